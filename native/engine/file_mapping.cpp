#include "file_mapping.h"

#include <sys/mman.h>

#include <algorithm>

namespace gpunvme {
namespace {

#ifndef MADV_POPULATE_READ
constexpr int MADV_POPULATE_READ = 22;  // Linux 5.14
#endif

}  // namespace

std::unique_ptr<FileMapping> FileMapping::make(int fd, std::uint64_t nbytes) {
  if (nbytes == 0) return nullptr;
  void* const data = mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return nullptr;
  return std::unique_ptr<FileMapping>(new FileMapping(static_cast<const std::uint8_t*>(data), nbytes));
}

FileMapping::FileMapping(const std::uint8_t* data, std::uint64_t nbytes)
    : data_(data), nbytes_(nbytes), regions_(std::make_unique<Region[]>(regions(nbytes))) {}

FileMapping::~FileMapping() { munmap(const_cast<std::uint8_t*>(data_), nbytes_); }

std::uint64_t FileMapping::region_bytes(std::uint64_t region) const {
  return std::min(kRegion, nbytes_ - region * kRegion);
}

bool FileMapping::count_hit(std::uint64_t region, std::uint64_t dense) {
  return regions_[region].hits.fetch_add(1, std::memory_order_relaxed) >= dense;
}

void FileMapping::populate(std::uint64_t region) {
  auto* const pages = const_cast<std::uint8_t*>(data_ + region * kRegion);
  // Where this fails copies still work; they fault page by page.
  madvise(pages, region_bytes(region), MADV_POPULATE_READ);
  regions_[region].populated.store(true, std::memory_order_release);
}

void FileMapping::forget(std::uint64_t region) {
  regions_[region].populated.store(false, std::memory_order_relaxed);
  regions_[region].hits.store(0, std::memory_order_relaxed);
}

}  // namespace gpunvme
