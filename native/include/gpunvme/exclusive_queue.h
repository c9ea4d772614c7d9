// A queue that one warp has for itself, for reads that wait for each other: a list that is followed, a tree that is
// searched. Where nobody else can come, a command takes the entry, one fence, the doorbell and the look for its
// completion; what lets any number of warps share a queue takes longer than that.
//
//   __global__ void follow(const gpunvme::GpuQueue* queues, …) {
//     gpunvme::ExclusiveQueue queue(queues[blockIdx.x]);  // one for each warp
//     while (…) {
//       const gpunvme::Outcome outcome = queue.read(lba, 1, node);
//       if (!outcome.ok()) …
//     }
//   }
//
// All 32 lanes of a warp make the object, call it with the same arguments, and are together where it ends. It takes the
// queue only if nobody has a command on it; `is_exclusive` tells. It loses it when a command is not answered in time,
// since whoever comes next has to look for that. Without the queue to itself everything works as with `warp_read` and
// `warp_write`. As long as it has the queue, there are no slots for others, who wait for one until their deadline.
//
// How it takes the queue: with all its slots, the reaper's lock and the ringer's turn. So nobody else looks at it
// differently than ever, and what a controller does wrong is noticed as ever.
#pragma once

#include "gpunvme/gpu_queue.h"
#include "gpunvme/warp_transfers.h"

namespace gpunvme {

class ExclusiveQueue {
 public:
  GPUNVME_DEVICE explicit ExclusiveQueue(const GpuQueue& queue) : shared_(queue), queue_(queue) {
    exclusive_ = take();
    if (exclusive_) prepare(0);
  }
  GPUNVME_DEVICE ~ExclusiveQueue() { leave(); }
  ExclusiveQueue(const ExclusiveQueue&) = delete;
  ExclusiveQueue& operator=(const ExclusiveQueue&) = delete;

  GPUNVME_DEVICE bool is_exclusive() const { return exclusive_; }

  // As warp_read: commands of at most `max_blocks`, one after the other.
  GPUNVME_DEVICE Outcome read(std::uint64_t lba, std::uint64_t blocks, void* memory) {
    return transfer(kRead, lba, blocks, static_cast<unsigned char*>(memory));
  }
  GPUNVME_DEVICE Outcome write(std::uint64_t lba, std::uint64_t blocks, const void* memory) {
    warp_.meet();  // whatever other lanes wrote there
    return transfer(kWrite, lba, blocks, static_cast<unsigned char*>(const_cast<void*>(memory)));
  }

  // Gives the queue to everybody again. Does nothing the second time.
  GPUNVME_DEVICE void leave() {
    if (!exclusive_) return;
    exclusive_ = false;
    const QueuePair& pair = queue_.pair;
    QueuePair::State& state = *pair.state_;
    if (warp_.leads()) {
      if (is_cq_doorbell_due_) ring_doorbell(pair.cq_doorbell_, next_cqe_ & ~QueuePair::kPhase);
      const std::uint64_t head = lost_ == QueuePair::kNoSlot ? ticket_ : ticket_ - 1;
      Near(state.reserved).store_relaxed(ticket_);
      Near(state.rung).store_relaxed(ticket_);
      Near(state.sq_head).store_relaxed(head);
      Near(state.head_seen).store_relaxed(head);
      Near(state.completed).add_relaxed(completed_);
      // Release: who reaps or rings next goes on from there.
      Near(state.ringers).subtract_release(1);
      Near(state.reaper).store_release(QueuePair::reaper_of(next_cqe_));
    }
    warp_.meet();
    const std::uint32_t words = QueuePair::words(pair.shape_.slots);
    give_back((words + warp_.count() - 1 - warp_.rank()) / warp_.count());
    warp_.meet();
  }

 private:
  // What the next command is made of, fetched while the last one is on its way.
  struct Ready {
    std::uint32_t slot;
    std::uint16_t cid;    // the leader's
    std::uint64_t first;  // addresses of the buffer's pages for the controller …
    std::uint64_t second;
    std::uint64_t list;  // … and of its PRP list
  };

  // The bits of all slots that a word of the free ones has.
  GPUNVME_DEVICE std::uint32_t all_of_word(std::uint32_t at) const {
    const std::uint32_t left = queue_.pair.shape_.slots - at * 32;
    return left >= 32 ? ~0u : (1u << left) - 1;
  }

