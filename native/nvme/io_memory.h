// Memory as the commands of a transfer see it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace gpunvme {

class IoMemory {
 public:
  enum class Kind {
    kMapped,  // the controller reaches it
    kHost,    // it does not: bytes pass through staging memory
    kGpu,     // nor here: through page-locked staging memory
  };

  // Adjoining for the controller, from `iova` on.
  static std::shared_ptr<IoMemory> mapped(std::uint64_t address, std::uint64_t nbytes, std::uint64_t iova);
  // In pages of `page_bytes` (a power of two), each at its own IOVA. The memory begins `first` bytes into the first.
  static std::shared_ptr<IoMemory> mapped_pages(std::uint64_t address, std::uint64_t nbytes,
                                                std::vector<std::uint64_t> iovas, std::uint64_t page_bytes,
                                                std::uint64_t first);
  static std::shared_ptr<IoMemory> host(std::uint64_t address, std::uint64_t nbytes);
  static std::shared_ptr<IoMemory> gpu(std::uint64_t address, std::uint64_t nbytes, int device);

  Kind kind() const { return kind_; }
  std::uint64_t address() const { return address_; }
  std::uint64_t nbytes() const { return nbytes_; }
  int device() const { return device_; }  // of kGpu

  // What adjoins for the controller from `offset` on, at most `nbytes`, which must be inside the memory. Mapped only.
  struct Extent {
    std::uint64_t iova;
    std::uint64_t nbytes;
  };
  Extent extent(std::uint64_t offset, std::uint64_t nbytes) const {
    if (iovas_.empty()) return {iova_ + offset, nbytes};
    return paged_extent(offset, nbytes);
  }

 private:
  IoMemory(Kind kind, std::uint64_t address, std::uint64_t nbytes) : kind_(kind), address_(address), nbytes_(nbytes) {}
  Extent paged_extent(std::uint64_t offset, std::uint64_t nbytes) const;

  const Kind kind_;
  const std::uint64_t address_;
  const std::uint64_t nbytes_;
  int device_ = -1;
  std::uint64_t iova_ = 0;
  std::vector<std::uint64_t> iovas_;  // empty: all of it adjoins
  std::uint64_t page_bytes_ = 0;
  std::uint64_t first_ = 0;
};

}  // namespace gpunvme
