// Submission queues: doorbells, fetching, execution.
#include "queue_worker.h"

#include <algorithm>
#include <cstring>

#include "prefetch.h"

namespace gpunvme::soft {

Worker::Worker(Device& device, Admin& admin, IovaTable::Reader& reader, Counters& counters, unsigned number,
               unsigned count)
    : device_(device),
      admin_(admin),
      reader_(reader),
      counters_(counters),
      dma_(device.iova),
      io_(device, dma_, counters),
      number_(number),
      count_(count),
      several_(device.several),
      uses_ring_(device.backend->memory() == nullptr && device.options.threads > 0) {}

unsigned Worker::pass() {
  dma_.refresh();
  unsigned fetched = 0;
  // Acquire: the queues are as the register side left them before it switched this on.
  if (device_.serving.load(std::memory_order_acquire)) [[likely]] {
    // Each worker has queues of its own, whose cache lines then stay with it: what several take turns at takes longer.
    const std::uint32_t highest = device_.queues.highest_sq();
    for (std::uint32_t id = number_; id <= highest; id += count_) fetched += serve(device_.queues.sq(id));
    if (fetched == 0 && count_ > 1) fetched = help();
    if (fetched == 0) {
      counters_.add(Count::kIdlePasses);
      if (++looked_at_ >= device_.doorbells.ids()) looked_at_ = 0;
      look_around(looked_at_);
    }
  }
  chores();
  announce();
  return fetched;
}

// The other workers' queues: where more than one command waits, and now and then where any does.
unsigned Worker::help() {
  const bool due = ++passes_ % kPassesPerHelp == 0;
  if (!due && helping_ == 0 && !is_fresh_) return 0;
  // A queue that was long a moment ago is no lone thread's.
  const bool takes_lone = is_fresh_ || helping_ != 0 || passes_ % kPassesPerLone == 0;
  is_fresh_ = false;
  const std::uint32_t highest = device_.queues.highest_sq();
  unsigned fetched = 0;
  for (std::uint32_t id = 0; id <= highest; ++id) {
    if (id % count_ != number_) fetched += serve(device_.queues.sq(id), takes_lone);
  }
  helping_ = fetched > 1 ? kPassesOfHelp : helping_ > 0 ? helping_ - 1 : 0;
  return fetched;
}

// Everything that is rarely there to be done.
void Worker::chores() {
  if (io_.ring().in_flight() > 0) reap(false);
  if (device_.waiting_queues.load(std::memory_order_relaxed) != 0) drain_backlogs();
  if (device_.held.any()) release_held();
  if (device_.events.due() || admin_.deleting()) {
    SubmissionQueue& sq = device_.queues.sq(0);
    if (several_ && !sq.lock.try_lock()) return;
    for (const std::uint16_t cid : admin_.finished_deletions()) complete(sq, {0, 0, cid, nvme::kStatusSuccess});
    while (const auto delivery = device_.events.next()) {
      complete(sq, {delivery->dw0, 0, delivery->cid, nvme::kStatusSuccess});
    }
    if (several_) sq.lock.unlock();
  }
}

void Worker::announce() {
  // Reads in flight may still write where an older snapshot said.
  const std::uint64_t generation = dma_.generation();
  reader_.announce(io_.ring().in_flight() == 0 ? generation : io_.ring().oldest_generation(generation));
}

void Worker::go_offline() {
  while (io_.ring().in_flight() > 0) reap(true);
  reader_.go_offline();
}

// How many commands of one queue were fetched and executed. One that is alone is left, unless it `takes_lone` ones.
unsigned Worker::serve(SubmissionQueue& sq, bool takes_lone) {
  // Acquire: with the release of who switched the queue on.
  if (!sq.live.load(std::memory_order_acquire)) return 0;
  const auto tail = std::atomic_ref<std::uint32_t>(*sq.tail_doorbell).load(std::memory_order_relaxed);
  const std::uint32_t head = sq.head.load(std::memory_order_relaxed);
  // Near enough: how long the queue is, its lock guards.
  if (tail == head || (!takes_lone && (tail == head + 1 || tail == 0))) return 0;

  // The admin queue stays locked while its commands are executed: they are executed one at a time. Any other queue is
  // free for the next worker as soon as its entries have been copied.
  const bool admin = sq.id == 0;
  if (several_ && !sq.lock.try_lock()) return 0;
  const std::uint32_t count = sq.live.load(std::memory_order_relaxed) ? fetch(sq) : 0;
  bool alone = true;
  if (several_) {
    // Relaxed: the lock orders it for who deletes the queue. Others are at work on it if it was not 0.
    if (count > 0) alone = sq.unfinished.fetch_add(count, std::memory_order_relaxed) == 0;
    if (!admin || count == 0) sq.lock.unlock();
  }
  if (count == 0) return 0;

  counters_.add(admin ? Count::kAdminCommands : Count::kCommands, count);
  if (admin) {
    for (std::uint32_t i = 0; i < count; ++i) execute_admin(sq, batch_[i]);
  } else if (alone || count < kPostTogether || device_.faults->active() || dma_.is_device()) {
    for (std::uint32_t i = 0; i < count; ++i) {
      look_ahead(i, count);
      execute(sq, batch_[i]);
    }
  } else {
    execute_together(sq, count);
  }
  signal(*sq.cq);
  if (several_) {
    // Release: with the acquire of who deletes the queue. Nothing of it is touched by this worker after this.
    sq.unfinished.fetch_sub(count, std::memory_order_release);
    if (admin) sq.lock.unlock();
  }
  return count;
}

// Copies what the host has submitted into `batch_`, as many as can be completed; under the queue's lock.
std::uint32_t Worker::fetch(SubmissionQueue& sq) {
  // Acquire: the entries before this tail are written. Their host released it.
  const auto tail = std::atomic_ref<std::uint32_t>(*sq.tail_doorbell).load(std::memory_order_acquire);
  std::uint32_t head = sq.head.load(std::memory_order_relaxed);
  if (tail != sq.tail && accept_tail(sq, tail, head)) sq.tail = tail;
  std::uint32_t count = std::min((sq.tail >= head ? sq.tail : sq.tail + sq.entries) - head, kBatch);
  if (count == 0) return 0;

  // Nothing is fetched whose completion could not be posted: the submission queue fills up, and the host notices.
  CompletionQueue& cq = *sq.cq;
  std::uint32_t room = 0;
  if (!cq.waiting.load(std::memory_order_relaxed)) {
    room = cq.room();
    if (room < count && refresh_head(cq)) room = cq.room();
  }
  if (uses_ring_) room = std::min(room, io_.ring().room());
  if (room == 0) {
    if (!sq.waits) counters_.add(Count::kQueueFullWaits);
    sq.waits = true;
    return 0;
  }
  sq.waits = false;
  count = std::min(count, room);

  for (std::uint32_t i = 0; i < count; ++i) {
    const std::byte* const entry = sq.memory.entry(dma_, head, false);
    if (entry == nullptr) [[unlikely]] {
      if (dma_.is_device() && copy_entries(sq, head, i, count)) {
        head = (head + count - i) % sq.entries;
        break;
      }
      device_.fail();  // commands that cannot be fetched cannot be completed with an error either
      return 0;
    }
    // A copy: the host may change the entry while it is being checked.
    std::memcpy(&batch_[i], entry, sizeof(nvme::Sqe));
    head = head + 1 == sq.entries ? 0 : head + 1;
  }
  // Release: the copies are made before a completion's SQHD says so.
  sq.head.store(head, std::memory_order_release);
  return count;
}

// Fetches entries `done` to `count` of a batch from memory of a device: as few copies as the queue's end and its pages
// allow.
bool Worker::copy_entries(const SubmissionQueue& sq, std::uint32_t head, std::uint32_t done, std::uint32_t count) {
  while (done < count) {
    const std::uint32_t now = sq.memory.run(head, count - done);
    if (!dma_.read(sq.memory.iova(head), &batch_[done], now * sizeof(nvme::Sqe))) return false;
    done += now;
    head = (head + now) % sq.entries;
  }
  return true;
}

// Is this a tail that a host may write after `sq.tail`? One that is not is reported, once.
bool Worker::accept_tail(SubmissionQueue& sq, std::uint32_t tail, std::uint32_t head) {
  if (tail < sq.entries) {
    const std::uint32_t added = (tail >= sq.tail ? tail : tail + sq.entries) - sq.tail;
    const std::uint32_t held = (sq.tail >= head ? sq.tail : sq.tail + sq.entries) - head;
    if (added + held < sq.entries) {
      sq.rejected_tail = Doorbells::kUntouched;
      return true;
    }
  }
  if (tail != sq.rejected_tail) {
    sq.rejected_tail = tail;
    report_doorbell(nvme::kEventErrorInvalidDoorbellValue, sq.id);
  }
  return false;
}

// Before command `i` of a batch: asks for blocks of the commands behind it, and at first also for its own, which has to
// be checked yet before it is copied.
void Worker::look_ahead(std::uint32_t i, std::uint32_t count) const {
  const std::uint32_t end = std::min<std::uint32_t>(count, i + kPrefetchAhead + 1);
  for (std::uint32_t next = i == 0 ? 0 : i + kPrefetchAhead; next < end; ++next) io_.prefetch(batch_[next]);
}

void Worker::execute(SubmissionQueue& sq, const nvme::Sqe& sqe) {
  Ticket ticket{&sq, sqe.cid, {}};
  if (device_.faults->active()) [[unlikely]] {
    ticket.decision = device_.faults->decide();
    if (!begin_faults(sq, ticket.decision)) return;
  }
  std::uint16_t status = ticket.decision.error;
  if (status == nvme::kStatusSuccess) [[likely]]
    status = io_.execute(sqe, ticket);
  if (status == IoCommands::kPending) {
    sq.unfinished.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  finish(sq, {0, sq.id, sqe.cid, status}, ticket.decision);
}

// A batch of a long queue that others work on, too. Each taking of the completion queue's lock brings its cache lines
// from another core: so completions are posted several at a time, and are waited with while another worker is posting.
// Where nothing takes longer than a copy of some microseconds, so that none waits for long.
void Worker::execute_together(SubmissionQueue& sq, std::uint32_t count) {
  Completion done[kBatch];
  std::uint32_t ready = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    look_ahead(i, count);
    const nvme::Sqe& sqe = batch_[i];
    if (ready > 0 && !io_.is_quick(sqe)) {
      post_together(sq, {done, ready}, true);
      ready = 0;
    }
    const std::uint16_t status = io_.execute(sqe, {&sq, sqe.cid, {}});
    if (status == IoCommands::kPending) {
      sq.unfinished.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    done[ready++] = {0, sq.id, sqe.cid, status};
    if (ready % kPostTogether == 0 && post_together(sq, {done, ready}, false)) ready = 0;
  }
  if (ready > 0) post_together(sq, {done, ready}, true);
}

// Faults that hit before a command is executed. False: it is not.
bool Worker::begin_faults(SubmissionQueue& sq, Decision& decision) {
  // After a fault that stops everything, the rest of a batch is not executed.
  if (!device_.serving.load(std::memory_order_relaxed)) return false;
  if (!decision.any()) return true;
  if (decision.has(Fault::kDeviceGone)) {
    device_.count_fault(Fault::kDeviceGone);
    device_.gone.store(true);
    device_.serving.store(false);
    return false;
  }
  if (decision.has(Fault::kCfs)) {
    device_.count_fault(Fault::kCfs);
    device_.fail();
    return false;
  }
  if (decision.has(Fault::kError)) device_.count_fault(Fault::kError);
  if (decision.has(Fault::kCqStall)) {
    device_.count_fault(Fault::kCqStall);
    CompletionQueue& cq = *sq.cq;
    const SpinGuard guard(cq.lock, several_);
    cq.stalled_until = Clock::now() + std::chrono::seconds(1);
    if (!cq.waiting.exchange(true)) device_.waiting_queues.fetch_add(1, std::memory_order_relaxed);
    decision.remove(Fault::kCqStall);
  }
  return true;
}

void Worker::execute_admin(SubmissionQueue& sq, const nvme::Sqe& sqe) {
  if (!device_.serving.load(std::memory_order_relaxed)) return;
  const Admin::Result result = admin_.execute(*this, sqe);
  if (!result.completes) return;
  Decision decision;
  if (device_.faults->active()) decision = device_.faults->decide_admin();
  finish(sq, {result.dw0, 0, sqe.cid, result.status}, decision);
}

}  // namespace gpunvme::soft
