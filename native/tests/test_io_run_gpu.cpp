// Transfers to and from GPU memory, through page-locked staging, with the fake libcuda.
#include "fake.h"
#include "ram_device.h"

using namespace testing;
using State = IoRun::State;

namespace {

constexpr int kIllegalAddress = 700;

// A drive, a queue, staging memory, and a check that the driver's handles are given back.
struct Case {
  explicit Case(std::uint64_t slot_bytes = 16384) {
    fake.reset();
    before = fake.counters();
    staging = std::make_shared<IoStaging>(device.map(staging_memory), slot_bytes);
    device.max_bytes = 8192;
  }
  void check() {
    staging.reset();
    const FakeCudaCounters now = fake.counters();
    CHECK_EQ(now.live_streams, before.live_streams);
    CHECK_EQ(now.live_events, before.live_events);
    CHECK_EQ(now.page_locked_bytes, before.page_locked_bytes);
    CHECK_EQ(now.pending_operations, 0u);
  }
  std::unique_ptr<IoRun> run(std::uint8_t opcode = 2, void* stream = nullptr) {
    auto options = run_options(device, opcode);
    if (stream != nullptr) options.stream = reinterpret_cast<std::uint64_t>(stream);
    return std::make_unique<IoRun>(options, queues, staging);
  }

  const Fake& fake = Fake::instance();
  FakeCudaCounters before;
  RamDevice device{512, 4096};
  std::vector<std::shared_ptr<IoQueue>> queues = device.add_queues(2, 16);
  Memory staging_memory{128 * kKiB};
  std::shared_ptr<IoStaging> staging;
};

struct Stream {
  explicit Stream(int device) { gpunvme::cuda_check(Fake::instance().stream_create(device, 1, &handle), "stream"); }
  ~Stream() { Fake::instance().stream_destroy(handle); }
  void* handle = nullptr;
};

// Something on a stream that blocks it until it is opened.
class Gate {
 public:
  explicit Gate(const Stream& stream) {
    gpunvme::cuda_check(Fake::instance().launch_host(0, stream.handle, &Gate::wait, this), "launch");
  }
  ~Gate() { open(); }
  void open() { open_ = true; }

