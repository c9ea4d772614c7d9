// Who may touch a piece of GPU memory next, in the order of streams: whoever computes with it, or whoever fills it.
//
// Filling is queued behind a stream of our own, which follows the stream that computes; so the memory is never written
// while a kernel that was queued before may still read it, and nobody waits on the host for that.
#pragma once

#include <sys/types.h>

#include <cstddef>

#include "cuda_driver.h"

namespace gpunvme {

class HandOver {
 public:
  explicit HandOver(int device);
  ~HandOver();
  HandOver(const HandOver&) = delete;
  HandOver& operator=(const HandOver&) = delete;

  // What fills the memory is put behind this stream.
  CUstream stream() const { return stream_; }
  // What is queued on `other` now comes before everything that is queued on our stream from here on.
  void follow(CUstream other);
  // Whether all that was followed so far has happened. Throws Failure if it failed.
  bool passed() const;
  // Queues a copy of page-locked memory on our stream.
  void fill(CUdeviceptr to, const void* from, std::size_t nbytes);
  // What is queued on our stream now comes before everything that is queued on `other` from here on.
  void lead(CUstream other);
  // Returns when all that was queued on our stream has happened.
  void wait() const;

 private:
  void destroy();

  int device_;
  pid_t process_;
  CUstream stream_ = nullptr;
  CUevent followed_ = nullptr;  // on the other stream
  CUevent passed_ = nullptr;    // on ours, behind all that was followed
  CUevent led_ = nullptr;       // on ours, behind all that was queued
};

// Host memory that GPUs copy from without a detour. Not initialised.
class PageLocked {
 public:
  // Throws Failure (kCuda) where the driver refuses; `device` is any GPU, its context is needed for the call.
  PageLocked(int device, std::size_t nbytes);
  ~PageLocked();
  PageLocked(const PageLocked&) = delete;
  PageLocked& operator=(const PageLocked&) = delete;

  void* address() const { return memory_; }

 private:
  int device_;
  pid_t process_;
  void* memory_ = nullptr;
};

}  // namespace gpunvme
