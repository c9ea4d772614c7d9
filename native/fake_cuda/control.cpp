// The control side: settings, injected errors, counters, and what the rest of a program does with the GPU.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace gpunvme::fake_cuda {

namespace {

bool is_device(int device) { return device >= 0 && device < state().device_count; }

bool is_driver_function(std::string_view function) {
#define FAKE_CUDA_IS(symbol, member, parameters) \
  if (function == without_version(#symbol)) return true;
  GPUNVME_CUDA_FUNCTIONS(FAKE_CUDA_IS)
  GPUNVME_CUDA_OPTIONAL_FUNCTIONS(FAKE_CUDA_IS)
  FAKE_CUDA_KERNEL_FUNCTIONS(FAKE_CUDA_IS)
#undef FAKE_CUDA_IS
  return false;
}

// The stream of a handle, on this device; null otherwise.
StreamPtr stream_on(int device, void* handle) {
  if (!is_device(device)) return nullptr;
  StreamPtr stream = find_stream(reinterpret_cast<std::uintptr_t>(handle), device);
  return stream && stream->device == device ? stream : nullptr;
}

CUresult launch(int device, void* handle, Operation operation) {
  const StreamPtr stream = stream_on(device, handle);
  if (!stream) return kInvalidHandle;
  if (const CUresult error = state().devices[device].error) return error;
  enqueue(*stream, std::move(operation));
  return kCudaSuccess;
}

}  // namespace

}  // namespace gpunvme::fake_cuda

using namespace gpunvme;
using namespace gpunvme::fake_cuda;

extern "C" {

void fake_cuda_reset(void) {
  ControlCall call;
  State& s = state();
  s.copy_time = {};
  if (s.held) tell_before(&s.release_edge);
  s.held = false;
  s.changed.notify_all();
  wait_idle(call.lock());
  const State defaults;
  s.device_count = defaults.device_count;
  for (int i = 0; i < kMaxDevices; ++i) {
    s.devices[i].limit = defaults.devices[i].limit;
    s.devices[i].error = kCudaSuccess;
  }
  s.page_lock_limit = defaults.page_lock_limit;
  s.runs_kernels = defaults.runs_kernels;
  s.waits_for_kernels = defaults.waits_for_kernels;
  s.call_failures.clear();
  s.copy_failures.clear();
  s.calls.clear();
  s.sums = {};
}

int fake_cuda_set_device_count(int count) {
  ControlCall call;
  if (count < 0 || count > kMaxDevices) return kInvalidValue;
  state().device_count = count;
  return kCudaSuccess;
}

int fake_cuda_set_memory_limit(int device, uint64_t nbytes) {
  ControlCall call;
  if (!is_device(device)) return kInvalidDevice;
  state().devices[device].limit = nbytes;
  return kCudaSuccess;
}

void fake_cuda_set_page_lock_limit(uint64_t nbytes) {
  ControlCall call;
  state().page_lock_limit = nbytes;
}

void fake_cuda_set_copy_time(uint64_t delay_us, uint64_t jitter_us, uint64_t bytes_per_second, uint64_t seed) {
  ControlCall call;
  State& s = state();
  s.copy_time = {.delay_us = delay_us, .jitter_us = jitter_us, .bytes_per_second = bytes_per_second, .seed = seed};
  for (const auto& [id, stream] : s.streams) seed_jitter(*stream);
}

int fake_cuda_fail_call(const char* function, uint64_t k, int error) {
  ControlCall call;
  const std::string_view name = without_version(function);
  if (!is_driver_function(name) || k == 0 || error == kCudaSuccess) return kInvalidValue;
  state().call_failures.push_back({.function = std::string(name), .remaining = k, .error = error});
  return kCudaSuccess;
}

int fake_cuda_fail_copy(uint64_t k, int error) {
  ControlCall call;
  if (k == 0 || error == kCudaSuccess) return kInvalidValue;
  state().copy_failures.push_back({.function = "", .remaining = k, .error = error});
  return kCudaSuccess;
}

void fake_cuda_hold(void) {
  ControlCall call;
  state().held = true;
}

void fake_cuda_release(void) {
  ControlCall call;
  // An order that a test makes: what it looked at while everything was held comes before what runs afterwards.
  tell_before(&state().release_edge);
  state().held = false;
  state().changed.notify_all();
}

void fake_cuda_wait_idle(void) {
  ControlCall call;
  wait_idle(call.lock());
}

void fake_cuda_run_kernels(int on) {
  ControlCall call;
  state().runs_kernels = on != 0;
}

void fake_cuda_wait_for_kernels(int on) {
  ControlCall call;
  state().waits_for_kernels = on != 0;
}

void fake_cuda_seed_kernels(uint64_t seed) { simt::seed(seed); }

uint64_t fake_cuda_calls(const char* function) {
  ControlCall call;
  const auto found = state().calls.find(without_version(function));
  return found == state().calls.end() ? 0 : found->second;
}

void fake_cuda_get_counters(FakeCudaCounters* counters) {
  ControlCall call;
  const State& s = state();
  FakeCudaCounters now = s.sums;
  now.live_allocations = s.allocations.size();
  for (const auto& [base, allocation] : s.allocations) now.live_allocated_bytes += allocation.nbytes;
  for (const auto& [base, range] : s.host_ranges) {
    ++(range.allocated ? now.live_host_allocations : now.live_host_registrations);
  }
  now.page_locked_bytes = s.page_locked;
  for (const auto& [id, stream] : s.streams) {
    if (!stream->destroyed && !stream->is_implicit) ++now.live_streams;
    now.pending_operations += stream->queue.size();
  }
  now.live_events = s.events.size();
  for (const Device& device : s.devices) now.retained_contexts += static_cast<uint64_t>(device.retained);
  *counters = now;
}

int fake_cuda_alloc(int device, size_t nbytes, uint64_t* pointer) {
  ControlCall call;
  return is_device(device) ? allocate(device, nbytes, pointer) : kInvalidDevice;
}

int fake_cuda_free(uint64_t pointer) {
  ControlCall call;
  return release_allocation(pointer);
}

int fake_cuda_reallocate(uint64_t pointer) {
  ControlCall call;
  const auto found = state().allocations.find(pointer);
  if (found == state().allocations.end()) return kInvalidValue;
  found->second.id = state().next_buffer_id++;
  return kCudaSuccess;
}

int fake_cuda_stream_create(int device, unsigned flags, void** stream) {
  ControlCall call;
  if (!is_device(device)) return kInvalidDevice;
  *stream = reinterpret_cast<void*>(create_stream(device, flags)->id);
  return kCudaSuccess;
}

int fake_cuda_stream_destroy(void* stream) {
  ControlCall call;
  const auto handle = reinterpret_cast<std::uintptr_t>(stream);
  const StreamPtr found = handle > 2 ? find_stream(handle, 0) : nullptr;
  if (!found) return kInvalidHandle;
  destroy_stream(*found);
  return kCudaSuccess;
}

int fake_cuda_stream_synchronize(int device, void* stream) {
  ControlCall call;
  const StreamPtr found = stream_on(device, stream);
  if (!found) return kInvalidHandle;
  return wait_passed(call.lock(), last_marker(*found), device);
}

int fake_cuda_peek(void* to, uint64_t from, size_t nbytes) {
  ControlCall call;
  const std::byte* const bytes = shadow_of(from, nbytes, -1);
  if (bytes == nullptr) return kInvalidValue;
  Shown shown;
  std::memcpy(to, bytes, nbytes);
  return kCudaSuccess;
}

int fake_cuda_poke(uint64_t to, const void* from, size_t nbytes) {
  ControlCall call;
  std::byte* const bytes = shadow_of(to, nbytes, -1);
  if (bytes == nullptr) return kInvalidValue;
  Shown shown;
  std::memcpy(bytes, from, nbytes);
  return kCudaSuccess;
}

int fake_cuda_launch_fill(int device, void* stream, uint64_t to, int byte, size_t nbytes, uint64_t delay_us) {
  ControlCall call;
  std::byte* const bytes = shadow_of(to, nbytes, device);
  if (bytes == nullptr) return kInvalidValue;
  return launch(device, stream,
                {.work = [=] { std::memset(bytes, byte, nbytes); },
                 .touches = {{.begin = to, .nbytes = nbytes}},
                 .delay_us = delay_us});
}

int fake_cuda_launch_copy(int device, void* stream, uint64_t to, uint64_t from, size_t nbytes, uint64_t delay_us) {
  ControlCall call;
  std::byte* const target = shadow_of(to, nbytes, device);
  const std::byte* const source = shadow_of(from, nbytes, device);
  if (target == nullptr || source == nullptr) return kInvalidValue;
  return launch(device, stream,
                {.work = [=] { std::memmove(target, source, nbytes); },
                 .touches = {{.begin = to, .nbytes = nbytes}, {.begin = from, .nbytes = nbytes}},
                 .delay_us = delay_us});
}

int fake_cuda_launch_host(int device, void* stream, void (*function)(void*), void* argument) {
  ControlCall call;
  return launch(device, stream, {.work = [=] { function(argument); }});
}

}  // extern "C"
