// Many small reads of one size: rows of a table, packed in the order in which they were asked for.
#include <numeric>
#include <thread>

#include "check.h"
#include "engine.h"
#include "files.h"

using namespace testing;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;
using Offsets = std::vector<std::int64_t>;

struct Table {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes;
  std::shared_ptr<SourceFile> file;

  explicit Table(std::uint64_t nbytes, const std::string& where = default_directory())
      : directory(where), bytes(pattern(nbytes, 1)) {
    write_file(path, bytes);
    file = SourceFile::open(path, kRead);
  }
};

struct Result {
  std::optional<Failure> failure;
  Counts counts;
};

Result gather(const std::shared_ptr<SourceFile>& file, const Offsets& offsets, std::uint64_t nbytes,
              std::uint64_t address) {
  const auto job = make_job();
  job->add_gather(job->add_file(file), offsets.data(), offsets.size(), nbytes, address);
  auto failure = seal_and_wait(*job);
  return {failure, job->counts()};
}

// Gathers and compares; what lies behind the result must stay as it is.
Counts check_gather(const Table& table, const Offsets& offsets, std::uint64_t nbytes, std::uint64_t shift = 0) {
  Memory memory(offsets.size() * nbytes + 64, shift);
  const Result result = gather(table.file, offsets, nbytes, memory.address());
  if (result.failure) throw *result.failure;
  Bytes expected(memory.size(), 0xa5);
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    put(expected, i * nbytes, table.bytes, static_cast<std::uint64_t>(offsets[i]), nbytes);
  }
  CHECK_EQ(first_difference(memory, expected), -1);
  CHECK_EQ(result.counts.total(), offsets.size() * nbytes);
  CHECK(result.counts.mapped <= result.counts.cached);
  CHECK(result.counts.bounced <= result.counts.direct + result.counts.buffered);
  return result.counts;
}

enum class Shape { kRandom, kAdjacent, kDuplicates, kRows };

Offsets make_offsets(Shape shape, std::uint64_t count, std::uint64_t nbytes, std::uint64_t size,
                     check::Random& random) {
  Offsets offsets;
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t offset = random.below(size - nbytes + 1);
    if (shape == Shape::kAdjacent && i % 16 != 0 && static_cast<std::uint64_t>(offsets.back()) + 2 * nbytes <= size) {
      offset = static_cast<std::uint64_t>(offsets.back()) + nbytes;
    }
    if (shape == Shape::kDuplicates && i % 2 != 0) offset = static_cast<std::uint64_t>(offsets[random.below(i)]);
    if (shape == Shape::kRows) offset = offset / nbytes * nbytes;
    offsets.push_back(static_cast<std::int64_t>(offset));
  }
  return offsets;
}

}  // namespace

