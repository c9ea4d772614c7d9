// One queue pair, driver and controller stepped by one thread: each hazard of NVMe queues by name.
#include <algorithm>
#include <set>

#include "queue_memory.h"

using namespace testing;

namespace {

constexpr std::uint32_t kSizes[] = {2, 3, 5, 7, 64, 1000};

std::uint64_t unknown(const Driver& driver) { return driver.pair.state().unknown.load_relaxed(); }
std::uint64_t late(const Driver& driver) { return driver.pair.state().late.load_relaxed(); }
std::uint64_t bad_head(const Driver& driver) { return driver.pair.state().bad_head.load_relaxed(); }
std::uint64_t completed(const Driver& driver) { return driver.pair.state().completed.load_relaxed(); }

// One command from end to end.
void round_trip(const Driver& driver, Controller& controller, std::uint32_t number) {
  const std::uint16_t cid = driver.submit(number);
  const Sqe sqe = controller.must_fetch();
  CHECK_EQ(sqe.cid, cid);
  CHECK_EQ(sqe.cdw10, number);
  CHECK(!driver.poll(cid));
  controller.post(cid, 0, number + 1);
  CHECK_EQ(driver.reap(), 1u);
  CHECK(driver.poll(cid));
  CHECK_EQ(driver.last.status, 0u);
  CHECK_EQ(driver.last.result, number + 1);
}

}  // namespace

TEST(wrap_and_phase_with_sizes_that_are_not_powers_of_two) {
  for (const std::uint32_t size : kSizes) {
    const Driver driver(size);
    Controller controller(driver.shared);
    for (std::uint32_t number = 0; number < 5 * size + 3; ++number) round_trip(driver, controller, number);
    CHECK_EQ(completed(driver), 5 * size + 3);
    CHECK_EQ(unknown(driver) + late(driver) + bad_head(driver), 0u);
  }
}

TEST(sq_and_cq_of_different_sizes) {
  for (const std::uint32_t sq : {2u, 5u, 64u}) {
    for (const std::uint32_t cq : {2u, 3u, 64u}) {
      const Driver driver(sq, cq, sq - 1);
      Controller controller(driver.shared);
      for (std::uint32_t number = 0; number < 3 * std::max(sq, cq); ++number) round_trip(driver, controller, number);
    }
  }
}

TEST(sq_full_leaves_one_entry_empty) {
  for (const std::uint32_t size : kSizes) {
    const Driver driver(size);
    Controller controller(driver.shared);
    for (int lap = 0; lap < 3; ++lap) {
      std::vector<std::uint16_t> cids;
      for (std::uint32_t number = 0; number < size - 1; ++number) cids.push_back(driver.submit(number));
      CHECK_EQ(driver.pair.claim(), QueuePair::kNoSlot);
      for (const std::uint16_t cid : cids) CHECK_EQ(controller.must_fetch().cid, cid);
      CHECK(!controller.fetch());
      for (const std::uint16_t cid : cids) {
        controller.post(cid);
        driver.reap();
        CHECK(driver.poll(cid));
      }
    }
  }
}

TEST(sq_full_until_a_completion_names_an_sq_head) {
  // More commands may be in flight than the SQ has entries: an entry is free when the controller has fetched it.
  for (const std::uint32_t size : {2u, 3u, 5u, 8u}) {
    const Driver driver(size, 64, 60);
    Controller controller(driver.shared);
    std::vector<std::uint16_t> cids;
    while (cids.size() < 40) {
      const std::size_t before = cids.size();
      for (std::uint32_t number = 0; number < size - 1; ++number) cids.push_back(driver.submit(number));
      const std::uint32_t slot = driver.pair.claim();
      Sqe sqe{};
      CHECK_EQ(driver.pair.submit(slot, sqe), Submitted::kFull);
      for (std::size_t i = before; i < cids.size(); ++i) controller.must_fetch();
      // It has fetched them all and not said so.
      CHECK_EQ(driver.pair.submit(slot, sqe), Submitted::kFull);
      driver.pair.release(slot);
      controller.post(cids[before]);
      CHECK_EQ(driver.reap(), 1u);
      CHECK(driver.poll(cids[before]));
    }
  }
}

