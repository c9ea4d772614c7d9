// Native code that runs without Python's global lock.
#pragma once

#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

namespace gpunvme {

// Without the lock for as long as this lives. When the interpreter has ended meanwhile, a daemon thread does not come
// back from taking it: up to Python 3.13 CPython ends the thread by unwinding its stack (pthread_exit), through
// destructors that must not throw, which would end the whole process by std::terminate. Such a thread stays here until
// the process is gone, as it does in Python 3.14.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();  // to leave this block without passing it on is an error
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace gpunvme
