// What Get Log Page returns (Base 2.0, 5.16.1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"

namespace gpunvme::soft {

// The whole log page in `page`. Returns a status.
std::uint16_t make_log_page(const Device& device, std::uint8_t log, std::uint32_t nsid, std::uint8_t csi,
                            std::vector<std::byte>& page);

}  // namespace gpunvme::soft
