// Transfers when things go wrong: errors, lost completions, stopped queues, processes forked in the middle.
#include <algorithm>
#include <map>

#include "ram_device.h"

using namespace testing;
using State = IoRun::State;
using Failed = IoRun::Failed;

namespace {

constexpr std::uint16_t kInternalError = 0x006;
constexpr std::uint16_t kUnrecoveredRead = 0x281;
constexpr std::uint16_t kAborted = 0x007;
constexpr std::uint16_t kDnr = 1 << 14;

std::uint64_t lba_of(const Sqe& sqe) { return sqe.cdw10 | std::uint64_t{sqe.cdw11} << 32; }

// A read of all of a small drive, a command a block, and what a test may want to know of it.
struct Case {
  explicit Case(int queue_count = 1, std::uint32_t depth = 16)
      : queues(device.add_queues(queue_count, depth)), mapped(device.map(memory)) {
    options.max_bytes = 512;
    options.timeout = 1;
    options.clock = [] { return test_clock(); };
  }
  std::unique_ptr<IoRun> read(std::shared_ptr<IoStaging> staging = nullptr) {
    auto run = std::make_unique<IoRun>(options, queues, staging);
    run->add_range(0, 256, staging == nullptr ? mapped : IoMemory::host(memory.address(), memory.size()), 0);
    return run;
  }
  void check() { CHECK_EQ(first_difference(memory, device.disk), -1); }
  // The controller is reset: new queues instead of the old ones.
  void rebuild(IoRun& run, bool retry = true) {
    for (const auto& queue : queues) queue->stop();
    CHECK_EQ(run.drive(0), State::kStopped);
    device.remove_queues();
    queues = device.add_queues(static_cast<int>(queues.size()), 16);
    run.attach(queues, retry);
  }

  RamDevice device{512, 256};
  IoRun::Options options = run_options(device);
  std::vector<std::shared_ptr<IoQueue>> queues;
  Memory memory{256 * 512};
  std::shared_ptr<IoMemory> mapped;
};

// Judges one command of an LBA, the first time or always.
auto once(std::uint64_t lba, RamDevice::Verdict verdict) {
  return [=, done = std::make_shared<bool>(false)](const Sqe& sqe) {
    if (lba_of(sqe) != lba || *done) return RamDevice::Verdict{};
    *done = true;
    return verdict;
  };
}

constexpr RamDevice::Verdict kDrop{0, true, false};
constexpr RamDevice::Verdict kHold{0, false, true};

}  // namespace

TEST(dnr_decides_a_retry) {
  Case c;
  int tries = 0;
  c.device.judge = [&](const Sqe& sqe) {
    return lba_of(sqe) == 40 && ++tries <= 3 ? RamDevice::Verdict{kInternalError} : RamDevice::Verdict{};
  };
  auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK(run->failures().empty());
  CHECK_EQ(tries, 4);
  CHECK_EQ(run->counts().retried, 3u);
  c.check();

  tries = 0;
  c.device.judge = [&](const Sqe& sqe) {
    return lba_of(sqe) == 40 && ++tries > 0 ? RamDevice::Verdict{kInternalError | kDnr} : RamDevice::Verdict{};
  };
  run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK_EQ(tries, 1);
  CHECK_EQ(run->counts().retried, 0u);
  CHECK_EQ(run->failures().size(), 1u);
  CHECK_EQ(run->failures()[0].status, kInternalError | kDnr);
}

TEST(a_command_that_always_fails_is_given_up_after_four_tries) {
  Case c;
  int tries = 0;
  c.device.judge = [&](const Sqe& sqe) {
    return lba_of(sqe) == 7 && ++tries > 0 ? RamDevice::Verdict{kUnrecoveredRead} : RamDevice::Verdict{};
  };
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK_EQ(tries, 4);
  const auto failures = run->failures();
  CHECK_EQ(failures.size(), 1u);
  CHECK_EQ(failures[0].opcode, 2);
  CHECK_EQ(failures[0].lba, 7u);
  CHECK_EQ(failures[0].blocks, 1u);
  CHECK_EQ(failures[0].queue, c.queues[0]->id());
  CHECK_EQ(failures[0].status, kUnrecoveredRead);
  CHECK_EQ(failures[0].kind, Failed::Kind::kStatus);
}

