// A process forked from one that uses the engine: it has workers of its own, and no GPU.
#include <atomic>
#include <thread>

#include "check.h"
#include "engine.h"
#include "fake.h"
#include "files.h"

using namespace testing;
using gpunvme::Engine;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;

struct TestFile {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes = pattern(6 * kMiB + 3, 1);
  std::shared_ptr<SourceFile> source;

  TestFile() {
    write_file(path, bytes);
    source = SourceFile::open(path, kRead);
  }
};

void read_it(const TestFile& file) {
  Memory memory(file.bytes.size());
  CHECK_EQ(move(file.source, 0, file.bytes.size(), memory.address()).total(), file.bytes.size());
  CHECK_EQ(first_difference(memory, file.bytes), -1);
}

void gather_from_it(const TestFile& file, std::uint64_t number) {
  check::Random random(number);
  std::vector<std::int64_t> offsets(2000);
  for (auto& offset : offsets) offset = static_cast<std::int64_t>(random.below(file.bytes.size() - 100));
  Memory memory(offsets.size() * 100);
  const auto job = make_job();
  job->add_gather(job->add_file(file.source), offsets.data(), offsets.size(), 100, memory.address());
  if (const auto failure = seal_and_wait(*job)) throw *failure;
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    CHECK_EQ(first_difference(memory.data() + i * 100, file.bytes.data() + offsets[i], 100), -1);
  }
}

// TSan takes a child's threads for the parent's; ASan's allocator of GCC 12 hangs in the child of a process of which
// other threads allocate.
#if defined(__SANITIZE_THREAD__)
constexpr bool kChildrenHaveThreads = false;
#else
constexpr bool kChildrenHaveThreads = true;
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kParentsMayBeBusy = false;
#else
constexpr bool kParentsMayBeBusy = true;
#endif

}  // namespace

TEST(a_child_reads_into_host_memory_and_the_parent_goes_on) {
  if (!kChildrenHaveThreads) SKIP("not under TSan");
  const TestFile file;
  for (const bool hot : {false, true}) {
    make_cold(file.path);
    if (hot) make_hot(file.path);
    read_it(file);
    CHECK_EQ(check::in_child([&file] {
               read_it(file);
               gather_from_it(file, 1);
               Engine::shutdown();
               read_it(file);
               // And its own child.
               CHECK_EQ(check::in_child([&file] { read_it(file); }), 0);
               read_it(file);
             }),
             0);
    read_it(file);
  }
}

TEST(a_child_forked_in_the_middle_of_anything) {
  if (!kParentsMayBeBusy) SKIP("not under ASan and TSan");
  const TestFile file;
  make_hot(file.path);
  std::atomic<bool> enough{false};
  std::vector<std::thread> threads;
  std::vector<std::string> failures(3);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        for (std::uint64_t round = 0; !enough; ++round) {
          i == 0 ? read_it(file) : gather_from_it(file, i * 1000 + round);
        }
      } catch (const std::exception& exception) {
        failures[i] = exception.what();
      }
    });
  }
  std::vector<int> statuses;
  for (int i = 0; i < check::rounds(15); ++i) {
    statuses.push_back(check::in_child([&file] {
      gather_from_it(file, 7);
      read_it(file);
    }));
  }
  enough = true;
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, "");
  for (const int status : statuses) CHECK_EQ(status, 0);
}

TEST(what_a_child_inherits_can_be_dropped_there) {
  if (!kChildrenHaveThreads) SKIP("not under TSan");
  // Jobs, their stream's events and page-locked memory belong to the parent: a child that lets go of them, or ends
  // with exit(), must neither hang nor touch the GPU.
  const Fake& fake = Fake::instance();
  Engine::shutdown();
  fake.reset();
  const TestFile file;
  {
    DeviceMemory memory(0, file.bytes.size());
    void* stream = nullptr;
    fake.stream_create(0, 1, &stream);
    Job::Options options;
    options.device = 0;
    options.stream = reinterpret_cast<std::uint64_t>(stream);
    auto job = Job::make(options);
    job->add({{job->add_file(file.source), 0, file.bytes.size(), memory.address()}});
    CHECK_EQ(check::in_child([&job, &file] {
               job.reset();
               read_it(file);
               Engine::shutdown();
             }),
             0);
    CHECK(!seal_and_wait(*job));
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
    fake.stream_destroy(stream);
  }
}

TEST(a_child_of_a_process_with_a_gpu_is_told_that_it_has_none) {
  (void)Fake::instance();
  const TestFile file;
  {
    DeviceMemory memory(0, file.bytes.size());
    move(file.source, 0, file.bytes.size(), memory.address(), Job::Direction::kRead, 0);
    CHECK_EQ(check::in_child([&] {
               const Failure failure = CHECK_FAILS(make_job(Job::Direction::kRead, 0));
               CHECK_EQ(failure.kind, FailureKind::kCuda);
               CHECK(std::string(failure.what()).find("forked") != std::string::npos);
               CHECK(std::string(failure.what()).find("spawn") != std::string::npos);
               CHECK_EQ(gpunvme::cuda_unavailable_reason(), std::string(failure.what()));
               if (kChildrenHaveThreads) read_it(file);
             }),
             0);
    move(file.source, 0, file.bytes.size(), memory.address(), Job::Direction::kRead, 0);
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
  }
  Engine::shutdown();
}
