#include "catalog/parse.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <unordered_set>

#include "catalog/bytes.h"
#include "catalog/crc32.h"
#include "catalog/utf8.h"

namespace gpunvme::catalog {
namespace {

Problem problem(std::uint64_t offset, std::string reason, bool unfinished = false) {
  return {offset, std::move(reason), unfinished};
}

std::string number(std::uint64_t value) { return std::to_string(value); }

// Whether [offset, offset + nbytes) lies behind the head and before `end`.
bool lies_within(std::uint64_t offset, std::uint64_t nbytes, std::uint64_t end) {
  return offset >= kHeadBytes && offset <= end && nbytes <= end - offset;
}

// Bits of all elements, or nothing if they are more than 64 bits can count.
std::optional<std::uint64_t> bits_of(const Region& region) {
  std::uint64_t bits = kElementTypes[region.element_type].bits;
  // A zero anywhere makes it zero, whatever the others are.
  if (std::find(region.shape.begin(), region.shape.end(), 0u) != region.shape.end()) return 0;
  for (const std::uint64_t extent : region.shape) {
    if (extent > UINT64_MAX / bits) return std::nullopt;
    bits *= extent;
  }
  return bits;
}

std::optional<std::string> wrong_with(const Region& region, const Superblock& superblock, std::uint64_t end) {
  if (region.element_type >= kElementTypes.size()) return "unknown element type " + number(region.element_type);
  if (region.offset % superblock.alignment != 0) {
    return "begins at " + number(region.offset) + ", which is no multiple of " + number(superblock.alignment);
  }
  if (!lies_within(region.offset, region.nbytes, end)) {
    return "has " + number(region.nbytes) + " bytes at " + number(region.offset) + "; regions lie between " +
           number(kHeadBytes) + " and " + number(end);
  }
  if (region.shape.size() > kMostDimensions) return "an array of " + number(region.shape.size()) + " dimensions";
  if (region.record_bytes == 0 || region.nbytes % region.record_bytes != 0) {
    return "its " + number(region.nbytes) + " bytes are no whole number of records of " + number(region.record_bytes);
  }
  if (region.element_type == 0 ? !region.shape.empty() : bits_of(region) != region.nbytes * 8) {
    return "shape and element type do not fit its " + number(region.nbytes) + " bytes";
  }
  if (region.name.size() > kMostNameBytes) return "its name has " + number(region.name.size()) + " bytes";
  if (!is_utf8(region.name)) return "its name is not UTF-8";
  return std::nullopt;
}

// One entry, from `bytes` which begin with it. Its size, or why it is none.
std::optional<std::string> parse_entry(std::span<const std::uint8_t> bytes, Region& region, std::uint64_t& size) {
  if (bytes.size() < kEntryHeadBytes) return "the table ends within an entry";
  size = load_u32(bytes, 0);
  if (size < kEntryHeadBytes || size % 8 != 0 || size > bytes.size()) {
    return "an entry of " + number(size) + " bytes in a table with " + number(bytes.size()) + " left";
  }
  region.kind = load_u32(bytes, 4);
  region.offset = load_u64(bytes, 8);
  region.nbytes = load_u64(bytes, 16);
  region.record_bytes = load_u64(bytes, 24);
  region.crc32 = load_u32(bytes, 32);
  region.element_type = load_u16(bytes, 36);
  const std::uint64_t dimensions = load_u16(bytes, 38);
  const std::uint64_t name_bytes = load_u16(bytes, 40);
  // Both have 16 bits: these sums cannot overflow.
  const std::uint64_t used = kEntryHeadBytes + dimensions * 8 + name_bytes;
  if (size != round_up(used, 8)) {
    return "an entry of " + number(size) + " bytes whose parts have " + number(used);
  }
  const auto is_set = [](std::uint8_t byte) { return byte != 0; };
  const auto reserved = bytes.subspan(42, 6);
  const auto padding = bytes.subspan(used, size - used);
  if (std::any_of(reserved.begin(), reserved.end(), is_set) || std::any_of(padding.begin(), padding.end(), is_set)) {
    return "reserved bytes of an entry are set";
  }
  region.shape.resize(dimensions);
  for (std::uint64_t i = 0; i < dimensions; ++i) region.shape[i] = load_u64(bytes, kEntryHeadBytes + i * 8);
  const auto name = bytes.subspan(kEntryHeadBytes + dimensions * 8, name_bytes);
  region.name.assign(reinterpret_cast<const char*>(name.data()), name.size());
  return std::nullopt;
}

}  // namespace

bool has_magic(std::span<const std::uint8_t> bytes) {
  return bytes.size() >= kMagicBytes && std::memcmp(bytes.data(), kSuperblockMagic, kMagicBytes) == 0;
}

std::optional<Problem> parse_superblock(std::span<const std::uint8_t> bytes, std::uint64_t offset,
                                        std::uint64_t device_bytes, Superblock& superblock) {
  if (bytes.size() < kSuperblockBytes) return problem(offset, "the device ends within a superblock", true);
  bytes = bytes.first(kSuperblockBytes);
  if (!has_magic(bytes)) return problem(offset, "there is no superblock", true);
  if (load_u32(bytes, kSuperblockBytes - 4) != crc32(bytes.first(kSuperblockBytes - 4))) {
    return problem(offset, "the superblock's checksum is wrong: it is damaged, or was not written to its end", true);
  }
  const std::uint32_t version = load_u32(bytes, 8);
  if (version != kVersion) {
    return problem(offset + 8,
                   "format version " + number(version) + "; this library reads version " + number(kVersion));
  }
  superblock.regions = load_u32(bytes, 12);
  std::copy_n(bytes.begin() + 16, superblock.id.size(), superblock.id.begin());
  superblock.generation = load_u64(bytes, 32);
  superblock.alignment = load_u64(bytes, 40);
  superblock.capacity = load_u64(bytes, 48);
  superblock.table_offset = load_u64(bytes, 56);
  superblock.table_bytes = load_u64(bytes, 64);
  superblock.table_crc32 = load_u32(bytes, 72);
  if (superblock.generation == 0 || superblock.generation == UINT64_MAX ||
      kSlots[superblock.generation % kSlots.size()] != offset) {
    return problem(offset + 32, "generation " + number(superblock.generation) + " does not belong into this slot");
  }
  if (!std::has_single_bit(superblock.alignment) || superblock.alignment < kLeastAlignment ||
      superblock.alignment > kMostAlignment) {
    return problem(offset + 40, "alignment " + number(superblock.alignment) + " is no power of two from " +
                                    number(kLeastAlignment) + " to " + number(kMostAlignment));
  }
  if (device_bytes > kMostBytes || superblock.capacity > device_bytes) {
    return problem(offset + 48, "the catalog was made for " + number(superblock.capacity) + " bytes, the device has " +
                                    number(device_bytes));
  }
  if (superblock.table_offset % superblock.alignment != 0 || superblock.table_bytes > kMostTableBytes ||
      !lies_within(superblock.table_offset, superblock.table_bytes, end_of(superblock, device_bytes))) {
    return problem(offset + 56, "a table of " + number(superblock.table_bytes) + " bytes at " +
                                    number(superblock.table_offset) + " on a device of " + number(device_bytes));
  }
  if (superblock.regions > kMostRegions ||
      superblock.table_bytes < kTableHeadBytes + superblock.regions * kEntryHeadBytes) {
    return problem(offset + 12,
                   number(superblock.regions) + " regions in a table of " + number(superblock.table_bytes) + " bytes");
  }
  return std::nullopt;
}

std::optional<Problem> parse_table(std::span<const std::uint8_t> bytes, const Superblock& superblock,
                                   std::uint64_t device_bytes, std::vector<Region>& regions) {
  const std::uint64_t start = superblock.table_offset;
  if (bytes.size() != superblock.table_bytes || bytes.size() < kTableHeadBytes) {
    return problem(start, "the table has " + number(bytes.size()) + " bytes, its superblock says " +
                              number(superblock.table_bytes));
  }
  if (crc32(bytes) != superblock.table_crc32) return problem(start, "the table's checksum is wrong");
  if (std::memcmp(bytes.data(), kTableMagic, kMagicBytes) != 0) return problem(start, "there is no table");
  if (load_u64(bytes, 8) != superblock.generation) {
    return problem(start + 8, "the table is of generation " + number(load_u64(bytes, 8)) + ", its superblock of " +
                                  number(superblock.generation));
  }
  regions.clear();
  regions.reserve(superblock.regions);
  std::uint64_t at = kTableHeadBytes;
  for (std::uint32_t i = 0; i < superblock.regions; ++i) {
    std::uint64_t size = 0;
    if (const auto wrong = parse_entry(bytes.subspan(at), regions.emplace_back(), size)) {
      return problem(start + at, "region number " + number(i) + ": " + *wrong);
    }
    at += size;
  }
  if (at != bytes.size()) {
    return problem(start + at, "the table has " + number(bytes.size() - at) + " bytes behind its last entry");
  }
  return check_regions(regions, superblock, device_bytes);
}

std::optional<Problem> check_regions(const std::vector<Region>& regions, const Superblock& superblock,
                                     std::uint64_t device_bytes) {
  const std::uint64_t end = end_of(superblock, device_bytes);
  std::unordered_set<std::uint32_t> kinds;
  std::unordered_set<std::string_view> names;
  std::vector<Extent> used = {{superblock.table_offset, round_up(superblock.table_bytes, superblock.alignment)}};
  used.reserve(regions.size() + 1);
  for (const Region& region : regions) {
    const std::string called = "kind " + number(region.kind) + ": ";
    if (const auto wrong = wrong_with(region, superblock, end)) return problem(region.offset, called + *wrong);
    if (!kinds.insert(region.kind).second) return problem(region.offset, called + "its number is there twice");
    if (!region.name.empty() && !names.insert(region.name).second) {
      return problem(region.offset, called + "its name is there twice");
    }
    if (region.nbytes > 0) used.push_back({region.offset, round_up(region.nbytes, superblock.alignment)});
  }
  std::sort(used.begin(), used.end(), [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  for (std::size_t i = 1; i < used.size(); ++i) {
    if (used[i].offset - used[i - 1].offset < used[i - 1].nbytes) {
      return problem(used[i].offset, "a region lies over another one, or over the table");
    }
  }
  return std::nullopt;
}

}  // namespace gpunvme::catalog