TEST(the_first_failure_ends_submission_and_every_failure_is_reported) {
  Case c(2);
  c.device.judge = [](const Sqe& sqe) {
    return RamDevice::Verdict{lba_of(sqe) % 4 == 1 ? static_cast<std::uint16_t>(kUnrecoveredRead | kDnr)
                                                   : std::uint16_t{0}};
  };
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK(c.device.commands < 100);
  std::vector<std::uint64_t> expected;
  for (const Sqe& sqe : c.device.seen) {
    if (lba_of(sqe) % 4 == 1) expected.push_back(lba_of(sqe));
  }
  std::vector<std::uint64_t> reported;
  for (const Failed& failed : run->failures()) reported.push_back(failed.lba);
  std::sort(expected.begin(), expected.end());
  std::sort(reported.begin(), reported.end());
  CHECK(expected == reported);
  CHECK_EQ(run->counts().commands, c.device.commands);
  CHECK_EQ(c.queues[0]->in_flight() + c.queues[1]->in_flight(), 0u);
}

TEST(timeout_then_abort_the_command_is_repeated_when_its_completion_has_come) {
  Case c(2);
  c.device.judge = once(33, kHold);
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
  const auto stuck = run->timed_out();
  CHECK_EQ(stuck.size(), 1u);
  const auto& queue = c.queues[stuck[0].first - c.queues[0]->id()];
  CHECK(queue->quarantined() == std::vector<std::uint16_t>{stuck[0].second});
  // All else goes on meanwhile, and nothing hangs.
  CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
  CHECK_EQ(run->counts().commands, 256u);
  c.device.answer_held(kAborted);
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK(queue->quarantined().empty());
  CHECK_EQ(queue->pair().state().late.load_relaxed(), 1u);
  CHECK(run->timed_out().empty());
  CHECK_EQ(run->counts().timeouts, 1u);
  CHECK_EQ(run->counts().retried, 1u);
  c.check();
}

TEST(timeout_does_not_touch_what_has_come_while_the_thread_was_away) {
  // More completions than are read at a time.
  Case c(2, 128);
  const auto run = c.read();
  CHECK_EQ(run->drive(0), State::kRunning);
  while (c.device.step() != 0) {
  }
  test_clock() += 3'000'000'000;
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK_EQ(run->counts().timeouts, 0u);
  c.check();
}

TEST(timeout_then_reset_the_run_goes_on_with_new_queues) {
  Case c(2);
  c.device.judge = once(33, kDrop);
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
  c.rebuild(*run);
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK(run->failures().empty());
  c.check();
}

TEST(commands_in_flight_at_a_reset_are_repeated_or_reported_as_lost) {
  for (const bool retry : {true, false}) {
    Case c(2);
    const auto run = c.read();
    CHECK_EQ(run->drive(0), State::kRunning);  // nothing is answered
    c.rebuild(*run, retry);
    CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
    const auto failures = run->failures();
    if (retry) {
      CHECK(failures.empty());
      c.check();
      continue;
    }
    CHECK_EQ(failures.size(), 30u);
    for (const Failed& failed : failures) CHECK_EQ(failed.kind, Failed::Kind::kLost);
    CHECK_EQ(c.device.commands, 0u);
  }
}

TEST(a_device_that_is_gone_for_good_leaves_a_list_of_what_was_lost) {
  Case c(2);
  const auto run = c.read();
  CHECK_EQ(run->drive(0), State::kRunning);
  for (const auto& queue : c.queues) queue->stop();
  c.device.remove_queues();
  run->attach({}, true);
  CHECK_EQ(run->drive(1), State::kDone);
  CHECK_EQ(run->failures().size(), 30u);
  for (const Failed& failed : run->failures()) CHECK_EQ(failed.kind, Failed::Kind::kLost);
}

TEST(what_was_done_before_a_reset_is_not_done_again) {
  Case c;
  const auto run = c.read();
  run->drive(0);
  c.device.step();
  // Another run reaps it, and ours does not look before the queue is gone.
  IoRun other(c.options, c.queues, nullptr);
  Memory elsewhere(512);
  other.add_range(0, 1, c.device.map(elsewhere), 0);
  other.drive(0);
  const std::uint64_t done = c.queues[0]->pair().state().completed.load_relaxed();
  CHECK(done > 0);
  c.rebuild(*run);
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK_EQ(run->counts().retried, 15 - done);
  c.check();
}

TEST(a_command_that_always_times_out_is_given_up) {
  Case c(1);
  c.device.judge = [](const Sqe& sqe) { return lba_of(sqe) == 3 ? kDrop : RamDevice::Verdict{}; };
  const auto run = c.read();
  int resets = 0;
  while (drive_in_time(*run, c.device) == State::kTimeout) {
    c.rebuild(*run);
    CHECK(++resets < 10);
  }
  CHECK_EQ(resets, 4);
  const auto failures = run->failures();
  CHECK_EQ(failures.size(), 1u);
  CHECK_EQ(failures[0].lba, 3u);
  CHECK_EQ(failures[0].kind, Failed::Kind::kTimeout);
}

