// Workers that share one queue, moved by hand: what one of them has done while another one posts, or takes long.
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <fstream>
#include <memory>
#include <numeric>

#include "image_client.h"
#include "queue_worker.h"
#include "soft_client.h"
#include "threads.h"

using namespace testing;

namespace {

namespace soft = gpunvme::soft;
using soft::Count;

constexpr std::uint64_t kIova = ClientMemory::kIova;
constexpr std::uint64_t kGateIova = 0x4000'0000'0000;
constexpr std::uint64_t kMemory = 4 << 20;
constexpr std::uint64_t kData = kIova + (1 << 20);

// Memory of a device whose copies wait until they may go on.
class Gate final : public soft::DeviceMemory {
 public:
  bool read(void* to, std::uint64_t, std::size_t nbytes) override {
    std::memset(to, 0, nbytes);
    reached.store(true);
    const auto deadline = std::chrono::steady_clock::now() + kDeadline;
    while (!open.load() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    return open.load();
  }
  bool write(std::uint64_t, const void*, std::size_t) override { return true; }

  std::atomic<bool> reached{false};
  std::atomic<bool> open{false};
};

struct Pages {
  Pages()
      : bytes(static_cast<std::byte*>(
            mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    CHECK(bytes != MAP_FAILED);
  }
  ~Pages() { munmap(bytes, kMemory); }
  Pages(const Pages&) = delete;
  std::byte* const bytes;
};

// Queue 1 of a controller that has two workers and no threads.
struct Shared {
  static Options options(const std::string* image) {
    Options options;
    options.size = 1 << 20;
    options.threads = 2;
    if (image != nullptr) options.path = *image;
    return options;
  }

  explicit Shared(std::uint32_t cq_entries = 64, const std::string* image = nullptr)
      : device(options(image)), admin(device), cq_entries(cq_entries) {
    for (unsigned i = 0; i < 2; ++i) {
      workers[i] =
          std::make_unique<soft::Worker>(device, admin, device.iova.add_reader(), device.counters.emplace_back(), i, 2);
    }
    device.iova.map(kIova, kMemory, memory.bytes, true, true);
    device.iova.map(kGateIova, 4096, reinterpret_cast<void*>(std::uint64_t{4096}), true, true, gate);
    soft::QueueMemory commands;
    soft::QueueMemory completions;
    commands.reset(kIova, kEntries, sizeof(nvme::Sqe));
    completions.reset(kIova + 64 * 1024, cq_entries, sizeof(nvme::Cqe));
    device.queues.start_cq(cq, std::move(completions), cq_entries);
    device.interrupts.set(3, interrupts);
    cq.interrupts = true;
    cq.vector = 3;
    device.queues.start_sq(sq, cq, std::move(commands), kEntries);
    device.serving.store(true, std::memory_order_release);
  }
  ~Shared() {
    gate->open.store(true);
    close(interrupts);
  }

  void put(std::uint8_t opcode, std::uint64_t data) {
    nvme::Sqe sqe{};
    sqe.opcode = opcode;
    sqe.nsid = 1;
    sqe.cid = next_cid++;
    sqe.prp1 = data;
    sqe.cdw10 = sqe.cid;
    std::memcpy(memory.bytes + std::uint64_t{tail} * sizeof sqe, &sqe, sizeof sqe);
    tail = (tail + 1) % kEntries;
  }
  void reads(unsigned count) {
    for (unsigned i = 0; i < count; ++i) put(nvme::kNvmRead, kData + std::uint64_t{next_cid} * 4096);
  }
  void ring() { device.doorbells.sq_tail(1).store(tail, std::memory_order_release); }

  void pass(unsigned worker) {
    workers[worker]->go_online();
    workers[worker]->pass();
    workers[worker]->go_offline();
  }

  // CIDs of what was posted since the last call.
  std::vector<int> posted() {
    std::vector<int> cids;
    for (;;) {
      auto* const entry = memory.bytes + 64 * 1024 + std::uint64_t{head} * sizeof(nvme::Cqe);
      const std::uint64_t high =
          std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(entry + 8)).load(std::memory_order_acquire);
      if ((high >> 48 & 1) != (phase ? 1u : 0u)) break;
      CHECK_EQ(high >> 49, 0u);                                // its status
      CHECK_EQ(high & 0xFFFF, std::uint64_t{sq.head.load()});  // all that was fetched: nothing is, meanwhile
      CHECK_EQ(high >> 16 & 0xFFFF, 1u);
      cids.push_back(static_cast<int>(high >> 32 & 0xFFFF));
      if (++head == cq_entries) {
        head = 0;
        phase = !phase;
      }
    }
    device.doorbells.cq_head(1).store(head, std::memory_order_release);
    return cids;
  }
  std::uint64_t read() const { return device.total(Count::kReads); }

