// A superblock and its table, turned into the bytes that parse.h reads.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "catalog/format.h"

namespace gpunvme::catalog {

// Bytes of the table of these regions, before it exists.
std::uint64_t table_bytes(const std::vector<Region>& regions);

// Neither checks anything: check_regions() says beforehand whether what they write can be read again.
std::vector<std::uint8_t> serialise_table(const std::vector<Region>& regions, std::uint64_t generation);
std::array<std::uint8_t, kSuperblockBytes> serialise_superblock(const Superblock& superblock);

}  // namespace gpunvme::catalog
