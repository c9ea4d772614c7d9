// Completions that a fault holds back.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "faults.h"
#include "queues.h"

namespace gpunvme::soft {

struct HeldCompletion {
  Completion completion;
  SubmissionQueue* sq = nullptr;
  Decision decision;  // what else happens to it when it is let go
  Clock::time_point due;
  std::uint64_t after_posted = ~std::uint64_t{0};  // or as soon as its completion queue has had this many entries
};

class Held {
 public:
  bool any() const { return count_.load(std::memory_order_relaxed) != 0; }
  void add(const HeldCompletion& completion);
  // Those that are due.
  std::vector<HeldCompletion> take_due(Clock::time_point now);
  // One that was asked for by Abort.
  std::optional<HeldCompletion> take(std::uint16_t sq_id, std::uint16_t cid);
  // All of a queue that is being deleted.
  std::vector<HeldCompletion> take_all(const SubmissionQueue& sq);
  void clear();

 private:
  template <typename Wanted>
  std::vector<HeldCompletion> take_if(Wanted wanted);

  std::mutex mutex_;
  std::vector<HeldCompletion> held_;
  std::atomic<std::size_t> count_{0};
};

}  // namespace gpunvme::soft
