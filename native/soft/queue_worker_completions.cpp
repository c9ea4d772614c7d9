// Completion queues: posting, waiting for room, what faults do to completions, and invalid doorbells.
#include <sched.h>

#include <cstring>

#include "queue_worker.h"

namespace gpunvme::soft {
namespace {

// How long an entry that a fault tears apart, or posts with a stale phase tag, stays like that.
constexpr std::chrono::microseconds kTornFor{50};
// How long a completion that has to be overtaken waits for one that overtakes it.
constexpr std::chrono::milliseconds kReorderFor{2};

void pause_for(std::chrono::microseconds time) {
  const auto until = Clock::now() + time;
  while (Clock::now() < until) sched_yield();
}

void store_word(std::byte* entry, unsigned word, std::uint32_t value, std::memory_order order) {
  std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(entry + 4 * word)).store(value, order);
}

}  // namespace

void Worker::finish(SubmissionQueue& sq, const Completion& completion, const Decision& decision) {
  if (decision.any()) [[unlikely]] {
    finish_badly(sq, completion, decision);
  } else {
    post(sq, completion);
  }
}

void Worker::complete(SubmissionQueue& sq, const Completion& completion) {
  post(sq, completion);
  signal(*sq.cq);
}

void Worker::finish_badly(SubmissionQueue& sq, const Completion& completion, Decision decision) {
  CompletionQueue& cq = *sq.cq;
  if (decision.has(Fault::kDrop)) {
    device_.count_fault(Fault::kDrop);
    return;
  }
  const bool late = decision.has(Fault::kDelay) || decision.has(Fault::kSlow);
  if (late || decision.has(Fault::kReorder)) {
    HeldCompletion held{completion, &sq, decision, Clock::now() + decision.late};
    for (const Fault fault : {Fault::kDelay, Fault::kSlow, Fault::kReorder}) {
      if (decision.has(fault)) device_.count_fault(fault);
      held.decision.remove(fault);
    }
    if (!late) {
      held.due += kReorderFor;
      held.after_posted = cq.posted.load(std::memory_order_relaxed) + 1 + decision.hash % 8;
    }
    sq.unfinished.fetch_add(1, std::memory_order_relaxed);
    device_.held.add(held);
    return;
  }
  if (decision.has(Fault::kUnknownCid)) {
    device_.count_fault(Fault::kUnknownCid);
    // FFFFh is no command's; the other one is a neighbour's slot with a generation that is not in use.
    Completion stranger = completion;
    stranger.cid = decision.hash % 2 == 0 ? nvme::kCidNone : static_cast<std::uint16_t>(completion.cid ^ 0x8000);
    post(sq, stranger);
  }
  if (decision.has(Fault::kTornCqe) || decision.has(Fault::kStalePhase)) {
    if (!device_.serving.load(std::memory_order_relaxed)) return;
    const SpinGuard guard(cq.lock, several_);
    if (cq.waiting.load(std::memory_order_relaxed) || (cq.room() == 0 && !refresh_head_locked(cq))) {
      queue_up(cq, completion);
    } else {
      for (const Fault fault : {Fault::kTornCqe, Fault::kStalePhase}) {
        if (decision.has(fault)) device_.count_fault(fault);
      }
      write_entry(cq, completion, static_cast<std::uint16_t>(sq.head.load(std::memory_order_acquire)), decision);
    }
  } else {
    post(sq, completion);
  }
  if (decision.has(Fault::kDuplicateCqe)) {
    device_.count_fault(Fault::kDuplicateCqe);
    post(sq, completion);
  }
}

// Under the completion queue's lock.
inline void Worker::post_locked(SubmissionQueue& sq, const Completion& completion) {
  // Nothing completes after a fatal error or a reset.
  if (!device_.serving.load(std::memory_order_relaxed)) [[unlikely]]
    return;
  CompletionQueue& cq = *sq.cq;
  if (cq.waiting.load(std::memory_order_relaxed) || (cq.room() == 0 && !refresh_head_locked(cq))) [[unlikely]] {
    queue_up(cq, completion);
    return;
  }
  // Acquire: with the release of the worker that copied the entries before this head.
  write_entry(cq, completion, static_cast<std::uint16_t>(sq.head.load(std::memory_order_acquire)));
}

void Worker::post(SubmissionQueue& sq, const Completion& completion) {
  const SpinGuard guard(sq.cq->lock, several_);
  post_locked(sq, completion);
}