  GPUNVME_DEVICE bool take() {
    QueuePair::State& state = *queue_.pair.state_;
    std::uint32_t taken = 0;
    bool have = warp_.all(take_words(taken));
    if (have) {
      have = false;
      if (warp_.leads()) {
        std::uint32_t nobody = 0;
        // Acquire: what was rung for. Who rings has a slot, so there is nobody.
        if (Near(state.ringers).compare_exchange_acquire(nobody, 1)) {
          have = take_reaper();
          if (!have) Near(state.ringers).subtract_release(1);
        }
        // Every command is done: all entries were written, rung for and fetched.
        if (have) ticket_ = Near(state.reserved).load_relaxed();
      }
      have = warp_.any(have);
      ticket_ = warp_.leaders(ticket_);
    }
    if (!have) give_back(taken);
    warp_.meet();  // what the leader acquired, all have
    return have;
  }

  // All of this lane's words of free slots, as far as all of them are free: `taken` words of them.
  GPUNVME_DEVICE bool take_words(std::uint32_t& taken) const {
    const QueuePair& pair = queue_.pair;
    for (std::uint32_t at = warp_.rank(); at < QueuePair::words(pair.shape_.slots); at += warp_.count()) {
      const Near free(pair.free_[at]);
      if (free.load_relaxed() != all_of_word(at)) return false;
      // Acquire: what the last users did with the slots comes before what we do.
      const std::uint32_t got = free.and_acquire(0);
      if (got != all_of_word(at)) {
        free.or_release(got);
        return false;
      }
      ++taken;
    }
    return true;
  }

  // Release: whoever claims a slot finds the queue as it was left, and the slot's buffer read.
  GPUNVME_DEVICE void give_back(std::uint32_t taken) const {
    std::uint32_t at = warp_.rank();
    for (; taken != 0; --taken, at += warp_.count()) {
      std::uint32_t free = all_of_word(at);
      if (lost_ != QueuePair::kNoSlot && lost_ / 32 == at) free &= ~(1u << lost_ % 32);
      Near(queue_.pair.free_[at]).or_release(free);
    }
  }

  // The reaper's lock, by the leader. Somebody may look who waits for a slot, but has no command that he could wait
  // for.
  GPUNVME_DEVICE bool take_reaper() {
    Near reaper(queue_.pair.state_->reaper);
    const std::uint64_t give_up = now_ns() + queue_.timeout_ns;
    do {
      std::uint64_t seen = reaper.load_relaxed();
      // Acquire: what the last reaper did.
      if ((seen & QueuePair::kReaping) == 0 && reaper.compare_exchange_acquire(seen, seen | QueuePair::kReaping)) {
        next_cqe_ = QueuePair::next_of(seen);
        return true;
      }
      pause();
    } while (now_ns() <= give_up);
    return false;
  }

  GPUNVME_DEVICE void prepare(std::uint32_t slot) {
    ready_.slot = slot;
    if (warp_.leads()) ready_.cid = queue_.pair.next_cid(slot);
    const std::uint64_t* const pages = queue_.pages + std::uint64_t{slot} * queue_.pages_per_slot;
    ready_.first = pages[0];
    ready_.second = queue_.pages_per_slot > 1 ? pages[1] : 0;
    ready_.list = queue_.lists[slot];
  }

  GPUNVME_DEVICE Outcome transfer(std::uint32_t opcode, std::uint64_t lba, std::uint64_t blocks,
                                  unsigned char* memory) {
    Outcome outcome{Fate::kDone, 0, 0};
    if (!in_range(queue_, lba, blocks)) return {Fate::kDone, kOutOfRange, 0};
    std::uint32_t tries = 0;
    while (blocks != 0) {
      if (!exclusive_) return shared_transfer(shared_, opcode, lba, blocks, memory);
      const auto some = static_cast<std::uint32_t>(blocks < queue_.max_blocks ? blocks : queue_.max_blocks);
      outcome = command(opcode, lba, some, memory);
      if (outcome.may_retry() && ++tries < kTries) continue;
      if (!outcome.ok()) return outcome;
      tries = 0;
      lba += some;
      blocks -= some;
      memory += std::uint64_t{some} * queue_.block_bytes;
    }
    return outcome;
  }

