#include "held.h"

#include <algorithm>

namespace gpunvme::soft {

void Held::add(const HeldCompletion& completion) {
  const std::lock_guard lock(mutex_);
  held_.push_back(completion);
  count_.store(held_.size(), std::memory_order_relaxed);
}

template <typename Wanted>
std::vector<HeldCompletion> Held::take_if(Wanted wanted) {
  const std::lock_guard lock(mutex_);
  const auto rest =
      std::stable_partition(held_.begin(), held_.end(), [&](const HeldCompletion& one) { return !wanted(one); });
  std::vector<HeldCompletion> taken(rest, held_.end());
  held_.erase(rest, held_.end());
  count_.store(held_.size(), std::memory_order_relaxed);
  return taken;
}

std::vector<HeldCompletion> Held::take_due(Clock::time_point now) {
  return take_if([&](const HeldCompletion& one) {
    return one.due <= now || one.sq->cq->posted.load(std::memory_order_relaxed) >= one.after_posted;
  });
}

std::optional<HeldCompletion> Held::take(std::uint16_t sq_id, std::uint16_t cid) {
  const auto taken =
      take_if([&](const HeldCompletion& one) { return one.completion.sq_id == sq_id && one.completion.cid == cid; });
  if (taken.empty()) return std::nullopt;
  return taken.front();
}

std::vector<HeldCompletion> Held::take_all(const SubmissionQueue& sq) {
  return take_if([&](const HeldCompletion& one) { return one.sq == &sq; });
}

void Held::clear() {
  const std::lock_guard lock(mutex_);
  held_.clear();
  count_.store(0, std::memory_order_relaxed);
}

}  // namespace gpunvme::soft
