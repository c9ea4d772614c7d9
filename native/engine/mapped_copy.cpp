#include "mapped_copy.h"

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <mutex>
#include <utility>

#include "prefetch.h"

namespace gpunvme {
namespace {

// What this thread copies from at the moment; the handler looks at nothing else.
struct Guard {
  sigjmp_buf retreat;
  const std::uint8_t* volatile begin = nullptr;
  const std::uint8_t* volatile end = nullptr;
};

thread_local Guard guard;

// What was installed when ours was put in front of it. A handler that was installed over ours mostly calls ours in
// turn; put in front of that, ours is another function with another predecessor, or a fault would go round in circles.
constexpr std::size_t kMostLevels = 8;
struct sigaction previous_actions[kMostLevels];

void hand_on(const struct sigaction& previous, int number, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else {
    // Not ours and nobody else's: returning runs the faulting instruction again, now under the default action.
    signal(SIGBUS, SIG_DFL);
  }
}

template <std::size_t kLevel>
void on_sigbus(int number, siginfo_t* info, void* context) {
  const auto* address = static_cast<const std::uint8_t*>(info->si_addr);
  if (guard.begin != nullptr && address >= guard.begin && address < guard.end) {
    // Whoever calls this may have blocked the signal for as long as it runs: the mask as it was before the fault.
    if (context != nullptr) pthread_sigmask(SIG_SETMASK, &static_cast<ucontext_t*>(context)->uc_sigmask, nullptr);
    siglongjmp(guard.retreat, 1);
  }
  hand_on(previous_actions[kLevel], number, info, context);
}

using Handler = void (*)(int, siginfo_t*, void*);

template <std::size_t... kLevels>
constexpr std::array<Handler, sizeof...(kLevels)> make_handlers(std::index_sequence<kLevels...>) {
  return {on_sigbus<kLevels>...};
}

constexpr std::array<Handler, kMostLevels> kHandlers = make_handlers(std::make_index_sequence<kMostLevels>());

// Whether ours is in front; `current` is what is.
bool is_contained(struct sigaction& current) {
  sigaction(SIGBUS, nullptr, &current);
  return (current.sa_flags & SA_SIGINFO) != 0 &&
         std::find(kHandlers.begin(), kHandlers.end(), current.sa_sigaction) != kHandlers.end();
}

}  // namespace

void contain_sigbus() {
  struct sigaction current {};
  if (is_contained(current)) return;  // without the lock: a forked child may find it held for ever
  static std::mutex mutex;
  static std::size_t levels = 0;
  std::lock_guard lock(mutex);
  if (is_contained(current)) return;
  std::size_t level = 0;
  while (level < levels && previous_actions[level].sa_sigaction != current.sa_sigaction) ++level;
  if (level == kMostLevels) return;  // nobody installs that many; the last one keeps its place
  previous_actions[level] = current;
  levels = std::max(levels, level + 1);
  struct sigaction action {};
  action.sa_sigaction = kHandlers[level];
  // SA_NODEFER: a predecessor that leaves by siglongjmp too may count on the signal not being blocked.
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGBUS, &action, nullptr);
}

std::size_t copy_mapped(const MappedRange* ranges, std::size_t count) {
  volatile std::size_t done = 0;  // volatile: read after siglongjmp
  // Without the signal mask, which would cost a system call: the handler puts it back.
  if (sigsetjmp(guard.retreat, 0) == 0) {
    while (done < count) {
      const MappedRange& range = ranges[done];
      if (done + kPrefetchAhead < count) {
        const MappedRange& next = ranges[done + kPrefetchAhead];
        prefetch(next.from, next.nbytes);
      }
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
