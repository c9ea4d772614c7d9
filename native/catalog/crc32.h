// The CRC-32 of zlib, gzip and PNG (polynomial 04C11DB7h, reflected), for superblocks and tables. Regions are summed by
// zlib itself, where their bytes are; a build that needs zlib's headers for a few kilobytes would ask more than it
// gives.
#pragma once

#include <cstdint>
#include <span>

namespace gpunvme::catalog {

// The sum of `bytes`, or of what `before` is the sum of followed by `bytes`.
std::uint32_t crc32(std::span<const std::uint8_t> bytes, std::uint32_t before = 0);

}  // namespace gpunvme::catalog
