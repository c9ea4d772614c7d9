// Threads that take turns: one runs at a time, and before every atomic access of a queue pair another may go on, chosen
// by a random number. So an interleaving that real threads meet once in a million is met often, and met again with the
// same seed. Include this before anything that includes gpunvme/atomics.h. Not for sanitizers.
#pragma once

namespace testing {
void before_access();
}
#define GPUNVME_BEFORE_ACCESS() ::testing::before_access()

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "check.h"

namespace testing {

class Fibers {
 public:
  explicit Fibers(std::uint64_t seed) : random_(seed) {}
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  void start(std::function<void()> function) {
    Fiber& fiber = *fibers_.emplace_back(std::make_unique<Fiber>());
    fiber.function = std::move(function);
    CHECK_EQ(getcontext(&fiber.context), 0);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Fibers::enter, 0);
  }

  // Until all have ended; throws what one of them threw.
  void run() {
    running() = this;
    std::vector<Fiber*> alive;
    for (const auto& fiber : fibers_) alive.push_back(fiber.get());
    for (int turns = 0; !alive.empty(); ++turns) {
      if (turns > kMostTurns) {
        running() = nullptr;
        check::fail(__FILE__, __LINE__, "nobody gets on any more");
      }
      const std::size_t which = random_.below(alive.size());
      current_ = alive[which];
      swapcontext(&scheduler_, &current_->context);
      if (!current_->ended) continue;
      alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(which));
      if (current_->thrown == nullptr) continue;
      running() = nullptr;
      std::rethrow_exception(current_->thrown);
    }
    running() = nullptr;
  }

  // Maybe somebody else's turn.
  static void step() {
    Fibers* const fibers = running();
    if (fibers == nullptr || fibers->random_.one_in(2)) return;
    swapcontext(&fibers->current_->context, &fibers->scheduler_);
  }

 private:
  static constexpr int kMostTurns = 200'000;
  struct Fiber {
    std::function<void()> function;
    std::vector<std::uint8_t> stack = std::vector<std::uint8_t>(128 << 10);
    ucontext_t context{};
    bool ended = false;
    std::exception_ptr thrown;
  };

  static Fibers*& running() {
    static Fibers* fibers = nullptr;
    return fibers;
  }
  static void enter() {
    Fiber& fiber = *running()->current_;
    try {
      fiber.function();
    } catch (...) {
      fiber.thrown = std::current_exception();
    }
    fiber.ended = true;
  }

  check::Random random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_{};
};

inline void before_access() { Fibers::step(); }

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kHasFibers = false;
#else
inline constexpr bool kHasFibers = true;
#endif

}  // namespace testing
