// One submission queue and its completion queue, driven by many threads at once: of the host, or of a GPU.
//
// A command takes these steps. `claim` gives it a slot, `submit` a place in the submission queue (SQ) and a CID,
// `ring` tells the controller. `reap`, called by whoever waits, reads new completion queue entries (CQEs) and finishes
// the slots that they name; `poll` takes a finished command's status and gives its slot back. No step waits for another
// thread, so that any thread may stop at any point for long: a GPU gives no promise that it will not.
//
// - Completions are matched by CID, and a CID carries a generation that changes whenever its slot is used again: a late
//   or second completion is counted and finishes nothing.
// - A command that is given up (`quarantine`) keeps its slot, because the controller may still write its memory. The
// slot
//   comes back when its completion does, or never.
// - The controller shares four things with us: SQ, CQ and two doorbells. None of them is ever the object of a
//   read-modify-write, which PCIe does not carry. All the rest is in memory of the submitters' choice.
//
// NVM Express Base Specification 2.0, 3.3 (queues), 4.2 (entries). C++17, also for nvcc, NVRTC and ThreadSanitizer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpunvme/atomics.h"
#include "gpunvme/nvme_spec.h"

namespace gpunvme {

// Tells the controller by storing `value` in a doorbell register, after everything that this thread has written or
// knows to be written. The one function that differs from target to target.
GPUNVME_HD inline void ring_doorbell(Atomic<std::uint32_t>* doorbell, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  // An MMIO store is relaxed: the fence orders queue entries in GPU or host memory before it, also as PCIe sees them.
  asm volatile("fence.acq_rel.sys; st.relaxed.mmio.sys.u32 [%0], %1;" ::"l"(doorbell), "r"(value) : "memory");
#elif defined(__aarch64__)
  // A release store orders memory for other CPUs; the controller is further away (outer shareable).
  asm volatile("dmb oshst" ::: "memory");
  doorbell->store_release(value);
#else
  // x86: stores to device memory stay behind earlier ones to ordinary memory, so the compiler's order is all it takes.
  doorbell->store_release(value);
#endif
}

// A completion queue entry as it is read: `tag` (DW2 and DW3: SQ head, CID, phase, status) in one access, then the
// rest.
struct CqeWords {
  std::uint64_t result;
  Atomic<std::uint64_t> tag;
};
static_assert(sizeof(CqeWords) == sizeof(nvme::Cqe));

struct Completion {
  std::uint16_t status;  // 15 bits: SC 7:0, SCT 10:8, CRD 12:11, More 13, DNR 14
  std::uint32_t result;  // DW0
};

enum class Submitted { kOk, kFull, kStopped };
enum class Waited { kDone, kTimeout, kStopped };

class WarpQueue;       // in warp_queue.h: the same for the lanes of a warp together
class ExclusiveQueue;  // in exclusive_queue.h: for one warp alone

class QueuePair {
 public:
  static constexpr std::uint32_t kNoSlot = 0xffffffff;
  // Leaves a CID at least 4 bits of generation.
  static constexpr std::uint32_t kMostSlots = 4096;
  // Entries that are read for one CQ head doorbell: a warp's worth.
  static constexpr std::uint32_t kBatch = 32;

  // One command in flight.
  struct alignas(32) Slot {
    Atomic<std::uint64_t> word;    // state, status << 16, CID << 32
    Atomic<std::uint64_t> ticket;  // which entry of the SQ, counted from the beginning
    Atomic<std::uint32_t> result;
  };

  struct State {
    // Written by submitters.
    alignas(kApart) Atomic<std::uint64_t> reserved;  // SQ entries given out: the ticket of the next one
    Atomic<std::uint64_t> head_seen;                 // a copy of sq_head that saves looking at the reaper's line
    Atomic<std::uint32_t> next_slot;                 // where to look for a free one
    // Written by whoever rings.
    alignas(kApart) Atomic<std::uint32_t> ringers;
    Atomic<std::uint64_t> rung;  // SQ entries that the controller was told of
    // Written by the reaper.
    alignas(kApart) Atomic<std::uint64_t> reaper;  // a `reaper_of`: one access locks it, and tells where to go on
    Atomic<std::uint64_t> sq_head;                 // SQ entries that the controller has fetched
    Atomic<std::uint64_t> completed;
    Atomic<std::uint64_t> unknown;   // CQEs with a CID that was never given out
    Atomic<std::uint64_t> late;      // CQEs of commands that were finished or given up before
    Atomic<std::uint64_t> bad_head;  // CQEs with an SQ head that cannot be
    // Seldom written.
    alignas(kApart) Atomic<std::uint32_t> stopped;
    Atomic<std::uint32_t> stuck;  // slots in quarantine
  };