TEST(sq_head_lagging_does_not_free_entries_that_are_in_use) {
  // A controller with several threads posts completions with SQ heads that were true when each was made.
  const Driver driver(8);
  Controller controller(driver.shared);
  std::vector<std::uint16_t> cids;
  for (std::uint32_t number = 0; number < 7; ++number) cids.push_back(driver.submit(number));
  for (int i = 0; i < 7; ++i) controller.must_fetch();
  const auto head = [&] { return driver.pair.state().sq_head.load_relaxed(); };
  controller.post_with_head(cids[4], 7);
  driver.reap();
  CHECK_EQ(head(), 7u);
  controller.post_with_head(cids[0], 1);  // made before
  controller.post_with_head(cids[1], 3);
  driver.reap();
  CHECK_EQ(head(), 7u);
  CHECK_EQ(bad_head(driver), 0u);
  // Full again, with the entries of the next round: a head from before must not be taken for one far ahead.
  for (const std::size_t i : {4, 0, 1}) CHECK(driver.poll(cids[i]));
  for (std::uint32_t number = 7; number < 10; ++number) cids.push_back(driver.submit(number));
  controller.post_with_head(cids[2], 3);
  driver.reap();
  CHECK_EQ(head(), 7u);
  for (int i = 0; i < 3; ++i) controller.must_fetch();
  controller.post_with_head(cids[9], 2);
  driver.reap();
  CHECK_EQ(head(), 10u);
  CHECK_EQ(bad_head(driver), 0u);
}

TEST(sq_head_that_cannot_be_is_counted_and_not_believed) {
  const Driver driver(8);
  Controller controller(driver.shared);
  const std::uint16_t first = driver.submit(0);
  const std::uint16_t second = driver.submit(1);
  controller.must_fetch();
  controller.must_fetch();
  controller.post_with_head(first, 9);  // outside the queue
  driver.reap();
  CHECK_EQ(bad_head(driver), 1u);
  CHECK_EQ(driver.pair.state().sq_head.load_relaxed(), 1u);
  controller.post_with_head(second, 5);  // more than it was told of
  driver.reap();
  CHECK_EQ(bad_head(driver), 2u);
  CHECK_EQ(driver.pair.state().sq_head.load_relaxed(), 2u);
  // The commands themselves are done all the same.
  CHECK(driver.poll(first) && driver.poll(second));
}

TEST(cq_full_and_cq_head_doorbell_once_a_batch) {
  for (const std::uint32_t size : {3u, 5u, 64u, 1000u}) {
    const Driver driver(size);
    Controller controller(driver.shared);
    for (int lap = 0; lap < 5; ++lap) {
      std::vector<std::uint16_t> cids;
      for (std::uint32_t number = 0; number < size - 1; ++number) cids.push_back(driver.submit(number));
      while (controller.fetch()) {
      }
      for (const std::uint16_t cid : cids) controller.post(cid);
      CHECK(controller.is_full());
      std::uint32_t read = 0;
      while (const std::uint32_t batch = driver.reap()) {
        read += batch;
        CHECK(batch <= QueuePair::kBatch);
        // The controller has its room back after each batch; a doorbell that is forgotten stops it for ever.
        CHECK_EQ(controller.unread(), size - 1 - read);
      }
      CHECK_EQ(read, size - 1);
      for (const std::uint16_t cid : cids) CHECK(driver.poll(cid));
    }
  }
}

TEST(completions_out_of_order_finish_their_own_commands) {
  check::Random random(1);
  const Driver driver(64);
  Controller controller(driver.shared);
  for (int round = 0; round < check::rounds(50); ++round) {
    std::vector<std::pair<std::uint16_t, std::uint32_t>> flying;
    for (std::uint32_t number = 0; number < 63; ++number) flying.emplace_back(driver.submit(number), number);
    std::vector<Sqe> fetched;
    while (const auto sqe = controller.fetch()) fetched.push_back(*sqe);
    while (!fetched.empty()) {
      const std::size_t which = random.below(fetched.size());
      controller.post(fetched[which].cid, static_cast<std::uint16_t>(fetched[which].cdw10), fetched[which].cdw10 * 3);
      fetched.erase(fetched.begin() + static_cast<std::ptrdiff_t>(which));
    }
    while (driver.reap() != 0) {
    }
    for (const auto& [cid, number] : flying) {
      CHECK(driver.poll(cid));
      CHECK_EQ(driver.last.status, number);
      CHECK_EQ(driver.last.result, number * 3);
    }
  }
}

TEST(every_bit_of_the_status_reaches_the_caller) {
  const Driver driver(4);
  Controller controller(driver.shared);
  for (std::uint32_t status = 0; status < 0x8000; status += 7) {
    const std::uint16_t cid = driver.submit(status);
    controller.must_fetch();
    controller.post(cid, static_cast<std::uint16_t>(status), ~status);
    driver.reap();
    CHECK(driver.poll(cid));
    CHECK_EQ(driver.last.status, status);
    CHECK_EQ(driver.last.result, ~status);
  }
}

