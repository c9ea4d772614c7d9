// A queue that one warp has for itself, as host code, where a warp is one thread: what it leaves to those who share the
// queue before and after it, and what it does with a controller that misbehaves.
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "device_queue.h"
#include "gpunvme/exclusive_queue.h"
#include "threads.h"

using namespace testing;
using gpunvme::ExclusiveQueue;
using gpunvme::Fate;
using gpunvme::Outcome;
using gpunvme::QueuePair;
using gpunvme::Token;

namespace {

constexpr std::uint32_t kBlock = kDeviceBlock;
constexpr std::uint64_t kBlocks = DeviceMachine::kBytes / kBlock;

// A machine, and what its blocks are to hold: each its own number, all over.
struct Machine : DeviceMachine {
  explicit Machine(const DeviceSetting& setting) : DeviceMachine(setting) {
    for (std::size_t i = 0; i < image.size(); ++i) image[i] = i * 8 / kBlock;
  }
  const std::uint64_t* block(std::uint64_t lba) const { return &image[lba * kBlock / 8]; }
  bool holds(const void* data, std::uint64_t lba, std::uint64_t blocks) const {
    return std::memcmp(data, block(lba), blocks * kBlock) == 0;
  }
  // Writes the first blocks of the image, by whoever is asked to.
  template <typename Queue>
  void fill(Queue&& write, std::uint64_t blocks) {
    CHECK(write(std::uint64_t{0}, blocks, image.data()).ok());
  }
  std::uint32_t free_slots() const {
    std::vector<Token> tokens(device.queue.pair.shape().slots + 1);
    std::uint32_t count = 0;
    while (gpunvme::claim(device.queue, tokens[count])) ++count;
    for (std::uint32_t i = 0; i < count; ++i) gpunvme::finish(device.queue, tokens[i]);
    return count;
  }
  // As it is while nobody has a command: nothing in flight, and of the SQ every entry is told and fetched.
  bool is_at_rest() const {
    const QueuePair::State& state = device.queue.pair.state();
    bool none = true;
    device.queue.pair.for_each_in_flight([&](std::uint16_t, bool) { none = false; });
    const std::uint64_t reserved = state.reserved.load_acquire();
    return none && state.rung.load_acquire() == reserved && state.sq_head.load_acquire() == reserved &&
           state.ringers.load_acquire() == 0 && state.stuck.load_acquire() == 0;
  }
  bool all_slots_are_free() const { return free_slots() == device.queue.pair.shape().slots; }

  std::vector<std::uint64_t> image = std::vector<std::uint64_t>(kBlocks * kBlock / 8);
};

unsigned rounds(unsigned count) { return static_cast<unsigned>(check::rounds(static_cast<int>(count))); }

}  // namespace

TEST(every_read_brings_its_blocks_and_the_queue_is_left_as_it_was) {
  // So often that CIDs' generations, SQ and CQ go round many times; 40 and 70 have more than one word of slots.
  for (const std::uint32_t entries : {2, 3, 4, 11, 16, 40, 70}) {
    Machine machine({.entries = entries});
    {
      ExclusiveQueue queue(machine.queue);
      CHECK(queue.is_exclusive());
      machine.fill([&](auto lba, auto blocks, auto* from) { return queue.write(lba, blocks, from); }, 64);
      std::vector<char> data(3 * kBlock);
      for (unsigned i = 0; i < rounds(2000); ++i) {
        const std::uint64_t lba = i * 7 % 60;
        const std::uint64_t blocks = 1 + i % 3;
        CHECK(queue.read(lba, blocks, data.data()).ok());
        CHECK(machine.holds(data.data(), lba, blocks));
      }
      CHECK(queue.is_exclusive());
    }
    const QueuePair::State& state = machine.queue.pair.state();
    CHECK_EQ(state.completed.load_acquire(), rounds(2000) + 64u / 8);
    CHECK_EQ(state.late.load_acquire() + state.unknown.load_acquire() + state.bad_head.load_acquire(), 0u);
    CHECK(machine.is_at_rest());
    CHECK(machine.all_slots_are_free());
    // Everybody's again, wherever it stopped; and once more one warp's.
    for (unsigned i = 0; i < 3 * entries; ++i) {
      char data[kBlock];
      CHECK(gpunvme::read(machine.queue, i % 64, 1, data).ok());
      CHECK(machine.holds(data, i % 64, 1));
      if (i % entries != 1) continue;
      ExclusiveQueue queue(machine.queue);
      CHECK(queue.is_exclusive());
      CHECK(queue.read(63, 1, data).ok());
      CHECK(machine.holds(data, 63, 1));
    }
    CHECK(machine.all_slots_are_free());
  }
}