  // --- what the queue is made of

  struct Shape {
    std::uint32_t sq_entries;  // 2 .. 65536, any number
    std::uint32_t cq_entries;
    std::uint32_t slots;  // commands in flight at most, 1 .. kMostSlots
  };

  // Bytes of the memory that `initialise` wants, aligned to kApart.
  GPUNVME_HD static constexpr std::size_t memory_bytes(const Shape& shape) {
    return sizeof(State) + round_up(shape.slots * sizeof(Slot)) + round_up(words(shape.slots) * 4) +
           round_up(shape.sq_entries * 4);
  }

  // `sq` and `cq` are zeroed. `memory` is shared by all submitters; a copy of this object may be used by any of them.
  GPUNVME_HD void initialise(const Shape& shape, void* sq, void* cq, void* sq_doorbell, void* cq_doorbell,
                             void* memory) {
    shape_ = shape;
    sq_ = static_cast<nvme::Sqe*>(sq);
    cq_ = static_cast<CqeWords*>(cq);
    sq_doorbell_ = static_cast<Atomic<std::uint32_t>*>(sq_doorbell);
    cq_doorbell_ = static_cast<Atomic<std::uint32_t>*>(cq_doorbell);
    auto* at = static_cast<unsigned char*>(memory);
    for (std::size_t i = 0; i < memory_bytes(shape); ++i) at[i] = 0;
    state_ = reinterpret_cast<State*>(at);
    slots_ = reinterpret_cast<Slot*>(at += sizeof(State));
    free_ = reinterpret_cast<Atomic<std::uint32_t>*>(at += round_up(shape.slots * sizeof(Slot)));
    written_ = reinterpret_cast<Atomic<std::uint32_t>*>(at += round_up(words(shape.slots) * 4));
    sq_mask_ = (shape.sq_entries & (shape.sq_entries - 1)) == 0 ? shape.sq_entries - 1 : 0;
    slot_bits_ = 1;
    while ((1u << slot_bits_) < shape.slots) ++slot_bits_;
    for (std::uint32_t slot = 0; slot < shape.slots; ++slot) {
      // The last generation, which is never given out: the first command gets the one after it.
      slots_[slot].word.store_relaxed(
          word_of(kFree, static_cast<std::uint16_t>(slot | last_generation() << slot_bits_)));
      free_[slot / 32].store_relaxed(free_[slot / 32].load_relaxed() | 1u << slot % 32);
    }
    state_->reaper.store_release(reaper_of(kPhase));
  }

  GPUNVME_HD const Shape& shape() const { return shape_; }
  GPUNVME_HD State& state() const { return *state_; }
  GPUNVME_HD std::uint32_t slot_of(std::uint16_t cid) const { return cid & ((1u << slot_bits_) - 1); }

  // --- submitting

  // A slot for one more command, or kNoSlot. Goes round, so that a slot's generations last as long as they can.
  GPUNVME_HD std::uint32_t claim() const {
    const std::uint32_t count = words(shape_.slots);
    const std::uint32_t start = state_->next_slot.load_relaxed();
    std::uint32_t at = start / 32;
    std::uint32_t mask = ~0u << start % 32;
    for (std::uint32_t looked = 0; looked <= count; ++looked) {
      while (const std::uint32_t bits = free_[at].load_relaxed() & mask) {
        const std::uint32_t bit = bits & (~bits + 1);
        // Acquire: what the last user did with the slot comes before what we do.
        if ((free_[at].fetch_and(~bit) & bit) == 0) continue;
        const std::uint32_t slot = at * 32 + lowest_bit(bit);
        state_->next_slot.store_relaxed(slot + 1 < shape_.slots ? slot + 1 : 0);
        return slot;
      }
      mask = ~0u;
      at = at + 1 < count ? at + 1 : 0;
    }
    return kNoSlot;
  }

  // Gives back a slot that was claimed and not submitted, or whose completion was reaped.
  GPUNVME_HD void release(std::uint32_t slot) const {
    Atomic<std::uint64_t>& word = slots_[slot].word;
    // Release: whoever sees a quarantine ended may use the command's memory again.
    word.store_release((word.load_relaxed() & kCidMask) | kFree);
    free_[slot / 32].fetch_or(1u << slot % 32);
  }

