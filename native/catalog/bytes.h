// Little-endian numbers in bytes whose size the caller has checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace gpunvme::catalog {

inline constexpr std::size_t kMagicBytes = 8;
inline constexpr char kSuperblockMagic[kMagicBytes + 1] = "GPUNVMEC";
inline constexpr char kTableMagic[kMagicBytes + 1] = "GPUNVMET";

template <typename Number>
Number load(std::span<const std::uint8_t> bytes, std::size_t at) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(Number); ++i) value |= static_cast<std::uint64_t>(bytes[at + i]) << (8 * i);
  return static_cast<Number>(value);
}
inline std::uint16_t load_u16(std::span<const std::uint8_t> bytes, std::size_t at) {
  return load<std::uint16_t>(bytes, at);
}
inline std::uint32_t load_u32(std::span<const std::uint8_t> bytes, std::size_t at) {
  return load<std::uint32_t>(bytes, at);
}
inline std::uint64_t load_u64(std::span<const std::uint8_t> bytes, std::size_t at) {
  return load<std::uint64_t>(bytes, at);
}

template <typename Number>
void store(std::span<std::uint8_t> bytes, std::size_t at, Number value) {
  for (std::size_t i = 0; i < sizeof(Number); ++i) {
    bytes[at + i] = static_cast<std::uint8_t>(static_cast<std::uint64_t>(value) >> (8 * i));
  }
}

}  // namespace gpunvme::catalog
