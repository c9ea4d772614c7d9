#include "catalog/superblocks.h"

#include "catalog/parse.h"

namespace gpunvme::catalog {

const Problem* Superblocks::refusal() const {
  for (const auto& problem : problems) {
    if (problem && !problem->unfinished) return &*problem;
  }
  return nullptr;
}

const Superblock* Superblocks::newest() const {
  const Superblock* last = nullptr;
  for (const auto& superblock : superblocks) {
    if (superblock && (last == nullptr || superblock->generation > last->generation)) last = &*superblock;
  }
  return last;
}

const Superblock* Superblocks::previous() const {
  const Superblock* last = newest();
  for (const auto& superblock : superblocks) {
    if (superblock && &*superblock != last) return &*superblock;
  }
  return nullptr;
}

Superblocks read_superblocks(const std::array<std::span<const std::uint8_t>, 2>& bytes, std::uint64_t device_bytes) {
  Superblocks found;
  for (std::size_t i = 0; i < kSlots.size(); ++i) {
    Superblock superblock;
    found.problems[i] = parse_superblock(bytes[i], kSlots[i], device_bytes, superblock);
    if (!found.problems[i]) found.superblocks[i] = superblock;
  }
  return found;
}

}  // namespace gpunvme::catalog