  // Puts a command into the SQ and its CID into `sqe`. Unless it says kOk, nothing happened and the slot is still the
  // caller's. The controller learns of the command when this thread or another calls ring().
  GPUNVME_HD Submitted submit(std::uint32_t slot, nvme::Sqe& sqe) const {
    if (stopped()) return Submitted::kStopped;
    std::uint64_t ticket = 0;
    if (!reserve(ticket)) return Submitted::kFull;
    sqe.cid = next_cid(slot);
    slots_[slot].ticket.store_relaxed(ticket);
    slots_[slot].word.store_relaxed(word_of(kPending, sqe.cid));
    const std::uint32_t at = position(ticket);
    sq_[at] = sqe;
    // Release: whoever rings for this entry sees it written, and the slot pending.
    written_[at].store_release(mark(ticket));
    return Submitted::kOk;
  }

  // Rings for everything that was submitted before, by any thread. Whoever comes first does it for those who come
  // meanwhile: the doorbell has one writer at a time and never goes backwards.
  GPUNVME_HD void ring() const {
    if (state_->ringers.fetch_add(1) != 0) return;
    std::uint32_t served = 1;
    for (;;) {
      ring_for_written();
      // Acquire: entries of those who came meanwhile are seen in the next round. Release: so is `rung`.
      const std::uint32_t came = state_->ringers.fetch_sub(served);
      if (came == served) return;
      served = came - served;
    }
  }

  // --- completing

  // Reads up to kBatch new CQEs, unless another thread is about it; returns how many. For each command that is done by
  // one of them, calls finished(slot, status): the slot is then anybody's who waits for it.
  template <typename Finished>
  GPUNVME_HD std::uint32_t reap(const Finished& finished) const {
    // Looking costs no read-modify-write: waiters do it all the time.
    std::uint64_t reaper = state_->reaper.load_relaxed();
    if ((reaper & kReaping) != 0 || !is_new(next_of(reaper))) return 0;
    // Acquire: what the last reaper did. It may just have been here: then there is nothing new for this one.
    if (!state_->reaper.compare_exchange(reaper, reaper | kReaping)) return 0;
    std::uint32_t next = next_of(reaper);
    std::uint32_t count = 0;
    while (count < kBatch) {
      const CqeWords& entry = cq_[next & ~kPhase];
      // Acquire: DW0, and the data that the command moved, were written before the phase tag changed.
      const std::uint64_t tag = entry.tag.load_acquire();
      if (!has_phase(tag, next)) break;
      finish(tag, static_cast<std::uint32_t>(entry.result), finished);
      next = (next & ~kPhase) + 1 < shape_.cq_entries ? next + 1 : (next & kPhase) ^ kPhase;
      ++count;
    }
    // After the entries were read: the controller may now write them anew.
    if (count != 0) ring_doorbell(cq_doorbell_, next & ~kPhase);
    // Release: the next reaper rings after this one.
    state_->reaper.store_release(reaper_of(next));
    return count;
  }

  // True if the command is done: its completion, and the slot is given back.
  GPUNVME_HD bool poll(std::uint16_t cid, Completion& completion) const {
    Slot& slot = slots_[slot_of(cid)];
    // Acquire: the result, and the data, were written before.
    const std::uint64_t word = slot.word.load_acquire();
    if ((word & (kCidMask | kStateMask)) != word_of(kDone, cid)) return false;
    completion.status = static_cast<std::uint16_t>(word >> kStatusShift);
    completion.result = slot.result.load_relaxed();
    release(slot_of(cid));
    return true;
  }

  // Gives a command up. False if it is done after all: exactly one of its completion and this wins.
  GPUNVME_HD bool quarantine(std::uint16_t cid) const {
    std::uint64_t expected = word_of(kPending, cid);
    // Before, so that the count never falls below zero.
    state_->stuck.fetch_add(1);
    if (slots_[slot_of(cid)].word.compare_exchange(expected, word_of(kQuarantined, cid))) return true;
    state_->stuck.fetch_sub(1);
    return false;
  }

  GPUNVME_HD bool is_quarantined(std::uint16_t cid) const {
    return slots_[slot_of(cid)].word.load_acquire() == word_of(kQuarantined, cid);
  }