  // Called seldom: not part of what every read carries in registers.
  GPUNVME_DEVICE GPUNVME_NOINLINE static Outcome shared_transfer(const GpuQueue& queue, std::uint32_t opcode,
                                                                 std::uint64_t lba, std::uint64_t blocks,
                                                                 unsigned char* memory) {
#if defined(GPUNVME_WARPS)
    return detail::warp_transfer(queue, opcode, lba, blocks, memory, 0, 1);
#else
    return detail::transfer(queue, opcode, lba, blocks, memory);
#endif
  }

  GPUNVME_DEVICE Outcome command(std::uint32_t opcode, std::uint64_t lba, std::uint32_t blocks, unsigned char* memory) {
    const QueuePair& pair = queue_.pair;
    const Ready now = ready_;
    const std::uint64_t nbytes = std::uint64_t{blocks} * queue_.block_bytes;
    unsigned char* const buffer = queue_.data + now.slot * queue_.slot_bytes();
    if (opcode == kWrite) detail::copy(buffer, memory, nbytes, warp_.rank(), warp_.count());
    std::uint64_t prp2 = 0;
    if (nbytes > queue_.page_bytes) prp2 = nbytes > 2 * std::uint64_t{queue_.page_bytes} ? now.list : now.second;
    write_entry({opcode, queue_.nsid, now.first, prp2, lba, blocks - 1}, now.cid);
    warp_.meet();  // the entry and the data are written before the leader rings
    std::uint64_t answer = 0;
    const std::uint64_t ticket = ticket_++;
    if (warp_.leads()) {
      Near(pair.slots_[now.slot].ticket).store_relaxed(ticket);
      Near(pair.slots_[now.slot].word).store_relaxed(QueuePair::word_of(QueuePair::kPending, now.cid));
      Near(pair.written_[pair.position(ticket)]).store_relaxed(QueuePair::mark(ticket));
      ring_doorbell(pair.sq_doorbell_, pair.position(ticket_));
    }
    prepare(now.slot + 1 < pair.shape_.slots ? now.slot + 1 : 0);
    if (warp_.leads()) answer = wait(now);
    warp_.meet();  // what the leader acquired, all have
    answer = warp_.leaders(answer);
    const Outcome outcome{static_cast<Fate>(answer >> 32), static_cast<std::uint16_t>(answer),
                          static_cast<std::uint16_t>(answer >> 16)};
    if (outcome.fate == Fate::kDone) {
      if (opcode == kRead && outcome.status == 0) {
        detail::copy(memory, buffer, nbytes, warp_.rank(), warp_.count());
        warp_.meet();  // all have copied: the data is there for each of them
      }
    } else {
      lost_ = now.slot;
      leave();
    }
    return outcome;
  }

  // One entry of the SQ; lanes write parts of it, so that it crosses PCIe in one piece.
  GPUNVME_DEVICE void write_entry(const IoCommand& command, std::uint16_t cid) const {
    const QueuePair& pair = queue_.pair;
    nvme::Sqe* const entry = pair.sq_ + pair.position(ticket_);
#if defined(GPUNVME_WARPS)
    // The leader's part is the first one, and only that has the CID.
    if (warp_.rank() < 4) reinterpret_cast<ulonglong2*>(entry)[warp_.rank()] = command.part(warp_.rank(), cid);
#else
    *entry = command.entry(cid);
#endif
  }

