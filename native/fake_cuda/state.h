// What the fake knows: devices, memory, streams and events, behind one mutex.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../engine/cuda_driver.h"
#include "fake_cuda.h"
#include "sanitizers.h"
#include "simt/machine.h"

// Every driver function the engine loads, declared from the engine's own list: a fake with other parameters does not
// compile, and one that lacks a function does not link (driver.cpp names them all).
namespace gpunvme {
extern "C" {
#define FAKE_CUDA_DECLARE(symbol, member, parameters) FAKE_CUDA_API CUresult symbol parameters;
GPUNVME_CUDA_FUNCTIONS(FAKE_CUDA_DECLARE)
GPUNVME_CUDA_OPTIONAL_FUNCTIONS(FAKE_CUDA_DECLARE)
// What src/gpunvme/gpu/driver.py calls besides; its _PROTOTYPES say the same parameters.
// clang-format off
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
#define FAKE_CUDA_KERNEL_FUNCTIONS(X)                                                           \
  X(cuDeviceGetAttribute, , (int* value, int attribute, CUdevice device))                       \
  X(cuDevicePrimaryCtxRelease_v2, , (CUdevice device))                                          \
  X(cuCtxPushCurrent_v2, , (CUcontext context))                                                 \
  X(cuCtxPopCurrent_v2, , (CUcontext * context))                                                \
  X(cuCtxSynchronize, , ())                                                                     \
  X(cuModuleLoadData, , (CUmodule * module, const void* image))                                 \
  X(cuModuleGetFunction, , (CUfunction * function, CUmodule module, const char* name))          \
  X(cuFuncGetAttribute, , (int* value, int attribute, CUfunction function))                     \
  X(cuLaunchKernel, , (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
    unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra)) \
  X(cuMemsetD8Async, , (CUdeviceptr to, unsigned char byte, std::size_t nbytes, CUstream stream)) \
  X(cuMemHostGetDevicePointer_v2, , (CUdeviceptr * device, void* host, unsigned flags))
// clang-format on
FAKE_CUDA_KERNEL_FUNCTIONS(FAKE_CUDA_DECLARE)
#undef FAKE_CUDA_DECLARE
// And one that only the cufile paths use.
FAKE_CUDA_API CUresult cuDeviceGetUuid(unsigned char* uuid, CUdevice device);
}
}  // namespace gpunvme

#pragma GCC visibility push(hidden)
namespace gpunvme::fake_cuda {

inline constexpr CUresult kInvalidValue = 1;
inline constexpr CUresult kOutOfMemory = 2;
inline constexpr CUresult kNoDevice = 100;
inline constexpr CUresult kInvalidDevice = 101;
inline constexpr CUresult kInvalidContext = 201;
inline constexpr CUresult kInvalidImage = 200;
inline constexpr CUresult kInvalidHandle = 400;
inline constexpr CUresult kNotFound = 500;
inline constexpr CUresult kAlreadyRegistered = 712;
inline constexpr CUresult kNotRegistered = 713;
inline constexpr CUresult kNotSupported = 801;

inline constexpr int kPointerBufferId = 7;    // CU_POINTER_ATTRIBUTE_BUFFER_ID
inline constexpr int kPointerLegacyIpc = 11;  // CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE

inline constexpr int kMaxDevices = 16;

// Fresh memory is filled with this, so that zeros which nobody wrote are not mistaken for data. Allocations above
// kMostFilled stay untouched (zero) and cost nothing until used.
inline constexpr int kFreshByte = 0xA5;
inline constexpr std::size_t kMostFilled = std::size_t{256} << 20;

// A point in a stream: passed when everything enqueued before it is finished.
struct Marker {
  bool passed = false;
  std::uint64_t enqueued_edge = 0;  // tell_before when enqueued, tell_after when executed
  std::uint64_t passed_edge = 0;    // tell_before when passed, tell_after by whoever waits
};
using MarkerPtr = std::shared_ptr<Marker>;

// Memory, host or device, that an operation touches.
struct Range {
  std::uintptr_t begin;
  std::size_t nbytes;
  bool overlaps(std::uintptr_t other, std::size_t other_nbytes) const {
    return begin < other + other_nbytes && other < begin + nbytes;
  }
};

struct Operation {
  std::vector<MarkerPtr> after{};  // in other streams
  std::function<void()> work{};    // runs unlocked on the stream's thread; none for records and waits
  std::function<int()> kernel{};   // the same for a kernel, which may fail
  std::vector<Range> touches{};
  std::uint64_t delay_us = 0;
  CUresult failure = kCudaSuccess;  // injected: instead of the work, the device fails
  bool is_copy = false;             // takes copy time, for `copy_nbytes`
  std::size_t copy_nbytes = 0;
  MarkerPtr done{};
};

struct Stream {
  std::uint64_t id;
  int device;
  bool blocking;  // ordered with the legacy default stream
  bool is_legacy;
  bool is_implicit;               // a default stream: not the caller's, not counted
  bool destroyed = false;         // no longer a valid handle; the thread ends when the queue is empty
  std::deque<Operation> queue{};  // the front one may be running
  MarkerPtr last{};
  std::minstd_rand random{};
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  int device;
  MarkerPtr marker;  // of the last record; none if never recorded
};

struct Allocation {
  std::size_t nbytes;
  std::size_t mapped;
  int device;
  std::uint64_t id;   // never used again, unlike the address
  std::byte* shadow;  // where the bytes really are
};

struct HostRange {
  std::size_t nbytes;
  int device;
  bool portable;
  bool allocated;  // by cuMemHostAlloc, otherwise registered
};

struct Device {
  int retained = 0;
  CUresult error = kCudaSuccess;  // sticky
  std::uint64_t limit;
  std::uint64_t used = 0;
  unsigned kernels = 0;  // that run now
  StreamPtr legacy;
};

// A library with kernels for the emulated GPU.
struct Module {
  const simt::Kernel* (*find)(const char* name);
  int device;
};

struct Function {
  const simt::Kernel* kernel;
  int device;
};

// The k-th next thing fails.
struct Failure {
  std::string function;  // empty for copies
  std::uint64_t remaining;
  CUresult error;
};

struct CopyTime {
  std::uint64_t delay_us = 0;
  std::uint64_t jitter_us = 0;
  std::uint64_t bytes_per_second = 0;
  std::uint64_t seed = 1;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;     // anything: an operation finished or was enqueued, release, destroy
  std::atomic<int> initialised_in{0};  // the pid of the process that called cuInit; read without the mutex