  // Waits until the command is done, `expired()` says that it is too late, or the queue is stopped. Reaps meanwhile.
  // After a timeout the command is in quarantine; of a stopped queue nothing is known.
  template <typename Expired>
  GPUNVME_HD Waited wait(std::uint16_t cid, Completion& completion, const Expired& expired) const {
    const auto nobody = [](std::uint32_t, std::uint16_t) {};
    for (;;) {
      if (poll(cid, completion)) return Waited::kDone;
      if (stopped()) return Waited::kStopped;
      if (reap(nobody) != 0 || !expired()) continue;
      if (quarantine(cid)) return Waited::kTimeout;
    }
  }

  // --- ending

  // Makes every submission and wait return at once. Those that are inside may still touch queue memory.
  GPUNVME_HD void stop() const { state_->stopped.store_release(1); }
  GPUNVME_HD bool stopped() const { return state_->stopped.load_acquire() != 0; }

  // Commands in flight, and those in quarantine, each as it was at some time during the call.
  template <typename Each>
  GPUNVME_HD void for_each_in_flight(const Each& each) const {
    for (std::uint32_t slot = 0; slot < shape_.slots; ++slot) {
      const std::uint64_t word = slots_[slot].word.load_acquire();
      const auto cid = static_cast<std::uint16_t>(word >> kCidShift);
      if ((word & kStateMask) == kPending) each(cid, false);
      if ((word & kStateMask) == kQuarantined) each(cid, true);
    }
  }

 private:
  friend class WarpQueue;
  friend class ExclusiveQueue;

  static constexpr std::uint64_t kFree = 0;
  static constexpr std::uint64_t kPending = 1;
  static constexpr std::uint64_t kDone = 2;
  static constexpr std::uint64_t kQuarantined = 3;
  static constexpr std::uint64_t kStateMask = 0xffff;
  static constexpr int kStatusShift = 16;
  static constexpr int kCidShift = 32;
  static constexpr std::uint64_t kCidMask = std::uint64_t{0xffff} << kCidShift;
  static constexpr std::uint32_t kPhase = 1u << 31;
  static constexpr std::uint64_t kReaping = 1;

  GPUNVME_HD static constexpr std::size_t round_up(std::size_t nbytes) {
    return (nbytes + kApart - 1) / kApart * kApart;
  }
  GPUNVME_HD static constexpr std::uint32_t words(std::uint32_t slots) { return (slots + 31) / 32; }
  GPUNVME_HD static constexpr std::uint64_t word_of(std::uint64_t state, std::uint16_t cid) {
    return state | std::uint64_t{cid} << kCidShift;
  }
  // Which CQ entry is to be read next, with the phase that makes it new; `| kReaping` while somebody is about it.
  GPUNVME_HD static constexpr std::uint64_t reaper_of(std::uint32_t next) { return std::uint64_t{next} << 32; }
  GPUNVME_HD static constexpr std::uint32_t next_of(std::uint64_t reaper) {
    return static_cast<std::uint32_t>(reaper >> 32);
  }
  GPUNVME_HD std::uint32_t last_generation() const { return (1u << (16 - slot_bits_)) - 1; }

  // The CID of a slot's next command. The last generation is left out, and with it 0xFFFF, which names no command.
  GPUNVME_HD std::uint16_t next_cid(std::uint32_t slot) const {
    const auto cid = static_cast<std::uint16_t>(slots_[slot].word.load_relaxed() >> kCidShift);
    const std::uint32_t generation = (static_cast<std::uint32_t>(cid) >> slot_bits_) + 1;
    return static_cast<std::uint16_t>(slot | (generation < last_generation() ? generation : 0) << slot_bits_);
  }

  GPUNVME_HD std::uint32_t position(std::uint64_t ticket) const {
    return static_cast<std::uint32_t>(sq_mask_ != 0 ? ticket & sq_mask_ : ticket % shape_.sq_entries);
  }
  // What tells a written entry from one of an earlier round.
  GPUNVME_HD static std::uint32_t mark(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket) + 1; }

  // The next place in the SQ. False if it is full: one entry stays empty, or a full queue would look like an empty one.
  GPUNVME_HD bool reserve(std::uint64_t& ticket) const {
    ticket = state_->reserved.load_relaxed();
    do {
      // Acquire: the controller has read the entry that will be overwritten.
      if (is_full(ticket, state_->head_seen.load_acquire())) {
        const std::uint64_t head = state_->sq_head.load_acquire();
        state_->head_seen.store_release(head);
        if (is_full(ticket, head)) return false;
      }
    } while (!state_->reserved.compare_exchange(ticket, ticket + 1));
    return true;
  }
  // A ticket that is behind the head is an old one, which compare_exchange refuses.
  GPUNVME_HD bool is_full(std::uint64_t ticket, std::uint64_t head) const {
    return static_cast<std::int64_t>(ticket - head) >= static_cast<std::int64_t>(shape_.sq_entries) - 1;
  }

