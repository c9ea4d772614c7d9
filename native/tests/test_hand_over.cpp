// GPU memory that is filled again only behind the kernels that read it, with the fake libcuda.
#include <cstring>

#include "check.h"
#include "fake.h"
#include "hand_over.h"

using namespace testing;
using gpunvme::HandOver;
using gpunvme::PageLocked;

namespace {

constexpr std::uint64_t kBytes = 4096;
constexpr std::uint64_t kSlow = 20'000;  // us

struct Case {
  Case() {
    fake.reset();
    before = fake.counters();
    gpunvme::cuda_check(fake.stream_create(0, 1, &stream), "stream");
  }
  void check() {
    fake.stream_destroy(stream);
    fake.wait_idle();
    const FakeCudaCounters now = fake.counters();
    CHECK_EQ(now.live_streams, before.live_streams);
    CHECK_EQ(now.live_events, before.live_events);
    CHECK_EQ(now.live_host_allocations, before.live_host_allocations);
  }
  gpunvme::CUstream user() const { return static_cast<gpunvme::CUstream>(stream); }

  const Fake& fake = Fake::instance();
  FakeCudaCounters before{};
  void* stream = nullptr;
};

}  // namespace

TEST(a_copy_comes_behind_the_kernel_that_reads_and_before_the_one_that_follows) {
  Case c;
  {
    HandOver order(0);
    PageLocked host(0, kBytes);
    DeviceMemory slot(0, kBytes, 1);
    DeviceMemory first(0, kBytes);
    DeviceMemory second(0, kBytes);
    std::memset(host.address(), 2, kBytes);
    c.fake.launch_copy(0, c.stream, first.address(), slot.address(), kBytes, kSlow);
    order.follow(c.user());
    CHECK(!order.passed());
    order.fill(slot.address(), host.address(), kBytes);
    order.lead(c.user());
    c.fake.launch_copy(0, c.stream, second.address(), slot.address(), kBytes, 0);
    c.fake.stream_synchronize(0, c.stream);
    CHECK(order.passed());
    CHECK(first.bytes() == Bytes(kBytes, 1));
    CHECK(second.bytes() == Bytes(kBytes, 2));
    order.wait();
  }
  c.check();
}

TEST(calls_that_fail_leave_nothing_behind) {
  Case c;
  for (const char* function : {"cuStreamCreate", "cuEventCreate", "cuMemHostAlloc"}) {
    for (int call = 1; call <= 3; ++call) {
      c.fake.fail_call(function, static_cast<std::uint64_t>(call), 700);
      try {
        HandOver order(0);
        PageLocked host(0, kBytes);
      } catch (const gpunvme::Failure& failure) {
        CHECK(failure.kind == gpunvme::FailureKind::kCuda);
      }
      c.fake.reset();
    }
  }
  c.check();
}

TEST(a_gpu_that_has_failed_says_so) {
  Case c;
  {
    HandOver order(0);
    PageLocked host(0, kBytes);
    DeviceMemory slot(0, kBytes);
    c.fake.fail_copy(1, 719);
    order.fill(slot.address(), host.address(), kBytes);
    bool failed = false;
    try {
      order.wait();
    } catch (const gpunvme::Failure&) {
      failed = true;
    }
    CHECK(failed);
    c.fake.reset();
  }
  c.check();
}
