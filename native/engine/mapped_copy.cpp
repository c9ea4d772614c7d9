#include "mapped_copy.h"

#include <atomic>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <mutex>

namespace gpunvme {
namespace {

// What this thread copies from at the moment; the handler looks at nothing else.
struct Guard {
  sigjmp_buf retreat;
  const std::uint8_t* volatile begin = nullptr;
  const std::uint8_t* volatile end = nullptr;
};

thread_local Guard guard;
struct sigaction previous_action;

void on_sigbus(int number, siginfo_t* info, void* context) {
  const auto* address = static_cast<const std::uint8_t*>(info->si_addr);
  if (guard.begin != nullptr && address >= guard.begin && address < guard.end) siglongjmp(guard.retreat, 1);
  if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(number, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(number);
  } else {
    // Not ours and nobody else's: returning runs the faulting instruction again, now under the default action.
    signal(SIGBUS, SIG_DFL);
  }
}

}  // namespace

void contain_sigbus() {
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  struct sigaction current {};
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_sigbus) return;
  previous_action = current;
  struct sigaction action {};
  action.sa_sigaction = on_sigbus;
  // SA_NODEFER: the handler leaves by siglongjmp, and the signal must not stay blocked behind it.
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGBUS, &action, nullptr);
}

std::size_t copy_mapped(const MappedRange* ranges, std::size_t count) {
  volatile std::size_t done = 0;  // volatile: read after siglongjmp
  if (sigsetjmp(guard.retreat, 0) == 0) {
    while (done < count) {
      const MappedRange& range = ranges[done];
      guard.end = range.from + range.nbytes;
      guard.begin = range.from;
      std::atomic_signal_fence(std::memory_order_seq_cst);  // the handler, on this thread, sees the guard set
      std::memcpy(range.to, range.from, range.nbytes);
      std::atomic_signal_fence(std::memory_order_seq_cst);
      done = done + 1;
    }
  }
  guard.begin = nullptr;
  return done;
}

}  // namespace gpunvme