 private:
  static void wait(void* gate) {
    while (!static_cast<Gate*>(gate)->open_) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  std::atomic<bool> open_{false};
};

}  // namespace

TEST(reads_gathers_and_writes) {
  for (int round = 0; round < check::rounds(10); ++round) {
    check::Random random(static_cast<std::uint64_t>(round));
    Case c(random.pick({4096u, 16384u, 65536u}));
    c.fake.set_copy_time(20, 200, 0, check::seed());
    const int gpu = round % 2;
    DeviceMemory memory(gpu, 1 * kMiB);
    const auto io = IoMemory::gpu(memory.address(), 1 * kMiB, gpu);
    const std::uint64_t lba = random.below(1000);
    const std::uint64_t blocks = random.between(1, 1900);
    const std::uint64_t offset = random.below(5000);
    auto read = c.run();
    read->add_range(lba, blocks, io, offset);
    CHECK_EQ(drive(*read, c.device), State::kDone);
    Bytes expected(1 * kMiB, 0xa5);
    put(expected, offset, c.device.disk, lba * 512, blocks * 512);
    CHECK_EQ(first_difference(memory.bytes(), expected), -1);
    CHECK_EQ(read->counts().bounced_gpu_bytes, blocks * 512);
    CHECK(read->counts().page_locked);
    read.reset();

    std::vector<std::uint64_t> lbas(random.between(1, 600));
    for (std::size_t i = 0; i < lbas.size(); ++i) {
      lbas[i] = random.below(4000);
      put(expected, 7 + i * 1024, c.device.disk, lbas[i] * 512, 1024);
    }
    auto gather = c.run();
    gather->add_gather(lbas.data(), lbas.size(), 2, io, 7);
    CHECK_EQ(drive(*gather, c.device), State::kDone);
    CHECK_EQ(first_difference(memory.bytes(), expected), -1);
    gather.reset();

    memory.put(pattern(1 * kMiB, 77));
    auto write = c.run(1);
    write->add_range(lba, blocks, io, offset);
    CHECK_EQ(drive(*write, c.device), State::kDone);
    CHECK_EQ(first_difference(c.device.disk.data() + lba * 512, pattern(blocks * 512, 77, offset).data(), blocks * 512),
             -1);
    write.reset();
    CHECK_EQ(c.staging->free_slots(), c.staging->slots());
    c.check();
  }
}

TEST(a_range_in_pieces_of_host_and_gpu_memory) {
  Case c;
  {
    DeviceMemory memory(0, 64 * kKiB);
    Memory host(64 * kKiB);
    const auto gpu = IoMemory::gpu(memory.address(), 64 * kKiB, 0);
    const auto mapped = c.device.map(host);
    const auto run = c.run();
    run->add_pieces(3, {{mapped, 0, 8192}, {gpu, 5, 10000}, {mapped, 16384, 1024}, {gpu, 20000, 240}});
    CHECK_EQ(drive(*run, c.device), State::kDone);
    const Bytes got = memory.bytes();
    const std::uint8_t* disk = c.device.disk.data() + 3 * 512;
    CHECK_EQ(first_difference(host.data(), disk, 8192), -1);
    CHECK_EQ(first_difference(got.data() + 5, disk + 8192, 10000), -1);
    CHECK_EQ(first_difference(host.data() + 16384, disk + 18192, 1024), -1);
    CHECK_EQ(first_difference(got.data() + 20000, disk + 19216, 240), -1);
    CHECK_EQ(run->counts().bounced_gpu_bytes, 10240u);
  }
  c.check();
}

TEST(copies_come_after_the_callers_stream_and_nobody_waits_in_the_driver) {
  Case c;
  {
    Stream stream(0);
    DeviceMemory memory(0, 64 * kKiB);
    Memory host(64 * kKiB);
    const auto io = IoMemory::gpu(memory.address(), 64 * kKiB, 0);
    Gate gate(stream);
    const auto read = c.run(2, stream.handle);
    read->add_range(0, 128, io, 0);
    // The caller's kernel is not through with the memory: it keeps what it holds, and the thread is free.
    for (int i = 0; i < 5; ++i) {
      CHECK_EQ(read->drive(0.002), State::kRunning);
      c.device.step();
    }
    CHECK(c.fake.counters().pending_operations > 4u);
    // The others go on; but staging memory is taken.
    CHECK_EQ(c.staging->free_slots(), 4u);
    const auto other = c.run();
    other->add_range(9, 50, IoMemory::host(host.address(), host.size()), 0);
    CHECK_EQ(drive(*other, c.device), State::kDone);
    gate.open();
    CHECK_EQ(drive(*read, c.device), State::kDone);
    CHECK_EQ(first_difference(memory.bytes(), Bytes(c.device.disk.begin(), c.device.disk.begin() + 65536)), -1);
  }
  c.check();
}

TEST(a_write_waits_for_the_kernel_that_makes_its_bytes) {
  Case c;
  {
    Stream stream(0);
    DeviceMemory memory(0, 8192, 1);
    const auto io = IoMemory::gpu(memory.address(), 8192, 0);
    c.fake.launch_fill(0, stream.handle, memory.address(), 0x5c, 8192, 3000);
    const auto write = c.run(1, stream.handle);
    write->add_range(0, 16, io, 0);
    CHECK_EQ(drive(*write, c.device), State::kDone);
    CHECK_EQ(first_difference(c.device.disk.data(), Bytes(8192, 0x5c).data(), 8192), -1);
  }
  c.check();
}

TEST(a_failed_copy_fails_the_run_when_everything_is_back) {
  for (const bool writing : {false, true}) {
    Case c;
    {
      DeviceMemory memory(0, 256 * kKiB);
      const auto run = c.run(writing ? 1 : 2);
      run->add_range(0, 512, IoMemory::gpu(memory.address(), 256 * kKiB, 0), 0);
      c.fake.fail_copy(3, kIllegalAddress);
      const Failure failure = CHECK_FAILS(drive(*run, c.device));
      CHECK_EQ(failure.kind, FailureKind::kCuda);
      CHECK_EQ(c.queues[0]->in_flight() + c.queues[1]->in_flight(), 0u);
      c.fake.reset();
    }
    c.staging.reset();
  }
}

TEST(a_driver_call_that_fails_fails_the_run) {
  for (const char* call : {"cuMemcpyHtoDAsync", "cuEventRecord", "cuStreamCreate", "cuEventCreate"}) {
    Case c;
    {
      DeviceMemory memory(0, 256 * kKiB);
      c.fake.fail_call(call, 1, 2);
      const Failure failure = CHECK_FAILS([&] {
        const auto run = c.run();
        run->add_range(0, 512, IoMemory::gpu(memory.address(), 256 * kKiB, 0), 0);
        return drive(*run, c.device);
      }());
      CHECK_EQ(failure.kind, FailureKind::kCuda);
      CHECK(std::string(failure.what()).find(call) != std::string::npos);
      CHECK_EQ(c.queues[0]->in_flight() + c.queues[1]->in_flight(), 0u);
      c.fake.wait_idle();
      // What was parked is found again when it is needed.
      while (c.staging->acquire() != IoStaging::kNone) {
      }
      for (std::uint32_t slot = 0; slot < c.staging->slots(); ++slot) c.staging->release(slot);
      CHECK_EQ(c.staging->free_slots(), c.staging->slots());
    }
    c.check();
  }
}

TEST(a_run_that_is_dropped_keeps_its_slots_until_its_copies_have_passed) {
  Case c(65536);
  {
    DeviceMemory memory(0, 128 * kKiB);
    c.fake.hold();
    {
      const auto run = c.run();
      run->add_range(0, 256, IoMemory::gpu(memory.address(), 128 * kKiB, 0), 0);
      while (c.fake.calls("cuMemcpyHtoDAsync") < 2) {
        run->drive(0);
        c.device.step();
      }
    }
    CHECK_EQ(c.staging->acquire(), IoStaging::kNone);
    c.fake.release();
    c.fake.wait_idle();
    const std::uint32_t slot = c.staging->acquire();
    CHECK(slot != IoStaging::kNone);
    c.staging->release(slot);
    CHECK_EQ(c.staging->free_slots(), 2u);
  }
  c.check();
}

TEST(what_was_read_before_a_reset_is_copied) {
  Case c;
  {
    DeviceMemory memory(0, 8192);
    const auto run = c.run();
    run->add_range(0, 16, IoMemory::gpu(memory.address(), 8192, 0), 0);
    run->drive(0);
    while (c.device.step() > 0) {
    }
    // Another run reaps it, and ours does not look before the queues are gone.
    Memory host(512);
    const auto other = c.run();
    other->add_range(0, 1, c.device.map(host), 0);
    CHECK_EQ(drive(*other, c.device), State::kDone);
    for (const auto& queue : c.queues) queue->stop();
    c.device.remove_queues();
    run->attach(c.device.add_queues(1, 8), true);
    CHECK_EQ(drive(*run, c.device), State::kDone);
    CHECK_EQ(run->counts().retried, 0u);
    CHECK_EQ(first_difference(memory.bytes(), Bytes(c.device.disk.begin(), c.device.disk.begin() + 8192)), -1);
  }
  c.check();
}

// The driver unmaps staging memory when it closes, whoever keeps a transfer that is over, and the staging with it.
TEST(unlocking_waits_for_copies_and_lets_cuda_forget_the_memory) {
  Case c(65536);
  {
    DeviceMemory memory(0, 128 * kKiB);
    c.fake.set_copy_time(3000, 0, 0, 1);
    auto lent = c.run();
    lent->add_range(0, 128, IoMemory::gpu(memory.address(), 128 * kKiB, 0), 0);
    {
      const auto dropped = c.run();
      dropped->add_range(128, 128, IoMemory::gpu(memory.address(), 128 * kKiB, 0), 65536);
      while (c.fake.calls("cuMemcpyHtoDAsync") < 1) {
        dropped->drive(0);
        c.device.step();
      }
    }
    // Longer than the other one, so that waiting for that is not enough.
    c.fake.set_copy_time(30000, 0, 0, 1);
    while (c.fake.calls("cuMemcpyHtoDAsync") < 2) {
      lent->drive(0);
      c.device.step();
    }
    // One lane is parked, one is lent; copies of both are under way. The fake ends a program that unlocks too early.
    CHECK(c.fake.counters().pending_operations > 0u);
    CHECK(c.staging->page_locked());
    c.staging->unlock();
    CHECK_EQ(c.fake.counters().pending_operations, 0u);
    CHECK_EQ(c.fake.counters().page_locked_bytes, c.before.page_locked_bytes);
    CHECK(!c.staging->page_locked());
    c.staging->unlock();
    lent.reset();
    // Nothing locks it again.
    c.staging->page_lock(0);
    CHECK_EQ(c.fake.counters().page_locked_bytes, c.before.page_locked_bytes);
  }
  c.check();
}

TEST(where_page_locking_is_refused_copies_work_all_the_same) {
  Case c;
  c.fake.set_page_lock_limit(0);
  {
    DeviceMemory memory(0, 64 * kKiB);
    const auto run = c.run();
    run->add_range(0, 128, IoMemory::gpu(memory.address(), 64 * kKiB, 0), 0);
    CHECK_EQ(drive(*run, c.device), State::kDone);
    CHECK(!run->counts().page_locked);
    CHECK_EQ(first_difference(memory.bytes(), Bytes(c.device.disk.begin(), c.device.disk.begin() + 65536)), -1);
  }
  c.fake.reset();
  c.check();
}

TEST(memory_of_two_gpus_is_refused) {
  Case c;
  {
    const auto run = c.run();
    DeviceMemory one(0, 4096);
    DeviceMemory other(1, 4096);
    run->add_range(0, 8, IoMemory::gpu(one.address(), 4096, 0), 0);
    bool refused = false;
    try {
      run->add_range(8, 8, IoMemory::gpu(other.address(), 4096, 1), 0);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
    CHECK_EQ(drive(*run, c.device), State::kDone);
    CHECK_EQ(first_difference(one.bytes(), Bytes(c.device.disk.begin(), c.device.disk.begin() + 4096)), -1);
  }
  c.check();
}
