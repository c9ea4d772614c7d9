// Copies between any host memory and one GPU's memory that have ended when the call returns.
//
// For who has to reach GPU memory while kernels run that may wait for it. In that time nothing may be allocated,
// registered or loaded: all that copies need is made, and used once, by the constructor. One stream for all of them: a
// GPU has few queues to the hardware, and work of streams that share one waits for each other.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>

#include "cuda_driver.h"

namespace gpunvme {

class GpuCopies {
 public:
  // Throws Failure (kCuda). `patience`: how long a copy may take. It may wait for a kernel, which may never end.
  explicit GpuCopies(int device, std::chrono::milliseconds patience = std::chrono::seconds(30));
  ~GpuCopies();
  GpuCopies(const GpuCopies&) = delete;
  GpuCopies& operator=(const GpuCopies&) = delete;

  int device() const { return device_; }

  // By any thread, one at a time. A copy is whole before the next one begins. False: it failed, failure() says how, and
  // nothing of it is under way any more; but for a copy that does not end, after which every other one fails at once.
  bool to_gpu(CUdeviceptr to, const void* from, std::size_t nbytes);
  bool to_host(void* to, CUdeviceptr from, std::size_t nbytes);
  // The first failure, or an empty string.
  std::string failure() const;

 private:
  template <typename Copy>
  bool move(std::size_t nbytes, Copy copy);
  void finish();
  void free();

  static constexpr std::size_t kRoomBytes = 1 << 20;

  const int device_;
  const std::chrono::milliseconds patience_;
  const pid_t process_;
  mutable std::mutex mutex_;
  bool stuck_ = false;  // a copy did not end: it may still use the room
  CUstream stream_ = nullptr;
  CUevent event_ = nullptr;
  std::byte* room_ = nullptr;  // page-locked: what copies pass through
  std::string failure_;
};

}  // namespace gpunvme
