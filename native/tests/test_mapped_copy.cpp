// Copying out of a mapping whose file is cut short under it: the copy ends, the process does not.
#include <csetjmp>
#include <csignal>
#include <thread>

#include "check.h"
#include "files.h"
#include "mapped_copy.h"

using namespace testing;
using gpunvme::contain_sigbus;
using gpunvme::copy_mapped;
using gpunvme::MappedRange;

namespace {

struct MappedFile {
  Directory directory;
  std::string path = directory / "file";
  std::uint64_t nbytes;
  std::uint8_t* data;

  explicit MappedFile(std::uint64_t size) : nbytes(size) {
    write_file(path, pattern(size, 1));
    const Descriptor fd(path);
    void* mapping = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    require(mapping != MAP_FAILED, "mmap");
    data = static_cast<std::uint8_t*>(mapping);
  }
  ~MappedFile() { munmap(data, nbytes); }
  void cut(std::uint64_t size) const { require(truncate(path.c_str(), static_cast<off_t>(size)) == 0, "truncate"); }
};

// A handler of the rest of the program's, and what it saw.
sigjmp_buf program_retreat;
volatile std::sig_atomic_t program_faults = 0;
void* volatile program_address = nullptr;
struct sigaction program_previous;

void program_handler(int, siginfo_t* info, void*) {
  program_faults = program_faults + 1;
  program_address = info->si_addr;
  siglongjmp(program_retreat, 1);
}

void program_old_style_handler(int) {
  program_faults = program_faults + 1;
  siglongjmp(program_retreat, 1);
}

// Hands everything on to the handler that was there when it was installed, as many libraries do.
void program_chaining_handler(int number, siginfo_t* info, void* context) {
  program_faults = program_faults + 1;
  if ((program_previous.sa_flags & SA_SIGINFO) != 0 && program_faults < 10) {
    program_previous.sa_sigaction(number, info, context);
  } else {
    siglongjmp(program_retreat, 1);
  }
}

void program_handing_on(int number, siginfo_t* info, void* context) {
  program_faults = program_faults + 1;
  program_previous.sa_sigaction(number, info, context);
}

void install(void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGBUS, &action, &program_previous);
}

// Touches memory as the rest of the program does; whether its own handler caught the fault.
bool program_faults_at(const std::uint8_t* address) {
  if (sigsetjmp(program_retreat, 1) != 0) return true;
  (void)*const_cast<const volatile std::uint8_t*>(address);
  return false;
}

// Handlers stay installed: each test is a process of its own.
void in_own_process(const std::function<void()>& function) { CHECK_EQ(check::in_child(function), 0); }

}  // namespace

TEST(copies_ranges_in_order) {
  const MappedFile file(kMiB);
  contain_sigbus();
  Memory memory(kMiB);
  std::vector<MappedRange> ranges;
  for (std::uint64_t at = 0; at < kMiB; at += 1000) {
    ranges.push_back({memory.data() + at, file.data + at, std::min<std::uint64_t>(1000, kMiB - at)});
  }
  CHECK_EQ(copy_mapped(ranges.data(), ranges.size()), ranges.size());
  CHECK_EQ(first_difference(memory.data(), file.data, kMiB), -1);
  CHECK_EQ(copy_mapped(ranges.data(), 0), 0u);
}

TEST(a_fault_ends_the_copy_again_and_again) {
  const MappedFile file(64 * kKiB);
  contain_sigbus();
  Memory memory(64 * kKiB);
  file.cut(32 * kKiB);
  const MappedRange ranges[] = {{memory.data(), file.data, 4096},
                                {memory.data() + 4096, file.data + 4096, 4096},
                                {memory.data() + 8192, file.data + 30 * kKiB, 4096},  // half of it is there
                                {memory.data(), file.data, 1}};
  for (int i = 0; i < 100; ++i) {
    contain_sigbus();
    CHECK_EQ(copy_mapped(ranges, 4), 2u);
    CHECK_EQ(copy_mapped(ranges, 2), 2u);
  }
  CHECK_EQ(first_difference(memory.data(), pattern(8192, 1).data(), 8192), -1);
}

// Ranges further on are looked at ahead of time, which may not be taken for touching them.
TEST(ranges_behind_one_that_faults_may_lie_anywhere) {
  const MappedFile file(64 * kKiB);
  contain_sigbus();
  Memory memory(64 * kKiB);
  file.cut(16 * kKiB);
  const auto* const nowhere = reinterpret_cast<const std::uint8_t*>(std::uintptr_t{1} << 46);
  const MappedRange ranges[] = {{memory.data(), file.data, 4096},
                                {memory.data() + 4096, file.data + 4096, 1},
                                {memory.data() + 8192, file.data + 32 * kKiB, 4096},
                                {memory.data(), nowhere, 4096},
                                {memory.data(), nullptr, 64}};
  for (int i = 0; i < 100; ++i) CHECK_EQ(copy_mapped(ranges, 5), 2u);
  CHECK_EQ(first_difference(memory.data(), pattern(4097, 1).data(), 4097), -1);
}

