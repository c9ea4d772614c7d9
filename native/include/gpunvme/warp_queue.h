// A queue pair as the lanes of a warp drive it together: one reservation and one doorbell for all their commands, and
// 32 completion queue entries in one look.
//
// The protocol, the memory and every rule are those of queue_pair.h, and both may be used on one queue at once. What
// differs is how far an access has to reach: the queue's own state is in the memory of the GPU whose threads use it, so
// that order between them needs no more than the GPU (`Near`). What a controller reads and writes is ordered for the
// whole system: CQEs are read with QueuePair's accesses, and ring_doorbell() makes everything before it visible.
#pragma once

#include "gpunvme/lanes.h"
#include "gpunvme/queue_pair.h"

namespace gpunvme {

// Orders everything before it before the accesses called "published" after it, for the threads of one GPU: one fence
// where there would be one for each of them. On the host these accesses are releases themselves, which
// ThreadSanitizer sees.
GPUNVME_DEVICE inline void publish() {
#if defined(__CUDACC__)
  cuda::atomic_thread_fence(cuda::std::memory_order_acq_rel, cuda::thread_scope_device);
#endif
}

// An Atomic that only threads of one GPU look at while it is used so. Host code has nothing nearer than its memory.
template <typename T>
class Near {
 public:
  GPUNVME_DEVICE explicit Near(Atomic<T>& atomic) : atomic_(atomic) {}
#if defined(__CUDACC__)
  GPUNVME_DEVICE T load_relaxed() const { return reference().load(cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE T load_acquire() const { return reference().load(cuda::std::memory_order_acquire); }
  GPUNVME_DEVICE void store_relaxed(T value) const { reference().store(value, cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE void store_release(T value) const { reference().store(value, cuda::std::memory_order_release); }
  GPUNVME_DEVICE T exchange_acquire(T value) const {
    return reference().exchange(value, cuda::std::memory_order_acquire);
  }
  GPUNVME_DEVICE T add(T value) const { return reference().fetch_add(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_DEVICE T add_acquire(T value) const { return reference().fetch_add(value, cuda::std::memory_order_acquire); }
  GPUNVME_DEVICE void add_release(T value) const { reference().fetch_add(value, cuda::std::memory_order_release); }
  GPUNVME_DEVICE void subtract_release(T value) const { reference().fetch_sub(value, cuda::std::memory_order_release); }
  GPUNVME_DEVICE T subtract(T value) const { return reference().fetch_sub(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_DEVICE T and_acquire(T value) const { return reference().fetch_and(value, cuda::std::memory_order_acquire); }
  GPUNVME_DEVICE T or_release(T value) const { return reference().fetch_or(value, cuda::std::memory_order_release); }
  GPUNVME_DEVICE bool compare_exchange_relaxed(T& expected, T desired) const {
    return reference().compare_exchange_strong(expected, desired, cuda::std::memory_order_relaxed,
                                               cuda::std::memory_order_relaxed);
  }
  GPUNVME_DEVICE bool compare_exchange_acquire(T& expected, T desired) const {
    return reference().compare_exchange_strong(expected, desired, cuda::std::memory_order_acquire,
                                               cuda::std::memory_order_relaxed);
  }
  GPUNVME_DEVICE void or_relaxed(T value) const { reference().fetch_or(value, cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE void and_relaxed(T value) const { reference().fetch_and(value, cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE void add_relaxed(T value) const { reference().fetch_add(value, cuda::std::memory_order_relaxed); }
  // An acquire once a fence follows.
  GPUNVME_DEVICE T load_before_fence() const { return load_relaxed(); }
  // After publish().
  GPUNVME_DEVICE void store_published(T value) const { store_relaxed(value); }
  GPUNVME_DEVICE void raise_published(T value) const { reference().fetch_max(value, cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE bool compare_exchange_published(T& expected, T desired) const {
    return compare_exchange_relaxed(expected, desired);
  }

 private:
  using Reference = cuda::atomic_ref<T, cuda::thread_scope_device>;
  GPUNVME_DEVICE Reference reference() const { return Reference(reinterpret_cast<T&>(atomic_)); }
#else
  T load_relaxed() const { return atomic_.load_relaxed(); }
  T load_acquire() const { return atomic_.load_acquire(); }
  void store_relaxed(T value) const { atomic_.store_relaxed(value); }
  void store_release(T value) const { atomic_.store_release(value); }
  T exchange_acquire(T value) const { return atomic_.exchange(value); }
  T add(T value) const { return atomic_.fetch_add(value); }
  T add_acquire(T value) const { return atomic_.fetch_add(value); }
  void add_release(T value) const { atomic_.fetch_add(value); }
  void subtract_release(T value) const { atomic_.fetch_sub(value); }
  T subtract(T value) const { return atomic_.fetch_sub(value); }
  T and_acquire(T value) const { return atomic_.fetch_and(value); }
  T or_release(T value) const { return atomic_.fetch_or(value); }
  bool compare_exchange_relaxed(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }
  bool compare_exchange_acquire(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }
  void or_relaxed(T value) const { atomic_.fetch_or(value); }
  void and_relaxed(T value) const { atomic_.fetch_and(value); }
  void add_relaxed(T value) const { atomic_.fetch_add(value); }
  T load_before_fence() const { return atomic_.load_acquire(); }
  void store_published(T value) const { atomic_.store_release(value); }
  void raise_published(T value) const {
    T seen = atomic_.load_relaxed();
    while (seen < value && !atomic_.compare_exchange(seen, value)) {
    }
  }
  bool compare_exchange_published(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }

 private:
#endif
  Atomic<T>& atomic_;
};
template <typename T>
Near(Atomic<T>&) -> Near<T>;

// What a read or write command says; everything else in its entry is zero.
struct IoCommand {
  std::uint32_t opcode;
  std::uint32_t nsid;
  std::uint64_t prp1;
  std::uint64_t prp2;
  std::uint64_t lba;
  std::uint32_t cdw12;  // blocks - 1, and flags

#if defined(GPUNVME_WARPS)
  // 16 bytes of its entry, one of four.
  GPUNVME_DEVICE ulonglong2 part(std::uint32_t number, std::uint16_t cid) const {
    switch (number) {
      case 0:
        return make_ulonglong2(
            (opcode | static_cast<std::uint32_t>(cid) << 16) | static_cast<std::uint64_t>(nsid) << 32, 0);
      case 1:
        return make_ulonglong2(0, prp1);
      case 2:
        return make_ulonglong2(prp2, lba);
      default:
        return make_ulonglong2(cdw12, 0);
    }
  }
#else
  nvme::Sqe entry(std::uint16_t cid) const {
    nvme::Sqe sqe{};
    sqe.opcode = static_cast<std::uint8_t>(opcode);
    sqe.cid = cid;
    sqe.nsid = nsid;
    sqe.prp1 = prp1;
    sqe.prp2 = prp2;
    sqe.cdw10 = static_cast<std::uint32_t>(lba);
    sqe.cdw11 = static_cast<std::uint32_t>(lba >> 32);
    sqe.cdw12 = cdw12;
    return sqe;
  }
#endif
};

class WarpQueue {
 public:
  // For a host that looks at a slot's word from outside: what is in its lowest bits in quarantine, and where the CID
  // is.
  static constexpr std::uint64_t kStateMask = QueuePair::kStateMask;
  static constexpr std::uint64_t kQuarantined = QueuePair::kQuarantined;
  static constexpr int kCidShift = QueuePair::kCidShift;

  GPUNVME_DEVICE explicit WarpQueue(const QueuePair& pair) : pair_(pair) {}

  // A slot for one thread, or kNoSlot.
  GPUNVME_DEVICE std::uint32_t claim(const Alone& alone) const {
    const std::uint32_t slot = any_number() % pair_.shape_.slots;
    const std::uint32_t bit = 1u << slot % 32;
    // Taken without a look, which would take as long: most often it is free. Acquire: as below.
    if ((Near(pair_.free_[slot / 32]).and_acquire(~bit) & bit) != 0) return slot;
    return claim_any(alone, slot);
  }

  // A slot for each lane, as far as there are some: kNoSlot for the rest. Who has one must not wait for another.
  template <typename Group>
  GPUNVME_DEVICE std::uint32_t claim(const Group& lanes) const {
    // From anywhere: a shared hint would cost a way to memory, and bring everybody to the same word.
    return claim_any(lanes, lanes.leaders(any_number()) % pair_.shape_.slots);
  }

  // Gives a slot back whose command is done, or was never submitted. Who has read its buffer has met the caller since.
  GPUNVME_DEVICE void release(std::uint32_t slot) const {
    release(slot, static_cast<std::uint16_t>(Near(pair_.slots_[slot].word).load_relaxed() >> kCidShift));
  }
  // The same, of the slot's last command, whose CID is known.
  GPUNVME_DEVICE void release(std::uint32_t slot, std::uint16_t cid) const {
    Near(pair_.slots_[slot].word).store_relaxed(QueuePair::word_of(QueuePair::kFree, cid));
    // Release: whoever claims the slot finds it free, and its buffer read.
    Near(pair_.free_[slot / 32]).or_release(1u << slot % 32);
  }

  // Puts one command for each lane into the SQ and rings, as QueuePair does; kFull if there is no room for all of them
  // now, which there will be when completions are reaped. `slot` is the lane's; `cid` is set.
  template <typename Group>
  GPUNVME_DEVICE Submitted submit(const Group& lanes, std::uint32_t slot, const IoCommand& command,
                                  std::uint16_t& cid) const {
    cid = pair_.next_cid(slot);
    Place place{};
    std::uint32_t result = 0;
    if (lanes.leads()) result = static_cast<std::uint32_t>(reserve(lanes.count(), place));
    const auto reserved = static_cast<Submitted>(lanes.leaders(result));
    const bool is_ringer = lanes.leaders(static_cast<std::uint32_t>(place.rings)) != 0;
    place.rung = lanes.leaders(place.rung);
    if (reserved != Submitted::kOk) {
      if (is_ringer) ring_for_all(lanes, place.rung, place.rung);
      return reserved;
    }
    const std::uint64_t first = lanes.leaders(place.first);
    const std::uint64_t ticket = first + lanes.rank();
    Near(pair_.slots_[slot].ticket).store_relaxed(ticket);
    Near(pair_.slots_[slot].word).store_relaxed(QueuePair::word_of(QueuePair::kPending, cid));
    write_entries(lanes, first, command, cid);
    lanes.meet();  // lanes wrote parts of each other's entries
    Near written(pair_.written_[pair_.position(ticket)]);
    if (is_ringer) {
      // Relaxed: only who rings looks at marks, which is this group. Whoever rings later comes to know of the entry by
      // `ringers`; the controller by the fence before the doorbell.
      written.store_relaxed(QueuePair::mark(ticket));
      // Its own entries need no look where they are the next to be told of.
      ring_for_all(lanes, place.rung, place.rung == first ? first + lanes.count() : place.rung);
      return Submitted::kOk;
    }
    // Release: whoever rings for this entry sees it written, and the slot pending.
    written.store_release(QueuePair::mark(ticket));
    lanes.meet();
    std::uint32_t others = 0;
    if (lanes.leads()) others = Near(pair_.state_->ringers).add(1);
    if (lanes.leaders(others) != 0) return Submitted::kOk;
    const std::uint64_t rung = lanes.leaders(lanes.leads() ? Near(pair_.state_->rung).load_relaxed() : 0);
    ring_for_all(lanes, rung, rung);
    return Submitted::kOk;
  }

  // Looks for new CQEs, as many as there are lanes at a time, and finishes the commands that they name; how many it
  // found. Nothing if another warp is about it, which `busy` tells. Looks `patience` times before it gives up.
  // DW0 is not read: it says nothing about reads and writes, and would cost a second way across PCIe.
  template <typename Group>
  GPUNVME_DEVICE std::uint32_t reap(const Group& lanes, std::uint32_t patience, bool& busy) const {
    Near reaper(pair_.state_->reaper);
    std::uint64_t seen = QueuePair::kReaping;
    if (lanes.leads()) {
      seen = reaper.load_relaxed();
      // Acquire: what the last reaper did.
      if ((seen & QueuePair::kReaping) == 0 && !reaper.compare_exchange_acquire(seen, seen | QueuePair::kReaping))
        seen |= QueuePair::kReaping;
    }
    seen = lanes.leaders(seen);
    busy = (seen & QueuePair::kReaping) != 0;
    if (busy) return 0;
    lanes.meet();  // what the leader acquired, all have
    std::uint32_t next = QueuePair::next_of(seen);
    std::uint32_t total = 0;
    for (;;) {
      std::uint64_t tag = 0;
      const std::uint32_t found = look(lanes, next, tag);
      if (found != 0) {
        total += found;
        next = advanced(next, found);
        finish(lanes, tag, found);
        if (found == lanes.count() && total < QueuePair::kBatch) continue;
      }
      if (total != 0 || patience-- <= 1) break;
    }
    if (lanes.leads()) {
      // Unless the doorbell is rung, no fence is left to pay for: what this reaper did was published with the last
      // commands.
      if (total != 0 && is_doorbell_due(next, total)) {
        // After the entries were read: the controller may now write them anew.
        ring_doorbell(pair_.cq_doorbell_, next & ~QueuePair::kPhase);
        publish();  // the next reaper rings after this one
      }
      reaper.store_published(QueuePair::reaper_of(next));
    }
    return total;
  }

  // Whether the command is done, and its status. The slot, and the buffer that goes with it, stay the caller's until
  // release().
  GPUNVME_DEVICE bool is_done(std::uint32_t slot, std::uint16_t cid, std::uint16_t& status) const {
    // Acquire: the reaper saw the CQE, behind which the data was written.
    const std::uint64_t word = Near(pair_.slots_[slot].word).load_acquire();
    status = static_cast<std::uint16_t>(word >> QueuePair::kStatusShift);
    return (word & (QueuePair::kCidMask | QueuePair::kStateMask)) == QueuePair::word_of(QueuePair::kDone, cid);
  }

  GPUNVME_DEVICE bool stopped() const { return Near(pair_.state_->stopped).load_relaxed() != 0; }

 private:
  friend class ExclusiveQueue;

  // The lowest `count` of the bits that are set.
  GPUNVME_DEVICE static std::uint32_t lowest(std::uint32_t bits, std::uint32_t count) {
    if (count_bits(bits) <= count) return bits;
    std::uint32_t rest = bits;
    for (; count != 0; --count) rest &= rest - 1;
    return bits & ~rest;
  }

  // Slots as claim() gives them, from `start` on.
  template <typename Group>
  GPUNVME_DEVICE std::uint32_t claim_any(const Group& lanes, std::uint32_t start) const {
    const std::uint32_t words = QueuePair::words(pair_.shape_.slots);
    std::uint32_t at = start / 32;
    std::uint32_t mask = ~0u << start % 32;
    std::uint32_t mine = QueuePair::kNoSlot;
    std::uint32_t have = 0;
    for (std::uint32_t looked = 0; looked <= words && have < lanes.count(); ++looked) {
      std::uint32_t got = 0;
      if (lanes.leads()) {
        const std::uint32_t take = lowest(Near(pair_.free_[at]).load_relaxed() & mask, lanes.count() - have);
        // Acquire: what the last users did with the slots comes before what we do.
        if (take != 0) got = Near(pair_.free_[at]).and_acquire(~take) & take;
      }
      got = lanes.leaders(got);
      const std::uint32_t more = count_bits(got);
      if (lanes.rank() >= have && lanes.rank() - have < more) mine = at * 32 + nth_bit(got, lanes.rank() - have);
      have += more;
      mask = ~0u;
      at = at + 1 < words ? at + 1 : 0;
    }
    lanes.meet();  // what the leader acquired, all have
    return mine;
  }

  // Where the entries of a group go, and what it has to do then.
  struct Place {
    std::uint64_t first;  // ticket
    std::uint64_t rung;   // if it rings: entries that the controller was told of
    bool rings;
  };

  // Room in the SQ for `count` entries that adjoin. Called by one lane, which may have become the one who rings, also
  // if there is no room.
  GPUNVME_DEVICE Submitted reserve(std::uint32_t count, Place& place) const {
    Near reserved(pair_.state_->reserved);
    // All that is needed, on its way at once.
    const bool is_stopped = stopped();
    const std::uint32_t ringers = Near(pair_.state_->ringers).load_relaxed();
    place.first = reserved.load_relaxed();
    // Acquire: the controller has read the entries that will be overwritten.
    const std::uint64_t seen = Near(pair_.state_->head_seen).load_acquire();
    if (is_stopped) return Submitted::kStopped;
    if (!has_room(place.first + count - 1, seen)) return Submitted::kFull;
    if (ringers == 0 && becomes_ringer()) {
      place.rings = true;
      place.rung = Near(pair_.state_->rung).load_relaxed();
    }
    // Relaxed: the tickets themselves say nothing; entries are published by their marks.
    while (!reserved.compare_exchange_relaxed(place.first, place.first + count)) {
      if (!has_room(place.first + count - 1, Near(pair_.state_->head_seen).load_acquire())) return Submitted::kFull;
    }
    return Submitted::kOk;
  }

  // Whether there is an entry for this ticket; `seen` is what was seen of the head.
  GPUNVME_DEVICE bool has_room(std::uint64_t ticket, std::uint64_t seen) const {
    if (!pair_.is_full(ticket, seen)) return true;
    const std::uint64_t head = Near(pair_.state_->sq_head).load_acquire();
    Near(pair_.state_->head_seen).store_release(head);
    return !pair_.is_full(ticket, head);
  }

  // To ring before the entries are written saves their release, and that of `ringers`: where nobody else is about it.
  // Those who come meanwhile are counted, and told of by ring_for_all(), as ever. Called by one lane.
  GPUNVME_DEVICE bool becomes_ringer() const {
    std::uint32_t nobody = 0;
    // Acquire: what the last one has rung for.
    return Near(pair_.state_->ringers).compare_exchange_acquire(nobody, 1);
  }

  // Rings until nobody has come meanwhile. By the one group that rings, which `ringers` counts as one. The controller
  // was told of the entries before `rung`; all before `written` are known to be written.
  template <typename Group>
  GPUNVME_DEVICE void ring_for_all(const Group& lanes, std::uint64_t rung, std::uint64_t written) const {
    std::uint32_t served = 1;
    for (;;) {
      lanes.meet();  // what the leader acquired, all have; and the marks of all
      written = rung = ring_for_written(lanes, rung, written);
      std::uint32_t came = 0;
      // Acquire and release as in QueuePair::ring.
      if (lanes.leads()) came = Near(pair_.state_->ringers).subtract(served);
      came = lanes.leaders(came);
      if (came == served) return;
      served = came - served;
    }
  }

  template <typename Group>
  GPUNVME_DEVICE void write_entries(const Group& lanes, std::uint64_t first, const IoCommand& command,
                                    std::uint16_t cid) const {
#if defined(GPUNVME_WARPS)
    // Four lanes write one entry, 16 bytes each: whole lines go across PCIe, not parts of them.
    const std::uint32_t opcode_and_cid = command.opcode | static_cast<std::uint32_t>(cid) << 16;
    for (std::uint32_t part = 0; part < 4; ++part) {
      const std::uint32_t piece = part * lanes.count() + lanes.rank();
      const std::uint32_t whose = piece / 4;
      const IoCommand theirs{lanes.from(whose, opcode_and_cid), lanes.from(whose, command.nsid),
                             lanes.from(whose, command.prp1),   lanes.from(whose, command.prp2),
                             lanes.from(whose, command.lba),    lanes.from(whose, command.cdw12)};
      reinterpret_cast<ulonglong2*>(pair_.sq_ + pair_.position(first + whose))[piece % 4] = theirs.part(piece % 4, 0);
    }
#else
    pair_.sq_[pair_.position(first + lanes.rank())] = command.entry(cid);
#endif
  }

  // Tells the controller of all entries that are written; how far it is told then.
  template <typename Group>
  GPUNVME_DEVICE std::uint64_t ring_for_written(const Group& lanes, std::uint64_t rung, std::uint64_t written) const {
    std::uint64_t ticket = written;
    for (;;) {
      // Two entries a lane, so that a single one sees at once where it may stop.
      const std::uint64_t mine = ticket + 2 * lanes.rank();
      const std::uint32_t mark = Near(pair_.written_[pair_.position(mine)]).load_before_fence();
      const std::uint32_t second = Near(pair_.written_[pair_.position(mine + 1)]).load_before_fence();
      const std::uint32_t both = mark != QueuePair::mark(mine) ? 0 : second != QueuePair::mark(mine + 1) ? 1 : 2;
      const std::uint32_t full = lanes.prefix(both == 2);
      ticket += 2 * full;
      if (full == lanes.count()) continue;
      ticket += lanes.from(full, both);
      break;
    }
    if (ticket == rung) return rung;
    // The entries are written: the leader's fence, in ring_doorbell(), is for what it has seen itself.
    if (lanes.count() > 1) publish();
    lanes.meet();
    if (lanes.leads()) {
      // Before the doorbell: a completion of these entries must find them told.
      Near(pair_.state_->rung).store_relaxed(ticket);
      ring_doorbell(pair_.sq_doorbell_, pair_.position(ticket));
    }
    return ticket;
  }

  // CQ position and phase, `count` entries further; at most one round.
  GPUNVME_DEVICE std::uint32_t advanced(std::uint32_t next, std::uint32_t count) const {
    const std::uint32_t at = (next & ~QueuePair::kPhase) + count;
    const std::uint32_t phase = next & QueuePair::kPhase;
    return at < pair_.shape_.cq_entries ? at | phase : (at - pair_.shape_.cq_entries) | (phase ^ QueuePair::kPhase);
  }

  // The CQ head doorbell is rung when a quarter of the queue, or its end, was passed: the controller has room for the
  // rest meanwhile, and rings cost a fence.
  GPUNVME_DEVICE bool is_doorbell_due(std::uint32_t next, std::uint32_t total) const {
    const std::uint32_t quarter = pair_.shape_.cq_entries / 4;
    if (quarter <= 1) return true;
    const std::uint32_t at = next & ~QueuePair::kPhase;
    return at < total || at / quarter != (at - total) / quarter;
  }

  // One look at the CQ from `next` on, an entry a lane; how many new ones there are. The reaper only.
  template <typename Group>
  GPUNVME_DEVICE std::uint32_t look(const Group& lanes, std::uint32_t next, std::uint64_t& tag) const {
    const bool takes_part = lanes.rank() < pair_.shape_.cq_entries;
    const std::uint32_t mine = takes_part ? advanced(next, lanes.rank()) : next;
    // Acquire: the data that the command moved was written before the phase tag changed.
    tag = pair_.cq_[mine & ~QueuePair::kPhase].tag.load_acquire();
    return lanes.prefix(takes_part && QueuePair::has_phase(tag, mine));
  }

  // Finishes the commands that the first `found` lanes' CQEs name.
  template <typename Group>
  GPUNVME_DEVICE void finish(const Group& lanes, std::uint64_t tag, std::uint32_t found) const {
    QueuePair::State& state = *pair_.state_;
    const auto cid = static_cast<std::uint16_t>(tag >> 32);
    const std::uint32_t number = pair_.slot_of(cid);
    const bool mine = lanes.rank() < found;
    const bool known = mine && number < pair_.shape_.slots &&
                       static_cast<std::uint32_t>(cid) >> pair_.slot_bits_ != pair_.last_generation();
    const std::uint64_t pending = QueuePair::word_of(QueuePair::kPending, cid);
    const std::uint64_t given_up = QueuePair::word_of(QueuePair::kQuarantined, cid);
    std::uint64_t seen = 0;
    std::uint64_t head = 0;
    bool bad_head = false;
    if (known) {
      const std::uint64_t rung = Near(state.rung).load_relaxed();
      const std::uint64_t ticket = Near(pair_.slots_[number].ticket).load_relaxed();
      seen = Near(pair_.slots_[number].word).load_relaxed();
      if (seen == pending || seen == given_up) head = head_after(ticket, tag, rung, bad_head);
    }
    head = lanes.largest(head, found);
    lanes.meet();
    // What the CQEs told: data is there, SQ entries were read.
    publish();
    if (lanes.leads() && head != 0) Near(state.sq_head).raise_published(head);
    bool completed = false;
    bool late = false;
    if (known) {
      // Whoever sees the slot done sees the data. Of two CQEs with one CID, one wins.
      const std::uint64_t done = QueuePair::word_of(QueuePair::kDone, cid) | (tag >> 49) << QueuePair::kStatusShift;
      completed = seen == pending && Near(pair_.slots_[number].word).compare_exchange_published(seen, done);
      late = !completed && seen != given_up &&
             static_cast<std::uint32_t>(seen >> QueuePair::kCidShift) >> pair_.slot_bits_ != pair_.last_generation();
      if (seen == given_up) {
        // Given up, but now the controller is finished with it: the slot is free again, by one CQE only.
        late = true;
        const std::uint64_t free = QueuePair::word_of(QueuePair::kFree, cid);
        if (Near(pair_.slots_[number].word).compare_exchange_published(seen, free)) {
          Near(pair_.free_[number / 32]).or_release(1u << number % 32);
          Near(state.stuck).subtract(1);
        }
      }
    }
    const std::uint32_t completions = lanes.how_many(completed);
    const std::uint32_t lates = lanes.how_many(late);
    const std::uint32_t bad_heads = lanes.how_many(bad_head);
    if (!lanes.leads()) return;
    count(state.completed, completions);
    count(state.late, lates);
    count(state.unknown, found - completions - lates);
    count(state.bad_head, bad_heads);
  }

  // As QueuePair::advance_head: where the SQ's head is after a completion.
  GPUNVME_DEVICE std::uint64_t head_after(std::uint64_t ticket, std::uint64_t tag, std::uint64_t rung,
                                          bool& bad) const {
    const auto named = static_cast<std::uint32_t>(tag & 0xffff);
    const std::uint32_t own = pair_.position(ticket + 1);
    std::uint64_t head = ticket + 1;
    if (named < pair_.shape_.sq_entries) {
      head += named >= own ? named - own : named + pair_.shape_.sq_entries - own;
    }
    // No further than what the controller was told of.
    bad = named >= pair_.shape_.sq_entries || head > rung;
    return bad ? ticket + 1 : head;
  }

  GPUNVME_DEVICE static void count(Atomic<std::uint64_t>& counter, std::uint32_t more) {
    if (more != 0) Near(counter).add_relaxed(more);
  }

  // A copy: in registers. Every acquire empties the L1 cache, and what lies in memory would have to be fetched again.
  const QueuePair pair_;
};

}  // namespace gpunvme
