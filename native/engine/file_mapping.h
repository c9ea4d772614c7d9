// A read-only mapping of a whole file, for those who read it at random: what is asked for again and again in the page
// cache is copied from the mapping, which costs less than a system call each time. Regions of it are made ready one by
// one, when enough was read there to pay for it. Copies are made by copy_mapped(), for the file may be cut short.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace gpunvme {

class FileMapping {
 public:
  static constexpr std::uint64_t kRegion = 2u << 20;
  // Reads after which making a region's page table entries (about 50 us for 2 MiB) is cheaper than going on with a
  // system call (about 0.4 us more than a copy) for each.
  static constexpr std::uint64_t kDenseHits = 128;

  // Null where the file cannot be mapped.
  static std::unique_ptr<FileMapping> make(int fd, std::uint64_t nbytes);
  ~FileMapping();
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::uint64_t nbytes() const { return nbytes_; }
  static constexpr std::uint64_t region_of(std::uint64_t offset) { return offset / kRegion; }
  static constexpr std::uint64_t regions(std::uint64_t nbytes) { return (nbytes + kRegion - 1) / kRegion; }
  // Of a region: only the last one may be smaller.
  std::uint64_t region_bytes(std::uint64_t region) const;

  // Counts a read that the page cache served; whether there were more than `dense` of them.
  bool count_hit(std::uint64_t region, std::uint64_t dense);
  // Makes the page table entries of a region that is in the page cache: what is not would be read from the drive now.
  void populate(std::uint64_t region);
  bool is_populated(std::uint64_t region) const { return regions_[region].populated.load(std::memory_order_acquire); }
  // Begins to count anew.
  void forget(std::uint64_t region);

 private:
  struct Region {
    std::atomic<std::uint16_t> hits{0};
    std::atomic<bool> populated{false};
  };

  FileMapping(const std::uint8_t* data, std::uint64_t nbytes);

  const std::uint8_t* const data_;
  const std::uint64_t nbytes_;
  const std::unique_ptr<Region[]> regions_;
};

}  // namespace gpunvme
