// Copies between any host memory and one GPU's memory that have ended when the call returns.
//
// For who has to reach GPU memory while kernels run that may wait for it. In that time nothing may be allocated,
// registered or loaded: all that copies need is made, and used once, by the constructor. One stream for all of them: a
// GPU has few queues to the hardware, and work of streams that share one waits for each other.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <mutex>
#include <string>

#include "cuda_driver.h"

namespace gpunvme {

class GpuCopies {
 public:
  explicit GpuCopies(int device);  // throws Failure (kCuda)
  ~GpuCopies();
  GpuCopies(const GpuCopies&) = delete;
  GpuCopies& operator=(const GpuCopies&) = delete;

  int device() const { return device_; }

  // By any thread, one at a time. A copy is whole before the next one begins. False: it failed, failure() says how, and
  // nothing of it is under way any more.
  bool to_gpu(CUdeviceptr to, const void* from, std::size_t nbytes);
  bool to_host(void* to, CUdeviceptr from, std::size_t nbytes);
  // The first failure, or an empty string.
  std::string failure() const;

 private:
  template <typename Copy>
  bool move(std::size_t nbytes, Copy copy);
  void free();

  static constexpr std::size_t kRoomBytes = 1 << 20;

  const int device_;
  const pid_t process_;
  mutable std::mutex mutex_;
  CUstream stream_ = nullptr;
  std::byte* room_ = nullptr;  // page-locked: what copies pass through
  std::string failure_;
};

}  // namespace gpunvme
