// The control side of libcuda_fake.so: a libcuda for tests, loaded through GPUNVME_LIBCUDA.
//
// What it models
//   - Devices with primary contexts, a current context per thread, the driver's error codes.
//   - Streams, each with its own queue and thread: work starts after the call that enqueued it has returned, in order
//     within a stream, in any order between streams. The legacy default stream (handle 0 or 1) is ordered with the
//     blocking streams of its device; handle 2 is the per-thread default stream.
//   - Events: a wait or a synchronisation refers to the last record made before it; re-recording does not move it.
//   - Device memory whose addresses are reserved without access: dereferencing one on the host is a SIGSEGV.
//   - Page-locked memory. A copy from pageable memory is staged before the call returns, a copy into it is waited for.
//   - Sticky errors: once a copy has failed, the device's queued work is dropped and its calls return the error.
//   - Under TSan, only the ordering that CUDA promises: enqueue -> execution, stream order, event and stream
//     synchronisation. The locks of the fake are hidden from TSan, so they cannot hide a race of the caller; with
//     GPUNVME_FAKE_CUDA_SHOW_LOCKS=1 they are shown, which is how the fake itself is checked. Device memory takes part:
//     a transfer that is not ordered with a user's kernel is reported as a race.
//
// Where it is stricter than the driver
//   - It aborts, saying why, when memory is freed or unregistered while a copy that touches it has not finished.
//   - Host memory must lie within one registration or touch none; a registration that is not PORTABLE counts as
//     pageable on other devices; the device memory of a copy must be on the device of its stream, and the other side
//     must be host memory (unified addressing would let it be anything).
//   - Kernels, memory and page-locked memory belong to the context that they were loaded, allocated or registered in: a
//     launch, a fill, a release in another one is an error, INVALID_HANDLE or INVALID_CONTEXT, as is a launch on a
//     stream or a record of an event of another context. Waits, queries and copies may name another one's streams and
//     events, as the CUDA programming guide says ("Multi-Device System").
//   - Every call on streams, events and memory but cuPointerGetAttribute needs a current context. (Driver 580 wants
//     none for those that name a stream, an event or memory. The other errors are those that it gave on an H100.)
//   - Handles are never reused, addresses of device memory hardly ever: a stale one is an error.
//
// With fake_cuda_run_kernels(1), or GPUNVME_FAKE_CUDA_KERNELS in the environment
//   - Device memory can be dereferenced, by everybody: kernels reach it, and the fake sees no host code that does.
//   - Kernels run on an emulated GPU (simt/machine.h), in their stream's order, beside those of other streams. Any
//     image is taken for the module of the package's own kernels, but for a shared library of this machine, which has
//     kernels of its own: simt/cuda.h says how to make one. A kernel that traps leaves a sticky error.
//   - Calls that allocate, free, register or load while a kernel runs abort: on a GPU they may wait for ever. Or they
//     wait, after fake_cuda_wait_for_kernels(1), and abort only when the kernel does not end.
//
// What it does not model: contexts other than primary ones and their release,
// peers, managed memory, stream-ordered allocation, graphs, priorities, timing of events, what can be locked in memory
// apart from a limit in bytes.
//
// All functions may be called from any thread, none in a process forked after cuInit. The functions here count as
// no driver calls, meet no injected error and need neither cuInit nor a context: they stand for the rest of the
// program. Those that return int return a CUresult.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FAKE_CUDA_API __attribute__((visibility("default")))

typedef struct FakeCudaCounters {
  // Since the start or the last fake_cuda_reset().
  uint64_t bytes_to_device;
  uint64_t bytes_to_host;
  uint64_t copies_to_device;
  uint64_t copies_to_host;
  uint64_t pageable_copies;
  // What exists now.
  uint64_t live_allocations;
  uint64_t live_allocated_bytes;
  uint64_t live_host_allocations;
  uint64_t live_host_registrations;
  uint64_t page_locked_bytes;
  uint64_t live_streams;
  uint64_t live_events;
  uint64_t retained_contexts;
  uint64_t pending_operations;  // enqueued and not finished, of all kinds
} FakeCudaCounters;

