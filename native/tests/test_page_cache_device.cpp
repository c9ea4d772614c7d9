// The page cache as host code: the functions that a GPU's threads call, on groups of one thread, over queues of the
// software controller. Every word of the namespace names itself, so that bytes of another line, or of none, are seen.
// Worth most under ThreadSanitizer.
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "device_queue.h"
#include "frame_memory.h"
#include "gpunvme/page_cache.h"
#include "threads.h"

using namespace testing;
using gpunvme::CachedArray;
using gpunvme::Fate;
using gpunvme::GpuQueue;
using gpunvme::Line;
using gpunvme::Outcome;
using gpunvme::PageCache;
using gpunvme::PageFrames;

namespace {

constexpr std::uint32_t kBlock = kDeviceBlock;
constexpr std::uint64_t kSize = 1 << 20;

struct Setting {
  std::string faults = {};
  std::uint64_t sets = 1;
  std::uint32_t line_shift = 12;
  std::uint32_t entries = 16;
  std::uint64_t timeout_ns = 20'000'000'000;
  std::uint64_t nbytes = kSize;
  std::uint64_t lba = 0;
  std::uint32_t pages_per_slot = 1;
};

// A controller, a queue of it, and a cache.
struct Machine {
  explicit Machine(const Setting& setting)
      : client(options(), 16 << 20),
        device(client, setting.entries, setting.pages_per_slot, setting.timeout_ns),
        memory(setting.sets, setting.line_shift) {
    fill();
    inject(setting.faults);
    cache.frames = memory.frames;
    cache.queues = &queue;
    cache.counters = counters;
    cache.error = &error;
    cache.nbytes = setting.nbytes;
    cache.lba = setting.lba;
    cache.blocks = (setting.nbytes + kBlock - 1) / kBlock;
    cache.queue_count = 1;
    cache.line_blocks = (1u << setting.line_shift) / kBlock;
  }
  static Options options() {
    Options options = in_memory(kSize);
    options.threads = 2;
    return options;
  }
  // Each word of the namespace is its own number, and a generation.
  void fill(std::uint64_t generation = 0) {
    std::vector<std::uint64_t> words(4096 / 8);
    for (std::uint64_t at = 0; at < kSize; at += 4096) {
      for (std::uint64_t i = 0; i < words.size(); ++i) words[i] = generation << 32 | (at / 8 + i);
      CHECK(gpunvme::write(queue, at / kBlock, 4096 / kBlock, words.data()).ok());
    }
  }
  void inject(const std::string& faults) { client.controller.inject(faults, 1); }
  std::uint64_t total(gpunvme::Atomic<std::uint64_t> gpunvme::CacheCounters::*which) const {
    std::uint64_t sum = 0;
    for (const auto& each : counters) sum += (each.*which).load_acquire();
    return sum;
  }
  std::uint64_t reads() const { return queue.pair.state().completed.load_acquire(); }

  Client client;
  DeviceQueue device;
  GpuQueue& queue = device.queue;
  FrameMemory memory;
  gpunvme::CacheCounters counters[PageCache::kStripes] = {};
  gpunvme::CacheError error{};
  PageCache cache{};
};

unsigned rounds(unsigned count) { return static_cast<unsigned>(check::rounds(static_cast<int>(count))); }

// Threads that read words at random, and find each where it belongs.
void read_at_random(Machine& machine, unsigned threads, unsigned count, std::uint64_t words) {
  Threads all;
  for (unsigned thread = 0; thread < threads; ++thread) {
    all.start([&machine, thread, count, words] {
      const CachedArray<std::uint64_t> array(&machine.cache);
      check::Random random(thread + 1);
      const std::uint64_t first = machine.cache.lba * kBlock / 8;
      for (unsigned i = 0; i < count; ++i) {
        const std::uint64_t at = random.below(words);
        std::uint64_t value = ~std::uint64_t{0};
        const Outcome outcome = array.read(at, value);
        CHECK_EQ(outcome.fate, Fate::kDone);
        CHECK_EQ(outcome.status, 0);
        CHECK_EQ(value, first + at);
      }
    });
  }
  all.finish();
}

}  // namespace

TEST(many_threads_and_few_frames_and_everybody_reads_its_own_words) {
  for (const std::uint64_t sets : {1, 3}) {
    Machine machine({.sets = sets, .entries = 8});
    const std::uint64_t before = machine.reads();
    read_at_random(machine, 6, rounds(120), kSize / 8);
    using Counters = gpunvme::CacheCounters;
    CHECK_EQ(machine.total(&Counters::hits) + machine.total(&Counters::misses), 6u * rounds(120));
    CHECK_EQ(machine.reads() - before, machine.total(&Counters::loads));
    CHECK_EQ(machine.total(&Counters::loads) - machine.total(&Counters::evictions) <= 8 * sets, true);
    CHECK(machine.total(&Counters::evictions) > 0);
  }
}

