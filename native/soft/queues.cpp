#include "queues.h"

#include <algorithm>
#include <utility>

namespace gpunvme::soft {

void QueueMemory::reset(std::uint64_t base, std::uint32_t entries, std::uint32_t entry_bytes) {
  *this = QueueMemory();
  base_ = base;
  entries_ = entries;
  entry_bytes_ = entry_bytes;
}

void QueueMemory::reset(std::vector<std::uint64_t> pages, std::uint64_t page_bytes, std::uint32_t entries,
                        std::uint32_t entry_bytes) {
  *this = QueueMemory();
  pages_ = std::move(pages);
  page_bytes_ = page_bytes;
  entries_ = entries;
  entry_bytes_ = entry_bytes;
}

std::byte* QueueMemory::find(Dma& dma, std::uint32_t index, bool write) {
  const std::uint64_t offset = std::uint64_t{index} * entry_bytes_;
  std::uint64_t available = 0;
  if (pages_.empty()) {
    // An access outside the mapping is the queue's first one or follows a change of the table: look at all of it.
    std::byte* const found = dma.at(base_ + offset, entry_bytes_, write, &available);
    if (found == nullptr) return nullptr;
    whole_ = dma.contains(base_, std::uint64_t{entries_} * entry_bytes_) ? found - offset : nullptr;
    generation_ = dma.generation();
    return found;
  }
  const std::uint64_t page = pages_[offset / page_bytes_];
  return dma.at(page + offset % page_bytes_, entry_bytes_, write, &available);
}

std::uint64_t QueueMemory::iova(std::uint32_t index) const {
  const std::uint64_t offset = std::uint64_t{index} * entry_bytes_;
  return pages_.empty() ? base_ + offset : pages_[offset / page_bytes_] + offset % page_bytes_;
}

std::uint32_t QueueMemory::run(std::uint32_t index, std::uint32_t most) const {
  const std::uint32_t left = std::min(most, entries_ - index);
  if (pages_.empty()) return left;
  const auto in_page = static_cast<std::uint32_t>(page_bytes_ / entry_bytes_);
  return std::min(left, in_page - index % in_page);
}

void CompletionQueue::clear() {
  live.store(false, std::memory_order_relaxed);
  entries = 0;
  memory = QueueMemory();
  tail.store(0, std::memory_order_relaxed);
  head.store(0, std::memory_order_relaxed);
  phase = true;
  rejected_head = Doorbells::kUntouched;
  backlog.clear();
  waiting.store(false, std::memory_order_relaxed);
  stalled_until = {};
  posted.store(0, std::memory_order_relaxed);
  interrupts = false;
  vector = 0;
  signal.store(false, std::memory_order_relaxed);
  users.store(0, std::memory_order_relaxed);
}

void SubmissionQueue::clear() {
  live.store(false, std::memory_order_relaxed);
  entries = 0;
  memory = QueueMemory();
  cq = nullptr;
  head.store(0, std::memory_order_relaxed);
  tail = 0;
  rejected_tail = Doorbells::kUntouched;
  waits = false;
  unfinished.store(0, std::memory_order_relaxed);
}

Queues::Queues(unsigned queues, Doorbells& doorbells)
    : count_(queues + 1),
      doorbells_(doorbells),
      sqs_(std::make_unique<SubmissionQueue[]>(count_)),
      cqs_(std::make_unique<CompletionQueue[]>(count_)) {
  for (std::uint32_t id = 0; id < count_; ++id) {
    sqs_[id].id = cqs_[id].id = static_cast<std::uint16_t>(id);
    sqs_[id].tail_doorbell = doorbells.sq_tail_address(id);
    cqs_[id].head_doorbell = doorbells.cq_head_address(id);
  }
}

void Queues::start_cq(CompletionQueue& cq, QueueMemory memory, std::uint32_t entries) {
  cq.clear();
  cq.memory = std::move(memory);
  cq.entries = entries;
  doorbells_.cq_head(cq.id).store(0, std::memory_order_relaxed);
  cq.live.store(true, std::memory_order_release);
}

void Queues::start_sq(SubmissionQueue& sq, CompletionQueue& cq, QueueMemory memory, std::uint32_t entries) {
  sq.clear();
  sq.memory = std::move(memory);
  sq.entries = entries;
  sq.cq = &cq;
  cq.users.fetch_add(1, std::memory_order_relaxed);
  doorbells_.sq_tail(sq.id).store(0, std::memory_order_relaxed);
  sq.live.store(true, std::memory_order_release);
  find_highest();
}

void Queues::stop_cq(CompletionQueue& cq) {
  cq.clear();
  doorbells_.cq_head(cq.id).store(Doorbells::kUntouched, std::memory_order_relaxed);
}

void Queues::stop_sq(SubmissionQueue& sq) {
  if (sq.cq != nullptr) sq.cq->users.fetch_sub(1, std::memory_order_relaxed);
  sq.clear();
  doorbells_.sq_tail(sq.id).store(Doorbells::kUntouched, std::memory_order_relaxed);
  find_highest();
}

void Queues::reset() {
  for (std::uint32_t id = 0; id < count_; ++id) {
    sqs_[id].clear();
    cqs_[id].clear();
  }
  for (std::uint32_t id = 0; id < doorbells_.ids(); ++id) {
    doorbells_.sq_tail(id).store(Doorbells::kUntouched, std::memory_order_relaxed);
    doorbells_.cq_head(id).store(Doorbells::kUntouched, std::memory_order_relaxed);
  }
  find_highest();
}

bool Queues::any_io_queue() const {
  for (std::uint32_t id = 1; id < count_; ++id) {
    if (sqs_[id].live.load(std::memory_order_relaxed) || cqs_[id].live.load(std::memory_order_relaxed)) return true;
  }
  return false;
}

void Queues::find_highest() {
  std::uint32_t highest = 0;
  for (std::uint32_t id = 1; id < count_; ++id) {
    if (sqs_[id].live.load(std::memory_order_relaxed)) highest = id;
  }
  highest_sq_.store(highest, std::memory_order_relaxed);
}

}  // namespace gpunvme::soft
