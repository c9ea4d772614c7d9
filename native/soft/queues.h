// Submission and completion queues as the controller sees them.
//
// All queues that there may be exist from the start and are switched on and off, so that no worker ever holds one that
// is gone. Each has a lock, which is taken only where there are several workers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "dma.h"
#include "doorbells.h"
#include "gpunvme/nvme_spec.h"
#include "spin_lock.h"

namespace gpunvme::soft {

using Clock = std::chrono::steady_clock;

// Where a queue's entries are. Guarded by the queue's lock.
class QueueMemory {
 public:
  void reset(std::uint64_t base, std::uint32_t entries, std::uint32_t entry_bytes);
  // Not contiguous: one address a page.
  void reset(std::vector<std::uint64_t> pages, std::uint64_t page_bytes, std::uint32_t entries,
             std::uint32_t entry_bytes);

  // Entry `index` in this process; null where it is a device's (dma.is_device()), or DMA was refused.
  std::byte* entry(Dma& dma, std::uint32_t index, bool write) {
    // The whole queue in one mapping, as it is as a rule: one addition.
    if (generation_ == dma.generation() && whole_ != nullptr) [[likely]]
      return whole_ + index * entry_bytes_;
    return find(dma, index, write);
  }

  // Its IOVA, and how many of `most` entries lie behind each other from there.
  std::uint64_t iova(std::uint32_t index) const;
  std::uint32_t run(std::uint32_t index, std::uint32_t most) const;

 private:
  std::byte* find(Dma& dma, std::uint32_t index, bool write);

  std::uint64_t base_ = 0;
  std::uint32_t entries_ = 0;
  std::uint32_t entry_bytes_ = 0;
  std::vector<std::uint64_t> pages_;
  std::uint64_t page_bytes_ = 0;
  std::byte* whole_ = nullptr;    // where entry 0 is, if all are in one mapping …
  std::uint64_t generation_ = 0;  // … by this snapshot of the IOVA table
};

// A completion before it has its place in a queue.
struct Completion {
  std::uint32_t dw0 = 0;
  std::uint16_t sq_id = 0;
  std::uint16_t cid = 0;
  std::uint16_t status = 0;  // 15 bits
};

// In both kinds of queues, what changes with every batch shares one cache line with the lock: whoever takes the lock
// has all of it. What stays as long as the queue lives is apart from it, and stays in every worker's cache.

struct CompletionQueue {
  alignas(64) SpinLock lock;
  // Written under the lock; read without it where a rough answer will do.
  std::atomic<bool> waiting{false};  // the backlog is not empty, or the queue is stalled
  std::atomic<bool> signal{false};   // an entry was posted since the last interrupt, where there are any
  bool phase = true;
  std::atomic<std::uint32_t> tail{0};                   // the next entry to write
  std::atomic<std::uint32_t> head{0};                   // what the host has said that it is done with
  std::uint32_t rejected_head = Doorbells::kUntouched;  // an invalid value that was reported already
  std::atomic<std::uint64_t> posted{0};

  alignas(64) std::atomic<bool> live{false};
  bool interrupts = false;
  std::uint16_t vector = 0;
  std::uint16_t id = 0;
  std::uint32_t entries = 0;
  QueueMemory memory;
  std::uint32_t* head_doorbell = nullptr;
  std::atomic<std::uint32_t> users{0};  // submission queues that complete here

  // Completions that have to wait: the queue is full, or stalled by a fault. Oldest first; bounded, because no command
  // is fetched whose completion would have to wait.
  std::deque<Completion> backlog;
  Clock::time_point stalled_until{};

  // Entries that could be posted now. One stays free: full and empty would look alike.
  std::uint32_t room() const {
    const std::uint32_t next = tail.load(std::memory_order_relaxed);
    const std::uint32_t first = head.load(std::memory_order_relaxed);
    return entries - 1 - ((next >= first ? next : next + entries) - first);
  }
  void clear();
};

struct SubmissionQueue {
  alignas(64) SpinLock lock;
  bool waits = false;  // the completion queue was full at the latest fetch
  // The next entry to fetch. Stored with release after entries were copied, loaded with acquire for a completion's
  // SQHD: whoever sees the completion may write to the entries before it.
  std::atomic<std::uint32_t> head{0};
  std::uint32_t tail = 0;                               // the latest valid value of the doorbell
  std::uint32_t rejected_tail = Doorbells::kUntouched;  // an invalid value that was reported already
  // Fetched and neither completed nor dropped; kept where it may be asked for.
  std::atomic<std::uint32_t> unfinished{0};

  alignas(64) std::atomic<bool> live{false};
  std::uint16_t id = 0;
  std::uint32_t entries = 0;
  QueueMemory memory;
  CompletionQueue* cq = nullptr;
  std::uint32_t* tail_doorbell = nullptr;

  void clear();
};

// Queue ids 0 (admin) to `queues`.
class Queues {
 public:
  Queues(unsigned queues, Doorbells& doorbells);

  std::uint32_t count() const { return count_; }  // I/O queues and the admin queue
  SubmissionQueue& sq(std::uint32_t id) { return sqs_[id]; }
  CompletionQueue& cq(std::uint32_t id) { return cqs_[id]; }

  // Switch queues on, under their locks, with doorbells at 0; and off again.
  void start_cq(CompletionQueue& cq, QueueMemory memory, std::uint32_t entries);
  void start_sq(SubmissionQueue& sq, CompletionQueue& cq, QueueMemory memory, std::uint32_t entries);
  void stop_cq(CompletionQueue& cq);
  void stop_sq(SubmissionQueue& sq);
  // Everything off. While no worker runs.
  void reset();

  bool any_io_queue() const;

  // Submission queues above this id do not exist; a hint for loops over them.
  std::uint32_t highest_sq() const { return highest_sq_.load(std::memory_order_relaxed); }

 private:
  void find_highest();

  std::uint32_t count_;
  Doorbells& doorbells_;
  std::unique_ptr<SubmissionQueue[]> sqs_;
  std::unique_ptr<CompletionQueue[]> cqs_;
  std::atomic<std::uint32_t> highest_sq_{0};
};

}  // namespace gpunvme::soft
