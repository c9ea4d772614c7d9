#include "layer_memory.h"

#include <sys/mman.h>

#include <string>
#include <utility>

#include "cuda_driver.h"
#include "job.h"
#include "refusal.h"

namespace gpunvme::capi {
namespace {

constexpr CUresult kCudaOutOfMemory = 2;  // CUDA_ERROR_OUT_OF_MEMORY

[[noreturn]] void refuse(int device, std::uint64_t nbytes) {
  const std::string where = device == kHost ? "host memory" : "the memory of device " + std::to_string(device);
  throw Refusal(GPUNVME_ENOMEM, "a layer of " + std::to_string(nbytes) + " bytes finds no room in " + where);
}

}  // namespace

LayerMemory::LayerMemory(int device, std::uint64_t nbytes) : device_(device), nbytes_(nbytes) {
  if (device == kHost) {
    void* memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) refuse(device, nbytes);
    madvise(memory, nbytes, MADV_HUGEPAGE);  // fewer faults; refused here and there, which does no harm
    address_ = reinterpret_cast<std::uint64_t>(memory);
    return;
  }
  CudaContextScope scope(device);
  const CUresult result = cuda().MemAlloc(&address_, nbytes);
  if (result == kCudaOutOfMemory) refuse(device, nbytes);
  cuda_check(result, "cuMemAlloc");
}

LayerMemory::LayerMemory(LayerMemory&& other) noexcept
    : device_(other.device_), nbytes_(other.nbytes_), address_(std::exchange(other.address_, 0)) {}

LayerMemory::~LayerMemory() {
  if (address_ == 0) return;
  if (device_ == kHost) {
    munmap(reinterpret_cast<void*>(address_), nbytes_);
    return;
  }
  try {
    CudaContextScope scope(device_);
    cuda().MemFree(address_);
  } catch (const Failure&) {
    // The context is gone, and the memory with it.
  }
}

}  // namespace gpunvme::capi
