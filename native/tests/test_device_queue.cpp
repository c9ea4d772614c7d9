// The device library as host code: the same functions that a GPU's threads call, on groups of one thread, against the
// software controller in all its moods. Worth most under ThreadSanitizer.
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "device_queue.h"
#include "threads.h"

using namespace testing;
using gpunvme::Fate;
using gpunvme::GpuQueue;
using gpunvme::Outcome;
using gpunvme::QueuePair;
using gpunvme::Token;

namespace {

constexpr std::uint32_t kBlock = kDeviceBlock;

struct Machine : DeviceMachine {
  explicit Machine(const DeviceSetting& setting) : DeviceMachine(setting) {}
  std::uint64_t total(const gpunvme::Atomic<std::uint64_t>& counter) const { return counter.load_acquire(); }
};

// What a block holds: its own number, and a salt, all over.
void fill_blocks(std::vector<std::uint64_t>& words, std::uint64_t lba, std::uint64_t salt) {
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = (lba + i * 8 / kBlock) << 20 | salt << 8 | (i & 63);
}

// Each thread has blocks of its own, writes them and reads them, and finds what it wrote.
void write_and_read(Machine& machine, unsigned threads, unsigned rounds, std::uint64_t blocks) {
  Threads all;
  for (unsigned thread = 0; thread < threads; ++thread) {
    all.start([&machine, thread, rounds, blocks] {
      std::vector<std::uint64_t> out(blocks * kBlock / 8);
      std::vector<std::uint64_t> in(out.size());
      for (unsigned round = 0; round < rounds; ++round) {
        const std::uint64_t lba = thread * blocks;
        fill_blocks(out, lba, round);
        const Outcome written = gpunvme::write(machine.queue, lba, blocks, out.data());
        CHECK_EQ(written.fate, Fate::kDone);
        CHECK_EQ(written.status, 0);
        std::memset(in.data(), 0xee, in.size() * 8);
        const Outcome read = gpunvme::read(machine.queue, lba, blocks, in.data());
        CHECK_EQ(read.fate, Fate::kDone);
        CHECK_EQ(read.status, 0);
        CHECK(in == out);
      }
    });
  }
  all.finish();
}

unsigned rounds(unsigned count) { return static_cast<unsigned>(check::rounds(static_cast<int>(count))); }

}  // namespace

TEST(many_threads_share_few_slots) {
  // Three slots for six threads: whoever waits for one must hold none.
  Machine machine({.entries = 4});
  write_and_read(machine, 6, rounds(40), 8);
}

TEST(a_queue_of_two_entries_serves_everybody) {
  Machine machine({.entries = 2});
  write_and_read(machine, 4, rounds(20), 8);
}

TEST(sizes_that_are_no_powers_of_two_wrap) {
  Machine machine({.entries = 11});
  write_and_read(machine, 4, rounds(60), 8);
}

TEST(large_commands_use_both_prps_or_a_list_and_larger_ones_are_cut) {
  // 8 pages a command; 100 blocks are 12.5 pages.
  for (const std::uint64_t blocks : {1, 8, 9, 16, 17, 64, 65, 100}) {
    Machine machine({.pages_per_slot = 8});
    write_and_read(machine, 2, 2, blocks);
  }
}

TEST(what_a_controller_may_do_wrong_harms_nobody) {
  for (const char* faults : {"reorder@0.5", "duplicate-cqe@0.3", "unknown-cid@0.3", "torn-cqe@0.1", "stale-phase@0.1",
                             "delay:2@0.1", "reorder@0.5,duplicate-cqe@0.3,unknown-cid@0.3,torn-cqe@0.1"}) {
    Machine machine({.faults = faults});
    write_and_read(machine, 4, rounds(15), 8);
    const QueuePair::State& state = machine.queue.pair.state();
    CHECK_EQ(machine.total(state.completed) >= 4u * rounds(15) * 2, true);
    CHECK_EQ(state.stuck.load_acquire(), 0u);
  }
}

TEST(errors_reach_the_thread_that_waits) {
  Machine machine({.faults = "error:0x281!"});
  char data[kBlock] = {};
  const Outcome outcome = gpunvme::read(machine.queue, 0, 1, data);
  CHECK_EQ(outcome.fate, Fate::kDone);
  CHECK_EQ(nvme::status_code(outcome.status), 0x281);
  CHECK(!outcome.may_retry());
}

TEST(blocks_outside_of_the_namespace_are_refused_without_asking) {
  Machine machine({});
  char data[kBlock] = {};
  for (const std::uint64_t lba : {machine.queue.blocks, ~std::uint64_t{0}}) {
    const Outcome outcome = gpunvme::read(machine.queue, lba, 1, data);
    CHECK_EQ(outcome.fate, Fate::kDone);
    CHECK_EQ(nvme::status_code(outcome.status), nvme::kStatusLbaOutOfRange);
  }
  CHECK_EQ(machine.total(machine.queue.pair.state().completed), 0u);
}

