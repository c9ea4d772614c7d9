// libcuda, loaded on first use: the package imports and works where there is no GPU and no driver.
//
// Only the functions that the engine calls are listed. Types and values are those of the CUDA driver API
// reference (docs.nvidia.com/cuda/cuda-driver-api); they are declared here so that building needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gpunvme {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;

inline constexpr CUresult kCudaSuccess = 0;
inline constexpr CUresult kCudaNotInitialized = 3;
inline constexpr CUresult kCudaNotReady = 600;
inline constexpr CUresult kCudaNotSupported = 801;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostAllocPortable = 1;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr int kPointerMemoryType = 2;     // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
inline constexpr int kPointerDeviceOrdinal = 9;  // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
inline constexpr unsigned kMemoryTypeHost = 1;
inline constexpr unsigned kMemoryTypeDevice = 2;

// CUmemcpyAttributes: one for all copies of a batch. The locations only matter for memory that can move.
struct CopyAttributes {
  int access = 1;  // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
  int from[2] = {};
  int to[2] = {};
  unsigned flags = 0;
};

// The exported name, the member's name, and the parameters of each function.
// Functions of version 2 are the ones that cuda.h maps the plain names to.
// clang-format off
#define GPUNVME_CUDA_FUNCTIONS(X)                                                             \
  X(cuInit, Init, (unsigned flags))                                                           \
  X(cuDriverGetVersion, DriverGetVersion, (int* version))                                     \
  X(cuDeviceGetCount, DeviceGetCount, (int* count))                                           \
  X(cuDeviceGet, DeviceGet, (CUdevice * device, int ordinal))                                 \
  X(cuDeviceGetName, DeviceGetName, (char* name, int length, CUdevice device))                \
  X(cuDeviceGetPCIBusId, DeviceGetPCIBusId, (char* id, int length, CUdevice device))          \
  X(cuDevicePrimaryCtxRetain, DevicePrimaryCtxRetain, (CUcontext * context, CUdevice device)) \
  X(cuCtxSetCurrent, CtxSetCurrent, (CUcontext context))                                      \
  X(cuCtxGetCurrent, CtxGetCurrent, (CUcontext * context))                                    \
  X(cuStreamCreate, StreamCreate, (CUstream * stream, unsigned flags))                        \
  X(cuStreamDestroy_v2, StreamDestroy, (CUstream stream))                                     \
  X(cuStreamSynchronize, StreamSynchronize, (CUstream stream))                                \
  X(cuStreamWaitEvent, StreamWaitEvent, (CUstream stream, CUevent event, unsigned flags))     \
  X(cuEventCreate, EventCreate, (CUevent * event, unsigned flags))                            \
  X(cuEventDestroy_v2, EventDestroy, (CUevent event))                                         \
  X(cuEventRecord, EventRecord, (CUevent event, CUstream stream))                             \
  X(cuEventQuery, EventQuery, (CUevent event))                                                \
  X(cuEventSynchronize, EventSynchronize, (CUevent event))                                    \
  X(cuMemAlloc_v2, MemAlloc, (CUdeviceptr * pointer, std::size_t nbytes))                     \
  X(cuMemFree_v2, MemFree, (CUdeviceptr pointer))                                             \
  X(cuMemHostAlloc, MemHostAlloc, (void** pointer, std::size_t nbytes, unsigned flags))       \
  X(cuMemFreeHost, MemFreeHost, (void* pointer))                                              \
  X(cuMemHostRegister_v2, MemHostRegister, (void* pointer, std::size_t nbytes, unsigned flags)) \
  X(cuMemHostUnregister, MemHostUnregister, (void* pointer))                                  \
  X(cuMemGetAddressRange_v2, MemGetAddressRange, (CUdeviceptr * base, std::size_t* nbytes, CUdeviceptr pointer)) \
  X(cuPointerGetAttribute, PointerGetAttribute, (void* data, int attribute, CUdeviceptr pointer)) \
  X(cuMemcpyHtoDAsync_v2, MemcpyHtoDAsync, (CUdeviceptr to, const void* from, std::size_t nbytes, CUstream stream)) \
  X(cuMemcpyDtoHAsync_v2, MemcpyDtoHAsync, (void* to, CUdeviceptr from, std::size_t nbytes, CUstream stream)) \
  X(cuGetErrorName, GetErrorName, (CUresult error, const char** name))                        \
  X(cuGetErrorString, GetErrorString, (CUresult error, const char** text))

// Null where the driver is too old. CUDA 12.8; the plain name keeps the parameters that it had then.
#define GPUNVME_CUDA_OPTIONAL_FUNCTIONS(X)                                                      \
  X(cuMemcpyBatchAsync, MemcpyBatchAsync, (CUdeviceptr * to, CUdeviceptr* from, std::size_t* nbytes, std::size_t count, \
    CopyAttributes* attributes, std::size_t* first_of_attributes, std::size_t attributes_count, std::size_t* failed, \
    CUstream stream))
// clang-format on

struct CudaApi {
#define GPUNVME_DECLARE(symbol, member, parameters) CUresult(*member) parameters;
  GPUNVME_CUDA_FUNCTIONS(GPUNVME_DECLARE)
  GPUNVME_CUDA_OPTIONAL_FUNCTIONS(GPUNVME_DECLARE)
#undef GPUNVME_DECLARE
};

// The table, initialised (cuInit) on first call. Throws Failure (kCuda) if libcuda is absent, if cuInit fails, or in
// a child process forked after the parent's first use. GPUNVME_LIBCUDA names another library (tests).
const CudaApi& cuda();

// Why CUDA cannot be used, or an empty string. Never throws.
std::string cuda_unavailable_reason();

// "cuMemcpyHtoDAsync: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)"
std::string cuda_error_text(const char* call, CUresult error);

// Throws Failure (kCuda) unless `error` is success.
void cuda_check(CUresult error, const char* call);

// Makes the primary context of `device` current in this thread (retained on the process's first use of the device).
void cuda_make_current(int device);

// The same for a scope of a thread that is not ours: puts the previous context back.
class CudaContextScope {
 public:
  explicit CudaContextScope(int device);
  ~CudaContextScope();
  CudaContextScope(const CudaContextScope&) = delete;
  CudaContextScope& operator=(const CudaContextScope&) = delete;

 private:
  CUcontext previous_ = nullptr;
};

// The device that `pointer` was allocated on, or -1 if it is not device memory.
int cuda_device_of(CUdeviceptr pointer);

// Held across fork(), so that the child never inherits a locked mutex.
void lock_cuda_driver_for_fork();
void unlock_cuda_driver_after_fork();

}  // namespace gpunvme