// Only where there are several workers. False: another one is posting there, and this was not to wait for it.
bool Worker::post_together(SubmissionQueue& sq, std::span<const Completion> completions, bool waits) {
  SpinLock& lock = sq.cq->lock;
  if (waits) {
    lock.lock();
  } else if (!lock.try_lock()) {
    return false;
  }
  for (const Completion& completion : completions) post_locked(sq, completion);
  lock.unlock();
  return true;
}

// Under the completion queue's lock, where there is room. False: DMA was refused, which is fatal.
bool Worker::write_entry(CompletionQueue& cq, const Completion& completion, std::uint16_t sq_head, Decision decision) {
  const std::uint32_t tail = cq.tail.load(std::memory_order_relaxed);
  std::byte* const entry = cq.memory.entry(dma_, tail, true);
  if (entry == nullptr && !dma_.is_device()) [[unlikely]] {
    device_.fail();
    return false;
  }
  const std::uint32_t word2 = sq_head | std::uint32_t{completion.sq_id} << 16;
  const auto word3 = [&](bool phase) {
    return completion.cid | std::uint32_t{completion.status} << 17 | std::uint32_t{phase} << 16;
  };
  const std::uint64_t result = completion.dw0;
  if (entry == nullptr) [[unlikely]] {
    if (!copy_entry(cq.memory.iova(tail), {completion.dw0, 0, word2, word3(cq.phase)}, decision)) {
      device_.fail();
      return false;
    }
  } else if (!decision.any()) [[likely]] {
    std::memcpy(entry, &result, sizeof result);
    // DW2 and DW3 in one store, the last one. Release: data and DW0 are visible to whoever sees the phase tag.
    std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(entry + 8))
        .store(word2 | std::uint64_t{word3(cq.phase)} << 32, std::memory_order_release);
  } else {
    std::memcpy(entry, &result, sizeof result);
    store_word(entry, 2, word2, std::memory_order_release);
    if (decision.has(Fault::kStalePhase)) store_word(entry, 3, word3(!cq.phase), std::memory_order_release);
    pause_for(kTornFor);
    store_word(entry, 3, word3(cq.phase), std::memory_order_release);
  }
  if (tail + 1 == cq.entries) {
    cq.tail.store(0, std::memory_order_relaxed);
    cq.phase = !cq.phase;
  } else {
    cq.tail.store(tail + 1, std::memory_order_relaxed);
  }
  cq.posted.store(cq.posted.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  if (cq.interrupts) cq.signal.store(true, std::memory_order_relaxed);
  return true;
}

// The same in memory of a device. The data of the command was copied before, and copies do not overtake each other: who
// sees the entry finds the data. One copy of 16 bytes, aligned to that, is taken to arrive as a whole.
bool Worker::copy_entry(std::uint64_t iova, const std::uint32_t (&words)[4], Decision decision) {
  if (!decision.any()) return dma_.write(iova, words, sizeof words);
  if (!dma_.write(iova, words, 12)) return false;
  const std::uint32_t stale = words[3] ^ 1u << 16;
  if (decision.has(Fault::kStalePhase) && !dma_.write(iova + 12, &stale, 4)) return false;
  pause_for(kTornFor);
  return dma_.write(iova + 12, &words[3], 4);
}

void Worker::queue_up(CompletionQueue& cq, const Completion& completion) {
  cq.backlog.push_back(completion);
  if (!cq.waiting.exchange(true, std::memory_order_relaxed)) {
    device_.waiting_queues.fetch_add(1, std::memory_order_relaxed);
  }
}

void Worker::signal(CompletionQueue& cq) {
  // Asked first: the flag is on a cache line that every posting takes away.
  if (!cq.interrupts) return;
  // Completions that others post after this exchange set the flag again, and signal themselves.
  if (cq.signal.load(std::memory_order_relaxed) && cq.signal.exchange(false, std::memory_order_acq_rel)) {
    device_.interrupts.signal(cq.vector);
  }
}

bool Worker::refresh_head(CompletionQueue& cq) {
  const SpinGuard guard(cq.lock, several_);
  return refresh_head_locked(cq);
}