TEST(a_lost_completion_ends_at_its_deadline_and_the_others_go_on) {
  Machine machine({.faults = "drop#3"});
  const std::uint64_t long_enough = machine.queue.timeout_ns;
  std::vector<char> data(kBlock);
  for (int i = 1; i <= 40; ++i) {
    machine.queue.timeout_ns = i == 3 ? 300'000'000 : long_enough;
    const Outcome outcome = gpunvme::read(machine.queue, 0, 1, data.data());
    CHECK_EQ(outcome.fate, i == 3 ? Fate::kTimeout : Fate::kDone);
    CHECK_EQ(outcome.status, 0);
  }
  CHECK_EQ(machine.queue.pair.state().stuck.load_acquire(), 1u);
}

TEST(a_controller_that_answers_nothing_lets_everybody_go) {
  // More threads than slots: some never get one.
  Machine machine({.faults = "drop", .entries = 4, .timeout_ns = 200'000'000});
  Threads all;
  std::atomic<int> gave_up{0};
  for (int thread = 0; thread < 6; ++thread) {
    all.start([&] {
      char data[kBlock] = {};
      const Outcome outcome = gpunvme::read(machine.queue, 0, 1, data);
      CHECK(outcome.fate == Fate::kTimeout || outcome.fate == Fate::kFull);
      ++gave_up;
    });
  }
  all.finish();
  CHECK_EQ(gave_up.load(), 6);
}

TEST(a_late_completion_gives_the_slot_back) {
  Machine machine({.faults = "delay:2000#1", .entries = 2, .timeout_ns = 100'000'000});
  char data[kBlock] = {};
  CHECK_EQ(gpunvme::read(machine.queue, 0, 1, data).fate, Fate::kTimeout);
  machine.queue.timeout_ns = 20'000'000'000;
  CHECK_EQ(machine.queue.pair.state().stuck.load_acquire(), 1u);
  machine.client.until("the completion", [&] {
    gpunvme::reap(machine.queue);
    return machine.queue.pair.state().stuck.load_acquire() == 0;
  });
  CHECK(gpunvme::read(machine.queue, 0, 1, data).ok());
}

TEST(stopping_ends_every_wait) {
  Machine machine({.faults = "drop", .entries = 3});
  Threads all;
  for (int thread = 0; thread < 4; ++thread) {
    all.start([&] {
      char data[kBlock] = {};
      CHECK_EQ(gpunvme::read(machine.queue, 0, 1, data).fate, Fate::kStopped);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  machine.queue.pair.stop();
  all.finish();
}

TEST(tokens_overlap_and_are_finished_in_any_order) {
  Machine machine({.faults = "reorder@0.5", .entries = 16});
  std::vector<std::uint64_t> out(15 * kBlock / 8);
  fill_blocks(out, 0, 9);
  CHECK(gpunvme::write(machine.queue, 0, 15, out.data()).ok());
  for (int round = 0; round < 20; ++round) {
    Token tokens[15];
    for (std::uint64_t i = 0; i < 15; ++i) {
      CHECK_EQ(gpunvme::start(machine.queue, tokens[i], gpunvme::kRead, i, 1), Fate::kDone);
    }
    Token more{};
    CHECK_EQ(gpunvme::start(machine.queue, more, gpunvme::kRead, 0, 1), Fate::kFull);
    for (std::uint64_t i = 15; i-- > 0;) {
      CHECK(gpunvme::wait(machine.queue, tokens[i]).ok());
      CHECK_EQ(std::memcmp(gpunvme::data(machine.queue, tokens[i]), &out[i * kBlock / 8], kBlock), 0);
      gpunvme::finish(machine.queue, tokens[i]);
    }
  }
}

TEST(driver_threads_and_device_threads_share_a_queue) {
  // queue_pair.h's own functions and the lanes' are two ways into one protocol.
  Machine machine({.entries = 8});
  Threads all;
  for (int thread = 0; thread < 2; ++thread) {
    all.start([&machine] {
      char data[kBlock] = {};
      for (unsigned i = 0; i < rounds(100); ++i) CHECK(gpunvme::read(machine.queue, i % 64, 1, data).ok());
    });
    all.start([&machine] {
      const QueuePair& pair = machine.queue.pair;
      for (unsigned i = 0; i < rounds(100); ++i) {
        std::uint32_t slot = QueuePair::kNoSlot;
        while ((slot = pair.claim()) == QueuePair::kNoSlot) gpunvme::reap(machine.queue);
        nvme::Sqe sqe = machine.client.io(nvme::kNvmRead, i % 64, 1, machine.device.pages[slot]);
        while (pair.submit(slot, sqe) != gpunvme::Submitted::kOk) gpunvme::reap(machine.queue);
        pair.ring();
        gpunvme::Completion completion{};
        const auto expired = [] { return false; };
        CHECK_EQ(pair.wait(sqe.cid, completion, expired), gpunvme::Waited::kDone);
        CHECK_EQ(completion.status, 0);
      }
    });
  }
  all.finish();
}
