// Memory of another device, a GPU's, as far as the controller knows it: bytes that it can have copied, not touch.
//
// A real controller reaches such memory over PCIe by itself. The software controller has only a CPU, so whoever maps
// the memory says how it is copied. That is an emulation: it shows that code is right, and nothing of how fast it is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpunvme::soft {

class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;

  // Both are called by any worker, and return when the copy has ended, well or not: nothing is written after that. What
  // was copied by an earlier call is visible on the device before what a later one copies. False: it failed.
  virtual bool read(void* to, std::uint64_t from, std::size_t nbytes) = 0;
  virtual bool write(std::uint64_t to, const void* from, std::size_t nbytes) = 0;
};

}  // namespace gpunvme::soft
