// A stack, and a way to go on there and to come back: what a lane of an emulated warp is.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// Memory for stacks, given back to be used again. A page without access below each: running over the end is a SIGSEGV.
class Stack {
 public:
  static constexpr std::size_t kBytes = std::size_t{64} << 10;
  static std::byte* take();
  static void give_back(std::byte* stack);
};

// Not copied or moved: contexts point into it.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next enter() calls `function(argument)` on a stack of its own. It must not return: it leaves for good.
  void start(void (*function)(void*), void* argument);
  // From the scheduler: goes on in the fiber until it leaves.
  void enter();
  // From the fiber: goes on in the scheduler behind enter().
  void leave();
  bool holds(const void* address) const {
    const auto* const at = static_cast<const std::byte*>(address);
    return at >= stack_ && at < stack_ + Stack::kBytes;
  }

 private:
  std::byte* stack_ = nullptr;
#if defined(__x86_64__)
  void* inside_ = nullptr;  // stack pointers of who waits
  void* outside_ = nullptr;
#else
  ucontext_t inside_{};
  ucontext_t outside_{};
#endif
};

}  // namespace simt