TEST(large_transfers_are_cut_and_use_both_prps_or_a_list) {
  for (const std::uint64_t blocks : {1, 8, 9, 16, 17, 64, 65, 100}) {
    Machine machine({.pages_per_slot = 8});
    ExclusiveQueue queue(machine.queue);
    machine.fill([&](auto lba, auto count, auto* from) { return queue.write(lba, count, from); }, 100);
    std::vector<char> data(blocks * kBlock);
    CHECK(queue.read(100 - blocks, blocks, data.data()).ok());
    CHECK(machine.holds(data.data(), 100 - blocks, blocks));
    CHECK(queue.read(5, 0, data.data()).ok());
  }
}

TEST(who_has_a_command_keeps_the_queue_shared) {
  for (const std::uint32_t entries : {16, 70}) {
    Machine machine({.entries = entries});
    // In the last slot, so that the others are free when it is seen.
    const std::uint32_t slots = machine.queue.pair.shape().slots;
    std::vector<Token> tokens(slots);
    for (Token& token : tokens) CHECK(gpunvme::claim(machine.queue, token));
    Token last;
    for (Token& token : tokens) {
      if (token.slot == slots - 1) {
        last = token;
      } else {
        gpunvme::finish(machine.queue, token);
      }
    }
    CHECK_EQ(gpunvme::submit(machine.queue, last, gpunvme::kRead, 0, 1), Fate::kDone);
    char data[kBlock];
    {
      ExclusiveQueue queue(machine.queue);
      CHECK(!queue.is_exclusive());
      CHECK(queue.read(1, 1, data).ok());  // as if nothing were
      CHECK(queue.write(1, 1, machine.block(1)).ok());
      CHECK_EQ(nvme::status_code(queue.read(kBlocks, 1, data).status), nvme::kStatusLbaOutOfRange);
    }
    CHECK_EQ(machine.free_slots(), slots - 1);
    CHECK(gpunvme::wait(machine.queue, last).ok());
    gpunvme::finish(machine.queue, last);
    ExclusiveQueue queue(machine.queue);
    CHECK(queue.is_exclusive());
  }
}

TEST(others_get_no_slot_and_are_let_go_at_their_deadline) {
  Machine machine({.timeout_ns = 100'000'000});
  char data[kBlock];
  ExclusiveQueue queue(machine.queue);
  CHECK(queue.is_exclusive());
  ExclusiveQueue second(machine.queue);
  CHECK(!second.is_exclusive());
  CHECK_EQ(gpunvme::read(machine.queue, 0, 1, data).fate, Fate::kFull);
  CHECK_EQ(second.read(0, 1, data).fate, Fate::kFull);
  machine.queue.timeout_ns = 20'000'000'000;
  queue.leave();
  CHECK(!queue.is_exclusive());
  CHECK(second.read(0, 1, data).ok());
  CHECK(queue.read(0, 1, data).ok());
  queue.leave();
  CHECK(machine.all_slots_are_free());
}

TEST(threads_that_take_it_and_threads_that_share_it_take_turns) {
  for (const std::uint32_t entries : {2, 4, 40}) {
    Machine machine({.entries = entries});
    machine.fill([&](auto lba, auto count, auto* from) { return gpunvme::write(machine.queue, lba, count, from); }, 64);
    Threads all;
    for (unsigned thread = 0; thread < 4; ++thread) {
      all.start([&, thread] {
        char data[kBlock];
        for (unsigned i = 0; i < rounds(60); ++i) {
          const std::uint64_t lba = (thread * 13 + i) % 64;
          if (thread % 2 == 0) {
            CHECK(gpunvme::read(machine.queue, lba, 1, data).ok());
          } else {
            ExclusiveQueue queue(machine.queue);
            for (int again = 0; again < 3; ++again) CHECK(queue.read(lba, 1, data).ok());
          }
          CHECK(machine.holds(data, lba, 1));
        }
      });
    }
    all.finish();
    CHECK(machine.all_slots_are_free());
    const QueuePair::State& state = machine.queue.pair.state();
    CHECK_EQ(state.completed.load_acquire(), 2u * rounds(60) + 6u * rounds(60) + 64u / 8);
    CHECK_EQ(state.stuck.load_acquire(), 0u);
    ExclusiveQueue queue(machine.queue);
    CHECK(queue.is_exclusive());
  }
}

