#include "memory_place.h"

#include <string>

#include "cuda_driver.h"
#include "job.h"
#include "refusal.h"

namespace gpunvme::capi {
namespace {

void check_on_device(std::uint64_t address, int device, const char* which) {
  const int actual = cuda_device_of(address);
  if (actual == device) return;
  const std::string found = actual < 0 ? "no memory of a GPU" : "on device " + std::to_string(actual);
  throw Refusal(GPUNVME_EINVAL, std::string("the ") + which + " byte of the memory was said to be on device " +
                                    std::to_string(device) + ", and is " + found);
}

}  // namespace

std::optional<std::uint64_t> Place::job_stream() const {
  if (device == kHost) return std::nullopt;
  return reinterpret_cast<std::uint64_t>(stream);
}

void check_device(std::int32_t device) {
  if (device == GPUNVME_HOST) return;
  if (device < 0) {
    throw Refusal(GPUNVME_EINVAL, "device " + std::to_string(device) + ": use GPUNVME_HOST, or a GPU's ordinal");
  }
  int count = 0;
  cuda_check(cuda().DeviceGetCount(&count), "cuDeviceGetCount");
  if (device >= count) {
    throw Refusal(GPUNVME_EINVAL,
                  "device " + std::to_string(device) + ": the driver sees " + std::to_string(count) + " GPU(s)");
  }
}

Place checked_place(const void* address, std::uint64_t nbytes, std::int32_t device, void* stream) {
  check_device(device);
  const Place place{reinterpret_cast<std::uint64_t>(address), nbytes, device, stream};
  if (nbytes == 0) return place;
  if (address == nullptr) throw Refusal(GPUNVME_EINVAL, "the memory is NULL");
  if (nbytes > INT64_MAX || place.address + nbytes < place.address) {
    throw Refusal(GPUNVME_EINVAL, "no memory has " + std::to_string(nbytes) + " bytes at that address");
  }
  if (device != GPUNVME_HOST) {
    // Both ends, and not their allocation: memory that was mapped in parts is several.
    check_on_device(place.address, device, "first");
    check_on_device(place.address + nbytes - 1, device, "last");
  }
  return place;
}

}  // namespace gpunvme::capi
