// Streams and events: a queue and a thread for each stream, markers for everything that can be waited for.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "state.h"

namespace gpunvme::fake_cuda {

namespace {

bool may_start(const Operation& operation) {
  return !state().held && std::ranges::all_of(operation.after, [](const MarkerPtr& marker) { return marker->passed; });
}

std::chrono::microseconds duration_of(const Operation& operation, Stream& stream) {
  std::uint64_t us = operation.delay_us;
  if (operation.is_copy) {
    const CopyTime& time = state().copy_time;
    us += time.delay_us;
    if (time.jitter_us > 0) us += std::uniform_int_distribution<std::uint64_t>(0, time.jitter_us)(stream.random);
    if (time.bytes_per_second > 0) us += operation.copy_nbytes * 1'000'000 / time.bytes_per_second;
  }
  return std::chrono::microseconds(us);
}

// Runs the operation at the front, which may start. Leaves and re-takes the lock.
void execute(Stream& stream, std::unique_lock<std::mutex>& lock) {
  State& s = state();
  Operation& operation = stream.queue.front();  // stays where it is while others are pushed behind it
  tell_after(&operation.done->enqueued_edge);
  tell_after(&s.release_edge);
  for (const MarkerPtr& marker : operation.after) tell_after(&marker->passed_edge);

  Device& device = s.devices[stream.device];
  if (const auto duration = duration_of(operation, stream); duration.count() > 0 && device.error == kCudaSuccess) {
    lock.unlock();
    std::this_thread::sleep_for(duration);
    lock.lock();
  }
  if (device.error == kCudaSuccess && operation.failure != kCudaSuccess) device.error = operation.failure;
  if (device.error == kCudaSuccess && operation.work) {
    lock.unlock();
    {
      Shown shown;
      operation.work();
    }
    lock.lock();
  }
  if (device.error == kCudaSuccess && operation.kernel) {
    ++device.kernels;
    lock.unlock();
    int error = kCudaSuccess;
    {
      Shown shown;
      error = operation.kernel();
    }
    lock.lock();
    --device.kernels;
    if (device.error == kCudaSuccess) device.error = error;
  }
  tell_before(&operation.done->passed_edge);
  operation.done->passed = true;
  stream.queue.pop_front();
  s.changed.notify_all();
}

void run(StreamPtr given) {
  Hidden hidden;
  const StreamPtr stream = std::move(given);  // released while hidden
  State& s = state();
  std::unique_lock lock(s.mutex);
  for (;;) {
    s.changed.wait(lock, [&] { return stream->queue.empty() ? stream->destroyed : may_start(stream->queue.front()); });
    if (stream->queue.empty()) break;
    execute(*stream, lock);
  }
  s.streams.erase(stream->id);
}

StreamPtr start_stream(int device, bool blocking, bool is_legacy, bool is_implicit) {
  State& s = state();
  const std::uint64_t id = s.next_handle += 0x10;
  auto stream = std::make_shared<Stream>(
      Stream{.id = id, .device = device, .blocking = blocking, .is_legacy = is_legacy, .is_implicit = is_implicit});
  seed_jitter(*stream);
  s.streams.emplace(id, stream);
  // Shown: that a thread starts after its creator is a real order, and TSan needs it.
  Shown shown;
  std::thread(run, stream).detach();
  return stream;
}

}  // namespace

StreamPtr find_stream(std::uintptr_t handle, int device) {
  State& s = state();
  if (handle <= 1) {  // CU_STREAM_LEGACY
    StreamPtr& legacy = s.devices[device].legacy;
    if (!legacy) legacy = start_stream(device, false, true, true);
    return legacy;
  }
  if (handle == 2) {  // CU_STREAM_PER_THREAD
    StreamPtr& mine = s.per_thread_streams[{syscall(SYS_gettid), device}];
    if (!mine) mine = start_stream(device, true, false, true);
    return mine;
  }
  const auto found = s.streams.find(handle);
  if (found == s.streams.end() || found->second->destroyed || found->second->is_implicit) return nullptr;
  return found->second;
}

StreamPtr create_stream(int device, unsigned flags) {
  return start_stream(device, (flags & kStreamNonBlocking) == 0, false, false);
}

void seed_jitter(Stream& stream) {
  // Streams differ, and a process that does the same again gets the same.
  stream.random.seed(static_cast<unsigned>(state().copy_time.seed * 2654435761u + stream.id));
}

void destroy_stream(Stream& stream) {
  stream.destroyed = true;
  state().changed.notify_all();
}

MarkerPtr enqueue(Stream& stream, Operation operation) {
  State& s = state();
  operation.done = std::make_shared<Marker>();
  if (stream.is_legacy) {
    for (const auto& [id, other] : s.streams) {
      if (other->device == stream.device && other->blocking && other->last) operation.after.push_back(other->last);
    }
  } else if (stream.blocking) {
    const StreamPtr& legacy = s.devices[stream.device].legacy;
    if (legacy && legacy->last) operation.after.push_back(legacy->last);
  }
  tell_before(&operation.done->enqueued_edge);
  stream.last = operation.done;
  stream.queue.push_back(std::move(operation));
  s.changed.notify_all();
  return stream.last;
}

CUresult wait_passed(std::unique_lock<std::mutex>& lock, MarkerPtr marker, int device) {
  if (marker) {
    state().changed.wait(lock, [&] { return marker->passed; });
    tell_after(&marker->passed_edge);
  }
  // Only now: after a failure the queue is dropped, and when the error is reported nothing runs any more before here.
  return state().devices[device].error;
}

MarkerPtr last_marker(Stream& stream) {
  // The legacy stream's point in time includes the blocking streams: an empty operation collects them.
  return stream.is_legacy ? enqueue(stream, {}) : stream.last;
}

bool in_flight(std::uintptr_t begin, std::size_t nbytes) {
  for (const auto& [id, stream] : state().streams) {
    for (const Operation& operation : stream->queue) {
      for (const Range& range : operation.touches) {
        if (range.overlaps(begin, nbytes)) return true;
      }
    }
  }
  return false;
}

void wait_idle(std::unique_lock<std::mutex>& lock) {
  state().changed.wait(lock, [] {
    return std::ranges::all_of(state().streams, [](const auto& entry) { return entry.second->queue.empty(); });
  });
}

}  // namespace gpunvme::fake_cuda

