#include "gpu_copies.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "failure.h"

namespace gpunvme {
namespace {

// A small copy takes some ten microseconds. Longer than this, and another thread may need the CPU.
constexpr std::chrono::microseconds kLookHard{50};
constexpr std::chrono::microseconds kNap{20};

}  // namespace

GpuCopies::GpuCopies(int device, std::chrono::milliseconds patience)
    : device_(device), patience_(patience), process_(getpid()) {
  CudaContextScope scope(device);
  CUdeviceptr tried = 0;
  try {
    cuda_check(cuda().StreamCreate(&stream_, kStreamNonBlocking), "cuStreamCreate");
    cuda_check(cuda().EventCreate(&event_, kEventDisableTiming), "cuEventCreate");
    void* room = nullptr;
    cuda_check(cuda().MemHostAlloc(&room, kRoomBytes, 0), "cuMemHostAlloc");
    room_ = static_cast<std::byte*>(room);
    std::memset(room_, 0, kRoomBytes);
    // Whatever the driver makes at the first copies is made now.
    constexpr std::size_t kTried = 4096;
    cuda_check(cuda().MemAlloc(&tried, kTried), "cuMemAlloc");
    cuda_check(cuda().MemcpyHtoDAsync(tried, room_, kTried, stream_), "cuMemcpyHtoDAsync");
    cuda_check(cuda().MemcpyDtoHAsync(room_, tried, kTried, stream_), "cuMemcpyDtoHAsync");
    cuda_check(cuda().StreamSynchronize(stream_), "cuStreamSynchronize");
    const CUdeviceptr done = tried;
    tried = 0;
    cuda_check(cuda().MemFree(done), "cuMemFree");
  } catch (...) {
    free();
    if (tried != 0) cuda().MemFree(tried);
    throw;
  }
}

GpuCopies::~GpuCopies() {
  // What a copy may still use stays reserved until the process ends.
  if (process_ != getpid() || stuck_) return;
  try {
    CudaContextScope scope(device_);
    free();
  } catch (const Failure&) {
    // The context is gone, and all of this with it.
  }
}

// In the device's context.
void GpuCopies::free() {
  if (stream_ != nullptr) {
    cuda().StreamSynchronize(stream_);
    cuda().StreamDestroy(stream_);
  }
  if (event_ != nullptr) cuda().EventDestroy(event_);
  if (room_ != nullptr) cuda().MemFreeHost(room_);
}

// Waits for the copy that was enqueued. The driver's own waits have no deadline.
void GpuCopies::finish() {
  if (const CUresult error = cuda().EventRecord(event_, stream_); error != kCudaSuccess) {
    cuda().StreamSynchronize(stream_);
    cuda_check(error, "cuEventRecord");
  }
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const CUresult result = cuda().EventQuery(event_);
    if (result == kCudaSuccess) return;
    if (result != kCudaNotReady) cuda_check(result, "cuEventQuery");
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > patience_) {
      stuck_ = true;
      throw cuda_failure("a copy did not end in " + std::to_string(patience_.count()) +
                         " ms: it waits for a kernel; set CUDA_DEVICE_MAX_CONNECTIONS=32 where it need not");
    }
    if (waited < kLookHard) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }
}

// Calls `copy(done, now)` for one piece after the other, each at most as large as the room.
template <typename Copy>
bool GpuCopies::move(std::size_t nbytes, Copy copy) {
  const std::lock_guard lock(mutex_);
  if (stuck_) return false;
  try {
    CudaContextScope scope(device_);
    for (std::size_t done = 0; done < nbytes;) {
      const std::size_t now = std::min(nbytes - done, kRoomBytes);
      copy(done, now);
      done += now;
    }
    return true;
  } catch (const Failure& failure) {
    if (failure_.empty()) failure_ = failure.what();
    return false;
  }
}

bool GpuCopies::to_gpu(CUdeviceptr to, const void* from, std::size_t nbytes) {
  return move(nbytes, [&](std::size_t done, std::size_t now) {
    std::memcpy(room_, static_cast<const std::byte*>(from) + done, now);
    cuda_check(cuda().MemcpyHtoDAsync(to + done, room_, now, stream_), "cuMemcpyHtoDAsync");
    finish();
  });
}

bool GpuCopies::to_host(void* to, CUdeviceptr from, std::size_t nbytes) {
  return move(nbytes, [&](std::size_t done, std::size_t now) {
    cuda_check(cuda().MemcpyDtoHAsync(room_, from + done, now, stream_), "cuMemcpyDtoHAsync");
    finish();
    std::memcpy(static_cast<std::byte*>(to) + done, room_, now);
  });
}

std::string GpuCopies::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

}  // namespace gpunvme
