#include "catalog/utf8.h"

#include <cstddef>
#include <cstdint>

namespace gpunvme::catalog {

bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto first = static_cast<std::uint8_t>(text[at++]);
    if (first < 0x80) continue;
    // Of the bytes that may follow, only the second has other bounds than 80h to BFh (RFC 3629, section 4).
    std::size_t more = 1;
    std::uint8_t low = 0x80;
    std::uint8_t high = 0xBF;
    if (first >= 0xC2 && first <= 0xDF) {
      more = 1;
    } else if (first >= 0xE0 && first <= 0xEF) {
      more = 2;
      if (first == 0xE0) low = 0xA0;
      if (first == 0xED) high = 0x9F;
    } else if (first >= 0xF0 && first <= 0xF4) {
      more = 3;
      if (first == 0xF0) low = 0x90;
      if (first == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (text.size() - at < more) return false;
    for (std::size_t i = 0; i < more; ++i) {
      const auto byte = static_cast<std::uint8_t>(text[at++]);
      if (byte < low || byte > high) return false;
      low = 0x80;
      high = 0xBF;
    }
  }
  return true;
}

}  // namespace gpunvme::catalog
