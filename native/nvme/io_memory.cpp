#include "io_memory.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace gpunvme {

std::shared_ptr<IoMemory> IoMemory::mapped(std::uint64_t address, std::uint64_t nbytes, std::uint64_t iova) {
  std::shared_ptr<IoMemory> memory(new IoMemory(Kind::kMapped, address, nbytes));
  memory->iova_ = iova;
  return memory;
}

std::shared_ptr<IoMemory> IoMemory::mapped_pages(std::uint64_t address, std::uint64_t nbytes,
                                                 std::vector<std::uint64_t> iovas, std::uint64_t page_bytes,
                                                 std::uint64_t first) {
  if (!std::has_single_bit(page_bytes) || first >= page_bytes) {
    throw std::invalid_argument("a page size is a power of two, and memory begins in its first page");
  }
  if (iovas.empty() || iovas.size() * page_bytes < first + nbytes) {
    throw std::invalid_argument("the memory is larger than its pages");
  }
  std::shared_ptr<IoMemory> memory(new IoMemory(Kind::kMapped, address, nbytes));
  memory->iovas_ = std::move(iovas);
  memory->page_bytes_ = page_bytes;
  memory->first_ = first;
  return memory;
}

std::shared_ptr<IoMemory> IoMemory::host(std::uint64_t address, std::uint64_t nbytes) {
  return std::shared_ptr<IoMemory>(new IoMemory(Kind::kHost, address, nbytes));
}

std::shared_ptr<IoMemory> IoMemory::gpu(std::uint64_t address, std::uint64_t nbytes, int device) {
  std::shared_ptr<IoMemory> memory(new IoMemory(Kind::kGpu, address, nbytes));
  memory->device_ = device;
  return memory;
}

IoMemory::Extent IoMemory::paged_extent(std::uint64_t offset, std::uint64_t nbytes) const {
  offset += first_;
  std::uint64_t page = offset / page_bytes_;
  const std::uint64_t within = offset % page_bytes_;
  const Extent one{iovas_[page] + within, std::min(nbytes, page_bytes_ - within)};
  std::uint64_t found = one.nbytes;
  while (found < nbytes && iovas_[page + 1] == iovas_[page] + page_bytes_) {
    found += std::min(nbytes - found, page_bytes_);
    ++page;
  }
  return {one.iova, found};
}

}  // namespace gpunvme