namespace gpunvme {

using namespace fake_cuda;

namespace {

StreamPtr stream_of(CUstream handle, const DriverCall& call) {
  return find_stream(reinterpret_cast<std::uintptr_t>(handle), call.device());
}

Event* event_of(CUevent handle) {
  const auto found = state().events.find(reinterpret_cast<std::uintptr_t>(handle));
  return found == state().events.end() ? nullptr : &found->second;
}

}  // namespace

extern "C" {

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  DriverCall call("cuStreamCreate", DriverCall::kContext);
  if (call.error()) return call.error();
  if (stream == nullptr || (flags & ~kStreamNonBlocking) != 0) return kInvalidValue;
  if (call.sticky()) return call.sticky();
  *stream = reinterpret_cast<CUstream>(create_stream(call.device(), flags)->id);
  return kCudaSuccess;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  DriverCall call("cuStreamDestroy_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  const StreamPtr found = stream_of(stream, call);
  if (!found || found->is_implicit) return kInvalidHandle;
  destroy_stream(*found);
  return state().devices[found->device].error;
}

CUresult cuStreamSynchronize(CUstream stream) {
  DriverCall call("cuStreamSynchronize", DriverCall::kContext);
  if (call.error()) return call.error();
  const StreamPtr found = stream_of(stream, call);
  if (!found) return kInvalidHandle;
  return wait_passed(call.lock(), last_marker(*found), found->device);
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  DriverCall call("cuStreamWaitEvent", DriverCall::kContext);
  if (call.error()) return call.error();
  const StreamPtr found = stream_of(stream, call);
  const Event* const awaited = event_of(event);
  if (!found || awaited == nullptr) return kInvalidHandle;
  if (flags > 1) return kInvalidValue;
  if (const CUresult error = state().devices[found->device].error) return error;
  if (awaited->marker) enqueue(*found, {.after = {awaited->marker}});
  return kCudaSuccess;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  DriverCall call("cuEventCreate", DriverCall::kContext);
  if (call.error()) return call.error();
  constexpr unsigned kKnown = 1 | kEventDisableTiming;  // CU_EVENT_BLOCKING_SYNC; interprocess events are not modelled
  if (event == nullptr || (flags & ~kKnown) != 0) return kInvalidValue;
  if (call.sticky()) return call.sticky();
  const std::uint64_t id = state().next_handle += 0x10;
  state().events.emplace(id, Event{.device = call.device(), .marker = nullptr});
  *event = reinterpret_cast<CUevent>(id);
  return kCudaSuccess;
}

CUresult cuEventDestroy_v2(CUevent event) {
  DriverCall call("cuEventDestroy_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  const auto found = state().events.find(reinterpret_cast<std::uintptr_t>(event));
  if (found == state().events.end()) return kInvalidHandle;
  const int device = found->second.device;
  state().events.erase(found);  // a pending record or wait keeps the marker
  return state().devices[device].error;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  DriverCall call("cuEventRecord", DriverCall::kContext);
  if (call.error()) return call.error();
  const StreamPtr found = stream_of(stream, call);
  Event* const recorded = event_of(event);
  if (!found || recorded == nullptr || recorded->device != found->device) return kInvalidHandle;
  if (const CUresult error = state().devices[found->device].error) return error;
  recorded->marker = enqueue(*found, {});
  return kCudaSuccess;
}

CUresult cuEventQuery(CUevent event) {
  DriverCall call("cuEventQuery", DriverCall::kContext);
  if (call.error()) return call.error();
  Event* const queried = event_of(event);
  if (queried == nullptr) return kInvalidHandle;
  if (queried->marker && !queried->marker->passed) return kCudaNotReady;
  return wait_passed(call.lock(), queried->marker, queried->device);
}

CUresult cuEventSynchronize(CUevent event) {
  DriverCall call("cuEventSynchronize", DriverCall::kContext);
  if (call.error()) return call.error();
  const Event* const awaited = event_of(event);
  if (awaited == nullptr) return kInvalidHandle;
  // By value: the event may be recorded again or destroyed meanwhile.
  return wait_passed(call.lock(), awaited->marker, awaited->device);
}

}  // extern "C"

}  // namespace gpunvme
