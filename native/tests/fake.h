// The control side of the fake libcuda: the very library that the engine opens.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

#include "cuda_driver.h"
#include "fake_cuda/fake_cuda.h"
#include "files.h"

namespace testing {

class Fake {
 public:
  static const Fake& instance() {
    static const Fake fake;
    return fake;
  }

// clang-format off
#define FAKE_FUNCTIONS(X)                                                                               \
  X(reset) X(set_device_count) X(set_memory_limit) X(set_page_lock_limit) X(set_copy_time) X(fail_call) \
  X(fail_copy) X(hold) X(release) X(wait_idle) X(calls) X(get_counters) X(alloc) X(free)                \
  X(stream_create) X(stream_destroy) X(stream_synchronize) X(peek) X(poke)                              \
  X(launch_fill) X(launch_copy) X(launch_host)
  // clang-format on
#define FAKE_DECLARE(name) decltype(&fake_cuda_##name) name;
  FAKE_FUNCTIONS(FAKE_DECLARE)
#undef FAKE_DECLARE

  FakeCudaCounters counters() const {
    FakeCudaCounters counters;
    get_counters(&counters);
    return counters;
  }

 private:
  Fake() {
    // So that a test program can be run by itself. Before the engine opens anything.
    setenv("GPUNVME_LIBCUDA", GPUNVME_FAKE_LIBCUDA, 0);
    void* library = dlopen(std::getenv("GPUNVME_LIBCUDA"), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
#define FAKE_LOAD(name)                                                        \
  name = reinterpret_cast<decltype(name)>(dlsym(library, "fake_cuda_" #name)); \
  if (name == nullptr) throw std::runtime_error("not the fake libcuda: no fake_cuda_" #name);
    FAKE_FUNCTIONS(FAKE_LOAD)
#undef FAKE_LOAD
#undef FAKE_FUNCTIONS
    gpunvme::cuda();  // cuInit, which the control side expects for memory
  }
};

// Memory of a GPU, of the rest of the program.
class DeviceMemory {
 public:
  DeviceMemory(int device, std::uint64_t nbytes, int byte = 0xa5) : nbytes_(nbytes) {
    gpunvme::cuda_check(Fake::instance().alloc(device, nbytes, &address_), "fake_cuda_alloc");
    const Bytes bytes(nbytes, static_cast<std::uint8_t>(byte));
    put(bytes);
  }
  ~DeviceMemory() { Fake::instance().free(address_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::uint64_t address() const { return address_; }
  void put(const Bytes& bytes) {
    gpunvme::cuda_check(Fake::instance().poke(address_, bytes.data(), bytes.size()), "fake_cuda_poke");
  }
  Bytes bytes() const {
    Bytes bytes(nbytes_);
    gpunvme::cuda_check(Fake::instance().peek(bytes.data(), address_, nbytes_), "fake_cuda_peek");
    return bytes;
  }

 private:
  std::uint64_t nbytes_;
  std::uint64_t address_ = 0;
};

}  // namespace testing
