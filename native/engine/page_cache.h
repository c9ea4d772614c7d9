// Which bytes of a file are in the page cache.
#pragma once

#include <cstdint>
#include <optional>

#include "source_file.h"

namespace gpunvme {

enum class Residency : std::uint8_t { kNone, kSome, kAll };

// Is the range in the page cache? By cachestat(2); where that is refused (it wants ownership of the file) or absent,
// by sampling with preadv2(RWF_NOWAIT); where that is unknown too, files in memory count as cached, others as not.
Residency residency(int fd, bool in_memory, std::uint64_t offset, std::uint64_t nbytes);
inline Residency residency(const SourceFile& file, std::uint64_t offset, std::uint64_t nbytes) {
  return residency(file.fd(), file.in_memory(), offset, nbytes);
}

// Whether a regular file's system is tmpfs, ramfs or hugetlbfs: there is no drive behind it.
bool is_in_memory(int fd);

// Bytes of the range in the page cache by cachestat, whole pages counted; nothing where cachestat is refused.
std::optional<std::uint64_t> cached_bytes(int fd, std::uint64_t offset, std::uint64_t nbytes);

}  // namespace gpunvme