TEST(what_fits_is_read_once_however_many_ask) {
  // 8 lines in 8 frames, and 6 threads that all ask for them at once.
  Machine machine({.sets = 1});
  const std::uint64_t before = machine.reads();
  read_at_random(machine, 6, rounds(200), 8 * 4096 / 8);
  CHECK_EQ(machine.reads() - before, 8u);
  CHECK_EQ(machine.total(&gpunvme::CacheCounters::loads), 8u);
  CHECK_EQ(machine.total(&gpunvme::CacheCounters::evictions), 0u);
}

TEST(lines_of_all_sizes_are_read_by_one_command_or_several) {
  for (const std::uint32_t shift : {12, 16}) {
    for (const std::uint32_t each : {1, 16}) {
      Machine machine({.sets = 1, .line_shift = shift, .pages_per_slot = each});
      read_at_random(machine, 2, rounds(10), kSize / 8);
    }
  }
}

TEST(an_array_begins_and_ends_where_it_was_said_to) {
  // Neither its beginning nor its end is that of a line of the namespace's.
  Machine machine({.line_shift = 14, .nbytes = 5 * 16384 + 5 * kBlock - 8, .lba = 3});
  const CachedArray<std::uint64_t> array(&machine.cache);
  CHECK_EQ(array.size(), machine.cache.nbytes / 8);
  read_at_random(machine, 3, rounds(30), array.size());
  std::uint64_t value = 7;
  for (const std::uint64_t index : {array.size(), ~std::uint64_t{0}, std::uint64_t{1} << 61}) {
    const Outcome outcome = array.read(index, value);
    CHECK_EQ(nvme::status_code(outcome.status), nvme::kStatusLbaOutOfRange);
    CHECK_EQ(value, 7u);
  }
  const Line<std::uint64_t> last = array.line(array.size() - 1);
  CHECK(last.ok());
  CHECK_EQ(last.end(), array.size());
  CHECK_EQ(array[array.size()], 0u);
  CHECK_EQ(machine.error.index, array.size());
}

TEST(late_and_strange_completions_harm_nobody) {
  for (const char* faults : {"reorder@0.5", "duplicate-cqe@0.3,unknown-cid@0.3", "torn-cqe@0.2", "delay:2@0.1"}) {
    Machine machine({.faults = faults, .sets = 1});
    read_at_random(machine, 4, rounds(30), kSize / 8);
  }
}

TEST(a_read_that_failed_is_told_to_all_who_wait_and_is_never_data) {
  Machine machine({.faults = "error:0x281!", .sets = 1});
  Threads all;
  for (unsigned thread = 0; thread < 6; ++thread) {
    all.start([&machine, thread] {
      const CachedArray<std::uint64_t> array(&machine.cache);
      for (unsigned i = 0; i < rounds(10); ++i) {
        std::uint64_t value = 0x5a5a;
        const Outcome outcome = array.read(i % 3 * 512 + thread, value);
        CHECK_EQ(outcome.fate, Fate::kDone);
        CHECK_EQ(nvme::status_code(outcome.status), 0x281);
        CHECK_EQ(value, 0x5a5au);
      }
    });
  }
  all.finish();
  CHECK_EQ(machine.total(&gpunvme::CacheCounters::loads), 0u);
  CHECK(machine.total(&gpunvme::CacheCounters::failures) > 0);
  CHECK_EQ(machine.error.state.load_acquire(), 0u);  // everybody asked
  const CachedArray<std::uint64_t> array(&machine.cache);
  CHECK_EQ(array[5], 0u);
  CHECK_EQ(machine.error.state.load_acquire(), gpunvme::CacheError::kSet);
  CHECK_EQ(machine.error.index, 5u);
  CHECK_EQ(nvme::status_code(gpunvme::Failure::outcome(machine.error.failure).status), 0x281);
  machine.inject("");  // and it is tried anew
  read_at_random(machine, 4, rounds(50), kSize / 8);
}

TEST(some_reads_fail_and_the_others_are_right) {
  Machine machine({.faults = "error:0x281!@0.2,error:0x082@0.1,reorder@0.3", .sets = 1});
  Threads all;
  for (unsigned thread = 0; thread < 6; ++thread) {
    all.start([&machine, thread] {
      const CachedArray<std::uint64_t> array(&machine.cache);
      check::Random random(thread + 1);
      for (unsigned i = 0; i < rounds(60); ++i) {
        const std::uint64_t at = random.below(kSize / 8);
        std::uint64_t value = 0;
        if (array.read(at, value).ok()) CHECK_EQ(value, at);
      }
    });
  }
  all.finish();
}

