#include "hot_regions.h"

#include <sys/stat.h>
#include <time.h>

#include <algorithm>

#include "mapped_copy.h"
#include "page_cache.h"
#include "prefetch.h"

namespace gpunvme::soft {
namespace {

// Never 0. The coarse clock: some nanoseconds instead of some tens, and exact enough.
std::uint32_t now_ms() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<std::uint32_t>(now.tv_sec * 1000 + now.tv_nsec / 1'000'000) | 1;
}

}  // namespace

std::unique_ptr<HotRegions> HotRegions::of(int fd, std::uint64_t nbytes) {
  auto mapping = FileMapping::make(fd, nbytes);
  if (mapping == nullptr) return nullptr;
  return std::unique_ptr<HotRegions>(new HotRegions(fd, std::move(mapping)));
}

HotRegions::HotRegions(int fd, std::unique_ptr<FileMapping> mapping)
    : fd_(fd),
      mapping_(std::move(mapping)),
      seen_(std::make_unique<std::atomic<std::uint32_t>[]>(FileMapping::regions(mapping_->nbytes()))) {}

bool HotRegions::read(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes) {
  const std::uint64_t first = FileMapping::region_of(offset);
  const std::uint64_t last = FileMapping::region_of(offset + nbytes - 1);
  for (std::uint64_t region = first; region <= last; ++region) {
    if (!is_hot(region)) return false;
  }
  constexpr std::size_t kAtOnce = 8;
  const std::uint8_t* from = mapping_->data() + offset;
  for (std::size_t done = 0; done < count;) {
    MappedRange ranges[kAtOnce];
    std::size_t number = 0;
    for (; number < kAtOnce && done + number < count; ++number) {
      const iovec& segment = segments[done + number];
      ranges[number] = {static_cast<std::uint8_t*>(segment.iov_base), from, segment.iov_len};
      from += segment.iov_len;
    }
    if (copy_mapped(ranges, number) < number) {
      // Cut short, or the drive does not give it: the file says which.
      for (std::uint64_t region = first; region <= last; ++region) cool(region);
      return false;
    }
    done += number;
  }
  return !has_been_cut(segments, count, offset + nbytes);
}

void HotRegions::prefetch(std::uint64_t offset, std::uint64_t nbytes) const {
  // Not what is read in another way: walks through page tables that lead nowhere take time as well.
  if (seen_[FileMapping::region_of(offset)].load(std::memory_order_relaxed) == 0) return;
  gpunvme::prefetch(mapping_->data() + offset, nbytes);
}

// Behind the end of a file, the rest of its last page reads as zeros and without a fault, and every page after it
// faults. So a range that does not end in a zero was in the file when that byte was copied: no more can be said of a
// read, which also looks at the size before it copies.
bool HotRegions::has_been_cut(const iovec* segments, std::size_t count, std::uint64_t end) const {
  const iovec& tail = segments[count - 1];
  if (static_cast<const std::uint8_t*>(tail.iov_base)[tail.iov_len - 1] != 0) return false;
  struct stat status {};
  return fstat(fd_, &status) != 0 || static_cast<std::uint64_t>(status.st_size) < end;
}

bool HotRegions::is_hot(std::uint64_t region) {
  // Relaxed: the pages, and what is in them, are the kernel's.
  const std::uint32_t seen = seen_[region].load(std::memory_order_relaxed);
  if (seen == 0) return false;
  return now_ms() - seen < kBelievedMs || look(region);
}

// Whether all of a region is in the page cache now. Files in memory are asked, too: reading a hole from a mapping of
// theirs takes memory for it, for good.
bool HotRegions::is_cached(std::uint64_t region) const {
  constexpr bool kTakeForGranted = false;
  return residency(fd_, kTakeForGranted, region * FileMapping::kRegion, mapping_->region_bytes(region)) ==
         Residency::kAll;
}

bool HotRegions::look(std::uint64_t region) {
  const std::uint32_t now = now_ms();
  if (!is_cached(region)) {
    cool(region);
    return false;
  }
  contain_sigbus();  // in front again, if somebody has put a handler before ours
  seen_[region].store(now, std::memory_order_relaxed);
  return true;
}

void HotRegions::cool(std::uint64_t region) {
  seen_[region].store(0, std::memory_order_relaxed);
  mapping_->forget(region);
}

void HotRegions::count_hit(std::uint64_t offset, std::uint64_t nbytes) {
  for (std::uint64_t region = FileMapping::region_of(offset); region <= FileMapping::region_of(offset + nbytes - 1);
       ++region) {
    if (seen_[region].load(std::memory_order_relaxed) != 0) continue;
    if (!mapping_->count_hit(region, FileMapping::kDenseHits)) continue;
    // Asked first, for populating reads what is not there, and the queue would wait.
    if (!is_cached(region)) {
      mapping_->forget(region);
      continue;
    }
    mapping_->populate(region);
    look(region);
  }
}

}  // namespace gpunvme::soft