TEST(torn_cqe_is_not_read_before_its_phase_tag) {
  const Driver driver(4);
  Controller controller(driver.shared);
  for (std::uint32_t number = 0; number < 20; ++number) {
    const std::uint16_t cid = driver.submit(number);
    controller.must_fetch();
    controller.post_torn(cid, 5, number, [&] { CHECK_EQ(driver.reap(), 0u); });
    CHECK_EQ(driver.reap(), 1u);
    CHECK(driver.poll(cid));
    CHECK_EQ(driver.last.result, number);
  }
}

TEST(stale_phase_is_nothing_new) {
  for (const std::uint32_t size : {2u, 5u, 64u}) {
    const Driver driver(size);
    Controller controller(driver.shared);
    for (std::uint32_t number = 0; number < size + 1; ++number) round_trip(driver, controller, number);
    const std::uint16_t cid = driver.submit(1);
    controller.must_fetch();
    controller.post_stale(cid);
    CHECK_EQ(driver.reap(), 0u);
    CHECK(!driver.poll(cid));
    CHECK(driver.pair.quarantine(cid));
  }
}

TEST(duplicate_completion_finishes_nothing) {
  const Driver driver(8);
  Controller controller(driver.shared);
  const std::uint16_t first = driver.submit(1);
  controller.must_fetch();
  controller.post(first, 1);
  controller.post(first, 2);  // while the first waits to be polled
  CHECK_EQ(driver.reap(), 2u);
  CHECK(driver.poll(first));
  CHECK_EQ(driver.last.status, 1u);
  CHECK_EQ(late(driver), 1u);
  controller.post(first, 3);  // when the slot is free
  driver.reap();
  CHECK_EQ(late(driver), 2u);
  CHECK_EQ(completed(driver), 1u);
  CHECK(!driver.poll(first));
}

TEST(duplicate_completion_does_not_finish_the_slots_next_command) {
  // One slot only, so that every command uses it.
  const Driver driver(2);
  Controller controller(driver.shared);
  std::uint16_t before = 0;
  for (std::uint32_t number = 0; number < 100; ++number) {
    const std::uint16_t cid = driver.submit(number);
    CHECK_EQ(driver.pair.slot_of(cid), 0u);
    controller.must_fetch();
    if (number > 0) {
      CHECK(cid != before);
      controller.post(before, 7);
      CHECK_EQ(driver.reap(), 1u);
      CHECK(!driver.poll(cid));
      CHECK_EQ(late(driver), number);
    }
    controller.post(cid);
    driver.reap();
    CHECK(driver.poll(cid));
    CHECK_EQ(driver.last.status, 0u);
    before = cid;
  }
}

TEST(unknown_cid_is_counted_and_finishes_nothing) {
  for (const std::uint32_t size : {2u, 4u, 6u, 64u}) {
    const Driver driver(size);
    Controller controller(driver.shared);
    const std::uint16_t cid = driver.submit(1);
    controller.must_fetch();
    std::uint32_t bits = 1;
    while (1u << bits < size - 1) ++bits;
    std::uint64_t strays = 0;
    std::uint64_t might_have_been = 0;
    for (std::uint32_t stray = 0; stray <= 0xffff; ++stray) {
      if (stray == cid) continue;
      controller.post(static_cast<std::uint16_t>(stray));
      CHECK_EQ(driver.reap(), 1u);
      ++strays;
      // Of the one slot that was ever used, and not of the generation that is never given out.
      if (driver.pair.slot_of(static_cast<std::uint16_t>(stray)) == 0 && stray >> bits != 0xffffu >> bits) {
        ++might_have_been;
      }
    }
    CHECK(!driver.poll(cid));
    CHECK_EQ(late(driver), might_have_been);
    CHECK_EQ(unknown(driver), strays - might_have_been);
    CHECK_EQ(completed(driver), 0u);
    controller.post(cid);
    driver.reap();
    CHECK(driver.poll(cid));
  }
}

TEST(a_cid_is_never_0xffff_and_lasts_as_many_uses_as_its_bits_allow) {
  for (const std::uint32_t slots : {1u, 2u, 63u, 64u, 1023u, 4096u}) {
    const Driver driver(slots + 1);
    Controller controller(driver.shared);
    std::set<std::uint16_t> used;
    const std::uint32_t rounds = 70000 / slots + 2;
    std::uint32_t bits = 1;
    while (1u << bits < slots) ++bits;
    const std::uint32_t generations = (1u << (16 - bits)) - 1;
    for (std::uint32_t round = 0; round < rounds; ++round) {
      if (round % generations == 0) used.clear();
      for (std::uint32_t i = 0; i < slots; ++i) {
        const std::uint16_t cid = driver.submit(i);
        CHECK(cid != 0xffff);
        CHECK(used.insert(cid).second);
        controller.must_fetch();
        controller.post(cid);
        driver.reap();
        CHECK(driver.poll(cid));
      }
    }
  }
}

