// The two sides of a queue pair for tests: the memory and the driver's half, and a controller's half that does what it
// is told, right or wrong.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "check.h"
#include "files.h"
#include "gpunvme/queue_pair.h"
#include "threads.h"

namespace testing {

using gpunvme::Atomic;
using gpunvme::Completion;
using gpunvme::CqeWords;
using gpunvme::QueuePair;
using gpunvme::Submitted;
using gpunvme::Waited;
using gpunvme::nvme::Sqe;

// What driver and controller share: two queues and two doorbells.
struct QueueMemory {
  QueueMemory(std::uint32_t sq_entries, std::uint32_t cq_entries)
      : sq_entries(sq_entries), cq_entries(cq_entries), sq(sq_entries * 64, 0, 0), cq(cq_entries * 16, 0, 0) {}
  Sqe* sqes() const { return reinterpret_cast<Sqe*>(sq.address()); }
  CqeWords* cqes() const { return reinterpret_cast<CqeWords*>(cq.address()); }
  Atomic<std::uint32_t>& sq_doorbell() const { return *reinterpret_cast<Atomic<std::uint32_t>*>(doorbells.address()); }
  Atomic<std::uint32_t>& cq_doorbell() const {
    return *reinterpret_cast<Atomic<std::uint32_t>*>(doorbells.address() + 4);
  }

  const std::uint32_t sq_entries;
  const std::uint32_t cq_entries;
  Memory sq;
  Memory cq;
  Memory doorbells{8, 0, 0};
};

// The driver's half.
struct Driver {
  Driver(std::uint32_t sq_entries, std::uint32_t cq_entries, std::uint32_t slots)
      : shared(sq_entries, cq_entries), memory(QueuePair::memory_bytes({sq_entries, cq_entries, slots})) {
    pair.initialise({sq_entries, cq_entries, slots}, shared.sqes(), shared.cqes(), &shared.sq_doorbell(),
                    &shared.cq_doorbell(), memory.data());
  }
  explicit Driver(std::uint32_t entries) : Driver(entries, entries, entries - 1) {}

  // Submits a command that carries `number`; its CID.
  std::uint16_t submit(std::uint32_t number, bool ring = true) const {
    const std::uint32_t slot = pair.claim();
    CHECK(slot != QueuePair::kNoSlot);
    Sqe sqe{};
    sqe.cdw10 = number;
    CHECK_EQ(pair.submit(slot, sqe), Submitted::kOk);
    if (ring) pair.ring();
    return sqe.cid;
  }
  std::uint32_t reap() const {
    return pair.reap([](std::uint32_t, std::uint16_t) {});
  }
  bool poll(std::uint16_t cid) const { return pair.poll(cid, last); }

  QueueMemory shared;
  Memory memory;
  QueuePair pair;
  mutable Completion last{};
};

// The controller's half. It checks what a controller would choke on: doorbells out of range, moving backwards, or
// telling of entries that nobody has written.
class Controller {
 public:
  explicit Controller(const QueueMemory& shared) : shared_(shared) {}

  // The next command, if the doorbell tells of one.
  std::optional<Sqe> fetch() {
    look_at_sq_doorbell();
    if (fetched_ == told_) return std::nullopt;
    Sqe& entry = shared_.sqes()[fetched_ % shared_.sq_entries];
    const Sqe sqe = entry;
    CHECK(sqe.opcode != kScribble);
    // What is read again before it is written anew was told of too early.
    std::memset(&entry, kScribble, sizeof entry);
    ++fetched_;
    return sqe;
  }
  Sqe must_fetch() {
    const auto sqe = fetch();
    CHECK(sqe.has_value());
    return *sqe;
  }

  std::uint32_t sq_head() const { return static_cast<std::uint32_t>(fetched_ % shared_.sq_entries); }
  std::uint64_t fetched() const { return fetched_; }

  // Entries that the driver has not taken yet.
  std::uint32_t unread() {
    const std::uint32_t head = shared_.cq_doorbell().load_acquire();
    CHECK(head < shared_.cq_entries);
    const std::uint32_t step = (head + shared_.cq_entries - cq_head_) % shared_.cq_entries;
    CHECK(step <= posted_ - read_);
    read_ += step;
    cq_head_ = head;
    return static_cast<std::uint32_t>(posted_ - read_);
  }
  bool is_full() { return unread() == shared_.cq_entries - 1; }

  static std::uint64_t tag(std::uint16_t cid, std::uint16_t status, std::uint32_t sq_head, bool phase) {
    return sq_head | std::uint64_t{cid} << 32 | std::uint64_t{phase} << 48 | std::uint64_t{status} << 49;
  }

  void post(std::uint16_t cid, std::uint16_t status = 0, std::uint32_t result = 0) {
    post_with_head(cid, sq_head(), status, result);
  }
  void post_with_head(std::uint16_t cid, std::uint32_t head, std::uint16_t status = 0, std::uint32_t result = 0) {
    CHECK(!is_full());
    CqeWords& entry = next_entry();
    entry.result = result;
    entry.tag.store_release(tag(cid, status, head, phase()));
    ++posted_;
  }
  // The same entry by parts, the phase tag last; `between` runs between them.
  template <typename Between>
  void post_torn(std::uint16_t cid, std::uint16_t status, std::uint32_t result, const Between& between) {
    CHECK(!is_full());
    CqeWords& entry = next_entry();
    entry.tag.store_release(tag(cid, status, sq_head(), !phase()));
    between();
    entry.result = result;
    entry.tag.store_release(tag(cid, status, sq_head(), phase()));
    ++posted_;
  }
  // An entry that says it is not new.
  void post_stale(std::uint16_t cid) {
    next_entry().tag.store_release(tag(cid, 0, sq_head(), !phase()));
    ++posted_;
  }

 private:
  static constexpr int kScribble = 0xee;

  void look_at_sq_doorbell() {
    const std::uint32_t tail = shared_.sq_doorbell().load_acquire();
    CHECK(tail < shared_.sq_entries);
    const auto told = static_cast<std::uint32_t>(told_ % shared_.sq_entries);
    const std::uint32_t step = (tail + shared_.sq_entries - told) % shared_.sq_entries;
    // A step backwards looks like a long one forwards: past what was told, into entries that were fetched.
    CHECK(told_ - fetched_ + step < shared_.sq_entries);
    told_ += step;
  }
  CqeWords& next_entry() const { return shared_.cqes()[posted_ % shared_.cq_entries]; }
  bool phase() const { return posted_ / shared_.cq_entries % 2 == 0; }

  const QueueMemory& shared_;
  std::uint64_t told_ = 0;
  std::uint64_t fetched_ = 0;
  std::uint64_t posted_ = 0;
  std::uint64_t read_ = 0;
  std::uint32_t cq_head_ = 0;
};

}  // namespace testing
