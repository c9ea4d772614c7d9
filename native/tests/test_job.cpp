// Reading into host memory: every byte where it belongs, nothing else touched, and the counters tell what was done.
#include <sys/resource.h>

#include <thread>

#include "block_device.h"
#include "check.h"
#include "engine.h"
#include "files.h"

using namespace testing;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;

enum class Cache { kCold, kHot, kAlternating, kRandom };

void set_cache(const std::string& path, Cache state, std::uint64_t size, check::Random& random) {
  make_cold(path);
  if (state == Cache::kHot) make_hot(path);
  if (state == Cache::kAlternating) {
    for (std::uint64_t at = 0; at < size; at += 2 * kMiB) make_hot(path, at, kMiB);
  }
  if (state == Cache::kRandom) {
    for (int i = 0; i < 5; ++i) make_hot(path, random.below(size + 1), random.pick({1ul, 4096ul, 300 * kKiB}));
  }
}

struct TestFile {
  std::string path;
  Bytes bytes;
  std::shared_ptr<SourceFile> source;
};

// Random segments over several files, in any order and in several calls, against a plain copy of the bytes.
void read_at_random(const std::string& directory, std::uint64_t number, bool sparse) {
  check::Random random(number);
  std::vector<TestFile> files(random.between(1, 3));
  for (std::size_t i = 0; i < files.size(); ++i) {
    TestFile& file = files[i];
    file.path = directory + "/" + std::to_string(i);
    const std::uint64_t size = random.pick(
        {std::uint64_t{0}, std::uint64_t{1}, 4095ul, 4096ul, 4097ul, 100'000ul, 3 * kMiB + 17, 5 * kMiB, 6 * kMiB - 1});
    file.bytes = pattern(size, number * 10 + i);
    write_file(file.path, file.bytes);
    if (sparse && size > 0) {
      const Descriptor fd(file.path, O_RDWR);
      for (int hole = 0; hole < 4; ++hole) {
        const std::uint64_t begin = random.below(size);
        const std::uint64_t length = std::min(size - begin, random.between(1, kMiB));
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin),
                      static_cast<off_t>(length)) == 0) {
          std::fill_n(file.bytes.begin() + static_cast<std::ptrdiff_t>(begin), length, std::uint8_t{0});
        }
      }
    }
    set_cache(file.path, random.pick({Cache::kCold, Cache::kHot, Cache::kAlternating, Cache::kRandom}), size, random);
    file.source = SourceFile::open(file.path, kRead);
  }

  // Destinations lie one behind the other with room between them that must stay as it is.
  std::vector<Segment> segments;
  std::uint64_t wanted = 0;
  std::uint64_t used = 1;
  const std::uint64_t count = random.pick({1ul, 2ul, 7ul, 40ul, 400ul});
  const std::uint64_t most = count > 40 ? 30'000 : 4 * kMiB;
  bool follow = false;  // the next segment adjoins the last one, in the file and perhaps in memory
  for (std::uint64_t i = 0; i < count; ++i) {
    Segment segment;
    segment.file = static_cast<std::uint32_t>(random.below(files.size()));
    if (follow) segment.file = segments.back().file;
    const std::uint64_t size = files[segment.file].bytes.size();
    segment.offset = random.below(size + 1);
    if (random.one_in(3)) segment.offset = segment.offset / 4096 * 4096;
    if (follow) {
      // Adjoining, or behind a gap that is worth reading over, or one that is not.
      const Segment& last = segments.back();
      const std::uint64_t gap = random.pick({std::uint64_t{0}, 0ul, 1ul, 512ul, 4095ul, 4096ul, 4097ul, 9000ul});
      segment.offset = std::min(size, last.offset + last.nbytes + gap);
    }
    segment.nbytes = random.below(std::min(size - segment.offset, most) + 1);
    if (random.one_in(10)) segment.nbytes = std::min<std::uint64_t>(segment.nbytes, random.below(3));
    if (random.one_in(5)) segment.nbytes = std::min(size - segment.offset, most);  // to the end of the file
    if (!follow || random.one_in(2)) used += random.between(1, 70);
    if (random.one_in(3)) used = (used + 4095) / 4096 * 4096 + segment.offset % 4096;  // reads in place
    segment.address = used;
    used += segment.nbytes;
    wanted += segment.nbytes;
    segments.push_back(segment);
    follow = random.one_in(2);
  }
  Memory memory(used + 100, 0);
  Bytes expected(memory.size(), 0xa5);
  for (Segment& segment : segments) {
    put(expected, segment.address, files[segment.file].bytes, segment.offset, segment.nbytes);
    segment.address += memory.address();
  }

  const auto job = make_job();
  for (const TestFile& file : files) job->add_file(file.source);
  const std::uint64_t calls = random.between(1, 4);
  for (std::uint64_t call = 0; call < calls; ++call) {
    const auto begin = segments.begin() + static_cast<std::ptrdiff_t>(segments.size() * call / calls);
    const auto end = segments.begin() + static_cast<std::ptrdiff_t>(segments.size() * (call + 1) / calls);
    job->add(std::vector<Segment>(begin, end));
  }
  const auto failure = seal_and_wait(*job);
  if (failure) throw *failure;
  const std::int64_t difference = first_difference(memory, expected);
  if (difference >= 0) {
    check::fail(__FILE__, __LINE__, "round " + std::to_string(number) + ": byte " + std::to_string(difference));
  }
  const Counts counts = job->counts();
  CHECK_EQ(counts.total(), wanted);
  CHECK(counts.bounced <= wanted);
  CHECK_EQ(counts.mapped, 0u);
}

}  // namespace

