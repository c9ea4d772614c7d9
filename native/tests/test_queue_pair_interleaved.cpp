// One queue pair and threads that take turns at every atomic access: what one of them does between two steps of another
// must not matter, wherever that is.
#include "fibers.h"
#include "gpunvme/warp_queue.h"
#include "queue_memory.h"

using namespace testing;

namespace {

struct Sizes {
  std::uint32_t sq;
  std::uint32_t cq;
  std::uint32_t slots;
};
constexpr Sizes kSizes[] = {{2, 2, 1}, {3, 3, 2}, {4, 4, 3}, {7, 7, 6}, {16, 16, 15}, {3, 16, 8}, {16, 3, 15}};

// Answers commands in any order until `commands` of them were seen.
void answer(const Driver& driver, int commands, std::uint64_t seed) {
  check::Random random(seed);
  Controller controller(driver.shared);
  std::vector<Sqe> waiting;
  for (int seen = 0; seen < commands || !waiting.empty();) {
    if (const auto sqe = controller.fetch()) {
      waiting.push_back(*sqe);
      ++seen;
    }
    if (waiting.empty() || controller.is_full() || (seen < commands && random.one_in(2))) continue;
    const std::size_t which = random.below(waiting.size());
    controller.post(waiting[which].cid, 0, waiting[which].cdw10);
    waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(which));
  }
}

// Submits commands one by one, rings once for each, and waits for each. Lanes that reap do not read DW0.
template <bool kHasResult = true>
void submit_and_wait(const Driver& driver, int commands, std::uint32_t number) {
  for (int i = 0; i < commands; ++i, ++number) {
    std::uint32_t slot = QueuePair::kNoSlot;
    Sqe sqe{};
    sqe.cdw10 = number;
    while ((slot = driver.pair.claim()) == QueuePair::kNoSlot) driver.reap();
    while (driver.pair.submit(slot, sqe) != Submitted::kOk) driver.reap();
    driver.pair.ring();
    Completion completion;
    CHECK_EQ(driver.pair.wait(sqe.cid, completion, [] { return false; }), Waited::kDone);
    if (kHasResult) CHECK_EQ(completion.result, number);
  }
}

// The same as a group of lanes does it, here of one.
void submit_and_wait_as_lanes(const Driver& driver, int commands, std::uint32_t number) {
  const gpunvme::WarpQueue queue(driver.pair);
  const gpunvme::Lanes lanes = gpunvme::Lanes::here();
  bool busy = false;
  for (int i = 0; i < commands; ++i, ++number) {
    std::uint32_t slot = QueuePair::kNoSlot;
    std::uint16_t cid = 0;
    std::uint16_t status = 0;
    const gpunvme::IoCommand command{gpunvme::nvme::kNvmRead, 1, 0, 0, number, 0};
    while ((slot = driver.pair.claim()) == QueuePair::kNoSlot) queue.reap(lanes, 1, busy);
    while (queue.submit(lanes, slot, command, cid) != Submitted::kOk) queue.reap(lanes, 1, busy);
    while (!queue.is_done(slot, cid, status)) queue.reap(lanes, 1, busy);
    CHECK_EQ(status, 0);
    queue.release(slot);
  }
}

}  // namespace

// A doorbell that goes backwards or tells of what is not written, one that nobody rings, two reapers at once, an entry
// written over before it was fetched: each ends in a check of the controller's, a wrong answer, or nobody getting on.
TEST(submitters_that_reap_for_each_other) {
  if (!kHasFibers) SKIP("not under sanitizers");
  constexpr int kCommands = 6;
  constexpr int kSubmitters = 3;
  std::uint64_t seed = 0;
  for (int round = 0; round < check::rounds(150); ++round) {
    for (const Sizes& sizes : kSizes) {
      const Driver driver(sizes.sq, sizes.cq, sizes.slots);
      Fibers fibers(++seed);
      fibers.start([&] { answer(driver, kSubmitters * kCommands, seed); });
      for (std::uint32_t i = 0; i < kSubmitters; ++i) {
        fibers.start([&driver, i] { submit_and_wait<>(driver, kCommands, 1000 * (i + 1)); });
      }
      fibers.run();
      const QueuePair::State& state = driver.pair.state();
      CHECK_EQ(state.completed.load_relaxed(), static_cast<std::uint64_t>(kSubmitters * kCommands));
      CHECK_EQ(state.unknown.load_relaxed() + state.late.load_relaxed() + state.bad_head.load_relaxed(), 0u);
      driver.pair.for_each_in_flight([](std::uint16_t, bool) { CHECK(false); });
    }
  }
}