// Takes over the head that the host has written; whether there is room. Under the completion queue's lock.
bool Worker::refresh_head_locked(CompletionQueue& cq) {
  // Acquire: the host has read the entries before this head; they may be written again.
  const auto value = std::atomic_ref<std::uint32_t>(*cq.head_doorbell).load(std::memory_order_acquire);
  const std::uint32_t head = cq.head.load(std::memory_order_relaxed);
  if (value == head) return cq.room() > 0;
  const std::uint32_t tail = cq.tail.load(std::memory_order_relaxed);
  const std::uint32_t taken = (value >= head ? value : value + cq.entries) - head;
  const std::uint32_t posted = (tail >= head ? tail : tail + cq.entries) - head;
  if (value < cq.entries && taken <= posted) {
    cq.head.store(value, std::memory_order_relaxed);
    cq.rejected_head = Doorbells::kUntouched;
  } else if (value != cq.rejected_head) {
    // Outside the queue, or past what was posted.
    cq.rejected_head = value;
    report_doorbell(nvme::kEventErrorInvalidDoorbellValue, cq.id);
  }
  return cq.room() > 0;
}

void Worker::drain_backlogs() {
  for (std::uint32_t id = 0; id < device_.queues.count(); ++id) {
    CompletionQueue& cq = device_.queues.cq(id);
    if (!cq.waiting.load(std::memory_order_relaxed)) continue;
    const SpinGuard guard(cq.lock, several_);
    if (!cq.waiting.load(std::memory_order_relaxed) || !device_.serving.load(std::memory_order_relaxed)) continue;
    if (cq.stalled_until != Clock::time_point{} && Clock::now() < cq.stalled_until) continue;
    cq.stalled_until = {};
    while (!cq.backlog.empty() && (cq.room() > 0 || refresh_head_locked(cq))) {
      const Completion completion = cq.backlog.front();
      cq.backlog.pop_front();
      const auto sq_head = device_.queues.sq(completion.sq_id).head.load(std::memory_order_acquire);
      if (!write_entry(cq, completion, static_cast<std::uint16_t>(sq_head))) return;
    }
    if (cq.backlog.empty()) {
      cq.waiting.store(false, std::memory_order_relaxed);
      device_.waiting_queues.fetch_sub(1, std::memory_order_relaxed);
    }
    signal(cq);
  }
}

void Worker::release_held() {
  for (const HeldCompletion& held : device_.held.take_due(Clock::now())) {
    finish(*held.sq, held.completion, held.decision);
    signal(*held.sq->cq);
    held.sq->unfinished.fetch_sub(1, std::memory_order_release);
  }
}

void Worker::reap(bool wait) {
  io_.ring().reap(finished_, wait);
  for (const FileRing::Finished& one : finished_) {
    SubmissionQueue& sq = *one.ticket.sq;
    finish(sq, {0, sq.id, one.ticket.cid, io_.finish(one)}, one.ticket.decision);
    signal(*sq.cq);
    sq.unfinished.fetch_sub(1, std::memory_order_release);
  }
}

// What the host wrote where it should not have.
void Worker::look_around(std::uint32_t id) {
  Doorbells& doorbells = device_.doorbells;
  if (id >= device_.queues.count()) {
    check_untouched(doorbells.sq_tail(id), id);
    check_untouched(doorbells.cq_head(id), id);
    return;
  }
  CompletionQueue& cq = device_.queues.cq(id);
  {
    const SpinGuard guard(cq.lock, several_);
    if (cq.live.load(std::memory_order_relaxed)) {
      refresh_head_locked(cq);
    } else {
      check_untouched(doorbells.cq_head(id), id);
    }
  }
  SubmissionQueue& sq = device_.queues.sq(id);
  if (several_ && !sq.lock.try_lock()) return;
  if (!sq.live.load(std::memory_order_relaxed) && sq.cq == nullptr) check_untouched(doorbells.sq_tail(id), id);
  if (several_) sq.lock.unlock();
}

void Worker::look_everywhere() {
  if (!device_.serving.load(std::memory_order_acquire)) return;
  for (std::uint32_t id = 0; id < device_.doorbells.ids(); ++id) look_around(id);
}

void Worker::check_untouched(std::atomic_ref<std::uint32_t> doorbell, std::uint32_t id) {
  std::uint32_t value = doorbell.load(std::memory_order_relaxed);
  if (value == Doorbells::kUntouched) return;
  // Another write may come in between: that one is seen next time.
  doorbell.compare_exchange_strong(value, Doorbells::kUntouched, std::memory_order_relaxed);
  report_doorbell(nvme::kEventErrorInvalidDoorbellRegister, id);
}

void Worker::report_doorbell(std::uint8_t information, std::uint32_t id) {
  device_.events.log_error(static_cast<std::uint16_t>(id), nvme::kCidNone, nvme::kStatusInvalidField, 0, 0);
  device_.events.raise(nvme::kEventError, information, nvme::kLogError);
}

}  // namespace gpunvme::soft
