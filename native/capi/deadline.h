// Until when a call may take.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "gpunvme/gpunvme.h"
#include "refusal.h"

namespace gpunvme::capi {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  // Throws Refusal (GPUNVME_EINVAL).
  explicit Deadline(std::int64_t timeout_ms) {
    if (timeout_ms == GPUNVME_FOREVER) return;
    if (timeout_ms < 0) {
      throw Refusal(GPUNVME_EINVAL, "a timeout of " + std::to_string(timeout_ms) + " ms: use GPUNVME_FOREVER for none");
    }
    constexpr std::int64_t kCentury = INT64_C(100) * 365 * 86'400'000;  // beyond it the clock would overflow
    if (timeout_ms < kCentury) at_ = Clock::now() + std::chrono::milliseconds(timeout_ms);
  }

  bool passed() const { return at_ && Clock::now() >= *at_; }
  // At most an hour: condition variables cannot wait for much longer.
  std::chrono::duration<double> nap() const {
    const std::chrono::duration<double> hour = std::chrono::hours(1);
    if (!at_) return hour;
    const std::chrono::duration<double> left = *at_ - Clock::now();
    return left < hour ? left : hour;
  }

 private:
  std::optional<Clock::time_point> at_;
};

}  // namespace gpunvme::capi