TEST(random_segments_arrive_as_the_file_has_them) {
  const Directory directory;
  for (int i = 0; i < check::rounds(40); ++i) read_at_random(directory.path(), static_cast<std::uint64_t>(i), false);
}

TEST(random_segments_of_sparse_files) {
  const Directory directory;
  for (int i = 0; i < check::rounds(15); ++i) {
    read_at_random(directory.path(), 10'000 + static_cast<std::uint64_t>(i), true);
  }
}

TEST(io_threads_read_the_same) {
  gpunvme::Engine::shutdown();
  setenv("GPUNVME_IO", "threads", 1);
  const Directory directory;
  try {
    for (int i = 0; i < check::rounds(10); ++i)
      read_at_random(directory.path(), 20'000 + static_cast<std::uint64_t>(i), false);
    if (has_direct(directory.path()) && can_be_cold(directory.path())) {
      const std::string path = directory / "file";
      write_file(path, pattern(kMiB, 1));
      make_cold(path);
      Memory memory(kMiB);
      const auto job = make_job();
      job->add({{job->add_file(SourceFile::open(path, kRead)), 0, kMiB, memory.address()}});
      CHECK(!seal_and_wait(*job));
      CHECK(job->used_io_threads());
      CHECK(!job->used_io_uring());
    }
  } catch (...) {
    gpunvme::Engine::shutdown();
    unsetenv("GPUNVME_IO");
    throw;
  }
  gpunvme::Engine::shutdown();
  unsetenv("GPUNVME_IO");
}

TEST(every_alignment_of_offset_length_and_address) {
  const Directory directory;
  const std::string path = directory / "file";
  const std::uint64_t size = 3 * kMiB + 1234;
  const Bytes bytes = pattern(size, 7);
  write_file(path, bytes);
  const auto file = SourceFile::open(path, kRead);
  for (const std::uint64_t offset : {0ul, 1ul, 511ul, 512ul, 4095ul, 4096ul, 4097ul, kMiB - 1, 2 * kMiB}) {
    for (const std::uint64_t nbytes : {1ul, 512ul, 4095ul, 4096ul, 12'289ul, 300 * kKiB, size - 2 * kMiB}) {
      for (const std::uint64_t shift : {0ul, 1ul, 64ul, 511ul, 512ul, offset % 4096}) {
        make_cold(path);
        Memory memory(nbytes + 64, shift);
        const Counts counts = move(file, offset, nbytes, memory.address());
        Bytes expected(nbytes + 64, 0xa5);
        put(expected, 0, bytes, offset, nbytes);
        CHECK_EQ(first_difference(memory, expected), -1);
        CHECK_EQ(counts.total(), nbytes);
      }
    }
  }
}

TEST(a_window_that_ends_in_a_gap_leaves_the_memory_around_alone) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(12 * kMiB, 3);
  write_file(path, bytes);
  const auto file = SourceFile::open(path, kRead);
  // Windows of host reads end at multiples of 256 KiB to 2 MiB; both sides of each are in reach of one request.
  for (const std::uint64_t before : {1ul, 512ul, 2000ul, 4096ul}) {
    make_cold(path);
    const std::uint64_t gap = 4096;
    Memory memory(12 * kMiB);
    Bytes expected(memory.size(), 0xa5);
    std::vector<Segment> segments;
    std::uint64_t at = 0;
    for (std::uint64_t edge = 256 * kKiB; edge < 12 * kMiB; edge += 256 * kKiB) {
      const std::uint64_t end = edge - before;
      // Where it comes from and goes to have the same place in their pages, so that it could be read in place.
      const std::uint64_t to = at;
      segments.push_back({0, at, end - at, memory.address() + to});
      put(expected, to, bytes, at, end - at);
      at = end + gap;
    }
    const auto job = make_job();
    job->add_file(file);
    job->add(segments);
    CHECK(!seal_and_wait(*job));
    CHECK_EQ(first_difference(memory, expected), -1);
  }
}

TEST(the_same_bytes_to_many_places) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(2 * kMiB, 1);
  write_file(path, bytes);
  for (const bool hot : {false, true}) {
    make_cold(path);
    if (hot) make_hot(path);
    const std::uint64_t nbytes = kMiB;
    Memory memory(8 * nbytes);
    const auto job = make_job();
    job->add_file(SourceFile::open(path, kRead));
    std::vector<Segment> segments;
    for (std::uint64_t i = 0; i < 8; ++i) segments.push_back({0, i / 2 * 1000, nbytes, memory.address() + i * nbytes});
    job->add(segments);
    CHECK(!seal_and_wait(*job));
    CHECK_EQ(job->counts().total(), 8 * nbytes);
    for (std::uint64_t i = 0; i < 8; ++i) {
      CHECK_EQ(first_difference(memory.data() + i * nbytes, bytes.data() + i / 2 * 1000, nbytes), -1);
    }
  }
}

TEST(nothing_to_read_is_done_when_sealed) {
  const Directory directory;
  write_file(directory / "empty", {});
  const auto file = SourceFile::open(directory / "empty", kRead);
  const auto job = make_job();
  CHECK(!job->done());
  job->add({{job->add_file(file), 0, 0, 0}, {0, 0, 0, 0}});
  CHECK(!job->wait_for(std::chrono::milliseconds(1)));
  job->seal();
  CHECK(job->done());
  CHECK(!job->failure());
  CHECK_EQ(job->counts().total(), 0u);
  CHECK_EQ(seal_and_wait(*make_job()).has_value(), false);
}

TEST(beyond_4_gib) {
  const Directory directory;
  const std::string path = directory / "file";
  const std::uint64_t begin = (5ul << 30) - 3 * kMiB / 2;
  const Bytes bytes = pattern(3 * kMiB + 77, 9);
  {
    const Descriptor file(path, O_RDWR | O_CREAT);
    write_at(file, bytes.data(), bytes.size(), begin);
  }
  const auto file = SourceFile::open(path, kRead);
  for (const bool hot : {false, true}) {
    make_cold(path);
    if (hot) make_hot(path, begin, bytes.size());
    Memory memory(bytes.size());
    CHECK_EQ(move(file, begin, bytes.size(), memory.address()).total(), bytes.size());
    CHECK_EQ(first_difference(memory, bytes), -1);
    // The hole before it, across 4 GiB.
    Memory zeros(2 * kMiB);
    CHECK_EQ(move(file, (4ul << 30) - kMiB, 2 * kMiB, zeros.address()).total(), 2 * kMiB);
    CHECK_EQ(first_difference(zeros, Bytes(2 * kMiB, 0)), -1);
  }
}

TEST(a_file_in_memory_comes_from_the_page_cache) {
  const Directory directory("/dev/shm");
  for (int i = 0; i < check::rounds(4); ++i)
    read_at_random(directory.path(), 30'000 + static_cast<std::uint64_t>(i), true);
  const std::string path = directory / "file";
  const Bytes bytes = pattern(2 * kMiB + 5, 1);
  write_file(path, bytes);
  const auto file = SourceFile::open(path, kRead);
  if (!file->in_memory()) SKIP("/dev/shm is no tmpfs");
  Memory memory(bytes.size());
  const Counts counts = move(file, 0, bytes.size(), memory.address());
  CHECK_EQ(first_difference(memory, bytes), -1);
  CHECK_EQ(counts.cached, bytes.size());
  CHECK_EQ(counts.bounced, 0u);
}

TEST(a_cold_read_stays_out_of_the_page_cache_and_a_hot_one_off_the_drive) {
  const Directory directory;
  if (!can_be_cold(directory.path())) SKIP(directory.path() + " cannot be cold");
  if (!has_direct(directory.path())) SKIP(directory.path() + " has no O_DIRECT");
  const std::string path = directory / "file";
  const std::uint64_t size = 9 * kMiB + 4321;
  const Bytes bytes = pattern(size, 11);
  write_file(path, bytes);
  const auto file = SourceFile::open(path, kRead);
  for (const std::uint64_t offset : {0ul, 4321ul}) {
    make_cold(path);
    Memory memory(size - offset, offset % 4096);
    Counts counts = move(file, offset, size - offset, memory.address());
    CHECK_EQ(counts.direct, size - offset);
    CHECK_EQ(cached(path).value(), 0u);
    // In place, but for what is no whole block at the ends of pieces.
    CHECK(counts.bounced < 2 * 4096);
    CHECK_EQ(first_difference(memory.data(), bytes.data() + offset, size - offset), -1);

    make_hot(path);
    counts = move(file, offset, size - offset, memory.address());
    CHECK_EQ(counts.cached, size - offset);
    CHECK_EQ(counts.bounced, 0u);

    // Half of it: what is cached comes from the cache, the rest from the drive, and the cache stays as it is.
    make_cold(path);
    make_hot(path, 4 * kMiB, 2 * kMiB);
    const std::uint64_t before = cached(path).value();
    counts = move(file, offset, size - offset, memory.address());
    CHECK_EQ(counts.total(), size - offset);
    CHECK_EQ(counts.cached, 2 * kMiB);
    CHECK_EQ(counts.direct, size - offset - 2 * kMiB);
    CHECK_EQ(cached(path).value(), before);
    CHECK_EQ(first_difference(memory.data(), bytes.data() + offset, size - offset), -1);
  }
}

TEST(segments_added_while_earlier_ones_move) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(4 * kMiB, 2);
  write_file(path, bytes);
  make_cold(path);
  Memory memory(bytes.size());
  const auto job = make_job();
  job->add_file(SourceFile::open(path, kRead));
  const std::uint64_t step = 128 * kKiB;
  for (std::uint64_t at = 0; at < bytes.size(); at += step) {
    job->add({{0, at, step, memory.address() + at}});
    if (at % (8 * step) == 0) {  // let everything so far be done: the workers fall asleep and must be woken again
      while (job->counts().total() < at + step) std::this_thread::yield();
      CHECK(!job->done());
    }
  }
  CHECK(!seal_and_wait(*job));
  CHECK_EQ(job->counts().total(), bytes.size());
  CHECK_EQ(first_difference(memory, bytes), -1);
}

TEST(jobs_of_many_threads_at_once) {
  const Directory directory;
  std::vector<std::thread> threads;
  std::vector<std::string> failures(6);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([i, &failures] {
      try {
        const Directory own;
        for (int round = 0; round < check::rounds(4); ++round) {
          read_at_random(own.path(), 40'000 + i * 1000 + static_cast<std::uint64_t>(round), false);
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
}

TEST(after_a_stop_the_memory_is_ours_again) {
  const Directory directory;
  const std::string path = directory / "file";
  const std::uint64_t size = 16 * kMiB;
  write_file(path, pattern(size, 5));
  const auto file = SourceFile::open(path, kRead);
  check::Random random(1);
  const Bytes marks(size, 0xee);
  int stopped = 0;
  for (int round = 0; round < check::rounds(30); ++round) {
    if (round % 3 == 0) make_cold(path);
    if (round % 3 == 1) make_hot(path);
    auto memory = std::make_unique<Memory>(size, random.pick({0ul, 1ul}));
    const auto job = make_job();
    job->add({{job->add_file(file), 0, size, memory->address()}});
    if (random.one_in(2)) job->seal();
    const std::uint64_t microseconds = random.below(3000);
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    job->stop(Failure(FailureKind::kCancelled, "enough"));
    const auto failure = wait(*job);
    if (round % 2 == 0) {
      memory.reset();  // a late byte of a worker's is a fault now
    } else {
      std::memset(memory->data(), 0xee, size);  // and one of the kernel's shows here
      Memory other(kMiB);
      move(file, 0, kMiB, other.address());
      CHECK_EQ(first_difference(*memory, marks), -1);
    }
    if (failure) {
      CHECK_EQ(failure->kind, FailureKind::kCancelled);
      CHECK_EQ(std::string(failure->what()), "enough");
      CHECK_EQ(std::string(CHECK_FAILS(job->add({{0, 0, 1, 0}})).what()), "enough");
      ++stopped;
    }
    CHECK(job->counts().total() <= size);
  }
  CHECK(stopped > 0);
}

TEST(the_first_failure_stays) {
  const auto job = make_job();
  job->stop(Failure(FailureKind::kCancelled, "first"));
  job->stop(Failure(FailureKind::kDeadline, "second"));
  CHECK(job->done());
  CHECK_EQ(std::string(job->failure()->what()), "first");
  job->seal();
  CHECK_EQ(std::string(job->failure()->what()), "first");
}

TEST(a_deadline_ends_a_read) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, pattern(8 * kMiB, 5));
  make_cold(path);
  Memory memory(8 * kMiB);
  Job::Options options;
  options.timeout = std::chrono::duration<double>(0);
  const auto job = Job::make(options);
  job->add({{job->add_file(SourceFile::open(path, kRead)), 0, 8 * kMiB, memory.address()}});
  const auto failure = seal_and_wait(*job);
  CHECK(failure.has_value());
  CHECK_EQ(failure->kind, FailureKind::kDeadline);
}

TEST(a_file_cut_short_is_an_error) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    for (const std::uint64_t left : {0ul, 1ul, 4096ul, 2 * kMiB + 100, 3 * kMiB - 1}) {
      for (const bool hot : {false, true}) {
        const Directory directory(where);
        const std::string path = directory / "file";
        const std::uint64_t size = 3 * kMiB;
        write_file(path, pattern(size, 5));
        const auto file = SourceFile::open(path, kRead);
        require(truncate(path.c_str(), static_cast<off_t>(left)) == 0, "truncate");
        make_cold(path);
        if (hot) make_hot(path);
        Memory memory(size);
        const Failure failure = CHECK_FAILS(move(file, 0, size, memory.address()));
        CHECK_EQ(failure.kind, FailureKind::kTruncated);
        CHECK_EQ(failure.file, path);
        CHECK(failure.offset >= static_cast<std::int64_t>(left));
        CHECK(failure.offset < static_cast<std::int64_t>(size));
      }
    }
  }
}

TEST(an_error_of_the_drive_is_reported_with_its_place) {
  const Directory directory;
  const std::string backing = directory / "backing";
  write_file(backing, pattern(8 * kMiB, 5));
  BlockDevice device(backing);
  device.pass_errors_on();
  const auto file = SourceFile::open(device.path(), kRead);
  CHECK_EQ(file->size(), 8 * kMiB);
  Memory memory(8 * kMiB);
  CHECK_EQ(move(file, 0, 8 * kMiB, memory.address()).total(), 8 * kMiB);
  CHECK_EQ(first_difference(memory, pattern(8 * kMiB, 5)), -1);

  // The drive can no longer read its second half.
  require(truncate(backing.c_str(), 4 * kMiB) == 0, "truncate");
  make_cold(device.path());
  const auto job = make_job();
  job->add({{job->add_file(file), 0, 8 * kMiB, memory.address()}});
  const auto failure = seal_and_wait(*job);
  CHECK(failure.has_value());
  CHECK_EQ(failure->kind, FailureKind::kFile);
  CHECK_EQ(failure->error_number, EIO);
  CHECK_EQ(failure->file, device.path());
  CHECK(failure->offset >= static_cast<std::int64_t>(4 * kMiB));
  CHECK(job->counts().total() <= 4 * kMiB);
  CHECK_EQ(move(file, 0, 4 * kMiB, memory.address()).total(), 4 * kMiB);
}

TEST(an_error_of_a_read_through_the_page_cache) {
  // A regular file, without O_DIRECT, that the kernel refuses to read where nothing is mapped.
  const auto file = SourceFile::open("/proc/self/mem", kRead);
  Bytes bytes = pattern(10'000, 1);
  Memory memory(10'000);
  CHECK_EQ(move(file, reinterpret_cast<std::uint64_t>(bytes.data()), 10'000, memory.address()).direct, 0u);
  CHECK_EQ(first_difference(memory, bytes), -1);
  const Failure failure = CHECK_FAILS(move(file, 4096, 100, memory.address()));
  CHECK_EQ(failure.kind, FailureKind::kFile);
  CHECK_EQ(failure.error_number, EIO);
  CHECK_EQ(failure.offset, 4096);
}

TEST(a_file_system_that_promised_too_much_is_read_through_the_page_cache) {
  const Directory directory;
  const std::string backing = directory / "backing";
  const Bytes bytes = pattern(4 * kMiB, 5);
  write_file(backing, bytes);
  BlockDevice device(backing);
  device.set_sector(512);
  const auto file = SourceFile::open(device.path(), kRead);
  CHECK_EQ(file->offset_align(), 512u);
  CHECK(file->direct_refusal().empty());
  // From here on the drive wants 4096, and the file still believes in 512.
  device.set_sector(4096);
  make_cold(device.path());
  Memory memory(2 * kMiB);
  // With gaps: the counters count what was wanted, not what was read.
  const auto job = make_job();
  job->add_file(file);
  std::vector<Segment> segments;
  std::uint64_t wanted = 0;
  for (std::uint64_t at = 512; at < 2 * kMiB; at += 300 * kKiB) {
    segments.push_back({0, at, 100'000, memory.address() + at});
    segments.push_back({0, at + 101'000, 50'000, memory.address() + at + 101'000});
    wanted += 150'000;
  }
  job->add(segments);
  CHECK(!seal_and_wait(*job));
  for (const Segment& segment : segments) {
    CHECK_EQ(first_difference(memory.data() + segment.offset, bytes.data() + segment.offset, segment.nbytes), -1);
  }
  CHECK(!file->direct_refusal().empty());
  CHECK_EQ(file->direct_fd(), -1);
  CHECK_EQ(job->counts().total(), wanted);
  CHECK(job->counts().buffered > 0);
}