TEST(a_lost_completion_ends_at_its_deadline_for_all_who_wait) {
  Machine machine({.faults = "drop#1", .sets = 1});
  machine.queue.timeout_ns = 200'000'000;
  Threads all;
  std::atomic<int> timeouts{0};
  for (unsigned thread = 0; thread < 4; ++thread) {
    all.start([&machine, &timeouts, thread] {
      const CachedArray<std::uint64_t> array(&machine.cache);
      std::uint64_t value = 0;
      const Outcome outcome = array.read(thread, value);
      if (outcome.fate == Fate::kTimeout) ++timeouts;
      if (outcome.ok()) CHECK_EQ(value, thread);
    });
  }
  all.finish();
  CHECK(timeouts.load() >= 1);
  machine.queue.timeout_ns = 20'000'000'000;
  read_at_random(machine, 2, 50, kSize / 8);
}

TEST(stopping_the_queue_ends_every_wait) {
  Machine machine({.faults = "drop", .sets = 1});
  Threads all;
  for (unsigned thread = 0; thread < 12; ++thread) {
    all.start([&machine, thread] {
      const CachedArray<std::uint64_t> array(&machine.cache);
      std::uint64_t value = 0;
      CHECK_EQ(array.read(thread * 512, value).fate, Fate::kStopped);
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  machine.queue.pair.stop();
  all.finish();
}

TEST(pinned_lines_are_never_evicted_and_keep_their_bytes) {
  Machine machine({.sets = 1});
  const CachedArray<std::uint64_t> array(&machine.cache);
  Line<std::uint64_t> lines[PageFrames::kWays - 1];
  for (std::uint64_t i = 0; i < PageFrames::kWays - 1; ++i) {
    lines[i] = array.line(i * 512 + 3);
    CHECK(lines[i].ok());
    CHECK_EQ(lines[i].first(), i * 512);
    CHECK_EQ(lines[i].end(), i * 512 + 512);
  }
  const std::uint64_t before = machine.reads();
  read_at_random(machine, 3, rounds(100), kSize / 8);  // through the one frame that is left
  for (std::uint64_t i = 0; i < PageFrames::kWays - 1; ++i) {
    for (std::uint64_t at = lines[i].first(); at < lines[i].end(); ++at) CHECK_EQ(lines[i][at], at);
  }
  CHECK(machine.reads() > before);
}

TEST(when_all_frames_are_held_others_are_told_at_the_deadline) {
  Machine machine({.sets = 1});
  const CachedArray<std::uint64_t> array(&machine.cache);
  Line<std::uint64_t> lines[PageFrames::kWays];
  for (std::uint64_t i = 0; i < PageFrames::kWays; ++i) lines[i] = array.line(i * 512);
  std::uint64_t value = 1;
  const std::uint64_t patience = std::exchange(machine.queue.timeout_ns, 100'000'000);
  CHECK_EQ(array.read(100 * 512, value).fate, Fate::kFull);
  machine.queue.timeout_ns = patience;
  CHECK(array.read(5, value).ok());  // what is there is there
  CHECK_EQ(value, 5u);
  lines[3].release();
  CHECK(array.read(100 * 512, value).ok());
  CHECK_EQ(value, 100u * 512);
  CHECK(array.read(101 * 512, value, lines[3]).ok());
  CHECK_EQ(value, 101u * 512);
  const std::uint64_t loads = machine.reads();
  CHECK(array.read(101 * 512 + 511, value, lines[3]).ok());  // held
  CHECK(array.find(101 * 512 + 1, value));
  CHECK(!array.find(77 * 512, value));
  CHECK_EQ(machine.reads(), loads);
}

TEST(the_clock_gives_a_second_chance_to_what_is_used) {
  Machine machine({.sets = 1});
  const CachedArray<std::uint64_t> array(&machine.cache);
  std::uint64_t value = 0;
  for (std::uint64_t i = 0; i < PageFrames::kWays; ++i) CHECK(array.read(i * 512, value).ok());
  for (std::uint64_t i = 8; i < 40; ++i) {
    CHECK(array.find(0, value));  // used between any two of the others
    CHECK(array.read(i * 512, value).ok());
  }
  CHECK(array.find(0, value));
  CHECK(!array.find(2 * 512, value));
}

TEST(elements_of_every_size) {
  struct Sixteen {
    std::uint64_t words[2];
  };
  Machine machine({.sets = 1});
  const CachedArray<std::uint8_t> bytes(&machine.cache);
  const CachedArray<std::uint16_t> halves(&machine.cache);
  const CachedArray<float> floats(&machine.cache);
  const CachedArray<Sixteen> large(&machine.cache);
  for (const std::uint64_t word : {std::uint64_t{1000}, kSize / 8 - 2}) {
    CHECK_EQ(bytes[word * 8], word & 0xff);
    CHECK_EQ(halves[word * 4], word & 0xffff);
    const float value = floats[word * 2];
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    CHECK_EQ(bits, word);
    CHECK_EQ(large[word / 2].words[1], word + 1);
  }
  CHECK_EQ(bytes.size(), kSize);
  CHECK_EQ(large.size(), kSize / 16);
}