  static constexpr std::uint32_t kEntries = 64;
  soft::Device device;
  soft::Admin admin;
  std::shared_ptr<Gate> gate = std::make_shared<Gate>();
  Pages memory;
  std::array<std::unique_ptr<soft::Worker>, 2> workers;
  soft::SubmissionQueue& sq = device.queues.sq(1);
  soft::CompletionQueue& cq = device.queues.cq(1);
  const int interrupts = eventfd(0, EFD_CLOEXEC);
  const std::uint32_t cq_entries;
  std::uint32_t tail = 0;
  std::uint32_t head = 0;
  bool phase = true;
  std::uint16_t next_cid = 0;
};

// Numbers from `first` to before `end`.
std::vector<int> from_to(int first, int end) {
  std::vector<int> all(static_cast<std::size_t>(end - first));
  std::iota(all.begin(), all.end(), first);
  return all;
}

template <typename Done>
void until(const char* what, Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (!done()) {
    if (std::chrono::steady_clock::now() > deadline) check::fail(what, 0, "did not happen in time");
    std::this_thread::yield();
  }
}

// What goes wrong in there, to be told when locks and gates are open again and no thread waits for them.
template <typename Action>
std::string trouble_in(const Action& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

}  // namespace

// While another worker posts, a batch goes on; all of it is posted in the end, once and in order, and signalled.
TEST(a_batch_goes_on_while_somebody_else_posts) {
  Shared shared;
  shared.sq.unfinished.store(1);  // another worker's command
  shared.reads(16);
  shared.ring();
  CHECK(shared.cq.lock.try_lock());
  Threads threads;
  threads.start([&] { shared.pass(1); });
  const std::string failed = trouble_in([&] {
    until("all of the batch is read", [&] { return shared.read() == 16; });
    CHECK(shared.posted().empty());
    CHECK_EQ(shared.device.interrupts.signalled(), 0u);
    CHECK_EQ(shared.sq.unfinished.load(), 17u);
  });
  shared.cq.lock.unlock();
  threads.finish();
  CHECK_EQ(failed, "");
  CHECK(shared.posted() == from_to(0, 16));
  CHECK_EQ(shared.device.interrupts.signalled(), 1u);
  CHECK_EQ(shared.sq.unfinished.load(), 1u);
}

// Nothing that is done waits for a command that takes long, whatever its place in the batch is, and whether or not
// another worker is at work on the queue.
TEST(what_is_done_is_posted_before_a_command_that_takes_long) {
  for (const std::uint32_t others : {0u, 1u}) {
    for (const int before : {0, 1, 2, 3, 4, 7, 13}) {
      Shared shared;
      shared.sq.unfinished.store(others);
      shared.reads(static_cast<unsigned>(before));
      shared.put(nvme::kNvmWrite, kGateIova);
      shared.reads(static_cast<unsigned>(15 - before));
      shared.ring();
      Threads threads;
      threads.start([&] { shared.pass(1); });
      std::vector<int> early;
      const std::string failed = trouble_in([&] {
        until("the long command is reached", [&] { return shared.gate->reached.load(); });
        early = shared.posted();
      });
      shared.gate->open.store(true);
      threads.finish();
      CHECK_EQ(failed, "");
      CHECK(early == from_to(0, before));
      CHECK(shared.posted() == from_to(before, 16));
      CHECK_EQ(shared.sq.unfinished.load(), others);
    }
  }
}

// Two batches, for one of which there is no room: it waits for the host, and loses nothing.
TEST(batches_that_do_not_fit_wait_for_room) {
  Shared shared(9);
  shared.sq.unfinished.store(1);
  CHECK(shared.cq.lock.try_lock());
  Threads threads;
  const std::string failed = trouble_in([&] {
    for (const unsigned worker : {1u, 0u}) {
      shared.reads(8);
      shared.ring();
      threads.start([&, worker] { shared.pass(worker); });
      until("the batch is read", [&] { return shared.read() == (worker == 1 ? 8 : 16); });
    }
  });
  shared.cq.lock.unlock();
  threads.finish();
  CHECK_EQ(failed, "");
  // Whichever of the two came first.
  std::vector<int> cids = shared.posted();
  CHECK_EQ(cids.size(), 8u);
  CHECK(shared.cq.waiting.load());
  shared.pass(0);
  for (const int cid : shared.posted()) cids.push_back(cid);
  std::sort(cids.begin(), cids.end());
  CHECK(cids == from_to(0, 16));
  CHECK(!shared.cq.waiting.load());
  CHECK_EQ(shared.sq.unfinished.load(), 1u);
}

// Nothing is posted after a fatal error, however much of a batch is done by then.
TEST(a_batch_that_a_fatal_error_overtakes_is_not_posted) {
  Shared shared;
  shared.sq.unfinished.store(1);
  shared.reads(16);
  shared.ring();
  CHECK(shared.cq.lock.try_lock());
  Threads threads;
  threads.start([&] { shared.pass(1); });
  const std::string failed =
      trouble_in([&] { until("all of the batch is read", [&] { return shared.read() == 16; }); });
  shared.device.fail();
  shared.cq.lock.unlock();
  threads.finish();
  CHECK_EQ(failed, "");
  CHECK(shared.posted().empty());
  CHECK_EQ(shared.sq.unfinished.load(), 1u);
}

// Reads that wait for the image's drive complete when they are there, the others of their batch before.
TEST(reads_of_a_batch_that_the_page_cache_does_not_have_complete_too) {
  const Directory directory;
  const std::string path = directory.file("image");
  const std::vector<char> bytes(1 << 20, 'x');
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  make_cold(path);
  Shared shared(64, &path);
  shared.sq.unfinished.store(1);
  shared.reads(16);
  shared.ring();
  std::vector<int> cids;
  until("all of the batch completes", [&] {
    shared.pass(1);
    for (const int cid : shared.posted()) cids.push_back(cid);
    return cids.size() >= 16;
  });
  std::sort(cids.begin(), cids.end());
  CHECK(cids == from_to(0, 16));
  CHECK_EQ(shared.sq.unfinished.load(), 1u);
}
