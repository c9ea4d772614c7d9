// Which generations a device holds: both superblocks, looked at together.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "catalog/format.h"

namespace gpunvme::catalog {

struct Superblocks {
  std::array<std::optional<Superblock>, 2> superblocks;
  std::array<std::optional<Problem>, 2> problems;  // of the slots that have none

  // Why the device cannot be trusted although a slot may be good: the other one was written to its end, and says what
  // cannot be. No crash leaves that; a file that was cut off does.
  const Problem* refusal() const;
  // The superblock that counts: that of the newest generation. Null if neither is whole.
  const Superblock* newest() const;
  // The one before it, whose table and regions must stay as they are until its slot is written again. Null if that slot
  // holds nothing whole.
  const Superblock* previous() const;
};

// `bytes`: the first kSuperblockBytes of each slot, fewer where the device ends.
Superblocks read_superblocks(const std::array<std::span<const std::uint8_t>, 2>& bytes, std::uint64_t device_bytes);

}  // namespace gpunvme::catalog
