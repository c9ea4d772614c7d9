// Memory of the library's own for one layer, on the host or a GPU.
#pragma once

#include <cstdint>

namespace gpunvme::capi {

class LayerMemory {
 public:
  // Throws Refusal (GPUNVME_ENOMEM) or Failure (kCuda).
  LayerMemory(int device, std::uint64_t nbytes);
  ~LayerMemory();
  LayerMemory(LayerMemory&& other) noexcept;
  LayerMemory(const LayerMemory&) = delete;
  LayerMemory& operator=(const LayerMemory&) = delete;

  std::uint64_t address() const { return address_; }

 private:
  int device_;
  std::uint64_t nbytes_;
  std::uint64_t address_ = 0;
};

}  // namespace gpunvme::capi
