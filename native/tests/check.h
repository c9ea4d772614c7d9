// What the engine's tests are written with. A test file includes this once and is then a program of its own:
//
//   TEST(reads_an_empty_file) { CHECK_EQ(...); }
//
// `test_job` runs all tests of test_job.cpp, `test_job tail` those whose names contain "tail". A failed check ends its
// test; a test that hangs ends the program. GPUNVME_TEST_LEVEL=long asks for more rounds, GPUNVME_TEST_SEED=n for
// other random numbers (the ones in use are printed where a test fails).
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace check {

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

template <typename T>
std::string text(const T& value) {
  std::ostringstream stream;
  if constexpr (std::is_enum_v<T>) {
    stream << static_cast<long long>(value);
  } else if constexpr (std::is_integral_v<T> && sizeof(T) == 1) {
    stream << static_cast<int>(value);
  } else {
    stream << value;
  }
  return stream.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failed(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

inline bool is_long() {
  const char* level = std::getenv("GPUNVME_TEST_LEVEL");
  return level != nullptr && std::string_view(level) == "long";
}

// Rounds of a loop: `few` as a rule, ten times as many at length; half of that under TSan, which is slow.
inline int rounds(int few) {
#ifdef __SANITIZE_THREAD__
  few = (few + 1) / 2;
#endif
  return is_long() ? few * 10 : few;
}

inline std::uint64_t seed() {
  static const std::uint64_t chosen = [] {
    const char* given = std::getenv("GPUNVME_TEST_SEED");
    return given != nullptr ? std::strtoull(given, nullptr, 10) : 20240229;
  }();
  return chosen;
}

class Random {
 public:
  explicit Random(std::uint64_t number) : generator_(seed() * 1000003 + number) {}
  std::uint64_t below(std::uint64_t limit) { return generator_() % limit; }
  std::uint64_t between(std::uint64_t least, std::uint64_t most) { return least + below(most - least + 1); }
  bool one_in(std::uint64_t n) { return below(n) == 0; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return *(values.begin() + below(values.size()));
  }

 private:
  std::mt19937_64 generator_;
};

// Nothing here takes more than seconds. A test that is not done by then hangs, even on a slow and busy machine.
inline constexpr unsigned kHangs = 240;

inline const char*& running() {
  static const char* name = "";
  return name;
}

inline void on_alarm(int) {
  // Only what a signal handler may call.
  const auto say = [](const char* words) { (void)!write(STDERR_FILENO, words, std::strlen(words)); };
  say("FAILED ");
  say(running());
  say(": it hangs\n");
  std::abort();
}

inline int run_one(const Test& test) {
  running() = test.name;
  alarm(check::is_long() ? 10 * kHangs : kHangs);
  int failed = 0;
  const auto start = std::chrono::steady_clock::now();
  try {
    test.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("ok      %-70s %6.2f s\n", test.name, seconds.count());
  } catch (const Skipped& skipped) {
    std::printf("SKIPPED %s: %s\n", test.name, skipped.what());
  } catch (const std::exception& exception) {
    std::printf("FAILED  %s (GPUNVME_TEST_SEED=%llu): %s\n", test.name, static_cast<unsigned long long>(seed()),
                exception.what());
    failed = 1;
  }
  alarm(0);
  std::fflush(stdout);
  return failed;
}

inline int run(int argc, char** argv) {
  std::signal(SIGALRM, on_alarm);
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const std::string_view wanted = argc > 1 ? argv[1] : "";
  int failed = 0;
  for (const Test& test : tests()) {
    if (std::string_view(test.name).find(wanted) != std::string_view::npos) failed += run_one(test);
  }
  return failed == 0 ? 0 : 1;
}

// Runs a function in a forked child; the wait status. The child ends without exit handlers: they are the parent's.
inline int in_child(const std::function<void()>& function) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    alarm(kHangs);  // the parent's is not inherited
    int failed = 1;
    try {
      function();
      failed = 0;
    } catch (const std::exception& exception) {
      std::fprintf(stderr, "in the child: %s\n", exception.what());
    }
    std::fflush(nullptr);
    _exit(failed);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

}  // namespace check

#define TEST(name)                                              \
  static void name();                                           \
  static const check::Registration name##_is_test{#name, name}; \
  static void name()

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not " #condition); \
  } while (false)

#define CHECK_EQ(left, right)                                                                              \
  do {                                                                                                     \
    const auto left_value = (left);                                                                        \
    const auto right_value = (right);                                                                      \
    if (!(left_value == right_value)) {                                                                    \
      check::fail(__FILE__, __LINE__,                                                                      \
                  #left " is " + check::text(left_value) + ", " #right " is " + check::text(right_value)); \
    }                                                                                                      \
  } while (false)

// The failure that `statement` throws.
#define CHECK_FAILS(statement)                                   \
  [&]() -> gpunvme::Failure {                                    \
    try {                                                        \
      (void)(statement);                                         \
    } catch (const gpunvme::Failure& failure) {                  \
      return failure;                                            \
    }                                                            \
    check::fail(__FILE__, __LINE__, #statement " did not fail"); \
  }()

#define SKIP(reason) throw check::Skipped(reason)

int main(int argc, char** argv) { return check::run(argc, argv); }
