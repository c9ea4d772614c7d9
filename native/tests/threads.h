// Threads of a test.
#pragma once

#include <deque>
#include <exception>
#include <thread>
#include <vector>

namespace testing {

// Threads whose failed checks fail the test.
class Threads {
 public:
  ~Threads() { join(); }
  template <typename Function>
  void start(Function function) {
    std::exception_ptr& thrown = thrown_.emplace_back();
    threads_.emplace_back([&thrown, function] {
      try {
        function();
      } catch (...) {
        thrown = std::current_exception();
      }
    });
  }
  // Throws what the first of them threw.
  void finish() {
    join();
    for (const auto& thrown : thrown_) {
      if (thrown != nullptr) std::rethrow_exception(thrown);
    }
  }

 private:
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  std::deque<std::exception_ptr> thrown_;
  std::vector<std::thread> threads_;
};

}  // namespace testing