  // Looks until the command has come to its end, which is returned in one word. By the leader.
  GPUNVME_DEVICE std::uint64_t wait(const Ready& now) {
    const QueuePair& pair = queue_.pair;
    const std::uint64_t deadline = now_ns() + queue_.timeout_ns;
    if (is_cq_doorbell_due_) {
      // While the command is on its way anyhow. After the entries were read: the controller may write them anew.
      is_cq_doorbell_due_ = false;
      ring_doorbell(pair.cq_doorbell_, next_cqe_ & ~QueuePair::kPhase);
    }
    Atomic<std::uint64_t>& word = pair.slots_[now.slot].word;
    for (const std::uint64_t rung = cycles(); cycles() - rung < delay_;) {
    }
    const std::uint64_t begun = cycles();
    for (bool is_first = true;; is_first = false) {
      const bool is_stopped = Near(pair.state_->stopped).load_relaxed() != 0;  // on its way together with the next
      // Acquire: the data that the command moved was written before the phase tag changed.
      const std::uint64_t tag = pair.cq_[next_cqe_ & ~QueuePair::kPhase].tag.load_acquire();
      if (QueuePair::has_phase(tag, next_cqe_)) {
        pass();
        if (static_cast<std::uint16_t>(tag >> 32) != now.cid) {
          count_stray(tag);
          continue;
        }
        // It was alone in the SQ: the head can be nowhere else.
        if ((tag & 0xffff) != pair.position(ticket_)) Near(pair.state_->bad_head).add_relaxed(1);
        ++completed_;
        adapt(is_first);
        Near(word).store_relaxed(QueuePair::word_of(QueuePair::kFree, now.cid));
        return answer(Fate::kDone, now.cid, static_cast<std::uint16_t>(tag >> 49));
      }
      if (is_first) look_ = static_cast<std::uint32_t>(cycles() - begun);
      if (is_stopped) return answer(Fate::kStopped, now.cid, 0);
      if (now_ns() <= deadline) continue;
      // Before the word, so that the count never falls below zero. leave() is their release.
      Near(pair.state_->stuck).add_relaxed(1);
      Near(word).store_relaxed(QueuePair::word_of(QueuePair::kQuarantined, now.cid));
      return answer(Fate::kTimeout, now.cid, 0);
    }
  }

  // A look takes as long as the way to the controller's memory and back, and one that comes a little too early costs a
  // second one. So the first look waits until shortly after commands were done of late. No longer than a look takes:
  // where commands take many looks, these are where they would have been.
  GPUNVME_DEVICE void adapt(bool was_first) {
    constexpr std::uint32_t kSooner = 16;
    constexpr std::uint32_t kLater = 6 * kSooner;  // one too late in seven
    if (was_first) {
      delay_ -= delay_ < kSooner ? delay_ : kSooner;
    } else {
      delay_ = delay_ + kLater < look_ ? delay_ + kLater : look_;
    }
  }

  GPUNVME_DEVICE static std::uint64_t answer(Fate fate, std::uint16_t cid, std::uint16_t status) {
    return static_cast<std::uint64_t>(fate) << 32 | std::uint32_t{cid} << 16 | status;
  }

  // One CQE was read. By the leader.
  GPUNVME_DEVICE void pass() {
    const WarpQueue pair(queue_.pair);
    next_cqe_ = pair.advanced(next_cqe_, 1);
    is_cq_doorbell_due_ = is_cq_doorbell_due_ || pair.is_doorbell_due(next_cqe_, 1);
  }

  // A CQE of no command that is on its way; as WarpQueue::finish counts it.
  GPUNVME_DEVICE void count_stray(std::uint64_t tag) const {
    const QueuePair& pair = queue_.pair;
    const auto cid = static_cast<std::uint16_t>(tag >> 32);
    const std::uint32_t number = pair.slot_of(cid);
    bool was_used =
        number < pair.shape_.slots && static_cast<std::uint32_t>(cid) >> pair.slot_bits_ != pair.last_generation();
    if (was_used) {
      const std::uint64_t word = Near(pair.slots_[number].word).load_relaxed();
      was_used = static_cast<std::uint32_t>(word >> QueuePair::kCidShift) >> pair.slot_bits_ != pair.last_generation();
    }
    Near(was_used ? pair.state_->late : pair.state_->unknown).add_relaxed(1);
  }

  const GpuQueue& shared_;
  const GpuQueue queue_;  // in registers: see WarpQueue
  const Warp warp_{};
  bool exclusive_ = false;
  std::uint64_t ticket_ = 0;  // of the next command
  Ready ready_{};
  std::uint32_t lost_ = QueuePair::kNoSlot;  // of a command whose end was not seen
  // The leader's.
  std::uint32_t next_cqe_ = 0;  // with its phase
  bool is_cq_doorbell_due_ = false;
  std::uint64_t completed_ = 0;
  std::uint32_t delay_ = 0;  // cycles from the doorbell to the first look
  std::uint32_t look_ = 0;   // cycles that a look takes
};

}  // namespace gpunvme