// Lets everything enqueued finish, then puts every setting back to its default and clears counters and sticky errors.
// What is alive stays alive: the engine keeps its workers' streams and page-locked memory between tests.
FAKE_CUDA_API void fake_cuda_reset(void);

// Default 2, at most 16. With 0 devices cuInit fails with CUDA_ERROR_NO_DEVICE.
FAKE_CUDA_API int fake_cuda_set_device_count(int count);
// How much device memory cuMemAlloc hands out (default 16 GiB), and how much memory can be page-locked (no limit).
FAKE_CUDA_API int fake_cuda_set_memory_limit(int device, uint64_t nbytes);
FAKE_CUDA_API void fake_cuda_set_page_lock_limit(uint64_t nbytes);

// How long a copy takes: delay + up to jitter (random per stream, from the seed) + size / bandwidth (0: no limit).
// The bytes move at the end of that time.
FAKE_CUDA_API void fake_cuda_set_copy_time(uint64_t delay_us, uint64_t jitter_us, uint64_t bytes_per_second,
                                           uint64_t seed);

// The k-th next call (1: the next one) of a driver function returns `error` and does nothing. With or without "_v2".
FAKE_CUDA_API int fake_cuda_fail_call(const char* function, uint64_t k, int error);
// The k-th copy enqueued from now on fails when it is its turn, and its device with it (sticky, until a reset).
FAKE_CUDA_API int fake_cuda_fail_copy(uint64_t k, int error);

// No stream starts anything between hold and release; what has started, finishes.
FAKE_CUDA_API void fake_cuda_hold(void);
FAKE_CUDA_API void fake_cuda_release(void);
// Until nothing is pending.
FAKE_CUDA_API void fake_cuda_wait_idle(void);

// See above. Before the first allocation; a reset puts both back to what the environment says.
FAKE_CUDA_API void fake_cuda_run_kernels(int on);
FAKE_CUDA_API void fake_cuda_wait_for_kernels(int on);
// Whose turn it is on the emulated GPU is chosen by random numbers; these are others from now on.
FAKE_CUDA_API void fake_cuda_seed_kernels(uint64_t seed);

// How often a driver function was called, failures included. With or without "_v2".
FAKE_CUDA_API uint64_t fake_cuda_calls(const char* function);
FAKE_CUDA_API void fake_cuda_get_counters(FakeCudaCounters* counters);

// Device memory and streams that belong to the rest of the program. flags: CU_STREAM_NON_BLOCKING is 1.
FAKE_CUDA_API int fake_cuda_alloc(int device, size_t nbytes, uint64_t* pointer);
FAKE_CUDA_API int fake_cuda_free(uint64_t pointer);
// As if it had been freed, and as much allocated at the same address at once: another CU_POINTER_ATTRIBUTE_BUFFER_ID.
FAKE_CUDA_API int fake_cuda_reallocate(uint64_t pointer);
FAKE_CUDA_API int fake_cuda_stream_create(int device, unsigned flags, void** stream);
FAKE_CUDA_API int fake_cuda_stream_destroy(void* stream);
// Waits as cuStreamSynchronize does. `device` tells whose default stream is meant by handle 0, 1 or 2.
FAKE_CUDA_API int fake_cuda_stream_synchronize(int device, void* stream);

// Copies between host and device at once, past all streams. TSan sees them: an unordered one is a race.
FAKE_CUDA_API int fake_cuda_peek(void* to, uint64_t from, size_t nbytes);
FAKE_CUDA_API int fake_cuda_poke(uint64_t to, const void* from, size_t nbytes);

// A user's kernel, enqueued on a stream: after `delay_us` it fills device memory, copies it within the device, or
// calls a function on the stream's thread (which may block, but must not call the driver).
FAKE_CUDA_API int fake_cuda_launch_fill(int device, void* stream, uint64_t to, int byte, size_t nbytes,
                                        uint64_t delay_us);
FAKE_CUDA_API int fake_cuda_launch_copy(int device, void* stream, uint64_t to, uint64_t from, size_t nbytes,
                                        uint64_t delay_us);
FAKE_CUDA_API int fake_cuda_launch_host(int device, void* stream, void (*function)(void*), void* argument);

#ifdef __cplusplus
}  // extern "C"
#endif
