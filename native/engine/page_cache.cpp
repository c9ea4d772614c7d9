#include "page_cache.h"

#include <linux/magic.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace gpunvme {
namespace {

// cachestat(2), Linux 6.5; glibc 2.36 has no wrapper and its headers no number.
constexpr long kCachestat = 451;

struct CachestatRange {
  std::uint64_t offset;
  std::uint64_t nbytes;
};

struct Cachestat {
  std::uint64_t cached;
  std::uint64_t dirty;
  std::uint64_t writeback;
  std::uint64_t evicted;
  std::uint64_t recently_evicted;
};

constexpr std::uint64_t kSampleEvery = 256u << 10;

std::uint64_t page_size() {
  static const std::uint64_t size = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// One page asked for with RWF_NOWAIT. Some kernels start reading a page that is not there, which is why this is the
// second choice and why it samples.
std::optional<bool> page_is_cached(int fd, std::uint64_t offset) {
  char byte = 0;
  const iovec vector{&byte, 1};
  for (;;) {
    const ssize_t got = preadv2(fd, &vector, 1, static_cast<off_t>(offset), RWF_NOWAIT);
    if (got >= 0) return true;
    if (errno == EAGAIN) return false;
    if (errno != EINTR) return std::nullopt;
  }
}

}  // namespace

std::optional<std::uint64_t> cached_bytes(int fd, std::uint64_t offset, std::uint64_t nbytes) {
  const CachestatRange range{offset, nbytes};
  Cachestat result{};
  if (nbytes == 0) return 0;  // cachestat takes a length of 0 for "to the end"
  if (syscall(kCachestat, fd, &range, &result, 0u) != 0) return std::nullopt;
  return result.cached * page_size();
}

Residency residency(int fd, bool in_memory, std::uint64_t offset, std::uint64_t nbytes) {
  if (in_memory) return Residency::kAll;
  const std::uint64_t page = page_size();
  const std::uint64_t wanted = ((offset + nbytes + page - 1) / page - offset / page) * page;
  if (const auto cached = cached_bytes(fd, offset, nbytes)) {
    if (*cached == 0) return Residency::kNone;
    return *cached >= wanted ? Residency::kAll : Residency::kSome;
  }
  bool all = true;
  bool none = true;
  for (std::uint64_t at = offset; at < offset + nbytes; at += kSampleEvery) {
    const auto cached = page_is_cached(fd, at);
    if (!cached) return Residency::kNone;
    all = all && *cached;
    none = none && !*cached;
  }
  if (all) return Residency::kAll;
  return none ? Residency::kNone : Residency::kSome;
}

bool is_in_memory(int fd) {
  struct statfs filesystem {};
  if (fstatfs(fd, &filesystem) != 0) return false;
  const auto type = static_cast<unsigned long>(filesystem.f_type);
  return type == TMPFS_MAGIC || type == RAMFS_MAGIC || type == HUGETLBFS_MAGIC;
}

}  // namespace gpunvme
