// GPU memory through the fake libcuda: order, errors, and what is given back.
#include <atomic>
#include <thread>

#include "check.h"
#include "engine.h"
#include "fake.h"
#include "files.h"
#include "slots.h"

using namespace testing;
using gpunvme::CudaContextScope;
using gpunvme::Engine;
using gpunvme::Slots;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;
constexpr auto kReadWrite = SourceFile::Mode::kReadWrite;
constexpr int kIllegalAddress = 700;
constexpr int kOutOfMemory = 2;

// A test begins with an engine and a fake that have done nothing yet, and checks that it ends with nothing left.
class Clean {
 public:
  Clean() {
    Engine::shutdown();
    fake_.reset();
    before_ = fake_.counters();
  }
  void check() const {
    Engine::shutdown();
    const FakeCudaCounters now = fake_.counters();
    CHECK_EQ(now.live_streams, before_.live_streams);
    CHECK_EQ(now.live_events, before_.live_events);
    CHECK_EQ(now.live_allocations, before_.live_allocations);
    CHECK_EQ(now.live_host_allocations, before_.live_host_allocations);
    CHECK_EQ(now.live_host_registrations, before_.live_host_registrations);
    CHECK_EQ(now.page_locked_bytes, before_.page_locked_bytes);
    CHECK_EQ(now.pending_operations, 0u);
  }

 private:
  const Fake& fake_ = Fake::instance();
  FakeCudaCounters before_;
};

struct TestFile {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes;
  std::shared_ptr<SourceFile> source;

  explicit TestFile(std::uint64_t nbytes) : bytes(pattern(nbytes, 1)) {
    write_file(path, bytes);
    source = SourceFile::open(path, kReadWrite);
  }
  // Cold, hot, and every other MiB.
  void set_cache(int state) const {
    make_cold(path);
    if (state == 1) make_hot(path);
    for (std::uint64_t at = 0; state == 2 && at < bytes.size(); at += 2 * kMiB) make_hot(path, at, kMiB);
  }
};

struct Stream {
  explicit Stream(int device) { gpunvme::cuda_check(Fake::instance().stream_create(device, 1, &handle), "stream"); }
  ~Stream() { Fake::instance().stream_destroy(handle); }
  std::uint64_t number() const { return reinterpret_cast<std::uint64_t>(handle); }
  void* handle = nullptr;
};

std::shared_ptr<Job> make_job_behind(const Stream& stream, int device,
                                     Job::Direction direction = Job::Direction::kRead) {
  Job::Options options;
  options.direction = direction;
  options.device = device;
  options.stream = stream.number();
  return Job::make(options);
}

// Something on a stream that blocks it until it is opened.
class Gate {
 public:
  Gate(int device, const Stream& stream) {
    gpunvme::cuda_check(Fake::instance().launch_host(device, stream.handle, &Gate::wait, this), "launch");
  }
  ~Gate() { open(); }
  void open() { open_ = true; }

