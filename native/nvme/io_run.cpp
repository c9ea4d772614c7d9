// The loop of a run: time, trouble, and the end.
#include "io_run.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <stdexcept>

#include "failure.h"

namespace gpunvme {
namespace {

// Turns without progress before the CPU is offered to others: about 100 us, longer than most commands take.
constexpr unsigned kSpins = 2000;
// Reading the clock costs as much as a fifth of a command.
constexpr unsigned kTurnsPerLook = 64;

std::atomic<std::uint64_t> next_id{1};

std::int64_t steady_clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::int64_t nanoseconds(double seconds) { return static_cast<std::int64_t>(std::clamp(seconds, 0.0, 1e9) * 1e9); }

void rest(unsigned idle) {
  if (idle > kSpins) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

const IoRun::Options& checked(const IoRun::Options& options) {
  if (!std::has_single_bit(options.lba_bytes) || options.lba_bytes < 512) {
    throw std::invalid_argument("a block has a power of two of bytes, at least 512");
  }
  if (options.max_bytes != 0 && options.max_bytes < options.lba_bytes) {
    throw std::invalid_argument("a command moves at least one block");
  }
  return options;
}

// The number of blocks is a field of 16 bits.
std::uint64_t most_bytes(const IoRun::Options& options) {
  const std::uint64_t most = std::uint64_t{65536} * options.lba_bytes;
  if (options.max_bytes == 0 || options.max_bytes > most) return most;
  return options.max_bytes - options.max_bytes % options.lba_bytes;
}

}  // namespace

IoRun::IoRun(Options options, const std::vector<std::shared_ptr<IoQueue>>& queues, std::shared_ptr<IoStaging> staging)
    : options_(checked(options)),
      lba_shift_(std::countr_zero(options.lba_bytes)),
      max_bytes_(most_bytes(options)),
      id_(next_id.fetch_add(1)),
      process_(getpid()),
      timeout_(nanoseconds(options.timeout)),
      staging_(std::move(staging)),
      clock_(options.clock != nullptr ? options.clock : &steady_clock_ns),
      start_(clock_()) {
  if (queues.empty()) throw std::invalid_argument("a transfer needs a queue");
  attach(queues, true);
}

IoRun::~IoRun() {
  // What a forked child has of it is the parent's.
  if (process_ != getpid()) return;
  std::vector<const Bounce*> unsafe;
  for (Command* command : stuck_) unsafe.push_back(command->part.bounce);
  for (Use& use : uses_) {
    for (Command* command = use.oldest; command != nullptr; command = command->newer) {
      Completion completion;
      // Nobody will ask for it any more. The slot is free when the completion comes.
      if (use.queue->pair().quarantine(command->cid)) {
        unsafe.push_back(command->part.bounce);
      } else {
        use.queue->pair().poll(command->cid, completion);
      }
    }
  }
  for (const Bounce* bounce : copying_) parked_slots_.push_back(bounce->slot);
  for (const Bounce& bounce : bounces_) {
    if (std::find(copying_.begin(), copying_.end(), &bounce) != copying_.end()) continue;
    const bool is_unsafe = std::find(unsafe.begin(), unsafe.end(), &bounce) != unsafe.end();
    is_unsafe ? staging_->give_up(bounce.slot) : staging_->release(bounce.slot);
  }
  if (lane_ == nullptr) return;
  try {
    for (const Bounce* bounce : copying_) lane_->spare_events.push_back(bounce->event);
    staging_->give_back_lane(std::move(lane_), std::move(parked_slots_));
  } catch (const Failure&) {
    // The context is gone. Its slots are lost.
  }
}

// A forked child has the parent's runs but not its threads, and would submit the same commands a second time.
void IoRun::check_process() const {
  if (process_ != getpid()) {
    throw Failure(FailureKind::kCancelled, "the transfer was started by the parent process and runs only there");
  }
}

void IoRun::attach(const std::vector<std::shared_ptr<IoQueue>>& queues, bool retry) {
  check_process();
  std::lock_guard lock(mutex_);
  for (const auto& queue : queues) {
    if (queue->page_bytes() != options_.page_bytes) {
      throw std::invalid_argument("the queue and the transfer disagree about the controller's page size");
    }
  }
  const auto stays = [&](const Use& use) { return std::find(queues.begin(), queues.end(), use.queue) != queues.end(); };
  for (const Use& use : uses_) {
    if (!stays(use) && !use.queue->stopped()) throw std::invalid_argument("a queue is stopped before it is left");
  }
  if (queues.empty()) abandoned_ = true;
  // Completions that were reaped and not looked at may lead to copies.
  std::optional<CudaContextScope> scope;
  if (lane_ != nullptr) scope.emplace(device_);
  for (auto use = uses_.begin(); use != uses_.end();) {
    if (stays(*use)) {
      ++use;
      continue;
    }
    leave_queue(*use, retry);
    use = uses_.erase(use);
  }
  for (const auto& queue : queues) {
    const bool known = std::any_of(uses_.begin(), uses_.end(), [&](const Use& use) { return use.queue == queue; });
    if (!known) uses_.emplace_back().queue = queue;
  }
}

// The controller no longer knows the queue: what was in flight there is not any more.
void IoRun::leave_queue(Use& use, bool retry) {
  harvest(use);
  while (Command* command = use.oldest) {
    unlink(*command);
    spare_commands_.push_back(command);
    if (retry && !ending()) {
      submit_again(command->part, false);
    } else {
      fail(*command, 0, Failed::Kind::kLost);
    }
  }
  const auto others =
      std::partition(stuck_.begin(), stuck_.end(), [&](Command* command) { return command->use != &use; });
  const std::vector<Command*> stuck(others, stuck_.end());
  stuck_.erase(others, stuck_.end());
  for (Command* command : stuck) {
    spare_commands_.push_back(command);
    if (retry && command->part.tries < kMostTries && !ending()) {
      submit_again(command->part, true);
    } else {
      fail(*command, 0, Failed::Kind::kTimeout);
    }
  }
}

IoRun::State IoRun::drive(double seconds) {
  check_process();
  std::lock_guard lock(mutex_);
  if (is_done()) return finish();
  std::vector<std::shared_lock<std::shared_mutex>> inside;
  inside.reserve(uses_.size());
  for (Use& use : uses_) {
    if (use.queue->stopped()) return State::kStopped;
    inside.push_back(use.queue->enter());
  }
  std::optional<CudaContextScope> scope;
  if (lane_ != nullptr) scope.emplace(device_);
  now_ = clock_();
  const std::int64_t end = now_ + nanoseconds(seconds);
  unsigned idle = 0;
  for (unsigned turn = 1;; ++turn) {
    if (a_queue_stopped()) return State::kStopped;
    bool progress = reap();
    if (!copying_.empty()) progress |= take_back_copies();
    progress |= submit();
    if (in_flight_ == 0 && is_done()) return finish();
    idle = progress ? 0 : idle + 1;
    if (idle != 0) rest(idle);
    if (turn % kTurnsPerLook != 0 && idle <= kSpins && seconds > 0) continue;
    now_ = clock_();
    look_after_stuck();
    if (expire()) return State::kTimeout;
    if (now_ < end) continue;
    const bool only_stuck = in_flight_ == 0 && copying_.empty() && !stuck_.empty();
    return only_stuck ? State::kTimeout : State::kRunning;
  }
}

bool IoRun::a_queue_stopped() const {
  for (const Use& use : uses_) {
    if (use.queue->stopped()) return true;
  }
  return false;
}

bool IoRun::is_done() const {
  if (in_flight_ != 0 || !stuck_.empty() || !copying_.empty()) return false;
  if (ending()) return bounces_.empty() && retries_.empty();
  return work_ == works_.size() && retries_.empty() && bounces_.empty();
}

IoRun::State IoRun::finish() {
  if (counts_.seconds == 0) counts_.seconds = static_cast<double>(clock_() - start_) / 1e9;
  if (error_ != nullptr) std::rethrow_exception(error_);
  return State::kDone;
}

// Puts commands that are past their deadline into quarantine. True if there were any.
bool IoRun::expire() {
  bool any = false;
  const auto is_late = [this](const Use& use) { return use.oldest != nullptr && use.oldest->deadline <= now_; };
  for (Use& use : uses_) {
    // What has come is not late, however long this thread was away.
    while (is_late(use) && reap(use)) {
    }
    while (is_late(use)) {
      Command& command = *use.oldest;
      Completion completion;
      if (use.queue->pair().quarantine(command.cid)) {
        unlink(command);
        stuck_.push_back(&command);
        ++counts_.timeouts;
        any = true;
      } else if (use.queue->pair().poll(command.cid, completion)) {
        complete(command, completion.status);
      }
    }
  }
  return any;
}

// Commands whose completion has come after all, as it does after an Abort: the controller is finished with their
// memory.
bool IoRun::look_after_stuck() {
  bool any = false;
  for (std::size_t i = 0; i < stuck_.size();) {
    Command& command = *stuck_[i];
    if (command.use->queue->pair().is_quarantined(command.cid)) {
      ++i;
      continue;
    }
    stuck_.erase(stuck_.begin() + static_cast<std::ptrdiff_t>(i));
    spare_commands_.push_back(&command);
    if (command.part.tries < kMostTries && !ending()) {
      submit_again(command.part, true);
    } else {
      fail(command, 0, Failed::Kind::kTimeout);
    }
    any = true;
  }
  return any;
}

void IoRun::fail(const Command& command, std::uint16_t status, Failed::Kind kind) {
  const Part part = command.part;
  const Work& work = *part.work;
  Failed failed{work.opcode, 0, part.nbytes >> lba_shift_, command.use->queue->id(), command.cid, status, kind};
  if (!work.simple) {
    failed.lba = work.lba_at(part.place, lba_shift_);
  } else if (work.opcode != 0 && work.opcode != 9) {
    // All but flush and dataset management name a range.
    failed.lba = work.cdw[0] | std::uint64_t{work.cdw[1]} << 32;
    failed.blocks = (work.cdw[2] & 0xffff) + 1;
  }
  failures_.push_back(failed);
  if (part.bounce != nullptr) part.bounce->failed = true;
  part_done(part);
}

void IoRun::abandon() {
  check_process();
  std::lock_guard lock(mutex_);
  abandoned_ = true;
  end_unsubmitted();
}

// Forgets what is not in flight.
void IoRun::end_unsubmitted() {
  while (!retries_.empty()) {
    const Part part = retries_.front();
    retries_.pop_front();
    if (part.bounce != nullptr) --part.bounce->outstanding;
  }
  issuing_.clear();
  for (auto bounce = bounces_.begin(); bounce != bounces_.end();) {
    Bounce& ended = *bounce++;
    const bool copying = std::find(copying_.begin(), copying_.end(), &ended) != copying_.end();
    if (ended.outstanding == 0 && !copying) end_bounce(ended);
  }
}

std::vector<std::pair<std::uint16_t, std::uint16_t>> IoRun::timed_out() const {
  check_process();
  std::lock_guard lock(mutex_);
  std::vector<std::pair<std::uint16_t, std::uint16_t>> all;
  for (const Command* command : stuck_) all.emplace_back(command->use->queue->id(), command->cid);
  return all;
}

std::vector<IoRun::Failed> IoRun::failures() const {
  check_process();
  std::lock_guard lock(mutex_);
  return failures_;
}

IoRun::Counts IoRun::counts() const {
  check_process();
  std::lock_guard lock(mutex_);
  Counts counts = counts_;
  if (counts.seconds == 0) counts.seconds = static_cast<double>(clock_() - start_) / 1e9;
  return counts;
}

}  // namespace gpunvme
