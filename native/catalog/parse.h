// Bytes of a device, turned into a superblock and a table of regions. Whatever the bytes are, nothing but a Problem
// comes of it: every count, offset and sum is checked before it is used. Nothing here throws, but for want of memory.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "catalog/format.h"

namespace gpunvme::catalog {

// Whether bytes at the start of a slot claim to be a superblock.
bool has_magic(std::span<const std::uint8_t> bytes);

// Reads one superblock. `offset`: where it was found, for the Problem; it must be where its generation belongs.
std::optional<Problem> parse_superblock(std::span<const std::uint8_t> bytes, std::uint64_t offset,
                                        std::uint64_t device_bytes, Superblock& superblock);

// Reads the table of a superblock that was parsed from the same device; in the order of its entries.
std::optional<Problem> parse_table(std::span<const std::uint8_t> bytes, const Superblock& superblock,
                                   std::uint64_t device_bytes, std::vector<Region>& regions);

// What a table has to fulfil beyond being readable: regions lie in the device, apart from each other and from the
// table, numbers and names are unique. The Problem's offset is that of the region.
std::optional<Problem> check_regions(const std::vector<Region>& regions, const Superblock& superblock,
                                     std::uint64_t device_bytes);

}  // namespace gpunvme::catalog