 private:
  static void wait(void* gate) {
    while (!static_cast<Gate*>(gate)->open_) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  std::atomic<bool> open_{false};
};

void read_at_random(int device, std::uint64_t number) {
  check::Random random(number);
  const TestFile file(random.pick({100ul, 3 * kMiB + 7, 20 * kMiB}));
  const std::uint64_t size = file.bytes.size();
  file.set_cache(static_cast<int>(random.below(3)));
  std::vector<Segment> segments;
  std::uint64_t used = 0;
  std::uint64_t wanted = 0;
  std::uint64_t at = 0;
  const std::uint64_t count = random.pick({1ul, 3ul, 100ul});
  for (std::uint64_t i = 0; i < count; ++i) {
    if (random.one_in(4) || at >= size) at = random.below(size);
    const std::uint64_t nbytes = random.below(std::min(size - at, count > 3 ? 50'000 : size) + 1);
    used += random.pick({std::uint64_t{0}, 0ul, 1ul, 256ul});
    segments.push_back({0, at, nbytes, used});
    used += nbytes;
    wanted += nbytes;
    at += nbytes + random.pick({std::uint64_t{0}, 0ul, 1ul, 4096ul, 5000ul});
  }
  DeviceMemory memory(device, used + 64);
  Bytes expected(used + 64, 0xa5);
  for (Segment& segment : segments) {
    put(expected, segment.address, file.bytes, segment.offset, segment.nbytes);
    segment.address += memory.address();
  }
  const auto job = make_job(Job::Direction::kRead, device);
  job->add_file(file.source);
  job->add(segments);
  const auto failure = seal_and_wait(*job);
  if (failure) throw *failure;
  CHECK_EQ(first_difference(memory.bytes(), expected), -1);
  CHECK_EQ(job->counts().total(), wanted);
  CHECK_EQ(job->counts().bounced, wanted);
}

void write_at_random(int device, std::uint64_t number) {
  check::Random random(number);
  const TestFile file(random.pick({100ul, 3 * kMiB + 7}));
  const std::uint64_t offset = random.pick({std::uint64_t{0}, 1ul, 4096ul, 100'000ul});
  const std::uint64_t nbytes = random.pick({1ul, 5000ul, kMiB, 6 * kMiB + 77});
  const Bytes bytes = pattern(nbytes, number + 2);
  DeviceMemory memory(device, nbytes);
  memory.put(bytes);
  const auto job = make_job(Job::Direction::kWrite, device);
  job->add_file(file.source);
  // In parts that adjoin in the file but need not in memory.
  std::vector<Segment> segments;
  for (std::uint64_t at = 0; at < nbytes;) {
    const std::uint64_t part = std::min(nbytes - at, random.between(1, nbytes));
    segments.push_back({0, offset + at, part, memory.address() + at});
    at += part;
  }
  job->add(segments);
  const auto failure = seal_and_wait(*job);
  if (failure) throw *failure;
  Bytes expected = file.bytes;
  expected.resize(std::max(expected.size(), static_cast<std::size_t>(offset + nbytes)));
  put(expected, offset, bytes, 0, nbytes);
  CHECK_EQ(first_difference(read_file(file.path), expected), -1);
  CHECK_EQ(job->counts().total(), nbytes);
  CHECK_EQ(job->counts().bounced, nbytes);
}

void gather_at_random(int device, std::uint64_t number) {
  check::Random random(number);
  const TestFile file(5 * kMiB + 3);
  file.set_cache(static_cast<int>(random.below(3)));
  const std::uint64_t nbytes = random.pick({1ul, 100ul, 4096ul, 5000ul, 512 * kKiB});
  std::vector<std::int64_t> offsets(random.pick({1ul, 10ul, nbytes > 10'000 ? 20ul : 1500ul}));
  for (auto& offset : offsets) offset = static_cast<std::int64_t>(random.below(file.bytes.size() - nbytes + 1));
  DeviceMemory memory(device, offsets.size() * nbytes + 64);
  Bytes expected(offsets.size() * nbytes + 64, 0xa5);
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    put(expected, i * nbytes, file.bytes, static_cast<std::uint64_t>(offsets[i]), nbytes);
  }
  const auto job = make_job(Job::Direction::kRead, device);
  job->add_gather(job->add_file(file.source), offsets.data(), offsets.size(), nbytes, memory.address());
  const auto failure = seal_and_wait(*job);
  if (failure) throw *failure;
  CHECK_EQ(first_difference(memory.bytes(), expected), -1);
  CHECK_EQ(job->counts().total(), offsets.size() * nbytes);
  CHECK_EQ(job->counts().bounced, offsets.size() * nbytes);
}

}  // namespace

TEST(reads_gathers_and_writes) {
  const Clean clean;
  Fake::instance().set_copy_time(20, 300, 0, check::seed());
  for (int i = 0; i < check::rounds(12); ++i) {
    const auto number = static_cast<std::uint64_t>(i);
    read_at_random(i % 2, number);
    gather_at_random(i % 2, 1000 + number);
    write_at_random(i % 2, 2000 + number);
  }
  clean.check();
}

TEST(two_devices_and_the_host_at_once) {
  const Clean clean;
  Fake::instance().set_copy_time(20, 200, 0, check::seed());
  std::vector<std::thread> threads;
  std::vector<std::string> failures(5);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([i, &failures] {
      try {
        for (int round = 0; round < check::rounds(4); ++round) {
          const std::uint64_t number = 5000 + i * 100 + static_cast<std::uint64_t>(round);
          const int device = static_cast<int>(i % 2);
          if (i == 4) {
            const TestFile file(4 * kMiB);
            Memory memory(4 * kMiB);
            move(file.source, 0, 4 * kMiB, memory.address());
            CHECK_EQ(first_difference(memory, file.bytes), -1);
          } else if (round % 3 == 0) {
            write_at_random(device, number);
          } else if (round % 3 == 1) {
            gather_at_random(device, number);
          } else {
            read_at_random(device, number);
          }
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
  CHECK(Fake::instance().counters().bytes_to_device > 0);
  clean.check();
}

TEST(a_read_waits_for_what_the_stream_had_queued) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(3 * kMiB);
  for (int state = 0; state < 3; ++state) {
    file.set_cache(state);
    Stream stream(0);
    DeviceMemory memory(0, 3 * kMiB, 1);
    Bytes seen(3 * kMiB);
    {
      Gate gate(0, stream);
      // What the program still does with the memory when the read is asked for: it must not see the file yet.
      DeviceMemory copy(0, 3 * kMiB, 0);
      fake.launch_copy(0, stream.handle, copy.address(), memory.address(), 3 * kMiB, 0);
      const auto job = make_job_behind(stream, 0);
      job->add({{job->add_file(file.source), 0, 3 * kMiB, memory.address()}});
      job->seal();
      CHECK(!job->wait_for(std::chrono::milliseconds(50)));
      gate.open();
      CHECK(!wait(*job));
      fake.stream_synchronize(0, stream.handle);
      seen = copy.bytes();
    }
    CHECK_EQ(first_difference(seen, Bytes(3 * kMiB, 1)), -1);
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
    fake.reset();
  }
  clean.check();
}

TEST(a_write_waits_for_what_the_stream_had_queued) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(3 * kMiB);
  {
    Stream stream(1);
    DeviceMemory memory(1, 3 * kMiB, 1);
    Gate gate(1, stream);
    fake.launch_fill(1, stream.handle, memory.address(), 0x42, 3 * kMiB, 1000);
    const auto job = make_job_behind(stream, 1, Job::Direction::kWrite);
    job->add({{job->add_file(file.source), 0, 3 * kMiB, memory.address()}});
    job->seal();
    CHECK(!job->wait_for(std::chrono::milliseconds(50)));
    gate.open();
    CHECK(!wait(*job));
    CHECK_EQ(first_difference(read_file(file.path), Bytes(3 * kMiB, 0x42)), -1);
  }
  clean.check();
}

TEST(each_addition_waits_for_what_the_stream_had_by_then) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(2 * kMiB);
  {
    Stream stream(0);
    DeviceMemory memory(0, 2 * kMiB, 1);
    const auto job = make_job_behind(stream, 0);
    job->add({{job->add_file(file.source), 0, kMiB, memory.address()}});
    while (job->counts().total() < kMiB) std::this_thread::yield();
    Gate gate(0, stream);
    fake.launch_fill(0, stream.handle, memory.address() + kMiB, 0x42, kMiB, 0);
    job->add({{0, kMiB, kMiB, memory.address() + kMiB}});
    job->seal();
    CHECK(!job->wait_for(std::chrono::milliseconds(30)));
    gate.open();
    CHECK(!wait(*job));
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
  }
  clean.check();
}

TEST(a_stopped_read_is_done_when_its_copies_have_passed) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(20 * kMiB);
  check::Random random(1);
  for (int round = 0; round < check::rounds(15); ++round) {
    file.set_cache(round % 3);
    fake.set_copy_time(200, 500, 0, static_cast<std::uint64_t>(round));
    auto memory = std::make_unique<DeviceMemory>(0, file.bytes.size());
    const auto job = make_job(Job::Direction::kRead, 0);
    job->add({{job->add_file(file.source), 0, file.bytes.size(), memory->address()}});
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(4000)));
    job->stop(Failure(FailureKind::kCancelled, "enough"));
    wait(*job);
    memory.reset();  // the fake aborts if a copy to it is pending
  }
  clean.check();
}

// Other work must not wait for a stream that it has nothing to do with: what runs there may be waiting for it.
TEST(a_busy_stream_holds_back_nobody_else) {
  const Clean clean;
  const TestFile file(40 * kMiB);
  for (int state = 0; state < 3; ++state) {
    file.set_cache(state);
    Stream stream(0);
    DeviceMemory memory(0, 40 * kMiB);
    Gate gate(0, stream);
    const auto job = make_job_behind(stream, 0);
    job->add({{job->add_file(file.source), 0, 40 * kMiB, memory.address()}});
    job->seal();
    CHECK(!job->wait_for(std::chrono::milliseconds(50)));
    for (int i = 0; i < 3; ++i) {
      Memory host(3 * kMiB, i == 1 ? 1 : 0);
      file.set_cache(i);
      CHECK_EQ(move(file.source, 100, 3 * kMiB, host.address()).total(), 3 * kMiB);
      // Nor another GPU's: what runs on one may be waiting for the other.
      DeviceMemory other(1, 5 * kMiB);
      file.set_cache(i);
      for (const auto direction : {Job::Direction::kRead, Job::Direction::kWrite}) {
        const auto there = make_job(direction, 1);
        there->add({{there->add_file(file.source), 100, 5 * kMiB, other.address()}});
        there->seal();
        const bool went_on = there->wait_for(std::chrono::seconds(20));
        if (!went_on) gate.open();
        CHECK(!wait(*there));
        CHECK(went_on);
      }
      CHECK_EQ(first_difference(other.bytes(), Bytes(file.bytes.begin() + 100, file.bytes.begin() + 100 + 5 * kMiB)),
               -1);
    }
    CHECK(!job->done());
    gate.open();
    CHECK(!wait(*job));
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
  }
  clean.check();
}

TEST(without_page_locked_memory_it_works_and_says_so) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  fake.set_page_lock_limit(0);
  const TestFile file(4 * kMiB);
  {
    DeviceMemory memory(0, 4 * kMiB);
    const auto job = make_job(Job::Direction::kRead, 0);
    job->add({{job->add_file(file.source), 0, 4 * kMiB, memory.address()}});
    CHECK(!seal_and_wait(*job));
    CHECK(job->used_pageable());
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
    CHECK(fake.counters().pageable_copies > 0);
    CHECK_EQ(fake.counters().page_locked_bytes, 0u);
  }
  clean.check();
  fake.reset();
  DeviceMemory memory(0, 4 * kMiB);
  const auto job = make_job(Job::Direction::kRead, 0);
  job->add({{job->add_file(file.source), 0, 4 * kMiB, memory.address()}});
  CHECK(!seal_and_wait(*job));
  CHECK(!job->used_pageable());
}

TEST(page_locked_memory_is_bounded) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(8 * kMiB);
  {
    DeviceMemory memory(0, 8 * kMiB);
    for (int i = 0; i < 20; ++i) move(file.source, 0, 8 * kMiB, memory.address(), Job::Direction::kRead, 0);
    const std::uint64_t most = Engine::instance()->workers() * Slots::kBlocks * Slots::kBlock;
    CHECK(fake.counters().page_locked_bytes > 0);
    CHECK(fake.counters().page_locked_bytes <= most);
    CHECK(fake.counters().live_streams <= Engine::instance()->workers());
    // Events are used again.
    const std::uint64_t events = fake.counters().live_events;
    for (int i = 0; i < 20; ++i) move(file.source, 0, 8 * kMiB, memory.address(), Job::Direction::kRead, 0);
    CHECK(fake.counters().live_events <= std::max<std::uint64_t>(2 * events, 64));
  }
  clean.check();
}

// A checkpoint of small tensors is thousands of copies: one by one they take three times as long as its bytes.
TEST(many_segments_are_handed_over_at_once) {
  const Fake& fake = Fake::instance();
  const TestFile file(4 * kMiB);
  constexpr std::uint64_t kEach = 3000;
  constexpr std::uint64_t kApart = 3072;
  constexpr std::uint64_t kCount = 1300;  // more than fit into one call
  constexpr int kNotSupported = 801;
  DeviceMemory memory(0, kApart * kCount);
  std::vector<Segment> segments;
  for (std::uint64_t i = 0; i < kCount; ++i) segments.push_back({0, i * kEach, kEach, memory.address() + i * kApart});
  Bytes expected(kApart * kCount, 0xa5);
  for (std::uint64_t i = 0; i < kCount; ++i) put(expected, i * kApart, file.bytes, i * kEach, kEach);
  for (const int error : {0, kNotSupported, kOutOfMemory}) {
    for (int state = 0; state < 2; ++state) {
      for (const auto direction : {Job::Direction::kRead, Job::Direction::kWrite}) {
        Engine::shutdown();
        fake.reset();
        file.set_cache(state);
        memory.put(direction == Job::Direction::kRead ? Bytes(kApart * kCount, 0xa5) : expected);
        // As often as there can be workers: each has to find out by itself.
        for (std::uint64_t k = 1; error != 0 && k <= 64; ++k) fake.fail_call("cuMemcpyBatchAsync", k, error);
        const auto job = make_job(direction, 0);
        job->add_file(file.source);
        job->add(segments);
        const auto failure = seal_and_wait(*job);
        CHECK(fake.calls("cuMemcpyBatchAsync") > 0);
        if (error == kOutOfMemory) {
          CHECK(failure && std::string(failure->what()).find("cuMemcpyBatchAsync") != std::string::npos);
          continue;
        }
        CHECK(!failure);
        CHECK_EQ(fake.calls("cuMemcpyHtoDAsync") + fake.calls("cuMemcpyDtoHAsync") > kCount / 2, error != 0);
        CHECK_EQ(first_difference(memory.bytes(), expected), -1);
        CHECK_EQ(first_difference(read_file(file.path), file.bytes), -1);
      }
    }
  }
}

// A driver call that is refused once: the job fails and says which, and everything works afterwards.
TEST(a_refused_call_fails_the_job_and_nothing_else) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(2 * kMiB);
  const auto attempt = [&](const char* function, std::uint64_t k, Job::Direction direction, bool must_fail) {
    Engine::shutdown();  // so that streams and events are made anew
    fake.reset();
    DeviceMemory memory(0, 2 * kMiB);
    Stream stream(0);
    fake.fail_call(function, k, kOutOfMemory);
    std::optional<Failure> failure;
    try {
      const auto job = make_job_behind(stream, 0, direction);
      job->add({{job->add_file(file.source), 0, 2 * kMiB, memory.address()}});
      failure = seal_and_wait(*job);
    } catch (const Failure& thrown) {
      failure = thrown;
    }
    CHECK(failure.has_value() || !must_fail);
    if (failure) {
      CHECK_EQ(failure->kind, FailureKind::kCuda);
      CHECK(std::string(failure->what()).find(function) != std::string::npos);
      CHECK(std::string(failure->what()).find("CUDA_ERROR_OUT_OF_MEMORY") != std::string::npos);
    }
    fake.reset();
    Memory host(2 * kMiB);
    CHECK_EQ(move(file.source, 0, 2 * kMiB, host.address()).total(), 2 * kMiB);
    move(file.source, 0, 2 * kMiB, memory.address(), Job::Direction::kRead, 0);
    CHECK_EQ(first_difference(memory.bytes(), read_file(file.path)), -1);
  };
  for (int state = 0; state < 2; ++state) {
    file.set_cache(state);
    for (const std::uint64_t k : {1ul, 2ul, 3ul}) {
      attempt("cuMemcpyHtoDAsync", k, Job::Direction::kRead, k == 1);
      attempt("cuEventRecord", k, Job::Direction::kRead, k == 1);
      attempt("cuEventCreate", k, Job::Direction::kRead, k == 1);
      attempt("cuEventQuery", k, Job::Direction::kRead, k == 1);
      attempt("cuEventSynchronize", k, Job::Direction::kRead, false);
      attempt("cuStreamCreate", k, Job::Direction::kRead, k == 1);
      attempt("cuStreamWaitEvent", k, Job::Direction::kRead, k == 1);
      attempt("cuMemcpyDtoHAsync", k, Job::Direction::kWrite, k == 1);
    }
    for (std::uint64_t k = 1; k < 12; ++k) attempt("cuCtxSetCurrent", k, Job::Direction::kRead, false);
  }
  clean.check();
}

TEST(a_copy_that_fails_later_fails_its_job) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(12 * kMiB);
  for (const auto direction : {Job::Direction::kRead, Job::Direction::kWrite}) {
    for (const std::uint64_t k : {1ul, 2ul, 4ul}) {
      file.set_cache(static_cast<int>(k % 3));
      fake.set_copy_time(200, 200, 0, k);
      {
        DeviceMemory memory(0, 12 * kMiB);
        DeviceMemory other(1, 12 * kMiB);
        fake.fail_copy(k, kIllegalAddress);
        const auto job = make_job(direction, 0);
        job->add({{job->add_file(file.source), 0, 12 * kMiB, memory.address()}});
        const auto failure = seal_and_wait(*job);
        if (k == 1) CHECK(failure.has_value());
        if (failure) {
          CHECK_EQ(failure->kind, FailureKind::kCuda);
          CHECK(std::string(failure->what()).find("CUDA_ERROR_ILLEGAL_ADDRESS") != std::string::npos);
          // The GPU is lost to this process, and says so every time; the host and the other GPU are not.
          CHECK_EQ(CHECK_FAILS(move(file.source, 0, kMiB, memory.address(), Job::Direction::kRead, 0)).kind,
                   FailureKind::kCuda);
        }
        Memory host(3 * kMiB);
        CHECK_EQ(move(file.source, 0, 3 * kMiB, host.address()).total(), 3 * kMiB);
        CHECK_EQ(move(file.source, 0, 12 * kMiB, other.address(), Job::Direction::kRead, 1).total(), 12 * kMiB);
        CHECK_EQ(first_difference(other.bytes(), read_file(file.path)), -1);
        fake.reset();
      }
      clean.check();
    }
  }
}

