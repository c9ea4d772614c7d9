#include "small_read.h"

#include <sys/uio.h>

#include "cuda_driver.h"
#include "page_cache.h"

namespace gpunvme {

bool small_read(const SourceFile& file, std::uint64_t offset, std::uint64_t nbytes, int device, std::uint64_t stream,
                std::uint64_t address) {
  if (nbytes > kMostSmallBytes) return false;
  // Asked first: reading what is not there, even without waiting, makes some kernels start to fetch it.
  if (residency(file, offset, nbytes) != Residency::kAll) return false;
  alignas(64) std::uint8_t staged[kMostSmallBytes];
  const iovec vector{device == kHost ? reinterpret_cast<void*>(address) : staged, nbytes};
  // tmpfs knows no RWF_NOWAIT, and no drive that could be waited for.
  const int flags = file.in_memory() ? 0 : RWF_NOWAIT;
  if (preadv2(file.fd(), &vector, 1, static_cast<off_t>(offset), flags) != static_cast<ssize_t>(nbytes)) {
    return false;
  }
  if (device == kHost || nbytes == 0) return true;
  CudaContextScope scope(device);
  auto* const on = reinterpret_cast<CUstream>(stream);
  cuda_check(cuda().MemcpyHtoDAsync(address, staged, nbytes, on), "cuMemcpyHtoDAsync");
  cuda_check(cuda().StreamSynchronize(on), "cuStreamSynchronize");
  return true;
}

}  // namespace gpunvme
