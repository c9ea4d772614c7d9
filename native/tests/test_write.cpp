// Writing from host memory: what a plain read of the file finds afterwards.

#include <thread>

#include "block_device.h"
#include "check.h"
#include "engine.h"
#include "files.h"

using namespace testing;

namespace {

constexpr auto kReadWrite = SourceFile::Mode::kReadWrite;
constexpr auto kCreate = SourceFile::Mode::kCreate;
constexpr auto kWrite = Job::Direction::kWrite;

// Segments side by side, apart, at any offset and from any address, into a file that has other bytes already.
void write_at_random(const std::string& directory, std::uint64_t number) {
  check::Random random(number);
  const std::string path = directory + "/file";
  Bytes expected = pattern(random.pick({std::uint64_t{0}, 1ul, 4096ul, 100'001ul, 3 * kMiB + 5}), number);
  write_file(path, expected);
  if (random.one_in(2)) make_cold(path);
  const auto file = SourceFile::open(path, kReadWrite);

  std::vector<Segment> segments;
  std::uint64_t at = random.pick({std::uint64_t{0}, 1ul, 4095ul, 4096ul, 70'000ul});
  std::uint64_t used = 0;
  std::uint64_t wanted = 0;
  const std::uint64_t count = random.pick({1ul, 2ul, 9ul, 200ul});
  const std::uint64_t most = count > 9 ? 20'000 : 3 * kMiB;
  for (std::uint64_t i = 0; i < count; ++i) {
    Segment segment;
    segment.offset = at;
    segment.nbytes = random.one_in(8) ? random.below(3) : random.below(most);
    used += random.below(70);
    if (random.one_in(2)) used = (used + 4095) / 4096 * 4096 + segment.offset % 4096;  // as O_DIRECT wants it
    segment.address = used;
    used += segment.nbytes;
    wanted += segment.nbytes;
    at += segment.nbytes + random.pick({std::uint64_t{0}, 0ul, 0ul, 1ul, 100ul, 4096ul, 10'000ul});
    segments.push_back(segment);
  }
  Memory memory(used);
  fill(memory.data(), 0, used, number + 1);
  std::uint64_t end = 0;
  for (Segment& segment : segments) {
    if (segment.nbytes > 0) {
      end = segment.offset + segment.nbytes;
      if (expected.size() < end) expected.resize(end);
      std::memcpy(expected.data() + segment.offset, memory.data() + segment.address, segment.nbytes);
    }
    segment.address += memory.address();
  }
  if (random.one_in(2)) {
    file->reserve(0, end);
    expected.resize(std::max<std::uint64_t>(expected.size(), end));
  }

  const auto job = make_job(kWrite);
  job->add_file(file);
  std::shuffle(segments.begin(), segments.end(), std::minstd_rand(static_cast<unsigned>(number)));
  job->add(segments);
  const auto failure = seal_and_wait(*job);
  if (failure) throw *failure;
  if (first_difference(read_file(path), expected) != -1) {
    check::fail(
        __FILE__, __LINE__,
        "round " + std::to_string(number) + ": byte " + std::to_string(first_difference(read_file(path), expected)));
  }
  CHECK_EQ(job->counts().total(), wanted);
  CHECK_EQ(job->counts().buffered, 0u);
  CHECK(job->counts().bounced <= wanted);
  // And what is on the drive is what is in the page cache.
  make_cold(path);
  CHECK_EQ(first_difference(read_file(path), expected), -1);
}

}  // namespace

TEST(random_segments_end_up_in_the_file) {
  const Directory directory;
  for (int i = 0; i < check::rounds(25); ++i) write_at_random(directory.path(), static_cast<std::uint64_t>(i));
}

TEST(random_segments_into_memory) {
  const Directory directory("/dev/shm");
  for (int i = 0; i < check::rounds(10); ++i) write_at_random(directory.path(), 1000 + static_cast<std::uint64_t>(i));
}

TEST(random_segments_by_io_threads) {
  gpunvme::Engine::shutdown();
  setenv("GPUNVME_IO", "threads", 1);
  const Directory directory;
  std::string failed;
  try {
    for (int i = 0; i < check::rounds(6); ++i) write_at_random(directory.path(), 2000 + static_cast<std::uint64_t>(i));
  } catch (const std::exception& exception) {
    failed = exception.what();
  }
  gpunvme::Engine::shutdown();
  unsetenv("GPUNVME_IO");
  CHECK_EQ(failed, "");
}

TEST(ends_that_are_no_whole_pages) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes old = pattern(2 * kMiB, 1);
  for (const std::uint64_t offset : {0ul, 1ul, 4095ul, 4096ul, 4097ul}) {
    for (const std::uint64_t nbytes : {1ul, 4096ul, 8191ul, kMiB, kMiB + 1, 2 * kMiB - 4098}) {
      for (const std::uint64_t shift : {0ul, 1ul, offset % 4096}) {
        write_file(path, old);
        const auto file = SourceFile::open(path, kReadWrite);
        Memory memory(nbytes, shift);
        fill(memory.data(), 0, nbytes, 2);
        const Counts counts = move(file, offset, nbytes, memory.address(), kWrite);
        Bytes expected = old;
        std::memcpy(expected.data() + offset, memory.data(), nbytes);
        CHECK_EQ(first_difference(read_file(path), expected), -1);
        CHECK_EQ(counts.total(), nbytes);
        if (file->direct_fd() >= 0 && nbytes >= kMiB) CHECK(counts.direct >= nbytes - 2 * 4096);
        if (nbytes < kMiB) CHECK_EQ(counts.direct, 0u);
      }
    }
  }
}

TEST(behind_the_end_of_a_short_file) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    const Directory directory(where);
    const std::string path = directory / "file";
    const Bytes bytes = pattern(2 * kMiB + 333, 3);
    for (const std::uint64_t offset : {0ul, 100ul, kMiB, (4ul << 30) + 5}) {
      write_file(path, pattern(100, 1));
      const auto file = SourceFile::open(path, kReadWrite);
      CHECK_EQ(move(file, offset, bytes.size(), reinterpret_cast<std::uint64_t>(bytes.data()), kWrite).total(),
               bytes.size());
      CHECK_EQ(file->size(), offset + bytes.size());
      Memory back(bytes.size());
      move(file, offset, bytes.size(), back.address());
      CHECK_EQ(first_difference(back, bytes), -1);
      if (offset < 100) continue;
      Memory head(100);
      move(file, 0, 100, head.address());
      CHECK_EQ(first_difference(head, pattern(100, 1)), -1);
    }
  }
}

TEST(what_is_written_is_what_is_read_next) {
  // The page cache must not hold old bytes of what was written past it, nor the other way about.
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, Bytes(4 * kMiB, 0));
  const auto file = SourceFile::open(path, kReadWrite);
  for (std::uint64_t round = 1; round <= 10; ++round) {
    round % 2 == 0 ? make_hot(path) : make_cold(path);
    Memory memory(4 * kMiB);
    fill(memory.data(), 0, 4 * kMiB, round);
    move(file, 0, 4 * kMiB, memory.address(), kWrite);
    Memory back(4 * kMiB);
    move(file, 0, 4 * kMiB, back.address());
    CHECK_EQ(first_difference(back.data(), memory.data(), 4 * kMiB), -1);
  }
}

TEST(a_file_that_is_not_writable) {
  const Directory directory;
  const std::string path = directory / "file";
  for (const std::uint64_t nbytes : {100ul, 3 * kMiB}) {
    write_file(path, pattern(nbytes, 1));
    const auto file = SourceFile::open(path, SourceFile::Mode::kRead);
    Memory memory(nbytes);
    const Failure failure = CHECK_FAILS(move(file, 0, nbytes, memory.address(), kWrite));
    CHECK_EQ(failure.kind, FailureKind::kFile);
    CHECK_EQ(failure.error_number, EBADF);
    CHECK_EQ(first_difference(read_file(path), pattern(nbytes, 1)), -1);
  }
}

TEST(a_full_disk) {
  const Directory directory;
  const bool mounted = on_a_small_disk(directory.path(), [&directory] {
    const auto file = SourceFile::open(directory / "file", kCreate);
    Memory memory(3 * kMiB);
    const auto job = make_job(kWrite);
    job->add({{job->add_file(file), 0, 3 * kMiB, memory.address()}});
    const auto failure = seal_and_wait(*job);
    CHECK(failure.has_value());
    CHECK_EQ(failure->kind, FailureKind::kFile);
    CHECK_EQ(failure->error_number, ENOSPC);
    CHECK_EQ(failure->file, directory / "file");
    CHECK(failure->offset >= 0);
    CHECK(job->counts().total() <= kMiB);
    // Room again, and all is well.
    require(ftruncate(file->fd(), 0) == 0, "ftruncate");
    CHECK_EQ(move(file, 0, kMiB / 2, memory.address(), kWrite).total(), kMiB / 2);
  });
  if (!mounted) SKIP("mounting a tmpfs takes root");
}

TEST(a_write_to_a_block_device_and_behind_its_end) {
  const Directory directory;
  const std::string backing = directory / "backing";
  write_file(backing, pattern(8 * kMiB, 5));
  BlockDevice device(backing);
  device.pass_errors_on();
  const auto file = SourceFile::open(device.path(), kReadWrite);
  Memory memory(4 * kMiB);
  fill(memory.data(), 0, 4 * kMiB, 9);
  const Counts counts = move(file, 2 * kMiB, 4 * kMiB, memory.address(), kWrite);
  CHECK_EQ(counts.direct, 4 * kMiB);
  Bytes expected = pattern(8 * kMiB, 5);
  std::memcpy(expected.data() + 2 * kMiB, memory.data(), 4 * kMiB);
  CHECK_EQ(first_difference(read_file(backing), expected), -1);
  // Behind its end there is nothing.
  const auto job = make_job(kWrite);
  job->add({{job->add_file(file), 6 * kMiB, 4 * kMiB, memory.address()}});
  const auto failure = seal_and_wait(*job);
  CHECK(failure.has_value());
  CHECK(job->counts().total() <= 2 * kMiB);
}

TEST(after_a_stop_the_source_is_ours_again) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, {});
  const auto file = SourceFile::open(path, kReadWrite);
  check::Random random(1);
  for (int round = 0; round < check::rounds(20); ++round) {
    auto memory = std::make_unique<Memory>(16 * kMiB, random.pick({0ul, 1ul}));
    const auto job = make_job(kWrite);
    job->add({{job->add_file(file), 0, 16 * kMiB, memory->address()}});
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
    job->stop(Failure(FailureKind::kCancelled, "enough"));
    wait(*job);
    memory.reset();
    CHECK(job->counts().total() <= 16 * kMiB);
  }
}

TEST(an_unlucky_write_never_touches_its_neighbours) {
  // Two jobs write next to each other at once, with a page in common: it must come out with both halves.
  const Directory directory;
  const std::string path = directory / "file";
  for (int round = 0; round < check::rounds(15); ++round) {
    write_file(path, Bytes(6 * kMiB, 0));
    const auto file = SourceFile::open(path, kReadWrite);
    const std::uint64_t border = 3 * kMiB - 1000 + static_cast<std::uint64_t>(round);
    Memory left(border);
    Memory right(6 * kMiB - border, border % 4096);
    fill(left.data(), 0, left.size(), 1);
    fill(right.data(), border, right.size(), 1);
    const auto first = make_job(kWrite);
    const auto second = make_job(kWrite);
    first->add({{first->add_file(file), 0, left.size(), left.address()}});
    second->add({{second->add_file(file), border, right.size(), right.address()}});
    CHECK(!seal_and_wait(*first));
    CHECK(!seal_and_wait(*second));
    CHECK_EQ(first_difference(read_file(path), pattern(6 * kMiB, 1)), -1);
  }
}