// Lanes take the role of who rings before they write their entry: nobody else may have it then, and none may be left
// out who came meanwhile.
TEST(lanes_that_ring_for_each_other_and_for_others) {
  if (!kHasFibers) SKIP("not under sanitizers");
  constexpr int kCommands = 6;
  constexpr int kSubmitters = 4;
  std::uint64_t seed = 0;
  for (int round = 0; round < check::rounds(50); ++round) {
    for (const Sizes& sizes : kSizes) {
      if (sizes.slots >= sizes.cq) continue;  // which lanes count on
      for (const int lanes : {kSubmitters, kSubmitters / 2}) {
        const Driver driver(sizes.sq, sizes.cq, sizes.slots);
        Fibers fibers(++seed);
        fibers.start([&] { answer(driver, kSubmitters * kCommands, seed); });
        for (int i = 0; i < kSubmitters; ++i) {
          const auto submit = i < lanes ? submit_and_wait_as_lanes : submit_and_wait<false>;
          fibers.start([&driver, i, submit] { submit(driver, kCommands, 1000u * static_cast<std::uint32_t>(i + 1)); });
        }
        fibers.run();
        const QueuePair::State& state = driver.pair.state();
        CHECK_EQ(state.completed.load_relaxed(), static_cast<std::uint64_t>(kSubmitters * kCommands));
        CHECK_EQ(state.ringers.load_relaxed(), 0u);
        CHECK_EQ(state.unknown.load_relaxed() + state.late.load_relaxed() + state.bad_head.load_relaxed(), 0u);
        driver.pair.for_each_in_flight([](std::uint16_t, bool) { CHECK(false); });
      }
    }
  }
}

TEST(exactly_one_of_completion_and_quarantine_wins) {
  if (!kHasFibers) SKIP("not under sanitizers");
  std::uint64_t given_up = 0;
  const auto rounds = static_cast<std::uint64_t>(check::rounds(3000));
  for (std::uint64_t round = 0; round < rounds; ++round) {
    const Driver driver(4);
    Controller controller(driver.shared);
    const std::uint16_t cid = driver.submit(1);
    controller.must_fetch();
    controller.post(cid);
    bool won = false;
    Fibers fibers(round);
    fibers.start([&] { CHECK_EQ(driver.reap(), 1u); });
    fibers.start([&] { won = driver.pair.quarantine(cid); });
    fibers.run();
    CHECK_EQ(driver.poll(cid), !won);
    const QueuePair::State& state = driver.pair.state();
    CHECK_EQ(state.late.load_relaxed(), won ? 1u : 0u);
    CHECK_EQ(state.completed.load_relaxed(), won ? 0u : 1u);
    CHECK_EQ(state.stuck.load_relaxed(), 0u);
    given_up += won;
  }
  CHECK(given_up > 0 && given_up < rounds);
}

TEST(a_wait_that_times_out_leaves_its_slot_to_the_late_completion) {
  if (!kHasFibers) SKIP("not under sanitizers");
  for (int round = 0; round < check::rounds(1000); ++round) {
    const Driver driver(3);
    Fibers fibers(static_cast<std::uint64_t>(round));
    fibers.start([&] { answer(driver, 10, static_cast<std::uint64_t>(round)); });
    int late = 0;
    fibers.start([&] {
      check::Random random(static_cast<std::uint64_t>(round));
      for (std::uint32_t number = 0; number < 10; ++number) {
        std::uint32_t slot = QueuePair::kNoSlot;
        Sqe sqe{};
        sqe.cdw10 = number;
        while ((slot = driver.pair.claim()) == QueuePair::kNoSlot) driver.reap();
        while (driver.pair.submit(slot, sqe) != Submitted::kOk) driver.reap();
        driver.pair.ring();
        Completion completion;
        const Waited waited = driver.pair.wait(sqe.cid, completion, [&] { return random.one_in(8); });
        if (waited == Waited::kTimeout) {
          ++late;
        } else {
          CHECK_EQ(completion.result, number);
        }
      }
    });
    fibers.run();
    while (driver.reap() != 0) {
    }
    CHECK_EQ(driver.pair.state().late.load_relaxed(), static_cast<std::uint64_t>(late));
    CHECK_EQ(driver.pair.state().stuck.load_relaxed(), 0u);
    std::uint32_t free = 0;
    while (driver.pair.claim() != QueuePair::kNoSlot) ++free;
    CHECK_EQ(free, 2u);
  }
}
