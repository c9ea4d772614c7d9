#include "catalog/serialise.h"

#include <cstring>

#include "catalog/bytes.h"
#include "catalog/crc32.h"

namespace gpunvme::catalog {
namespace {

std::uint64_t entry_bytes(const Region& region) {
  return round_up(kEntryHeadBytes + region.shape.size() * 8 + region.name.size(), 8);
}

}  // namespace

std::uint64_t table_bytes(const std::vector<Region>& regions) {
  std::uint64_t sum = kTableHeadBytes;
  for (const Region& region : regions) sum += entry_bytes(region);
  return sum;
}

std::vector<std::uint8_t> serialise_table(const std::vector<Region>& regions, std::uint64_t generation) {
  std::vector<std::uint8_t> bytes(table_bytes(regions));
  std::memcpy(bytes.data(), kTableMagic, kMagicBytes);
  store(std::span(bytes), 8, generation);
  std::size_t at = kTableHeadBytes;
  for (const Region& region : regions) {
    const std::uint64_t size = entry_bytes(region);
    const std::span entry = std::span(bytes).subspan(at, size);
    store(entry, 0, static_cast<std::uint32_t>(size));
    store(entry, 4, region.kind);
    store(entry, 8, region.offset);
    store(entry, 16, region.nbytes);
    store(entry, 24, region.record_bytes);
    store(entry, 32, region.crc32);
    store(entry, 36, region.element_type);
    store(entry, 38, static_cast<std::uint16_t>(region.shape.size()));
    store(entry, 40, static_cast<std::uint16_t>(region.name.size()));
    for (std::size_t i = 0; i < region.shape.size(); ++i) store(entry, kEntryHeadBytes + i * 8, region.shape[i]);
    const std::size_t name_at = kEntryHeadBytes + region.shape.size() * 8;
    if (!region.name.empty()) std::memcpy(entry.data() + name_at, region.name.data(), region.name.size());
    at += size;
  }
  return bytes;
}

std::array<std::uint8_t, kSuperblockBytes> serialise_superblock(const Superblock& superblock) {
  std::array<std::uint8_t, kSuperblockBytes> bytes{};
  std::memcpy(bytes.data(), kSuperblockMagic, kMagicBytes);
  store(std::span<std::uint8_t>(bytes), 8, kVersion);
  store(std::span<std::uint8_t>(bytes), 12, superblock.regions);
  std::memcpy(bytes.data() + 16, superblock.id.data(), superblock.id.size());
  store(std::span<std::uint8_t>(bytes), 32, superblock.generation);
  store(std::span<std::uint8_t>(bytes), 40, superblock.alignment);
  store(std::span<std::uint8_t>(bytes), 48, superblock.capacity);
  store(std::span<std::uint8_t>(bytes), 56, superblock.table_offset);
  store(std::span<std::uint8_t>(bytes), 64, superblock.table_bytes);
  store(std::span<std::uint8_t>(bytes), 72, superblock.table_crc32);
  const std::span<const std::uint8_t> summed = std::span<const std::uint8_t>(bytes).first(kSuperblockBytes - 4);
  store(std::span<std::uint8_t>(bytes), kSuperblockBytes - 4, crc32(summed));
  return bytes;
}

}  // namespace gpunvme::catalog
