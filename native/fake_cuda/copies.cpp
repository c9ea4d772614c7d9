// Copies between host and device, enqueued on a stream.
#include <cstring>
#include <memory>

#include "state.h"

namespace gpunvme {

using namespace fake_cuda;

namespace {

// What both directions check and know before anything is enqueued.
struct Copy {
  CUresult error = kCudaSuccess;
  StreamPtr stream;
  std::byte* device = nullptr;  // the shadow
  HostKind kind = HostKind::kInvalid;
  Operation operation;
};

Copy plan(const DriverCall& call, std::uintptr_t device, std::uintptr_t host, std::size_t nbytes, CUstream handle) {
  Copy copy;
  copy.stream = find_stream(reinterpret_cast<std::uintptr_t>(handle), call.device());
  if (!copy.stream) {
    copy.error = kInvalidHandle;
    return copy;
  }
  copy.error = state().devices[copy.stream->device].error;
  if (copy.error != kCudaSuccess || nbytes == 0) return copy;
  copy.device = shadow_of(device, nbytes, copy.stream->device);
  copy.kind = host_kind(host, nbytes, copy.stream->device);
  if (copy.device == nullptr || copy.kind == HostKind::kInvalid) {
    copy.error = kInvalidValue;
    return copy;
  }
  copy.operation.touches = {{.begin = device, .nbytes = nbytes}};
  if (copy.kind == HostKind::kPageLocked) {
    copy.operation.touches.push_back({.begin = host, .nbytes = nbytes});
  } else {
    ++state().sums.pageable_copies;
  }
  copy.operation.is_copy = true;
  copy.operation.copy_nbytes = nbytes;
  copy.operation.failure = take_failure(state().copy_failures, "");
  return copy;
}

CUresult copy_to_device(const DriverCall& call, CUdeviceptr to, const void* from, std::size_t nbytes, CUstream stream) {
  Copy copy = plan(call, to, reinterpret_cast<std::uintptr_t>(from), nbytes, stream);
  if (copy.error != kCudaSuccess || nbytes == 0) return copy.error;
  if (copy.kind == HostKind::kPageable) {
    // Staged before this call returns; the staged bytes then travel like any others.
    const std::shared_ptr<std::byte[]> staged(new std::byte[nbytes]);
    {
      Shown shown;
      std::memcpy(staged.get(), from, nbytes);
    }
    copy.operation.work = [=, device = copy.device] { std::memcpy(device, staged.get(), nbytes); };
  } else {
    copy.operation.work = [=, device = copy.device] { std::memcpy(device, from, nbytes); };
  }
  ++state().sums.copies_to_device;
  state().sums.bytes_to_device += nbytes;
  enqueue(*copy.stream, std::move(copy.operation));
  return kCudaSuccess;
}

CUresult copy_to_host(DriverCall& call, void* to, CUdeviceptr from, std::size_t nbytes, CUstream stream) {
  Copy copy = plan(call, from, reinterpret_cast<std::uintptr_t>(to), nbytes, stream);
  if (copy.error != kCudaSuccess || nbytes == 0) return copy.error;
  copy.operation.work = [=, device = copy.device] { std::memcpy(to, device, nbytes); };
  ++state().sums.copies_to_host;
  state().sums.bytes_to_host += nbytes;
  const MarkerPtr done = enqueue(*copy.stream, std::move(copy.operation));
  return copy.kind == HostKind::kPageable ? wait_passed(call.lock(), done, copy.stream->device) : kCudaSuccess;
}

}  // namespace

extern "C" {

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t nbytes, CUstream stream) {
  DriverCall call("cuMemcpyHtoDAsync_v2", DriverCall::kContext);
  return call.error() ? call.error() : copy_to_device(call, to, from, nbytes, stream);
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t nbytes, CUstream stream) {
  DriverCall call("cuMemcpyDtoHAsync_v2", DriverCall::kContext);
  return call.error() ? call.error() : copy_to_host(call, to, from, nbytes, stream);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, std::size_t nbytes, CUstream stream) {
  DriverCall call("cuMemsetD8Async", DriverCall::kContext);
  if (call.error()) return call.error();
  const StreamPtr found = find_stream(reinterpret_cast<std::uintptr_t>(stream), call.device());
  if (!found || found->device != call.device()) return kInvalidHandle;
  if (const CUresult error = state().devices[found->device].error) return error;
  if (nbytes == 0) return kCudaSuccess;
  std::byte* const bytes = shadow_of(to, nbytes, found->device);
  if (bytes == nullptr) return kInvalidValue;
  enqueue(*found, {.work = [=] { std::memset(bytes, byte, nbytes); }, .touches = {{.begin = to, .nbytes = nbytes}}});
  return kCudaSuccess;
}

CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, std::size_t* nbytes, std::size_t count,
                            CopyAttributes* attributes, std::size_t* first_of_attributes, std::size_t attributes_count,
                            std::size_t* failed, CUstream stream) {
  DriverCall call("cuMemcpyBatchAsync", DriverCall::kContext);
  if (call.error()) return call.error();
  const bool one_for_all = attributes_count == 1 && first_of_attributes[0] == 0 && attributes[0].access == 1;
  if (stream == nullptr || count == 0 || !one_for_all) return kInvalidValue;
  for (std::size_t i = 0; i < count; ++i) {
    *failed = i;
    if (nbytes[i] == 0) return kInvalidValue;
    const CUresult error = find_allocation(to[i], nbytes[i]) != nullptr
                               ? copy_to_device(call, to[i], reinterpret_cast<const void*>(from[i]), nbytes[i], stream)
                               : copy_to_host(call, reinterpret_cast<void*>(to[i]), from[i], nbytes[i], stream);
    if (error != kCudaSuccess) return error;
  }
  return kCudaSuccess;
}

}  // extern "C"

}  // namespace gpunvme
