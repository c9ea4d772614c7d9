#include "cuda_driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "failure.h"

namespace gpunvme {
namespace {

struct Driver {
  std::mutex mutex;
  bool tried = false;
  pid_t pid = 0;  // the process that called cuInit
  std::string refusal;
  CudaApi api{};
  std::map<int, CUcontext> contexts;
};

// Never destroyed: worker threads may use it while the process exits.
Driver& driver() {
  static Driver* instance = new Driver;
  return *instance;
}

std::string load(CudaApi& api) {
  const char* chosen = std::getenv("GPUNVME_LIBCUDA");
  const char* name = chosen != nullptr ? chosen : "libcuda.so.1";
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string("no CUDA driver: ") + dlerror();
#define GPUNVME_LOAD(symbol, member, parameters)                                \
  api.member = reinterpret_cast<decltype(api.member)>(dlsym(library, #symbol)); \
  if (api.member == nullptr) return std::string("the CUDA driver is too old: it has no " #symbol);
  GPUNVME_CUDA_FUNCTIONS(GPUNVME_LOAD)
#undef GPUNVME_LOAD
#define GPUNVME_LOAD(symbol, member, parameters) \
  api.member = reinterpret_cast<decltype(api.member)>(dlsym(library, #symbol));
  GPUNVME_CUDA_OPTIONAL_FUNCTIONS(GPUNVME_LOAD)
#undef GPUNVME_LOAD
  const CUresult error = api.Init(0);
  if (error == kCudaNotInitialized) return "cuInit refused: this process was forked from one that used CUDA";
  if (error != kCudaSuccess) {
    const char* error_name = nullptr;
    api.GetErrorName(error, &error_name);
    return std::string("cuInit: ") + (error_name != nullptr ? error_name : std::to_string(error).c_str());
  }
  return "";
}

// Expects the mutex to be held.
std::string refusal_locked(Driver& d) {
  if (!d.tried) {
    d.tried = true;
    d.pid = getpid();
    d.refusal = load(d.api);
  }
  if (d.refusal.empty() && d.pid != getpid()) {
    return "CUDA cannot be used in a process forked from one that used it: start the process by 'spawn' or "
           "'forkserver', or read into host memory here";
  }
  return d.refusal;
}

}  // namespace

const CudaApi& cuda() {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  const std::string refusal = refusal_locked(d);
  if (!refusal.empty()) throw cuda_failure(refusal);
  return d.api;
}

std::string cuda_unavailable_reason() {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  std::string refusal = refusal_locked(d);
  if (!refusal.empty()) return refusal;
  int count = 0;
  const CUresult error = d.api.DeviceGetCount(&count);
  if (error != kCudaSuccess) return "cuDeviceGetCount failed with error " + std::to_string(error);
  return count > 0 ? "" : "the CUDA driver sees no GPU";
}

std::string cuda_error_text(const char* call, CUresult error) {
  const CudaApi& api = cuda();
  const char* name = nullptr;
  const char* text = nullptr;
  api.GetErrorName(error, &name);
  api.GetErrorString(error, &text);
  return std::string(call) + ": " + (name != nullptr ? name : std::to_string(error).c_str()) + " (" +
         (text != nullptr ? text : "unknown error") + ")";
}

void cuda_check(CUresult error, const char* call) {
  if (error != kCudaSuccess) throw cuda_failure(cuda_error_text(call, error));
}

void cuda_make_current(int device) {
  const CudaApi& api = cuda();
  Driver& d = driver();
  CUcontext context = nullptr;
  {
    std::lock_guard lock(d.mutex);
    const auto found = d.contexts.find(device);
    if (found != d.contexts.end()) {
      context = found->second;
    }
  }
  if (context == nullptr) {
    // Not under the lock: making a context takes long, and a second retain of the same context is harmless.
    CUdevice handle = 0;
    cuda_check(api.DeviceGet(&handle, device), "cuDeviceGet");
    cuda_check(api.DevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");
    std::lock_guard lock(d.mutex);
    d.contexts[device] = context;
  }
  cuda_check(api.CtxSetCurrent(context), "cuCtxSetCurrent");
}

CudaContextScope::CudaContextScope(int device) {
  cuda_check(cuda().CtxGetCurrent(&previous_), "cuCtxGetCurrent");
  cuda_make_current(device);
}

CudaContextScope::~CudaContextScope() { cuda().CtxSetCurrent(previous_); }

int cuda_device_of(CUdeviceptr pointer) {
  unsigned type = 0;
  if (cuda().PointerGetAttribute(&type, kPointerMemoryType, pointer) != kCudaSuccess) return -1;
  if (type != kMemoryTypeDevice) return -1;
  int ordinal = -1;
  if (cuda().PointerGetAttribute(&ordinal, kPointerDeviceOrdinal, pointer) != kCudaSuccess) return -1;
  return ordinal;
}

void lock_cuda_driver_for_fork() { driver().mutex.lock(); }
void unlock_cuda_driver_after_fork() { driver().mutex.unlock(); }

}  // namespace gpunvme