TEST(what_a_controller_may_do_wrong_harms_nobody) {
  for (const char* faults : {"duplicate-cqe@0.3", "unknown-cid@0.3", "torn-cqe@0.1", "stale-phase@0.1", "delay:2@0.1",
                             "duplicate-cqe@0.3,unknown-cid@0.3,torn-cqe@0.1"}) {
    Machine machine({.faults = faults, .entries = 11});
    machine.fill([&](auto lba, auto count, auto* from) { return gpunvme::write(machine.queue, lba, count, from); }, 64);
    const QueuePair::State& state = machine.queue.pair.state();
    const std::uint64_t late = state.late.load_acquire();
    const std::uint64_t unknown = state.unknown.load_acquire();
    {
      ExclusiveQueue queue(machine.queue);
      char data[kBlock];
      for (unsigned i = 0; i < rounds(200); ++i) {
        CHECK(queue.read(i % 64, 1, data).ok());
        CHECK(machine.holds(data, i % 64, 1));
      }
      CHECK(queue.is_exclusive());
    }
    if (std::strcmp(faults, "duplicate-cqe@0.3") == 0) CHECK(state.late.load_acquire() > late);
    if (std::strcmp(faults, "unknown-cid@0.3") == 0) CHECK(state.unknown.load_acquire() > unknown);
    for (unsigned i = 0; i < 40; ++i) {
      char data[kBlock];
      CHECK(gpunvme::read(machine.queue, i, 1, data).ok());
      CHECK(machine.holds(data, i, 1));
    }
    CHECK_EQ(state.completed.load_acquire(), rounds(200) + 40u + 64u / 8);
    CHECK(machine.all_slots_are_free());
  }
}

TEST(what_may_be_tried_again_is) {
  Machine machine({.faults = "error:0x281#2"});
  ExclusiveQueue queue(machine.queue);
  char data[kBlock];
  for (int i = 0; i < 3; ++i) CHECK(queue.read(0, 1, data).ok());
  queue.leave();
  CHECK_EQ(machine.queue.pair.state().completed.load_acquire(), 4u);
}

TEST(errors_and_ranges_are_answers) {
  Machine machine({.faults = "error:0x281!#3"});
  ExclusiveQueue queue(machine.queue);
  char data[kBlock];
  CHECK(queue.read(0, 1, data).ok());
  CHECK(queue.read(0, 1, data).ok());
  CHECK_EQ(nvme::status_code(queue.read(0, 1, data).status), 0x281);
  CHECK(queue.is_exclusive());
  for (const std::uint64_t lba : {kBlocks, ~std::uint64_t{0}})
    CHECK_EQ(nvme::status_code(queue.read(lba, 1, data).status), nvme::kStatusLbaOutOfRange);
  CHECK(queue.read(0, 1, data).ok());
}

TEST(a_lost_completion_ends_at_its_deadline_and_the_queue_is_shared_again) {
  Machine machine({.faults = "drop#3"});
  char data[kBlock];
  for (int i = 0; i < 2; ++i) CHECK(gpunvme::write(machine.queue, 0, 1, machine.block(0)).ok());
  machine.queue.timeout_ns = 300'000'000;
  {
    ExclusiveQueue queue(machine.queue);
    CHECK(queue.is_exclusive());
    CHECK_EQ(queue.read(0, 1, data).fate, Fate::kTimeout);
    CHECK(!queue.is_exclusive());
    // Whether the controller has fetched it is not known.
    CHECK_EQ(machine.queue.pair.state().sq_head.load_acquire(), 2u);
    CHECK_EQ(machine.queue.pair.state().stuck.load_acquire(), 1u);
    machine.queue.timeout_ns = 20'000'000'000;
    for (int i = 0; i < 20; ++i) {
      CHECK(queue.read(0, 1, data).ok());
      CHECK(machine.holds(data, 0, 1));
    }
  }
  CHECK_EQ(machine.free_slots(), machine.queue.pair.shape().slots - 1);
  ExclusiveQueue again(machine.queue);
  CHECK(!again.is_exclusive());
  CHECK(again.read(0, 1, data).ok());
}

TEST(a_late_completion_gives_the_slot_back) {
  Machine machine({.faults = "delay:2000#1", .entries = 2, .timeout_ns = 100'000'000});
  char data[kBlock];
  {
    ExclusiveQueue queue(machine.queue);
    CHECK_EQ(queue.read(0, 1, data).fate, Fate::kTimeout);
  }
  machine.queue.timeout_ns = 20'000'000'000;
  machine.client.until("the completion", [&] {
    gpunvme::reap(machine.queue);
    return machine.queue.pair.state().stuck.load_acquire() == 0;
  });
  CHECK_EQ(machine.queue.pair.state().late.load_acquire(), 1u);
  ExclusiveQueue queue(machine.queue);
  CHECK(queue.is_exclusive());
  CHECK(queue.read(0, 1, data).ok());
}

TEST(stopping_ends_the_wait) {
  Machine machine({.faults = "drop", .entries = 4});
  Threads all;
  all.start([&] {
    ExclusiveQueue queue(machine.queue);
    char data[kBlock];
    CHECK_EQ(queue.read(0, 1, data).fate, Fate::kStopped);
    CHECK(!queue.is_exclusive());
    CHECK_EQ(queue.read(0, 1, data).fate, Fate::kStopped);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  machine.queue.pair.stop();
  all.finish();
}