TEST(nothing_touches_queue_memory_after_stop_has_returned) {
  check::Random random(9);
  for (int round = 0; round < check::rounds(30); ++round) {
    // Long queues, so that a turn of the loop that fills them takes long too.
    RamDevice device(512, 4096);
    auto queues = device.add_queues(2, 1024);
    Memory memory(4096 * 512);
    auto options = run_options(device);
    options.max_bytes = 512;
    options.timeout = 1e6;
    IoRun run(options, queues, nullptr);
    run.add_range(0, 4096, device.map(memory), 0);
    if (round % 2 == 0) device.start_thread();
    std::atomic<bool> started{false};
    std::atomic<bool> rebuilt{false};
    Threads threads;
    threads.start([&] {
      started = true;
      while (run.drive(0.01) != State::kDone && !rebuilt) {
      }
    });
    while (!started) std::this_thread::yield();
    for (std::uint64_t i = random.below(5000); i > 0; --i) started.load();
    for (const auto& queue : queues) queue->stop();
    device.remove_queues();
    queues = device.add_queues(2, 64);
    run.attach(queues, true);
    rebuilt = true;
    threads.finish();
    CHECK_EQ(drive_in_time(run, device), State::kDone);
    device.stop_thread();
    CHECK_EQ(first_difference(memory, device.disk), -1);
  }
}

TEST(dma_after_free_staging_of_a_lost_command_is_kept_from_others) {
  Case c(1);
  Memory staging_memory(16 * kKiB);
  const auto staging = std::make_shared<IoStaging>(c.device.map(staging_memory), 4096);
  c.device.judge = once(0, kHold);
  {
    const auto run = c.read(staging);
    CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
    CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
    CHECK_EQ(staging->free_slots(), 3u);
  }
  // The run is gone, the controller may still write.
  CHECK_EQ(staging->free_slots(), 3u);
  CHECK_EQ(c.queues[0]->quarantined().size(), 1u);
  c.queues[0]->stop();
  c.device.remove_queues();
  staging->reclaim();
  CHECK_EQ(staging->free_slots(), 4u);
}

TEST(a_run_that_is_dropped_in_the_middle_gives_its_slots_back_when_completions_come) {
  Case c(1, 16);
  {
    const auto run = c.read();
    run->drive(0);
    CHECK_EQ(c.queues[0]->in_flight(), 15u);
  }
  CHECK_EQ(c.queues[0]->quarantined().size(), 15u);
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  CHECK_EQ(c.queues[0]->in_flight(), 0u);
  CHECK_EQ(c.queues[0]->pair().state().late.load_relaxed(), 15u);
  c.check();
}

TEST(an_abandoned_run_is_done_when_everything_is_back) {
  Case c;
  Memory staging_memory(16 * kKiB);
  const auto staging = std::make_shared<IoStaging>(c.device.map(staging_memory), 4096);
  for (const bool bounced : {false, true}) {
    const auto run = c.read(bounced ? staging : nullptr);
    run->drive(0);
    run->abandon();
    CHECK_EQ(run->drive(0), State::kRunning);
    CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
    CHECK_EQ(run->counts().commands, 15u);
    CHECK_EQ(staging->free_slots(), 4u);
  }
}

TEST(queues_with_a_lost_command_are_avoided_while_there_are_others) {
  Case c(2);
  c.options.max_bytes = 512;
  c.device.judge = once(0, kHold);
  const auto run = c.read();
  CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
  const auto stuck = run->timed_out();
  const auto& bad = c.queues[stuck[0].first - c.queues[0]->id()];
  const std::uint64_t before = bad->pair().state().reserved.load_relaxed();
  CHECK_EQ(drive_in_time(*run, c.device), State::kTimeout);
  CHECK_EQ(bad->pair().state().reserved.load_relaxed(), before);
  IoRun other(c.options, c.queues, nullptr);
  Memory memory(64 * 512);
  other.add_range(10, 64, c.device.map(memory), 0);
  CHECK_EQ(drive_in_time(other, c.device), State::kDone);
  CHECK_EQ(bad->pair().state().reserved.load_relaxed(), before);
}

