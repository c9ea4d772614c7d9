// Driver calls in general: counted, checked, made to fail; devices, contexts and error texts.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace gpunvme::fake_cuda {

thread_local int t_current_device = -1;

namespace {

constexpr std::uint64_t kDefaultLimit = std::uint64_t{16} << 30;

struct ErrorText {
  CUresult error;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrorTexts[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

// Naming every function here makes a missing one an error when the library is linked with -z defs, as it should be,
// and an undefined symbol when it is loaded otherwise.
[[gnu::used]] const CudaApi kComplete = {
#define FAKE_CUDA_NAME(symbol, member, parameters) symbol,
    GPUNVME_CUDA_FUNCTIONS(FAKE_CUDA_NAME) GPUNVME_CUDA_OPTIONAL_FUNCTIONS(FAKE_CUDA_NAME)
#undef FAKE_CUDA_NAME
};

// While a kernel runs these wait for it, on a GPU, now or under circumstances: for ever, if the kernel waits for them.
constexpr std::string_view kMayWaitForKernels[] = {
    "cuMemAlloc",        "cuMemFree",           "cuMemHostAlloc",   "cuMemFreeHost",
    "cuMemHostRegister", "cuMemHostUnregister", "cuModuleLoadData", "cuModuleGetFunction",
};
// A kernel that has not ended by then, while such a call waits, waits for it.
constexpr auto kForEver = std::chrono::seconds(20);

// Contexts below a thread's current one.
thread_local std::vector<int> t_below;

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(std::uintptr_t{0xC0DE00} + 0x10 * device); }

// The device of a context that is alive, or -1.
int device_of(CUcontext context) {
  for (int device = 0; device < kMaxDevices; ++device) {
    if (context == context_of(device) && state().devices[device].retained > 0) return device;
  }
  return -1;
}

// CU_DEVICE_ATTRIBUTE_…; as on an H100.
struct Attribute {
  int attribute;
  int value;
};
constexpr Attribute kAttributes[] = {
    {1, 1024},   // MAX_THREADS_PER_BLOCK
    {10, 32},    // WARP_SIZE
    {16, 132},   // MULTIPROCESSOR_COUNT
    {41, 1},     // UNIFIED_ADDRESSING
    {75, 9},     // COMPUTE_CAPABILITY_MAJOR
    {76, 0},     // COMPUTE_CAPABILITY_MINOR
    {91, 1},     // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    {116, 1},    // GPU_DIRECT_RDMA_SUPPORTED
    {118, 100},  // GPU_DIRECT_RDMA_WRITES_ORDERING: for the owner's device
};

const ErrorText* find_error(CUresult error) {
  for (const ErrorText& entry : kErrorTexts) {
    if (entry.error == error) return &entry;
  }
  return nullptr;
}

}  // namespace

State::State() : runs_kernels(std::getenv("GPUNVME_FAKE_CUDA_KERNELS") != nullptr) {
  for (Device& device : devices) device.limit = kDefaultLimit;
}

State& state() {
  static State* const the_state = new State;
  return *the_state;
}

std::string_view without_version(std::string_view function) {
  if (function.ends_with("_v2")) function.remove_suffix(3);
  return function;
}

CUresult take_failure(std::vector<Failure>& failures, std::string_view function) {
  CUresult error = kCudaSuccess;
  for (Failure& failure : failures) {
    if (failure.function == function && --failure.remaining == 0) error = failure.error;
  }
  std::erase_if(failures, [](const Failure& failure) { return failure.remaining == 0; });
  return error;
}

DriverCall::DriverCall(std::string_view function, Needs needs) : error_(kCudaSuccess) {
  // Before the lock: in a forked child another thread may have held it.
  const int owner = state().initialised_in.load(std::memory_order_relaxed);
  if (owner != 0 && owner != getpid()) {
    error_ = needs == kNothing ? kCudaSuccess : kCudaNotInitialized;
    return;
  }
  lock_ = std::unique_lock(state().mutex);
  error_ = check(without_version(function), needs);
}

CUresult DriverCall::check(std::string_view function, Needs needs) {
  State& s = state();
  const auto count = s.calls.find(function);
  if (count == s.calls.end()) {
    s.calls.emplace(function, 1);
  } else {
    ++count->second;
  }
  if (const CUresult injected = take_failure(s.call_failures, function)) return injected;
  if (needs != kNothing && s.initialised_in.load(std::memory_order_relaxed) == 0) return kCudaNotInitialized;
  if (needs == kContext && t_current_device < 0) return kInvalidContext;
  if (needs == kContext) require_no_kernel(function);
  return kCudaSuccess;
}

void DriverCall::require_no_kernel(std::string_view function) {
  Device& device = state().devices[t_current_device];
  if (device.kernels == 0 || std::ranges::find(kMayWaitForKernels, function) == std::end(kMayWaitForKernels)) return;
  const auto none = [&] { return device.kernels == 0; };
  if (state().waits_for_kernels && state().changed.wait_for(lock_, kForEver, none)) return;
  std::fprintf(stderr, "fake libcuda: %.*s is called while a kernel runs, for which it may wait for ever\n",
               static_cast<int>(function.size()), function.data());
  std::abort();
}

}  // namespace gpunvme::fake_cuda

