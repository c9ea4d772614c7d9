#include "hand_over.h"

#include <unistd.h>

#include <algorithm>

#include "failure.h"

namespace gpunvme {

HandOver::HandOver(int device) : device_(device), process_(getpid()) {
  CudaContextScope scope(device_);
  cuda_check(cuda().StreamCreate(&stream_, kStreamNonBlocking), "cuStreamCreate");
  try {
    for (CUevent* event : {&followed_, &passed_, &led_}) {
      cuda_check(cuda().EventCreate(event, kEventDisableTiming), "cuEventCreate");
    }
  } catch (...) {
    destroy();
    throw;
  }
}

HandOver::~HandOver() {
  if (process_ != getpid()) return;  // a forked child has the parent's handles, but not its context
  try {
    CudaContextScope scope(device_);
    destroy();
  } catch (const Failure&) {
    // The context is gone, and these with it.
  }
}

// What is queued on the stream still happens.
void HandOver::destroy() {
  for (CUevent event : {followed_, passed_, led_}) {
    if (event != nullptr) cuda().EventDestroy(event);
  }
  cuda().StreamDestroy(stream_);
}

void HandOver::follow(CUstream other) {
  CudaContextScope scope(device_);
  cuda_check(cuda().EventRecord(followed_, other), "cuEventRecord");
  cuda_check(cuda().StreamWaitEvent(stream_, followed_, 0), "cuStreamWaitEvent");
  cuda_check(cuda().EventRecord(passed_, stream_), "cuEventRecord");
}

bool HandOver::passed() const {
  CudaContextScope scope(device_);
  const CUresult state = cuda().EventQuery(passed_);
  if (state == kCudaNotReady) return false;
  cuda_check(state, "cuEventQuery behind the stream that computes");
  return true;
}

void HandOver::fill(CUdeviceptr to, const void* from, std::size_t nbytes) {
  CudaContextScope scope(device_);
  cuda_check(cuda().MemcpyHtoDAsync(to, from, nbytes, stream_), "cuMemcpyHtoDAsync");
}

void HandOver::lead(CUstream other) {
  CudaContextScope scope(device_);
  cuda_check(cuda().EventRecord(led_, stream_), "cuEventRecord");
  cuda_check(cuda().StreamWaitEvent(other, led_, 0), "cuStreamWaitEvent");
}

void HandOver::wait() const {
  CudaContextScope scope(device_);
  cuda_check(cuda().StreamSynchronize(stream_), "cuStreamSynchronize");
}

PageLocked::PageLocked(int device, std::size_t nbytes) : device_(device), process_(getpid()) {
  CudaContextScope scope(device_);
  cuda_check(cuda().MemHostAlloc(&memory_, std::max<std::size_t>(nbytes, 1), kHostAllocPortable), "cuMemHostAlloc");
}

PageLocked::~PageLocked() {
  if (process_ != getpid()) return;
  try {
    CudaContextScope scope(device_);
    cuda().MemFreeHost(memory_);
  } catch (const Failure&) {
    // The context is gone, and the memory with it.
  }
}

}  // namespace gpunvme