TEST(every_size_shape_and_state_of_the_cache) {
  const Table table(9 * kMiB + 12'345);
  check::Random random(1);
  for (const std::uint64_t nbytes : {1ul, 7ul, 100ul, 4096ul, 5000ul, 65'536ul, 512 * kKiB}) {
    for (const Shape shape : {Shape::kRandom, Shape::kAdjacent, Shape::kDuplicates, Shape::kRows}) {
      for (int state = 0; state < 3; ++state) {  // cold, hot, every other MiB
        make_cold(table.path);
        if (state == 1) make_hot(table.path);
        if (state == 2) {
          for (std::uint64_t at = 0; at < table.bytes.size(); at += 2 * kMiB) make_hot(table.path, at, kMiB);
        }
        const std::uint64_t most = std::max<std::uint64_t>(8, std::min<std::uint64_t>(3000, 4 * kMiB / nbytes));
        for (const std::uint64_t count : {std::uint64_t{1}, random.between(2, 100), most}) {
          if (count * nbytes > 20 * kMiB) continue;
          check_gather(table, make_offsets(shape, count, nbytes, table.bytes.size(), random), nbytes,
                       random.pick({0ul, 1ul, 512ul}));
        }
      }
    }
  }
}

TEST(the_counters_tell_which_way_the_bytes_came) {
  const Table table(8 * kMiB);
  if (!can_be_cold(table.directory.path())) SKIP("files here cannot be cold");
  if (table.file->direct_fd() < 0) SKIP("no O_DIRECT here");
  check::Random random(2);
  make_cold(table.path);
  Counts counts = check_gather(table, make_offsets(Shape::kRandom, 50, 5000, table.bytes.size(), random), 5000);
  CHECK_EQ(counts.direct, 250'000u);
  CHECK_EQ(counts.bounced, 250'000u);
  CHECK_EQ(cached(table.path).value(), 0u);
  counts = check_gather(table, make_offsets(Shape::kRows, 50, 4096, table.bytes.size(), random), 4096);
  CHECK_EQ(counts.direct, 50 * 4096u);
  CHECK_EQ(counts.bounced, 0u);  // in place
  make_hot(table.path);
  counts = check_gather(table, make_offsets(Shape::kRandom, 50, 5000, table.bytes.size(), random), 5000);
  CHECK_EQ(counts.cached, 250'000u);
  CHECK_EQ(counts.bounced, 0u);
}

TEST(what_is_asked_for_often_is_copied_from_the_mapping) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    const Table table(5 * kMiB + 100, where);
    make_hot(table.path);
    check::Random random(3);
    std::uint64_t mapped = 0;
    for (int i = 0; i < 10; ++i) {
      const std::uint64_t nbytes = random.pick({1ul, 100ul, 4096ul, 5000ul});
      Offsets offsets = make_offsets(Shape::kRandom, 1000, nbytes, table.bytes.size(), random);
      offsets.push_back(static_cast<std::int64_t>(table.bytes.size() - nbytes));  // up to the end of the mapping
      const Counts counts = check_gather(table, offsets, nbytes);
      // The kernel may refuse a read without waiting while it moves the page that is meant.
      CHECK(counts.cached >= 990 * nbytes);
      mapped += counts.mapped;
    }
    CHECK(mapped > 0);
    // As dense as that from the start.
    const Table other(2 * kMiB, where);
    make_hot(other.path);
    const Counts counts = check_gather(other, make_offsets(Shape::kRandom, 5000, 64, other.bytes.size(), random), 64);
    CHECK(counts.mapped > 0);
  }
}

TEST(the_last_byte_and_the_first_behind_it) {
  const Table table(kMiB + 1);
  for (const bool hot : {false, true}) {
    make_cold(table.path);
    if (hot) make_hot(table.path);
    check_gather(table, {static_cast<std::int64_t>(kMiB), 0, static_cast<std::int64_t>(kMiB)}, 1);
    check_gather(table, {static_cast<std::int64_t>(kMiB - 4095)}, 4096);
    for (const std::int64_t offset : {static_cast<std::int64_t>(kMiB + 1), std::int64_t{-1}, INT64_MIN, INT64_MAX}) {
      Memory memory(100);
      const Result result = gather(table.file, {0, offset}, 1, memory.address());
      CHECK(result.failure.has_value());
      CHECK_EQ(result.failure->kind, FailureKind::kTruncated);
      CHECK_EQ(result.failure->offset, offset);
    }
  }
}

TEST(no_reads_at_all) {
  const Table table(100);
  check_gather(table, {}, 8);
  write_file(table.path, {});
  const Result result = gather(table.file, {}, 8, 0);
  CHECK(!result.failure);
}

TEST(gathers_and_segments_in_one_job) {
  const Table table(6 * kMiB);
  check::Random random(4);
  make_cold(table.path);
  make_hot(table.path, 0, 3 * kMiB);
  const Offsets first = make_offsets(Shape::kRandom, 300, 1000, table.bytes.size(), random);
  const Offsets second = make_offsets(Shape::kRandom, 10, 100'000, table.bytes.size(), random);
  Memory memory(300 * 1000 + 10 * 100'000 + table.bytes.size());
  Bytes expected(memory.size());
  for (std::size_t i = 0; i < 300; ++i)
    put(expected, i * 1000, table.bytes, static_cast<std::uint64_t>(first[i]), 1000);
  for (std::size_t i = 0; i < 10; ++i) {
    put(expected, 300'000 + i * 100'000, table.bytes, static_cast<std::uint64_t>(second[i]), 100'000);
  }
  put(expected, 1'300'000, table.bytes, 0, table.bytes.size());
  const auto job = make_job();
  job->add_file(table.file);
  job->add_gather(0, first.data(), first.size(), 1000, memory.address());
  job->add({{0, 0, table.bytes.size(), memory.address() + 1'300'000}});
  job->add_gather(0, second.data(), second.size(), 100'000, memory.address() + 300'000);
  CHECK(!seal_and_wait(*job));
  CHECK_EQ(first_difference(memory, expected), -1);
  CHECK_EQ(job->counts().total(), memory.size());
}

TEST(a_file_cut_short_before_a_gather) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    for (const bool dense : {false, true}) {
      const Table table(4 * kMiB, where);
      make_hot(table.path);
      check::Random random(5);
      if (dense) check_gather(table, make_offsets(Shape::kRandom, 3000, 100, table.bytes.size(), random), 100);
      require(truncate(table.path.c_str(), kMiB) == 0, "truncate");
      Memory memory(3000 * 100);
      const Result result = gather(table.file, make_offsets(Shape::kRandom, 3000, 100, table.bytes.size(), random), 100,
                                   memory.address());
      CHECK(result.failure.has_value());
      CHECK_EQ(result.failure->kind, FailureKind::kTruncated);
      CHECK(result.failure->offset > static_cast<std::int64_t>(kMiB - 100));
    }
  }
}

// A gather either fails or returns what the file held: never the zeros that a mapping shows behind the end.
TEST(a_file_cut_short_during_a_gather) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    const Table table(4 * kMiB, where);
    check::Random random(6);
    int failures = 0;
    for (int round = 0; round < check::rounds(60); ++round) {
      write_file(table.path, table.bytes);
      const std::uint64_t nbytes = random.pick({64ul, 100ul, 1000ul});
      const Offsets offsets = make_offsets(Shape::kRandom, 20'000, nbytes, table.bytes.size(), random);
      Memory memory(offsets.size() * nbytes);
      const auto job = make_job();
      job->add_file(table.file);
      std::thread cutter([&] {
        std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
        // Within a page: there is no fault behind the end, the rest of the page reads as zeros.
        require(
            truncate(table.path.c_str(), static_cast<off_t>(random.pick({4 * kMiB - 4000, 2 * kMiB + 1, 10ul}))) == 0,
            "truncate");
      });
      job->add_gather(0, offsets.data(), offsets.size(), nbytes, memory.address());
      const auto failure = seal_and_wait(*job);
      cutter.join();
      if (failure) {
        CHECK_EQ(failure->kind, FailureKind::kTruncated);
        ++failures;
        continue;
      }
      for (std::size_t i = 0; i < offsets.size(); ++i) {
        if (std::memcmp(memory.data() + i * nbytes, table.bytes.data() + offsets[i], nbytes) != 0) {
          check::fail(__FILE__, __LINE__, "round " + std::to_string(round) + ": wrong bytes and no failure");
        }
      }
    }
    std::printf("        %s: %d of %d failed as they should\n", where.c_str(), failures, check::rounds(60));
  }
}

TEST(after_a_stop_the_offsets_and_the_memory_are_ours_again) {
  const Table table(16 * kMiB);
  check::Random random(7);
  for (int round = 0; round < check::rounds(20); ++round) {
    round % 2 == 0 ? make_cold(table.path) : make_hot(table.path);
    auto offsets = std::make_unique<Offsets>(make_offsets(Shape::kRandom, 2000, 5000, table.bytes.size(), random));
    auto memory = std::make_unique<Memory>(offsets->size() * 5000);
    const auto job = make_job();
    job->add_gather(job->add_file(table.file), offsets->data(), offsets->size(), 5000, memory->address());
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(2000)));
    job->stop(Failure(FailureKind::kCancelled, "enough"));
    wait(*job);
    offsets.reset();
    memory.reset();
  }
}

TEST(gathers_of_many_threads_from_one_file) {
  const Table table(6 * kMiB);
  make_hot(table.path);
  std::vector<std::thread> threads;
  std::vector<std::string> failures(4);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([i, &failures, &table] {
      try {
        check::Random random(100 + i);
        for (int round = 0; round < check::rounds(10); ++round) {
          check_gather(table, make_offsets(Shape::kRandom, 1500, 333, table.bytes.size(), random), 333);
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
}
