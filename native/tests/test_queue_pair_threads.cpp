// One queue pair, many submitters that reap for each other, and a controller in a thread of its own that does
// everything that a controller may do and some things that it must not. Worth most under ThreadSanitizer.
#include <algorithm>
#include <atomic>

#include "queue_memory.h"

using namespace testing;

namespace {

// A command carries the address of a word of its submitter's, which the controller writes before it completes.
struct Data {
  std::uint64_t word = 0;
  std::atomic<bool> given_up{false};  // the controller let it be known that this completion will not come in time
};

std::uint64_t answer(std::uint32_t number) { return number * std::uint64_t{0x9e3779b97f4a7c15}; }

struct Mischief {
  bool reorder = true;
  bool duplicates = false;
  bool strays = false;
  bool torn = false;
  bool late = false;
  bool lagging_heads = false;
};

class ControllerThread {
 public:
  ControllerThread(const QueueMemory& shared, const Mischief& mischief, std::uint64_t seed)
      : controller_(shared), mischief_(mischief), random_(seed) {
    threads_.start([this] { run(); });
  }
  ~ControllerThread() { quitting_ = true; }
  // Ends it when all commands were answered; its failed checks fail the test.
  void finish() {
    ending_ = true;
    threads_.finish();
  }
  std::uint64_t strays() const { return strays_; }  // completions that finish nothing
  std::uint64_t fetched() const { return controller_.fetched(); }

 private:
  struct Waiting {
    Sqe sqe;
    Data* data;
    std::uint32_t head;  // the SQ head when it had just been fetched
    int patience;        // steps until a given up command is answered after all
  };

  void run() {
    while (!quitting_ && (!ending_ || !waiting_.empty() || !late_.empty())) {
      if (!step()) std::this_thread::yield();
    }
  }

  bool step() {
    bool progress = false;
    while (waiting_.size() < 16) {
      const auto sqe = controller_.fetch();
      if (!sqe) break;
      progress = true;
      auto* const data = reinterpret_cast<Data*>(sqe->prp1);
      if (mischief_.late && random_.one_in(20) && late_.size() < 2) {
        late_.push_back({*sqe, data, controller_.sq_head(), 30});
        data->given_up.store(true, std::memory_order_release);
      } else {
        waiting_.push_back({*sqe, data, controller_.sq_head(), 0});
      }
    }
    for (std::size_t i = 0; i < late_.size();) {
      if (--late_[i].patience > 0 || controller_.is_full()) {
        ++i;
        continue;
      }
      // Whoever waited for it has given it up by now, or will find it done: both must be safe.
      answer_to(late_[i]);
      late_.erase(late_.begin() + static_cast<std::ptrdiff_t>(i));
      progress = true;
    }
    // Keeps some back, so that there is something to put out of order; and lets the CQ become full.
    const std::size_t keep = mischief_.reorder && !ending_ ? random_.below(8) : 0;
    while (waiting_.size() > keep && !controller_.is_full()) {
      const std::size_t which = mischief_.reorder ? random_.below(waiting_.size()) : 0;
      const Waiting chosen = waiting_[which];
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(which));
      answer_to(chosen);
      progress = true;
    }
    return progress || !late_.empty();
  }

  void answer_to(const Waiting& waiting) {
    const Sqe& sqe = waiting.sqe;
    waiting.data->word = answer(sqe.cdw10);
    const auto status = static_cast<std::uint16_t>(sqe.cdw10 & 0x7fff);
    if (mischief_.torn && random_.one_in(2)) {
      controller_.post_torn(sqe.cid, status, sqe.cdw10, [] { std::this_thread::yield(); });
    } else if (mischief_.lagging_heads && random_.one_in(2)) {
      controller_.post_with_head(sqe.cid, waiting.head, status, sqe.cdw10);
    } else {
      controller_.post(sqe.cid, status, sqe.cdw10);
    }
    if (mischief_.duplicates && random_.one_in(5) && !controller_.is_full()) {
      controller_.post(sqe.cid, 0x7fff, 0xbad);
      ++strays_;
    }
    if (mischief_.strays && random_.one_in(5) && !controller_.is_full()) {
      controller_.post(0xffff, 0x7fff, 0xbad);
      ++strays_;
    }
  }

