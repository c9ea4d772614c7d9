// What a catalog is on a device: docs/catalog-format.md in C++. All numbers are little-endian, all sizes bytes.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gpunvme::catalog {

inline constexpr std::uint32_t kVersion = 1;

// Two superblocks; generation g lies in slot g % 2. Regions and tables begin behind the head, which also keeps them
// clear of the places where partition tables and file systems have their magic numbers.
inline constexpr std::uint64_t kSuperblockBytes = 512;
inline constexpr std::array<std::uint64_t, 2> kSlots = {0, 64u << 10};
inline constexpr std::uint64_t kSlotBytes = 64u << 10;
inline constexpr std::uint64_t kHeadBytes = 1u << 20;

inline constexpr std::uint64_t kLeastAlignment = 4096;
inline constexpr std::uint64_t kMostAlignment = std::uint64_t{1} << 30;
inline constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 60;  // so that neither sums nor bits overflow
inline constexpr std::uint32_t kMostRegions = 1u << 20;
inline constexpr std::uint64_t kMostTableBytes = 256u << 20;
inline constexpr std::uint64_t kMostNameBytes = 4096;
inline constexpr std::uint64_t kMostDimensions = 32;
inline constexpr std::uint64_t kTableHeadBytes = 16;
inline constexpr std::uint64_t kEntryHeadBytes = 48;

// Element types by their number on the device; the names are those of safetensors. 0: bytes without a type.
struct ElementType {
  std::string_view name;
  std::uint32_t bits;
};
inline constexpr std::array<ElementType, 23> kElementTypes = {{
    {"", 8},     {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6},     {"U8", 8},
    {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},     {"I16", 16},        {"U16", 16},
    {"F16", 16}, {"BF16", 16},   {"I32", 32},    {"U32", 32},        {"F32", 32},        {"C64", 64},
    {"F64", 64}, {"I64", 64},    {"U64", 64},    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
}};

struct Superblock {
  std::array<std::uint8_t, 16> id{};  // of this catalog, random
  std::uint64_t generation = 0;       // 1 at first, one more with every change
  std::uint64_t alignment = 0;        // of regions and tables; a power of two
  std::uint64_t capacity = 0;         // bytes that may be used, from the start of the device; 0: a file that grows
  std::uint64_t table_offset = 0;
  std::uint64_t table_bytes = 0;
  std::uint32_t table_crc32 = 0;
  std::uint32_t regions = 0;
};

struct Region {
  std::uint32_t kind = 0;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t record_bytes = 1;  // divides nbytes
  std::uint32_t crc32 = 0;         // of its nbytes bytes
  std::uint16_t element_type = 0;  // index into kElementTypes
  std::vector<std::uint64_t> shape;
  std::string name;  // UTF-8; empty, or unlike every other
};

// Why bytes are no catalog, and where on the device the first of them is that is wrong.
struct Problem {
  std::uint64_t offset = 0;
  std::string reason;
  bool unfinished = false;  // of a superblock: as an interrupted write leaves it, or one that never was
};

// A run of bytes in use.
struct Extent {
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
};

// `nbytes` rounded up to a multiple of `alignment`, a power of two; both at most kMostBytes.
constexpr std::uint64_t round_up(std::uint64_t nbytes, std::uint64_t alignment) {
  return (nbytes + alignment - 1) & ~(alignment - 1);
}

// Where the space ends that a catalog may use, given how large its device or file is now.
constexpr std::uint64_t end_of(const Superblock& superblock, std::uint64_t device_bytes) {
  return superblock.capacity != 0 && superblock.capacity < device_bytes ? superblock.capacity : device_bytes;
}

}  // namespace gpunvme::catalog
