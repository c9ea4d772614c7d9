#include "small_read.h"

#include <sys/uio.h>

#include "page_cache.h"

namespace gpunvme {

bool small_read(const SourceFile& file, std::uint64_t offset, std::uint64_t nbytes, std::uint64_t address) {
  // Asked first: reading what is not there, even without waiting, makes some kernels start to fetch it.
  if (residency(file, offset, nbytes) != Residency::kAll) return false;
  const iovec vector{reinterpret_cast<void*>(address), nbytes};
  return preadv2(file.fd(), &vector, 1, static_cast<off_t>(offset), RWF_NOWAIT) == static_cast<ssize_t>(nbytes);
}

}  // namespace gpunvme