  Controller controller_;
  const Mischief mischief_;
  check::Random random_;
  std::vector<Waiting> waiting_;
  std::vector<Waiting> late_;
  std::uint64_t strays_ = 0;
  std::atomic<bool> ending_{false};
  std::atomic<bool> quitting_{false};
  Threads threads_;
};

// Submits commands one after another or several at a time, and checks each.
class Submitter {
 public:
  Submitter(const Driver& driver, std::uint64_t seed, int commands)
      : driver_(driver), random_(seed), commands_(commands), number_(static_cast<std::uint32_t>(seed << 20)) {}

  void run() {
    while (submitted_ < commands_ || !flying_.empty()) {
      if (submitted_ < commands_ && flying_.size() < 8 && submit()) continue;
      if (flying_.empty()) {
        driver_.reap();
        std::this_thread::yield();
        continue;
      }
      driver_.pair.ring();
      take(random_.below(flying_.size()));
    }
  }
  std::uint64_t timeouts() const { return timeouts_; }

 private:
  struct Flying {
    std::uint16_t cid;
    std::uint32_t number;
    Data* data;
  };

  bool submit() {
    const std::uint32_t slot = driver_.pair.claim();
    if (slot == QueuePair::kNoSlot) return false;
    // Memory of a command that was given up is not used again: the controller may still write it.
    if (spare_.empty()) {
      all_.emplace_back();
      spare_.push_back(&all_.back());
    }
    Data* const data = spare_.back();
    Sqe sqe{};
    sqe.cdw10 = number_;
    sqe.prp1 = reinterpret_cast<std::uint64_t>(data);
    if (driver_.pair.submit(slot, sqe) != Submitted::kOk) {
      driver_.pair.release(slot);
      return false;
    }
    spare_.pop_back();
    flying_.push_back({sqe.cid, number_, data});
    ++number_;
    ++submitted_;
    if (random_.one_in(2)) driver_.pair.ring();
    return true;
  }

  void take(std::size_t which) {
    const Flying flying = flying_[which];
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(which));
    Completion completion{};
    const auto expired = [&] {
      std::this_thread::yield();
      return flying.data->given_up.load(std::memory_order_acquire);
    };
    if (driver_.pair.wait(flying.cid, completion, expired) == Waited::kTimeout) {
      ++timeouts_;
      return;
    }
    CHECK_EQ(completion.result, flying.number);
    CHECK_EQ(completion.status, flying.number & 0x7fff);
    CHECK_EQ(flying.data->word, answer(flying.number));
    flying.data->word = 0;
    flying.data->given_up.store(false, std::memory_order_relaxed);
    spare_.push_back(flying.data);
  }

  const Driver& driver_;
  check::Random random_;
  const int commands_;
  std::uint32_t number_;
  int submitted_ = 0;
  std::uint64_t timeouts_ = 0;
  std::deque<Data> all_;
  std::vector<Data*> spare_;
  std::vector<Flying> flying_;
};

void storm(std::uint32_t sq, std::uint32_t cq, std::uint32_t slots, const Mischief& mischief, std::uint64_t seed) {
  constexpr int kSubmitters = 4;
  // In tiny queues every command waits for another thread's turn on the CPU.
  const int commands = check::rounds(std::min(sq, cq) < 8 ? 60 : 400);
  const Driver driver(sq, cq, slots);
  ControllerThread controller(driver.shared, mischief, seed);
  std::deque<Submitter> submitters;
  for (int i = 0; i < kSubmitters; ++i) {
    submitters.emplace_back(driver, seed * 8 + static_cast<std::uint64_t>(i) + 1, commands);
  }
  {
    Threads threads;
    for (Submitter& submitter : submitters) threads.start([&submitter] { submitter.run(); });
    threads.finish();
  }
  controller.finish();
  while (driver.reap() != 0) {
  }
  std::uint64_t timeouts = 0;
  for (const Submitter& submitter : submitters) timeouts += submitter.timeouts();
  const QueuePair::State& state = driver.pair.state();
  CHECK_EQ(controller.fetched(), static_cast<std::uint64_t>(kSubmitters * commands));
  CHECK_EQ(state.completed.load_relaxed(), kSubmitters * commands - timeouts);
  CHECK_EQ(state.unknown.load_relaxed() + state.late.load_relaxed(), controller.strays() + timeouts);
  CHECK_EQ(state.bad_head.load_relaxed(), 0u);
  CHECK_EQ(state.stuck.load_relaxed(), 0u);
  driver.pair.for_each_in_flight([](std::uint16_t, bool) { CHECK(false); });
}