TEST(an_error_of_the_file_fails_a_gpu_job) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  fake.set_copy_time(300, 300, 0, 1);
  for (int state = 0; state < 3; ++state) {
    const TestFile file(12 * kMiB);
    require(truncate(file.path.c_str(), 7 * kMiB + 5) == 0, "truncate");
    file.set_cache(state);
    DeviceMemory memory(0, 12 * kMiB);
    const Failure failure = CHECK_FAILS(move(file.source, 0, 12 * kMiB, memory.address(), Job::Direction::kRead, 0));
    CHECK_EQ(failure.kind, FailureKind::kTruncated);
  }
  {
    const TestFile file(12 * kMiB);
    const auto read_only = SourceFile::open(file.path, kRead);
    DeviceMemory memory(1, 12 * kMiB);
    const Failure failure = CHECK_FAILS(move(read_only, 0, 12 * kMiB, memory.address(), Job::Direction::kWrite, 1));
    CHECK_EQ(failure.error_number, EBADF);
  }
  clean.check();
}

TEST(a_device_that_does_not_exist) {
  const Clean clean;
  const Failure failure = CHECK_FAILS(make_job(Job::Direction::kRead, 7));
  CHECK_EQ(failure.kind, FailureKind::kCuda);
  Memory memory(100);
  CHECK_EQ(gpunvme::cuda_device_of(memory.address()), -1);
  {
    DeviceMemory device_memory(1, 100);
    CHECK_EQ(gpunvme::cuda_device_of(device_memory.address()), 1);
    CHECK_EQ(gpunvme::cuda_device_of(device_memory.address() + 99), 1);
  }
  clean.check();
}