namespace gpunvme {

using namespace fake_cuda;

extern "C" {

CUresult cuInit(unsigned flags) {
  State& s = state();
  const int owner = s.initialised_in.load(std::memory_order_relaxed);
  if (owner != 0 && owner != getpid()) return kCudaNotInitialized;
  DriverCall call("cuInit", DriverCall::kNothing);
  if (call.error()) return call.error();
  if (flags != 0) return kInvalidValue;
  if (s.device_count == 0) return kNoDevice;
  s.initialised_in.store(getpid(), std::memory_order_relaxed);
  return kCudaSuccess;
}

CUresult cuDriverGetVersion(int* version) {
  DriverCall call("cuDriverGetVersion", DriverCall::kNothing);
  if (call.error()) return call.error();
  if (version == nullptr) return kInvalidValue;
  *version = 12080;
  return kCudaSuccess;
}

CUresult cuDeviceGetCount(int* count) {
  DriverCall call("cuDeviceGetCount", DriverCall::kInit);
  if (call.error()) return call.error();
  if (count == nullptr) return kInvalidValue;
  *count = state().device_count;
  return kCudaSuccess;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  DriverCall call("cuDeviceGet", DriverCall::kInit);
  if (call.error()) return call.error();
  if (device == nullptr) return kInvalidValue;
  if (ordinal < 0 || ordinal >= state().device_count) return kInvalidDevice;
  *device = ordinal;
  return kCudaSuccess;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  DriverCall call("cuDeviceGetName", DriverCall::kInit);
  if (call.error()) return call.error();
  if (name == nullptr || length <= 0) return kInvalidValue;
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  std::snprintf(name, static_cast<std::size_t>(length), "Fake GPU %d", device);
  return kCudaSuccess;
}

CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  DriverCall call("cuDeviceGetPCIBusId", DriverCall::kInit);
  if (call.error()) return call.error();
  if (id == nullptr || length < 13) return kInvalidValue;
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  std::snprintf(id, static_cast<std::size_t>(length), "FA4E:%02X:00.0", device + 1);
  return kCudaSuccess;
}

CUresult cuDeviceGetUuid(unsigned char* uuid, CUdevice device) {
  DriverCall call("cuDeviceGetUuid", DriverCall::kInit);
  if (call.error()) return call.error();
  if (uuid == nullptr) return kInvalidValue;
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  for (int i = 0; i < 16; ++i) uuid[i] = static_cast<unsigned char>(0xA0 + 16 * device + i);
  return kCudaSuccess;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  DriverCall call("cuDevicePrimaryCtxRetain", DriverCall::kInit);
  if (call.error()) return call.error();
  if (context == nullptr) return kInvalidValue;
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  ++state().devices[device].retained;
  *context = context_of(device);
  return kCudaSuccess;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  DriverCall call("cuCtxSetCurrent", DriverCall::kInit);
  if (call.error()) return call.error();
  if (context == nullptr) {
    t_current_device = -1;
    return kCudaSuccess;
  }
  const int device = device_of(context);
  if (device < 0) return kInvalidContext;
  t_current_device = device;
  return kCudaSuccess;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  DriverCall call("cuCtxGetCurrent", DriverCall::kInit);
  if (call.error()) return call.error();
  if (context == nullptr) return kInvalidValue;
  *context = t_current_device < 0 ? nullptr : context_of(t_current_device);
  return kCudaSuccess;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  DriverCall call("cuDevicePrimaryCtxRelease_v2", DriverCall::kInit);
  if (call.error()) return call.error();
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  if (state().devices[device].retained == 0) return kInvalidContext;
  --state().devices[device].retained;
  return kCudaSuccess;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  DriverCall call("cuCtxPushCurrent_v2", DriverCall::kInit);
  if (call.error()) return call.error();
  const int device = device_of(context);
  if (device < 0) return kInvalidContext;
  t_below.push_back(t_current_device);
  t_current_device = device;
  return kCudaSuccess;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  DriverCall call("cuCtxPopCurrent_v2", DriverCall::kInit);
  if (call.error()) return call.error();
  if (t_current_device < 0) return kInvalidContext;
  if (context != nullptr) *context = context_of(t_current_device);
  t_current_device = t_below.empty() ? -1 : t_below.back();
  if (!t_below.empty()) t_below.pop_back();
  return kCudaSuccess;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  DriverCall call("cuDeviceGetAttribute", DriverCall::kInit);
  if (call.error()) return call.error();
  if (value == nullptr) return kInvalidValue;
  if (device < 0 || device >= state().device_count) return kInvalidDevice;
  for (const Attribute& each : kAttributes) {
    if (each.attribute != attribute) continue;
    *value = each.value;
    return kCudaSuccess;
  }
  return kInvalidValue;
}

// The two below have no state and work in a forked child, as the driver's do; they are not counted.
CUresult cuGetErrorName(CUresult error, const char** name) {
  if (name == nullptr) return kInvalidValue;
  const ErrorText* const entry = find_error(error);
  *name = entry != nullptr ? entry->name : nullptr;
  return entry != nullptr ? kCudaSuccess : kInvalidValue;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  if (text == nullptr) return kInvalidValue;
  const ErrorText* const entry = find_error(error);
  *text = entry != nullptr ? entry->text : nullptr;
  return entry != nullptr ? kCudaSuccess : kInvalidValue;
}

}  // extern "C"

}  // namespace gpunvme
