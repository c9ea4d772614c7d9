#include "crew.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>

#include "spin_lock.h"

namespace gpunvme::soft {
namespace {

constexpr unsigned kPassesPerYield = 32;
constexpr unsigned kPassesBeforeYield = 2 * kPassesPerYield;
constexpr std::chrono::microseconds kSpinFor{200};
constexpr std::chrono::microseconds kShortestSleep{20};
constexpr std::chrono::microseconds kLongestSleep{1000};

}  // namespace

Crew::Crew(Device& device, Admin& admin) : device_(device) {
  const unsigned count = std::max(1u, device.options.threads);
  for (unsigned i = 0; i < count; ++i) {
    workers_.emplace_back(device, admin, device.iova.add_reader(), device.counters.emplace_back(), i, count);
  }
  for (unsigned i = 0; i < device.options.threads; ++i) {
    threads_.emplace_back([this, i] { run(workers_[i]); });
  }
}

void Crew::run(Worker& worker) {
  pthread_setname_np(pthread_self(), "nvme-soft");
  prctl(PR_SET_TIMERSLACK, 1UL);  // short sleeps are meant to be short
  unsigned idle = 0;
  Clock::time_point since{};
  worker.go_online();
  for (;;) {
    // Sequentially consistent, after go_online's store: either this sees that a pause began, or the one who pauses sees
    // that this worker is online.
    if (attention_.load(std::memory_order_seq_cst)) [[unlikely]] {
      if (!attend(worker)) return;
      continue;
    }
    if (worker.pass() > 0) {
      idle = 0;
    } else {
      rest(worker, idle, since);
    }
  }
}

// False: the thread is to end.
bool Crew::attend(Worker& worker) {
  worker.go_offline();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return pauses_ == 0 || stopping_; });
  if (stopping_) return false;
  worker.go_online();
  return true;
}

// Nothing to do: spin, then yield now and then, then sleep longer and longer. `idle` counts passes without work,
// `since` is when that began, near enough.
void Crew::rest(Worker& worker, unsigned& idle, Clock::time_point& since) {
  ++idle;
  if (idle < kPassesBeforeYield) {
    relax();
    return;
  }
  if (idle == kPassesBeforeYield) since = Clock::now();
  if (idle % kPassesPerYield != 0) {
    relax();
    return;
  }
  sched_yield();
  const auto quiet = Clock::now() - since;
  if (quiet < kSpinFor || worker.waits_for_drive()) return;
  worker.look_everywhere();
  // A fifth of the time that nothing has happened for: 40 µs at first.
  const auto nap =
      std::clamp(std::chrono::duration_cast<std::chrono::microseconds>(quiet / 5), kShortestSleep, kLongestSleep);
  idle = kPassesBeforeYield + kPassesPerYield - 1;  // after the next pass without work: here again
  const std::uint64_t wakes = wakes_.load(std::memory_order_relaxed);
  worker.go_offline();
  {
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1);
    changed_.wait_for(lock, nap, [&] { return attention_.load() || wakes_.load() != wakes; });
    sleeping_.fetch_sub(1);
  }
  worker.go_online();
}

void Crew::wake() {
  wakes_.fetch_add(1);
  if (sleeping_.load() == 0) return;
  const std::lock_guard lock(mutex_);
  changed_.notify_all();
}

Crew::Pause::Pause(Crew& crew) : crew_(crew) {
  {
    const std::lock_guard lock(crew_.mutex_);
    ++crew_.pauses_;
    crew_.attention_.store(true, std::memory_order_seq_cst);
  }
  crew_.changed_.notify_all();
  for (Worker& worker : crew_.workers_) {
    for (int round = 0; !worker.offline(); ++round) {
      if (round < 1000) {
        sched_yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(50));  // it waits for the image's drive
      }
    }
  }
}

Crew::Pause::~Pause() {
  const std::lock_guard lock(crew_.mutex_);
  if (--crew_.pauses_ == 0) crew_.attention_.store(crew_.stopping_, std::memory_order_seq_cst);
  crew_.changed_.notify_all();
}

unsigned Crew::step() {
  const std::lock_guard lock(step_mutex_);
  Worker& worker = workers_.front();
  for (;;) {
    worker.go_online();
    if (!attention_.load(std::memory_order_seq_cst)) break;
    worker.go_offline();
    std::unique_lock waiting(mutex_);
    changed_.wait(waiting, [&] { return pauses_ == 0; });
    if (stopping_) return 0;
  }
  const unsigned fetched = worker.pass();
  if (fetched == 0) worker.look_everywhere();
  worker.go_offline();
  return fetched;
}

void Crew::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    attention_.store(true, std::memory_order_seq_cst);
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace gpunvme::soft
