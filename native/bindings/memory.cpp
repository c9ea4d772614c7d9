// Memory: what a DLPack capsule describes, and GPU memory for gpunvme.Buffer.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "bindings.h"
#include "cuda_driver.h"
#include "dlpack.h"
#include "failure.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

// (address, bytes, device type, device number, contiguous, read-only)
nb::object inspect_dlpack(nb::object capsule) {
  const DlTensor* tensor = nullptr;
  bool read_only = false;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<const DlManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    tensor = &managed->tensor;
    read_only = (managed->flags & kDlReadOnly) != 0;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    tensor = &static_cast<const DlManaged*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  } else {
    throw nb::type_error("not a DLPack capsule");
  }
  std::uint64_t elements = 1;
  for (int i = 0; i < tensor->ndim; ++i) elements *= static_cast<std::uint64_t>(tensor->shape[i]);
  bool contiguous = true;
  std::int64_t expected = 1;
  for (int i = tensor->ndim - 1; i >= 0 && tensor->strides != nullptr && elements != 0; --i) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != expected) contiguous = false;
    expected *= tensor->shape[i];
  }
  const std::uint64_t bits = static_cast<std::uint64_t>(tensor->dtype.bits) * tensor->dtype.lanes;
  return nb::make_tuple(reinterpret_cast<std::uintptr_t>(tensor->data) + tensor->byte_offset, (elements * bits + 7) / 8,
                        tensor->device.type, tensor->device.id, contiguous, read_only);
}

// GPU memory seen as a DLPack tensor of bytes; `owner` keeps it alive.
nb::object gpu_array(std::uint64_t address, const std::vector<std::size_t>& shape, int device, nb::object owner) {
  return nb::cast(nb::ndarray<nb::ro, std::uint8_t>(reinterpret_cast<void*>(address), shape.size(), shape.data(), owner,
                                                    nullptr, nb::dtype<std::uint8_t>(), nb::device::cuda::value,
                                                    device));
}

nb::list cuda_devices() {
  int count = 0;
  cuda_check(cuda().DeviceGetCount(&count), "cuDeviceGetCount");
  nb::list devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CUdevice device = 0;
    char name[256] = "";
    char bus[32] = "";
    cuda_check(cuda().DeviceGet(&device, ordinal), "cuDeviceGet");
    cuda_check(cuda().DeviceGetName(name, sizeof name, device), "cuDeviceGetName");
    cuda_check(cuda().DeviceGetPCIBusId(bus, sizeof bus, device), "cuDeviceGetPCIBusId");
    nb::dict entry;
    entry["index"] = ordinal;
    entry["name"] = name;
    entry["pci_bus_id"] = bus;
    devices.append(entry);
  }
  return devices;
}

std::uint64_t gpu_allocate(int device, std::uint64_t nbytes) {
  CudaContextScope scope(device);
  CUdeviceptr pointer = 0;
  cuda_check(cuda().MemAlloc(&pointer, nbytes), "cuMemAlloc");
  return pointer;
}

void gpu_free(int device, std::uint64_t pointer) {
  CudaContextScope scope(device);
  cuda_check(cuda().MemFree(pointer), "cuMemFree");
}

// A plain copy between the host and a GPU, for small things; transfers go through jobs.
void gpu_copy(int device, std::uint64_t gpu, std::uint64_t host, std::uint64_t nbytes, bool to_gpu) {
  CudaContextScope scope(device);
  if (to_gpu) {
    cuda_check(cuda().MemcpyHtoDAsync(gpu, reinterpret_cast<void*>(host), nbytes, nullptr), "cuMemcpyHtoDAsync");
  } else {
    cuda_check(cuda().MemcpyDtoHAsync(reinterpret_cast<void*>(host), gpu, nbytes, nullptr), "cuMemcpyDtoHAsync");
  }
  cuda_check(cuda().StreamSynchronize(nullptr), "cuStreamSynchronize");
}

// Bytes from `pointer` to the end of its allocation.
std::uint64_t gpu_bytes_after(int device, std::uint64_t pointer) {
  CudaContextScope scope(device);
  CUdeviceptr base = 0;
  std::size_t nbytes = 0;
  cuda_check(cuda().MemGetAddressRange(&base, &nbytes, pointer), "cuMemGetAddressRange");
  return base + nbytes - pointer;
}

int cuda_version() {
  int version = 0;
  cuda_check(cuda().DriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

}  // namespace

void bind_memory(nb::module_& module) {
  module.def("inspect_dlpack", &inspect_dlpack, nb::arg("capsule"));
  module.def("gpu_array", &gpu_array, nb::arg("address"), nb::arg("shape"), nb::arg("device"), nb::arg("owner"));
  module.def("cuda_unavailable_reason", &cuda_unavailable_reason, nb::call_guard<WithoutGil>());
  module.def("cuda_devices", &cuda_devices);
  module.def("cuda_version", &cuda_version);
  module.def("cuda_device_of", &cuda_device_of, nb::arg("address"));
  module.def("gpu_allocate", &gpu_allocate, nb::arg("device"), nb::arg("nbytes"), nb::call_guard<WithoutGil>());
  module.def("gpu_free", &gpu_free, nb::arg("device"), nb::arg("address"), nb::call_guard<WithoutGil>());
  module.def("gpu_copy", &gpu_copy, nb::arg("device"), nb::arg("gpu"), nb::arg("host"), nb::arg("nbytes"),
             nb::arg("to_gpu"), nb::call_guard<WithoutGil>());
  module.def("gpu_bytes_after", &gpu_bytes_after, nb::arg("device"), nb::arg("address"));
}

}  // namespace gpunvme