TEST(several_threads_fault_at_once) {
  const MappedFile whole(64 * kKiB);
  const MappedFile cut(64 * kKiB);
  cut.cut(0);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      Memory memory(64 * kKiB);
      for (int round = 0; round < check::rounds(300); ++round) {
        const MappedFile& file = (round + i) % 2 == 0 ? whole : cut;
        contain_sigbus();
        const MappedRange range{memory.data(), file.data, 64 * kKiB};
        if (copy_mapped(&range, 1) != (&file == &whole ? 1u : 0u)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(wrong.load(), 0);
}

TEST(faults_of_the_rest_of_the_program_go_to_its_handler) {
  in_own_process([] {
    const MappedFile ours(8192);
    const MappedFile theirs(8192);
    ours.cut(0);
    theirs.cut(0);
    install(program_handler);
    contain_sigbus();
    Memory memory(8192);
    const MappedRange range{memory.data(), ours.data, 8192};
    for (int i = 1; i < 20; ++i) {
      CHECK_EQ(copy_mapped(&range, 1), 0u);
      CHECK(program_faults_at(theirs.data + 4096));
      CHECK_EQ(static_cast<int>(program_faults), i);
      CHECK(program_address == theirs.data + 4096);
      // Outside a copy, even our file's memory is none of our business.
      CHECK(program_faults_at(ours.data));
      program_faults = i;
    }
  });
  in_own_process([] {
    const MappedFile theirs(8192);
    theirs.cut(0);
    std::signal(SIGBUS, program_old_style_handler);
    contain_sigbus();
    CHECK(program_faults_at(theirs.data));
    CHECK_EQ(static_cast<int>(program_faults), 1);
  });
}

TEST(a_handler_installed_after_ours_gets_its_faults_too) {
  in_own_process([] {
    const MappedFile ours(8192);
    const MappedFile theirs(8192);
    ours.cut(0);
    theirs.cut(0);
    contain_sigbus();
    install(program_handler);
    contain_sigbus();  // as before each copy: in front again
    Memory memory(8192);
    const MappedRange range{memory.data(), ours.data, 8192};
    CHECK_EQ(copy_mapped(&range, 1), 0u);
    CHECK_EQ(static_cast<int>(program_faults), 0);
    CHECK(program_faults_at(theirs.data));
    CHECK_EQ(static_cast<int>(program_faults), 1);
    CHECK_EQ(copy_mapped(&range, 1), 0u);
  });
}

TEST(a_fault_leaves_the_signal_mask_as_it_was) {
  in_own_process([] {
    const MappedFile file(8192);
    file.cut(0);
    contain_sigbus();
    // In front of ours: a handler that blocks SIGBUS and SIGUSR1 for as long as it runs, and hands on to ours.
    struct sigaction action {};
    action.sa_sigaction = program_handing_on;
    action.sa_flags = SA_SIGINFO;
    sigaddset(&action.sa_mask, SIGUSR1);
    sigaction(SIGBUS, &action, &program_previous);
    Memory memory(8192);
    const MappedRange range{memory.data(), file.data, 8192};
    for (int i = 1; i < 5; ++i) {
      CHECK_EQ(copy_mapped(&range, 1), 0u);  // a second fault would end the process if the signal were blocked
      CHECK_EQ(static_cast<int>(program_faults), i);
      sigset_t mask;
      pthread_sigmask(SIG_SETMASK, nullptr, &mask);
      CHECK_EQ(sigismember(&mask, SIGBUS), 0);
      CHECK_EQ(sigismember(&mask, SIGUSR1), 0);
    }
  });
}

TEST(a_fault_is_handed_on_once_though_everybody_hands_it_on) {
  // Ours, theirs on top (which calls ours), ours on top again. A fault that is nobody's goes once through each and
  // then ends the process as it would have without us.
  const int status = check::in_child([] {
    const MappedFile theirs(8192);
    theirs.cut(0);
    std::signal(SIGBUS, SIG_DFL);  // sanitizers have one of their own
    contain_sigbus();
    install(program_chaining_handler);
    contain_sigbus();
    if (program_faults_at(theirs.data)) check::fail(__FILE__, __LINE__, "it went round in circles");
  });
  CHECK(WIFSIGNALED(status));
  CHECK_EQ(WTERMSIG(status), SIGBUS);
}

TEST(without_another_handler_a_foreign_fault_ends_the_process) {
  const int status = check::in_child([] {
    const MappedFile theirs(8192);
    theirs.cut(0);
    std::signal(SIGBUS, SIG_DFL);
    contain_sigbus();
    (void)*const_cast<const volatile std::uint8_t*>(theirs.data);
  });
  CHECK(WIFSIGNALED(status));
  CHECK_EQ(WTERMSIG(status), SIGBUS);
}