TEST(a_scope_puts_the_context_back) {
  (void)Fake::instance();
  gpunvme::CUcontext before = nullptr;
  gpunvme::CUcontext after = nullptr;
  gpunvme::cuda().CtxGetCurrent(&before);
  {
    CudaContextScope outer(0);
    gpunvme::CUcontext zero = nullptr;
    gpunvme::cuda().CtxGetCurrent(&zero);
    CHECK(zero != nullptr);
    {
      CudaContextScope inner(1);
      gpunvme::CUcontext one = nullptr;
      gpunvme::cuda().CtxGetCurrent(&one);
      CHECK(one != zero);
    }
    gpunvme::cuda().CtxGetCurrent(&after);
    CHECK(after == zero);
  }
  gpunvme::cuda().CtxGetCurrent(&after);
  CHECK(after == before);
  CHECK_EQ(gpunvme::cuda_unavailable_reason(), "");
}

TEST(shutting_down_with_copies_in_flight) {
  const Clean clean;
  const Fake& fake = Fake::instance();
  const TestFile file(20 * kMiB);
  for (int round = 0; round < check::rounds(6); ++round) {
    file.set_cache(round % 3);
    fake.set_copy_time(500, 500, 0, static_cast<std::uint64_t>(round));
    auto memory = std::make_unique<DeviceMemory>(0, 20 * kMiB);
    const auto job = make_job(Job::Direction::kRead, 0);
    job->add({{job->add_file(file.source), 0, 20 * kMiB, memory->address()}});
    job->seal();
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
    Engine::shutdown();
    CHECK(job->done());
    memory.reset();
  }
  clean.check();
}