TEST(slots_go_round_so_that_a_late_completion_meets_its_slot_late) {
  const Driver driver(64);
  Controller controller(driver.shared);
  std::set<std::uint32_t> slots;
  for (std::uint32_t number = 0; number < 63; ++number) {
    const std::uint16_t cid = driver.submit(number);
    CHECK(slots.insert(driver.pair.slot_of(cid)).second);
    controller.must_fetch();
    controller.post(cid);
    driver.reap();
    CHECK(driver.poll(cid));
  }
}

TEST(cid_reuse_after_a_timeout_waits_for_the_late_completion) {
  const Driver driver(3);
  Controller controller(driver.shared);
  const std::uint16_t lost = driver.submit(1);
  controller.must_fetch();
  CHECK(driver.pair.quarantine(lost));
  CHECK(!driver.pair.quarantine(lost));
  CHECK(driver.pair.is_quarantined(lost));
  CHECK_EQ(driver.pair.state().stuck.load_relaxed(), 1u);
  // Its slot is not used, however often the other one is.
  for (std::uint32_t number = 0; number < 300; ++number) {
    const std::uint16_t cid = driver.submit(number);
    CHECK(driver.pair.slot_of(cid) != driver.pair.slot_of(lost));
    CHECK_EQ(driver.pair.claim(), QueuePair::kNoSlot);
    controller.must_fetch();
    controller.post(cid);
    driver.reap();
    CHECK(driver.poll(cid));
  }
  // The late completion finishes nothing, and brings the slot back.
  controller.post(lost, 6);
  CHECK_EQ(driver.reap(), 1u);
  CHECK(!driver.poll(lost));
  CHECK(!driver.pair.is_quarantined(lost));
  CHECK_EQ(late(driver), 1u);
  CHECK_EQ(driver.pair.state().stuck.load_relaxed(), 0u);
  const std::uint16_t one = driver.submit(1);
  const std::uint16_t other = driver.submit(2);
  CHECK(one != lost && other != lost);
  // And a second one as little.
  controller.post(lost);
  driver.reap();
  CHECK_EQ(late(driver), 2u);
  CHECK(!driver.poll(one) && !driver.poll(other));
}

TEST(quarantine_of_a_command_that_is_done_fails) {
  const Driver driver(4);
  Controller controller(driver.shared);
  const std::uint16_t cid = driver.submit(1);
  controller.must_fetch();
  controller.post(cid, 9);
  driver.reap();
  CHECK(!driver.pair.quarantine(cid));
  CHECK_EQ(driver.pair.state().stuck.load_relaxed(), 0u);
  CHECK(driver.poll(cid));
  CHECK_EQ(driver.last.status, 9u);
}

TEST(wait_ends_with_the_completion_the_deadline_or_the_stop) {
  const Driver driver(8);
  Controller controller(driver.shared);
  Completion completion;
  int looks = 0;
  const auto never = [&] { return ++looks > 1000000; };
  const std::uint16_t done = driver.submit(1);
  controller.must_fetch();
  controller.post(done, 3, 4);
  CHECK_EQ(driver.pair.wait(done, completion, never), Waited::kDone);
  CHECK_EQ(completion.status, 3u);
  CHECK_EQ(completion.result, 4u);

  const std::uint16_t lost = driver.submit(2);
  looks = 0;
  CHECK_EQ(driver.pair.wait(lost, completion, [&] { return ++looks == 10; }), Waited::kTimeout);
  CHECK_EQ(looks, 10);
  CHECK(driver.pair.is_quarantined(lost));

  const std::uint16_t stopped = driver.submit(3);
  driver.pair.stop();
  CHECK_EQ(driver.pair.wait(stopped, completion, never), Waited::kStopped);
  Sqe sqe{};
  const std::uint32_t slot = driver.pair.claim();
  CHECK_EQ(driver.pair.submit(slot, sqe), Submitted::kStopped);
}

TEST(a_completion_that_came_before_the_deadline_was_noticed_wins) {
  const Driver driver(4);
  Controller controller(driver.shared);
  const std::uint16_t cid = driver.submit(1);
  controller.must_fetch();
  Completion completion;
  // It comes while the waiter looks at the clock, and another thread reaps it.
  CHECK_EQ(driver.pair.wait(cid, completion,
                            [&] {
                              controller.post(cid, 2);
                              driver.reap();
                              return true;
                            }),
           Waited::kDone);
  CHECK_EQ(completion.status, 2u);
}

