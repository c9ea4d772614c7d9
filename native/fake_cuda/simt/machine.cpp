#include "machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "warp.h"

namespace simt {

Random& random() {
  static Random numbers;
  return numbers;
}

namespace {

// Threads of blocks that are resident at once: what comes on top waits until others have ended.
constexpr unsigned kResidentThreads = 2048;
// Warp turns of a pass: now many, now hardly any, so that warps meet in all positions.
constexpr unsigned kMostTurns = 200;
constexpr auto kNap = std::chrono::microseconds(50);  // where all lanes sleep

// A launch that was accepted.
struct Running {
  Launch launch;
  std::uint64_t blocks;
  std::uint64_t next = 0;  // block to become resident
  std::uint64_t resident = 0;
  int error = 0;
  bool ended = false;

  explicit Running(const Launch& given)
      : launch(given), blocks(std::uint64_t{given.grid.x} * given.grid.y * given.grid.z) {}
  Index index(std::uint64_t number) const {
    const Index& grid = launch.grid;
    return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
            static_cast<unsigned>(number / grid.x / grid.y)};
  }
};

struct Resident {
  Running* of;
  std::unique_ptr<Block> block;
};

class Machine {
 public:
  int run(const Launch& launch) {
    Running running(launch);
    std::unique_lock lock(mutex_);
    if (!started_) {
      started_ = true;
      std::thread([this] { work(); }).detach();
    }
    running_.push_back(&running);
    changed_.notify_all();
    changed_.wait(lock, [&] { return running.ended; });
    return running.error;
  }

 private:
  [[noreturn]] void work() {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !running_.empty(); });
        admit();
      }
      pass();
    }
  }

  // New blocks, of each launch in turn, as far as there is room.
  void admit() {
    for (bool any = true; any;) {
      any = false;
      for (Running* const running : running_) {
        const Index& size = running->launch.block;
        const unsigned threads = size.x * size.y * size.z;
        if (running->next == running->blocks || (threads_ != 0 && threads_ + threads > kResidentThreads)) continue;
        resident_.push_back({running, std::make_unique<Block>(running->launch, running->index(running->next++))});
        ++running->resident;
        threads_ += threads;
        any = true;
      }
    }
  }

  void pass() {
    const unsigned most = random().one_in(2) ? 1 + random().below(8) : kMostTurns;
    turns() = sleeps() = 0;
    const std::size_t first = random().below(static_cast<unsigned>(resident_.size()));
    int failed_context = -1;
    int error = 0;
    for (std::size_t i = 0; i < resident_.size() && error == 0; ++i) {
      Resident& each = resident_[(first + i) % resident_.size()];
      error = each.block->run(most);
      if (error != 0) failed_context = each.of->launch.context;
    }
    const std::lock_guard lock(mutex_);
    if (error != 0) {
      for (Running* const running : running_) {
        if (running->launch.context == failed_context) running->error = error;
      }
    }
    std::erase_if(resident_, [this](const Resident& each) {
      if (!each.block->ended() && each.of->error == 0) return false;
      threads_ -= each.block->threads();
      --each.of->resident;
      return true;
    });
    std::erase_if(running_, [](Running* running) {
      if (running->resident != 0 || (running->error == 0 && running->next != running->blocks)) return false;
      running->ended = true;
      return true;
    });
    changed_.notify_all();
    // Controllers need the CPU, too.
    if (turns() == sleeps() && !resident_.empty()) {
      std::this_thread::sleep_for(kNap);
    } else {
      sched_yield();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool started_ = false;
  std::vector<Running*> running_;
  std::vector<Resident> resident_;  // the machine's thread alone
  unsigned threads_ = 0;
};

// Never destroyed: its thread runs until the process ends. A forked child has no such thread, and gets another.
Machine& machine() {
  static std::mutex mutex;
  static Machine* the_machine = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (owner != getpid()) {
    owner = getpid();
    the_machine = new Machine;
  }
  return *the_machine;
}

}  // namespace

unsigned& turns() {
  static unsigned count = 0;
  return count;
}
unsigned& sleeps() {
  static unsigned count = 0;
  return count;
}

int run(const Launch& launch) { return machine().run(launch); }

void seed(std::uint64_t seed) { random().seed(seed); }

}  // namespace simt
