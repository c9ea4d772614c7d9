// The workers as a whole: started, shut down, started again, and never asleep while there is work.
#include <atomic>
#include <thread>

#include "check.h"
#include "engine.h"
#include "files.h"

using namespace testing;
using gpunvme::Engine;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;

struct TestFile {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes;
  std::shared_ptr<SourceFile> source;

  explicit TestFile(std::uint64_t nbytes) : bytes(pattern(nbytes, 1)) {
    write_file(path, bytes);
    source = SourceFile::open(path, kRead);
  }
};

// A job over random small pieces, ready to be sealed.
struct SmallRead {
  std::shared_ptr<Job> job;
  std::vector<Segment> segments;
  Memory memory;

  SmallRead(const TestFile& file, check::Random& random) : memory(64 * kKiB) {
    job = make_job();
    job->add_file(file.source);
    std::uint64_t at = 0;
    const std::uint64_t count = random.between(1, 4);
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t nbytes = random.between(1, 16 * kKiB);
      segments.push_back({0, random.below(file.bytes.size() - nbytes), nbytes, memory.address() + at});
      job->add({segments.back()});
      at += nbytes;
    }
  }
  void check(const TestFile& file) {
    if (const auto failure = wait(*job)) throw *failure;
    for (const Segment& segment : segments) {
      CHECK_EQ(first_difference(reinterpret_cast<const std::uint8_t*>(segment.address),
                                file.bytes.data() + segment.offset, segment.nbytes),
               -1);
    }
  }
};

}  // namespace

TEST(as_many_workers_as_cpus_within_bounds) {
  Engine::shutdown();
  CHECK(Engine::instance()->workers() >= 2);
  CHECK(Engine::instance()->workers() <= Engine::kMostWorkers);
  CHECK(Engine::instance() == Engine::instance());
  for (const auto& [chosen, expected] : {std::pair{"1", 1u}, std::pair{"3", 3u}, std::pair{"0", 1u}}) {
    Engine::shutdown();
    setenv("GPUNVME_WORKERS", chosen, 1);
    CHECK_EQ(Engine::instance()->workers(), expected);
  }
  Engine::shutdown();
  unsetenv("GPUNVME_WORKERS");
}

TEST(shut_down_and_started_again) {
  const TestFile file(3 * kMiB);
  Engine::shutdown();
  Engine::shutdown();
  for (int i = 0; i < check::rounds(10); ++i) {
    Memory memory(3 * kMiB);
    CHECK_EQ(move(file.source, 0, 3 * kMiB, memory.address()).total(), 3 * kMiB);
    CHECK_EQ(first_difference(memory, file.bytes), -1);
    Engine::shutdown();
  }
}

TEST(shutting_down_ends_every_job) {
  const TestFile file(24 * kMiB);
  check::Random random(1);
  for (int round = 0; round < check::rounds(10); ++round) {
    make_cold(file.path);
    if (round % 2 == 0) make_hot(file.path, 0, 12 * kMiB);
    auto memory = std::make_unique<Memory>(3 * file.bytes.size());
    std::vector<std::shared_ptr<Job>> jobs;
    for (std::uint64_t i = 0; i < 3; ++i) {
      jobs.push_back(make_job());
      jobs.back()->add_file(file.source);
      jobs.back()->add({{0, 0, file.bytes.size(), memory->address() + i * file.bytes.size()}});
      if (i != 1) jobs.back()->seal();  // one to which more might be added
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(4000)));
    Engine::shutdown();
    for (const auto& job : jobs) CHECK(job->done());
    memory.reset();
    for (const auto& job : jobs) {
      if (const auto failure = job->failure()) CHECK_EQ(failure->kind, FailureKind::kCancelled);
      jobs[0]->stop(Failure(FailureKind::kCancelled, "late"));
    }
    CHECK(jobs[1]->failure().has_value());
    (void)CHECK_FAILS(jobs[1]->add({{0, 0, 1, 0}}));
  }
}

// Whoever makes a job while the engine ends gets a job that ends: it fails, or new workers do it.
TEST(jobs_made_during_a_shutdown_end) {
  const TestFile file(kMiB);
  std::atomic<bool> enough{false};
  std::vector<std::thread> threads;
  std::vector<std::string> failures(3);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([&, i] {
      check::Random random(i);
      try {
        while (!enough) {
          try {
            SmallRead read(file, random);
            read.job->seal();
            read.check(file);
          } catch (const Failure& failure) {
            if (failure.kind != FailureKind::kCancelled) throw;
          }
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  for (int i = 0; i < check::rounds(300); ++i) {
    Engine::shutdown();
    std::this_thread::sleep_for(std::chrono::microseconds(i % 7 * 50));
  }
  enough = true;
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
}

TEST(hundreds_of_jobs_at_once) {
  const TestFile file(8 * kMiB);
  check::Random random(2);
  for (int round = 0; round < check::rounds(4); ++round) {
    make_cold(file.path);
    make_hot(file.path, 2 * kMiB, 3 * kMiB);
    // A large one among them must neither starve nor be starved.
    Memory memory(file.bytes.size());
    const auto large = make_job();
    large->add({{large->add_file(file.source), 0, file.bytes.size(), memory.address()}});
    std::vector<std::unique_ptr<SmallRead>> reads;
    for (int i = 0; i < 300; ++i) reads.push_back(std::make_unique<SmallRead>(file, random));
    for (const auto& read : reads) read->job->seal();
    for (const auto& read : reads) read->check(file);
    CHECK(!seal_and_wait(*large));
    CHECK_EQ(first_difference(memory, file.bytes), -1);
  }
}

// One job at a time, with workers that fall asleep in between: a wake-up that gets lost hangs here.
TEST(workers_wake_up_for_every_job) {
  const TestFile file(2 * kMiB);
  check::Random random(3);
  for (int i = 0; i < check::rounds(2000); ++i) {
    if (i % 50 == 0) make_cold(file.path);
    if (i % 50 == 25) make_hot(file.path);
    SmallRead read(file, random);
    if (random.one_in(4)) std::this_thread::sleep_for(std::chrono::microseconds(random.below(200)));
    read.job->seal();
    read.check(file);
  }
}

TEST(workers_wake_up_for_jobs_of_many_threads) {
  const TestFile file(4 * kMiB);
  std::vector<std::thread> threads;
  std::vector<std::string> failures(4);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([&, i] {
      check::Random random(10 + i);
      try {
        for (int round = 0; round < check::rounds(500); ++round) {
          if (i == 0 && round % 50 == 0) make_cold(file.path);
          SmallRead read(file, random);
          read.job->seal();
          if (random.one_in(5)) read.job->stop(Failure(FailureKind::kCancelled, "enough"));
          try {
            read.check(file);
          } catch (const Failure& failure) {
            if (failure.kind != FailureKind::kCancelled) throw;
          }
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
}

TEST(a_job_outlives_its_engine) {
  const TestFile file(kMiB);
  Memory memory(kMiB);
  const auto job = make_job();
  job->add({{job->add_file(file.source), 0, kMiB, memory.address()}});
  CHECK(!seal_and_wait(*job));
  Engine::shutdown();
  CHECK(job->done());
  CHECK_EQ(job->counts().total(), kMiB);
  CHECK(job->workers() >= 1);
  CHECK(job->seconds() >= 0);
  job->stop(Failure(FailureKind::kCancelled, "late"));
  CHECK(!job->failure());
}