TEST(a_queue_is_stopped_before_a_run_leaves_it) {
  Case c;
  const auto run = c.read();
  run->drive(0);
  const auto others = c.device.add_queues(1, 8);
  bool refused = false;
  try {
    run->attach(others, true);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  c.check();
}

TEST(a_forked_child_does_not_drive_its_parents_run) {
  Case c;
  const auto run = c.read();
  run->drive(0);
  CHECK_EQ(check::in_child([&] {
             const Failure failure = CHECK_FAILS(run->drive(0));
             CHECK_EQ(failure.kind, FailureKind::kCancelled);
             c.queues[0]->stop();
             CHECK(!c.queues[0]->stopped());
           }),
           0);
  CHECK_EQ(drive_in_time(*run, c.device), State::kDone);
  c.check();
}

// Runs of several threads on the same queues, each reaping for all, with errors and lost commands among them.
TEST(many_runs_share_queues) {
  check::Random random(5);
  RamDevice device(512, 4096);
  device.max_bytes = 4096;
  std::uint64_t number = 0;
  device.judge = [&](const Sqe&) {
    ++number;
    if (number % 50 == 0) return RamDevice::Verdict{kInternalError};
    return number % 400 == 0 ? kHold : RamDevice::Verdict{};
  };
  const auto queues = device.add_queues(2, 12);
  Memory staging_memory(256 * kKiB);
  const auto staging = std::make_shared<IoStaging>(device.map(staging_memory), 16384);
  device.start_thread();
  Threads threads;
  for (std::uint64_t thread = 0; thread < 4; ++thread) {
    threads.start([&, thread] {
      check::Random mine(70 + thread);
      Memory memory(512 * kKiB);
      const auto mapped = device.map(memory, thread % 2 == 0);
      for (int round = 0; round < check::rounds(10); ++round) {
        auto options = run_options(device);
        options.timeout = 0.2;
        IoRun run(options, queues, staging);
        const std::uint64_t lba = mine.below(4096 - 1000);
        std::memset(memory.data(), 0, memory.size());
        run.add_range(lba, 1000, mine.one_in(2) ? mapped : IoMemory::host(memory.address(), memory.size()), 8);
        for (;;) {
          const State state = run.drive(0.01);
          if (state == State::kDone) break;
          if (state == State::kTimeout) device.answer_held(kAborted);
        }
        CHECK(run.failures().empty());
        CHECK_EQ(first_difference(memory.data() + 8, device.disk.data() + lba * 512, 512000), -1);
      }
    });
  }
  threads.finish();
  device.stop_thread();
  for (const auto& queue : queues) CHECK_EQ(queue->in_flight(), 0u);
  CHECK_EQ(staging->free_slots(), staging->slots());
}

TEST(random_trouble_on_random_transfers) {
  for (int round = 0; round < check::rounds(25); ++round) {
    check::Random random(3000 + static_cast<std::uint64_t>(round));
    RamDevice device(512, 2048);
    device.max_bytes = random.pick({512u, 4096u, 16384u});
    int drops = 0;
    std::map<std::uint32_t, int> errors;
    device.judge = [&](const Sqe& sqe) {
      // Fewer for each place than a command is tried.
      if (random.one_in(30) && ++errors[sqe.cdw10] < 3) return RamDevice::Verdict{kInternalError};
      if (random.one_in(150) && ++drops < 4) return random.one_in(2) ? kDrop : kHold;
      return RamDevice::Verdict{};
    };
    const auto depth = static_cast<std::uint32_t>(random.between(2, 32));
    auto queues = device.add_queues(2, depth);
    Memory memory(1 * kMiB, random.pick({0u, 2u}));
    Memory staging_memory(64 * kKiB);
    const auto staging = std::make_shared<IoStaging>(device.map(staging_memory), 8192);
    auto options = run_options(device);
    options.timeout = 0.004;
    options.clock = [] { return test_clock(); };
    IoRun run(options, queues, staging);
    run.add_range(0, 2048, random.one_in(2) ? device.map(memory) : IoMemory::host(memory.address(), memory.size()), 0);
    for (;;) {
      const State state = drive_in_time(run, device);
      if (state == State::kDone) break;
      CHECK_EQ(state, State::kTimeout);
      if (random.one_in(2)) {
        device.answer_held(kAborted);
        if (drive_in_time(run, device) == State::kDone) break;
      }
      if (run.timed_out().empty()) continue;
      for (const auto& queue : queues) queue->stop();
      device.remove_queues();
      queues = device.add_queues(2, depth);
      run.attach(queues, true);
    }
    CHECK(run.failures().empty());
    CHECK_EQ(first_difference(memory, device.disk), -1);
    CHECK_EQ(staging->free_slots(), staging->slots());
  }
}