  int device_count = 2;
  std::array<Device, kMaxDevices> devices;
  std::map<std::uint64_t, StreamPtr> streams;  // also those destroyed that still have work
  std::map<std::uint64_t, Event> events;
  std::map<std::pair<long, int>, StreamPtr> per_thread_streams;  // (thread, device)
  std::uint64_t next_handle = 0x5ea000;

  std::map<std::uintptr_t, Allocation> allocations;
  std::deque<Range> retired;  // reserved addresses of freed device memory, kept from being handed out again
  std::uint64_t retired_nbytes = 0;
  std::uint64_t next_buffer_id = 1;
  std::map<std::uintptr_t, HostRange> host_ranges;
  std::uint64_t page_locked = 0;
  std::uint64_t page_lock_limit = UINT64_MAX;

  bool runs_kernels = false;       // device memory is then where its address says
  bool waits_for_kernels = false;  // calls that a running kernel keeps waiting; otherwise they abort
  std::map<std::uint64_t, Module> modules;
  std::map<std::uint64_t, Function> functions;

  CopyTime copy_time;
  bool held = false;
  std::uint64_t release_edge = 0;
  std::vector<Failure> call_failures;
  std::vector<Failure> copy_failures;
  std::map<std::string, std::uint64_t, std::less<>> calls;  // by name without "_v2"
  FakeCudaCounters sums{};                                  // only the fields that are sums

  State();
};

// Never destroyed: streams' threads run until the process ends.
State& state();

// The device whose primary context is current in this thread, or -1.
extern thread_local int t_current_device;

// One driver call: hides it from TSan, takes the lock, counts, applies injected errors and checks what is needed.
class DriverCall {
 public:
  enum Needs { kNothing, kInit, kContext };
  DriverCall(std::string_view function, Needs needs);
  CUresult error() const { return error_; }
  int device() const { return t_current_device; }
  CUresult sticky() const { return state().devices[t_current_device].error; }
  std::unique_lock<std::mutex>& lock() { return lock_; }

 private:
  CUresult check(std::string_view function, Needs needs);
  void require_no_kernel(std::string_view function);
  Hidden hidden_;  // first: outlives the lock
  std::unique_lock<std::mutex> lock_;
  CUresult error_;
};

// One call of the control side.
class ControlCall {
 public:
  ControlCall() : lock_(state().mutex) {}
  std::unique_lock<std::mutex>& lock() { return lock_; }

 private:
  Hidden hidden_;
  std::unique_lock<std::mutex> lock_;
};

std::string_view without_version(std::string_view function);

// Counts one down; the error of the failure that has its turn, if any.
CUresult take_failure(std::vector<Failure>& failures, std::string_view function);

// All below are called with the lock held.

// streams.cpp
StreamPtr find_stream(std::uintptr_t handle, int device);  // null: no such stream; `device` for default streams
StreamPtr create_stream(int device, unsigned flags);
void seed_jitter(Stream& stream);
void destroy_stream(Stream& stream);
MarkerPtr enqueue(Stream& stream, Operation operation);
CUresult wait_passed(std::unique_lock<std::mutex>& lock, MarkerPtr marker, int device);
MarkerPtr last_marker(Stream& stream);
bool in_flight(std::uintptr_t begin, std::size_t nbytes);
void wait_idle(std::unique_lock<std::mutex>& lock);

// memory.cpp
enum class HostKind { kPageLocked, kPageable, kInvalid };
HostKind host_kind(std::uintptr_t begin, std::size_t nbytes, int device);
const std::pair<const std::uintptr_t, Allocation>* find_allocation(std::uintptr_t begin, std::size_t nbytes);
// The bytes behind device addresses that lie within one allocation of the device (-1: any), or null.
std::byte* shadow_of(std::uintptr_t begin, std::size_t nbytes, int device);
CUresult allocate(int device, std::size_t nbytes, std::uint64_t* pointer);
CUresult release_allocation(std::uintptr_t pointer);

}  // namespace gpunvme::fake_cuda
#pragma GCC visibility pop
