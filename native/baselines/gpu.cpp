#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "baselines.h"
#include "cuda_driver.h"

namespace gpunvme::baselines {

double h2d_ceiling(int device, std::uint64_t nbytes) {
  CudaContextScope scope(device);
  const CudaApi& api = cuda();
  // One page-locked piece of at most 256 MiB, copied until `nbytes` have passed: as large as a ring never is.
  const std::uint64_t piece = std::min<std::uint64_t>(nbytes, 256u << 20);
  void* host = nullptr;
  CUdeviceptr gpu = 0;
  CUstream stream = nullptr;
  cuda_check(api.MemHostAlloc(&host, piece, 0), "cuMemHostAlloc");
  cuda_check(api.MemAlloc(&gpu, piece), "cuMemAlloc");
  cuda_check(api.StreamCreate(&stream, kStreamNonBlocking), "cuStreamCreate");
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t moved = 0;
    for (; moved < nbytes; moved += piece) {
      cuda_check(api.MemcpyHtoDAsync(gpu, host, piece, stream), "cuMemcpyHtoDAsync");
    }
    cuda_check(api.StreamSynchronize(stream), "cuStreamSynchronize");
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(moved) / seconds);
  }
  api.StreamDestroy(stream);
  api.MemFree(gpu);
  api.MemFreeHost(host);
  return best;
}

}  // namespace gpunvme::baselines
