// A lock for a few hundred nanoseconds, or none at all where there is only one worker.
#pragma once

#include <sched.h>

#include <atomic>

namespace gpunvme::soft {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class SpinLock {
 public:
  bool try_lock() {
    // Acquire: what the previous holder did is visible to this one.
    return !held_.load(std::memory_order_relaxed) && !held_.exchange(true, std::memory_order_acquire);
  }
  void lock() {
    // The holder is through in less time than a system call takes, unless it has lost its core.
    for (int round = 0; !try_lock(); ++round) {
      if (round < kRoundsBeforeYield) {
        relax();
      } else {
        sched_yield();
      }
    }
  }
  void unlock() { held_.store(false, std::memory_order_release); }

 private:
  static constexpr int kRoundsBeforeYield = 32;

  std::atomic<bool> held_{false};
};

// Holds a SpinLock if `needed`.
class SpinGuard {
 public:
  SpinGuard(SpinLock& lock, bool needed) : lock_(needed ? &lock : nullptr) {
    if (lock_ != nullptr) lock_->lock();
  }
  ~SpinGuard() {
    if (lock_ != nullptr) lock_->unlock();
  }
  SpinGuard(const SpinGuard&) = delete;
  SpinGuard& operator=(const SpinGuard&) = delete;

 private:
  SpinLock* lock_;
};

}  // namespace gpunvme::soft