struct Sizes {
  std::uint32_t sq;
  std::uint32_t cq;
  std::uint32_t slots;
};
constexpr Sizes kSizes[] = {{2, 2, 1}, {3, 3, 2}, {5, 5, 4}, {7, 7, 6}, {64, 64, 63}, {3, 64, 40}, {64, 3, 63}};

void storms(const Mischief& mischief, std::uint64_t seed) {
  for (const Sizes& sizes : kSizes) storm(sizes.sq, sizes.cq, sizes.slots, mischief, seed++);
}

}  // namespace

TEST(doorbells_never_go_backwards_with_several_submitters) {
  Mischief mischief;
  mischief.reorder = false;
  for (std::uint64_t round = 0; round < 3; ++round) storms(mischief, 100 + 10 * round);
}

TEST(doorbell_of_another_thread_tells_of_entries_that_are_visible) {
  const Driver driver(8);
  Controller controller(driver.shared);
  // Relaxed: nothing but the queue pair orders the two threads.
  std::atomic<std::uint32_t> submitted{0};
  Threads threads;
  threads.start([&] {
    for (std::uint32_t number = 0; number < 7; ++number) {
      driver.submit(number, false);
      submitted.store(number + 1, std::memory_order_relaxed);
    }
  });
  threads.start([&] {
    for (std::uint32_t number = 0; number < 7; ++number) {
      while (submitted.load(std::memory_order_relaxed) <= number) std::this_thread::yield();
      driver.pair.ring();
      CHECK_EQ(controller.must_fetch().cdw10, number);
    }
  });
  threads.finish();
}

TEST(data_is_visible_before_its_completion_is) { storms({}, 20); }

TEST(sq_heads_that_lag_with_several_reapers) {
  Mischief mischief;
  mischief.lagging_heads = true;
  storms(mischief, 25);
}

TEST(torn_cqes_with_several_reapers) {
  Mischief mischief;
  mischief.torn = true;
  storms(mischief, 30);
}

TEST(duplicate_and_unknown_cids_with_several_reapers) {
  Mischief mischief;
  mischief.duplicates = true;
  mischief.strays = true;
  storms(mischief, 40);
}

TEST(late_completions_race_with_quarantine) {
  Mischief mischief;
  mischief.late = true;
  storms(mischief, 50);
}

TEST(all_at_once) {
  Mischief mischief;
  mischief.duplicates = true;
  mischief.strays = true;
  mischief.torn = true;
  mischief.late = true;
  mischief.lagging_heads = true;
  for (std::uint64_t round = 0; round < 2; ++round) storms(mischief, 60 + 10 * round);
}

TEST(stop_ends_every_wait) {
  const Driver driver(64);
  Threads threads;
  std::atomic<int> waiting{0};
  for (int i = 0; i < 4; ++i) {
    threads.start([&] {
      const std::uint16_t cid = driver.submit(1);
      Completion completion;
      ++waiting;
      CHECK_EQ(driver.pair.wait(cid, completion,
                                [] {
                                  std::this_thread::yield();
                                  return false;
                                }),
               Waited::kStopped);
    });
  }
  while (waiting != 4) std::this_thread::yield();
  driver.pair.stop();
  threads.finish();
}