TEST(deferred_doorbell_tells_of_all_at_once) {
  const Driver driver(8);
  Controller controller(driver.shared);
  for (std::uint32_t number = 0; number < 5; ++number) driver.submit(number, false);
  CHECK(!controller.fetch());
  driver.pair.ring();
  for (std::uint32_t number = 0; number < 5; ++number) CHECK_EQ(controller.must_fetch().cdw10, number);
  CHECK(!controller.fetch());
  driver.pair.ring();
  CHECK(!controller.fetch());
}

TEST(a_slot_that_is_claimed_and_not_used_goes_back) {
  const Driver driver(4);
  std::set<std::uint32_t> slots;
  for (int i = 0; i < 3; ++i) slots.insert(driver.pair.claim());
  CHECK_EQ(slots.size(), 3u);
  CHECK_EQ(driver.pair.claim(), QueuePair::kNoSlot);
  for (const std::uint32_t slot : slots) driver.pair.release(slot);
  for (int i = 0; i < 3; ++i) CHECK(driver.pair.claim() != QueuePair::kNoSlot);
}

TEST(random_steps_against_a_model) {
  for (int round = 0; round < check::rounds(60); ++round) {
    check::Random random(100 + static_cast<std::uint64_t>(round));
    const auto sq = static_cast<std::uint32_t>(random.between(2, 20));
    const auto cq = static_cast<std::uint32_t>(random.between(2, 20));
    const Driver driver(sq, cq, static_cast<std::uint32_t>(random.between(1, sq - 1)));
    Controller controller(driver.shared);
    std::vector<Sqe> in_controller;
    std::vector<std::pair<std::uint16_t, std::uint32_t>> flying;
    std::vector<std::uint16_t> past;  // CIDs of commands that are over
    std::set<std::uint16_t> lost;
    std::uint64_t strays = 0;
    std::uint32_t number = 0;
    for (int step = 0; step < 3000; ++step) {
      switch (random.below(6)) {
        case 0: {
          const std::uint32_t slot = driver.pair.claim();
          if (slot == QueuePair::kNoSlot) break;
          Sqe sqe{};
          sqe.cdw10 = ++number;
          if (driver.pair.submit(slot, sqe) == Submitted::kOk) {
            flying.emplace_back(sqe.cid, number);
          } else {
            driver.pair.release(slot);
          }
          if (random.one_in(2)) driver.pair.ring();
          break;
        }
        case 1:
          driver.pair.ring();
          if (const auto sqe = controller.fetch()) in_controller.push_back(*sqe);
          break;
        case 2: {
          if (in_controller.empty() || controller.is_full()) break;
          const std::size_t which = random.below(in_controller.size());
          const Sqe sqe = in_controller[which];
          in_controller.erase(in_controller.begin() + static_cast<std::ptrdiff_t>(which));
          controller.post(sqe.cid, static_cast<std::uint16_t>(sqe.cdw10 & 0x7fff), sqe.cdw10);
          strays += lost.erase(sqe.cid);
          break;
        }
        case 3:
          driver.reap();
          break;
        case 4: {
          if (past.size() < 3 || controller.is_full() || !random.one_in(4)) break;
          // Of the latest ones: their generation has not come round again.
          controller.post(past[past.size() - 1 - random.below(3)]);
          ++strays;
          break;
        }
        case 5: {
          if (flying.empty()) break;
          const std::size_t which = random.below(flying.size());
          const auto [cid, carried] = flying[which];
          if (driver.poll(cid)) {
            CHECK_EQ(driver.last.result, carried);
            CHECK_EQ(driver.last.status, carried & 0x7fff);
            past.push_back(cid);
          } else if (random.one_in(20) && lost.empty()) {
            // Only what the controller still has can come late.
            const auto has = [cid = cid](const Sqe& sqe) { return sqe.cid == cid; };
            if (std::none_of(in_controller.begin(), in_controller.end(), has)) break;
            CHECK(driver.pair.quarantine(cid));
            lost.insert(cid);
          } else {
            break;
          }
          flying.erase(flying.begin() + static_cast<std::ptrdiff_t>(which));
          break;
        }
      }
    }
    while (driver.reap() != 0) {
    }
    CHECK_EQ(unknown(driver) + late(driver), strays);
    CHECK_EQ(driver.pair.state().stuck.load_relaxed(), lost.size());
    CHECK_EQ(bad_head(driver), 0u);
  }
}
