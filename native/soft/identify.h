// The data structures that Identify returns (Base 2.0, 5.17; NVM Command Set 1.0, 4.1.5).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "device.h"
#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {

inline constexpr char kModel[] = "gpunvme software controller";
inline constexpr char kFirmware[] = "soft-1";
inline constexpr std::uint16_t kPciVendor = 0x1AF4;  // as the PCI function that stands before it, nvme/pci_config.py
inline constexpr std::uint16_t kControllerId = 1;
inline constexpr std::uint16_t kWarningTemperature = 343;  // kelvin
inline constexpr std::uint16_t kCriticalTemperature = 353;

// Copies text into a field of the specification's: padded with spaces.
void put_text(char* field, std::size_t nbytes, const char* text);

// Fills `page`, all zeroes before, for CDW10, CDW11 and NSID. Returns a status.
std::uint16_t identify(const Device& device, const nvme::Sqe& sqe, std::array<std::byte, nvme::kIdentifyBytes>& page);

}  // namespace gpunvme::soft