  // As far as all entries are written, whoever wrote them.
  GPUNVME_HD void ring_for_written() const {
    const std::uint64_t rung = state_->rung.load_relaxed();
    std::uint64_t ticket = rung;
    // Acquire: the entry is written.
    while (written_[position(ticket)].load_acquire() == mark(ticket)) ++ticket;
    if (ticket == rung) return;
    // Before the doorbell: a completion of these entries must find them told.
    state_->rung.store_relaxed(ticket);
    ring_doorbell(sq_doorbell_, position(ticket));
  }

  GPUNVME_HD bool is_new(std::uint32_t next) const { return has_phase(cq_[next & ~kPhase].tag.load_relaxed(), next); }
  GPUNVME_HD static bool has_phase(std::uint64_t tag, std::uint32_t next) {
    return (tag >> 48 & 1) == (next & kPhase) >> 31;
  }

  // One CQE. Called by the reaper only.
  template <typename Finished>
  GPUNVME_HD void finish(std::uint64_t tag, std::uint32_t result, const Finished& finished) const {
    const auto cid = static_cast<std::uint16_t>(tag >> 32);
    const auto status = static_cast<std::uint16_t>(tag >> 49);
    const std::uint32_t number = slot_of(cid);
    if (number >= shape_.slots || static_cast<std::uint32_t>(cid) >> slot_bits_ == last_generation()) {
      return increment(state_->unknown);
    }
    Slot& slot = slots_[number];
    std::uint64_t seen = slot.word.load_relaxed();
    if (seen == word_of(kPending, cid)) {
      advance_head(slot.ticket.load_relaxed(), tag);
      slot.result.store_relaxed(result);
      // Release: whoever sees the slot done sees the result, the data, and the head. Fails if the command has just been
      // given up.
      if (slot.word.compare_exchange(seen, word_of(kDone, cid) | std::uint64_t{status} << kStatusShift)) {
        increment(state_->completed);
        return finished(number, status);
      }
    }
    if (seen == word_of(kQuarantined, cid)) {
      // Given up, but now the controller is finished with it.
      advance_head(slot.ticket.load_relaxed(), tag);
      increment(state_->late);
      release(number);
      state_->stuck.fetch_sub(1);
      return;
    }
    const bool used = static_cast<std::uint32_t>(seen >> kCidShift) >> slot_bits_ != last_generation();
    increment(used ? state_->late : state_->unknown);
  }

  // The controller fetches in order, so it has fetched the completed command's own entry (`ticket`) and whatever lies
  // between that and the SQ head that it names. Another thread of it may have named a later one already.
  GPUNVME_HD void advance_head(std::uint64_t ticket, std::uint64_t tag) const {
    const auto named = static_cast<std::uint32_t>(tag & 0xffff);
    const std::uint32_t own = position(ticket + 1);
    std::uint64_t head = ticket + 1;
    if (named < shape_.sq_entries) head += named >= own ? named - own : named + shape_.sq_entries - own;
    // No further than what it was told of.
    if (named >= shape_.sq_entries || head > state_->rung.load_relaxed()) {
      increment(state_->bad_head);
      head = ticket + 1;
    }
    // Release: the entries before it were read, and may be written.
    if (head > state_->sq_head.load_relaxed()) state_->sq_head.store_release(head);
  }

  GPUNVME_HD static void increment(Atomic<std::uint64_t>& counter) {
    counter.store_relaxed(counter.load_relaxed() + 1);
  }

  Shape shape_;
  std::uint32_t sq_mask_;    // sq_entries - 1 where that is a power of two, otherwise 0
  std::uint32_t slot_bits_;  // of a CID; the rest is the generation
  nvme::Sqe* sq_;
  CqeWords* cq_;
  Atomic<std::uint32_t>* sq_doorbell_;
  Atomic<std::uint32_t>* cq_doorbell_;
  State* state_;
  Slot* slots_;
  Atomic<std::uint32_t>* free_;     // a bit a slot
  Atomic<std::uint32_t>* written_;  // a mark an SQ entry
};

}  // namespace gpunvme
