// Where new regions and tables go: between what is in use.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "catalog/format.h"

namespace gpunvme::catalog {

// What one generation holds on its device: its table and its regions, rounded up to whole units of alignment.
std::vector<Extent> used_by(const Superblock& superblock, const std::vector<Region>& regions);

// Space that is handed out run by run. Whatever was added is never handed out, so that blocks which a valid superblock
// still refers to stay as they are, if its extents were added.
class Space {
 public:
  // Up to `end`; both it and every extent are multiples of `alignment` or are rounded to one.
  Space(std::uint64_t end, std::uint64_t alignment) : end_(end & ~(alignment - 1)), alignment_(alignment) {}

  void add(const std::vector<Extent>& used);

  // The first free run of `nbytes` bytes, which is then in use; nothing if there is none. Runs of 0 bytes take no room.
  std::optional<std::uint64_t> take(std::uint64_t nbytes);

  // The longest run that can be taken, in bytes.
  std::uint64_t longest() const;

 private:
  void insert(Extent extent);

  std::uint64_t end_;
  std::uint64_t alignment_;
  std::vector<Extent> used_;  // by offset; apart, and never touching
};

}  // namespace gpunvme::catalog
