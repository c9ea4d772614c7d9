// Modules of kernels, and their launches on the emulated GPU.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

// In kernels.cpp: those that come with the package.
extern "C" const simt::Kernel* simt_find_kernel(const char* name);

namespace gpunvme {

using namespace fake_cuda;

namespace {

// A shared library of this machine, and not a cubin, which is ELF too.
bool is_library(const void* image) {
  const auto* const header = static_cast<const Elf64_Ehdr*>(image);
  return std::memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 && header->e_type == ET_DYN &&
         (header->e_machine == EM_X86_64 || header->e_machine == EM_AARCH64);
}

// Opens a library that lies in memory. Its last bytes are its section headers, so it is known how long it is.
void* open_library(const void* image) {
  const auto* const header = static_cast<const Elf64_Ehdr*>(image);
  const std::size_t nbytes = header->e_shoff + std::size_t{header->e_shnum} * header->e_shentsize;
  // Never closed: another library must not get its number, by which the loader knows it.
  const int file = memfd_create("kernels", MFD_CLOEXEC);
  if (file < 0 || write(file, image, nbytes) != static_cast<ssize_t>(nbytes)) return nullptr;
  const std::string path = "/proc/self/fd/" + std::to_string(file);
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) std::fprintf(stderr, "fake libcuda: cuModuleLoadData: %s\n", dlerror());
  return library;
}

// Null, too, for a kernel that was loaded in another context.
const simt::Kernel* kernel_of(CUfunction function, int device) {
  const auto found = state().functions.find(reinterpret_cast<std::uintptr_t>(function));
  return found == state().functions.end() || found->second.device != device ? nullptr : found->second.kernel;
}

bool is_size(const simt::Index& size) { return size.x != 0 && size.y != 0 && size.z != 0; }

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  DriverCall call("cuModuleLoadData", DriverCall::kContext);
  if (call.error()) return call.error();
  if (module == nullptr || image == nullptr) return kInvalidValue;
  if (call.sticky()) return call.sticky();
  if (!state().runs_kernels) return kNotSupported;
  Module loaded{&simt_find_kernel, call.device()};
  if (is_library(image)) {
    void* const library = open_library(image);
    void* const find = library == nullptr ? nullptr : dlsym(library, "simt_find_kernel");
    if (find == nullptr) return kInvalidImage;
    loaded.find = reinterpret_cast<const simt::Kernel* (*)(const char*)>(find);
  }
  const std::uint64_t id = state().next_handle += 0x10;
  state().modules.emplace(id, loaded);
  *module = reinterpret_cast<CUmodule>(id);
  return kCudaSuccess;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  DriverCall call("cuModuleGetFunction", DriverCall::kContext);
  if (call.error()) return call.error();
  if (function == nullptr || name == nullptr) return kInvalidValue;
  const auto found = state().modules.find(reinterpret_cast<std::uintptr_t>(module));
  if (found == state().modules.end() || found->second.device != call.device()) return kInvalidHandle;
  const simt::Kernel* const kernel = found->second.find(name);
  if (kernel == nullptr) return kNotFound;
  const std::uint64_t id = state().next_handle += 0x10;
  state().functions.emplace(id, Function{kernel, call.device()});
  *function = reinterpret_cast<CUfunction>(id);
  return call.sticky();
}

CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
  DriverCall call("cuFuncGetAttribute", DriverCall::kContext);
  if (call.error()) return call.error();
  const simt::Kernel* const kernel = kernel_of(function, call.device());
  if (kernel == nullptr) return kInvalidHandle;
  constexpr int kMaxThreads = 0;
  constexpr int kSharedBytes = 1;
  constexpr int kLocalBytes = 3;
  if (value == nullptr || (attribute != kMaxThreads && attribute != kSharedBytes && attribute != kLocalBytes)) {
    return kInvalidValue;
  }
  *value = attribute == kMaxThreads    ? static_cast<int>(simt::kMostThreads)
           : attribute == kSharedBytes ? static_cast<int>(kernel->shared_bytes)
                                       : 0;
  return kCudaSuccess;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters,
                        void** extra) {
  DriverCall call("cuLaunchKernel", DriverCall::kContext);
  if (call.error()) return call.error();
  const simt::Kernel* const kernel = kernel_of(function, call.device());
  const StreamPtr found = find_stream(reinterpret_cast<std::uintptr_t>(stream), call.device());
  if (kernel == nullptr || !found || found->device != call.device()) return kInvalidHandle;
  if (const CUresult error = state().devices[found->device].error) return error;
  simt::Launch launch{.kernel = kernel,
                      .grid = {grid_x, grid_y, grid_z},
                      .block = {block_x, block_y, block_z},
                      .call = {},
                      .context = found->device};
  const bool fits = std::uint64_t{block_x} * block_y * block_z <= simt::kMostThreads;
  if (!is_size(launch.grid) || !is_size(launch.block) || !fits || extra != nullptr) return kInvalidValue;
  if (shared_bytes != 0) return kNotSupported;
  launch.call = kernel->bind(parameters);
  enqueue(*found, {.kernel = [launch = std::move(launch)] { return simt::run(launch); }});
  return kCudaSuccess;
}

CUresult cuCtxSynchronize() {
  DriverCall call("cuCtxSynchronize", DriverCall::kContext);
  if (call.error()) return call.error();
  const int device = call.device();
  std::vector<MarkerPtr> markers;
  for (const auto& [id, stream] : state().streams) {
    if (stream->device == device && stream->last) markers.push_back(stream->last);
  }
  for (const MarkerPtr& marker : markers) wait_passed(call.lock(), marker, device);
  return state().devices[device].error;
}

}  // extern "C"

}  // namespace gpunvme
