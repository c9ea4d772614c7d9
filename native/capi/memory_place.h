// Memory that a caller names: an address, a size, a device and a stream.
#pragma once

#include <cstdint>
#include <optional>

namespace gpunvme::capi {

struct Place {
  std::uint64_t address = 0;
  std::uint64_t nbytes = 0;
  int device = 0;  // kHost, or a GPU's ordinal
  void* stream = nullptr;

  // What a Job is ordered behind.
  std::optional<std::uint64_t> job_stream() const;
};

// Throws Refusal (GPUNVME_EINVAL) for a device that is not there. Failure (kCuda) where CUDA cannot be used.
void check_device(std::int32_t device);

// Memory that cannot be what the caller says: Refusal (GPUNVME_EINVAL). Host memory is taken at the caller's word but
// for NULL and sizes that no memory has.
Place checked_place(const void* address, std::uint64_t nbytes, std::int32_t device, void* stream);

}  // namespace gpunvme::capi
