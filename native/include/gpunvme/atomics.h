// Atomic accesses to plain memory, the same on host and GPU.
//
// An Atomic<T> is as large as its T and may be laid over any zeroed or written memory: host memory, page-locked memory,
// GPU memory, memory that a controller writes. Order is spelled by the accesses themselves (load_acquire,
// store_release), never by fences, so that ThreadSanitizer sees it. Compiled by nvcc or NVRTC this needs libcu++
// (<cuda/atomic>), which comes with CUDA; other compilers need nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpunvme/target.h"

#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

// A test may put something before every access of the host's: another thread's turn, for instance.
#ifndef GPUNVME_BEFORE_ACCESS
#define GPUNVME_BEFORE_ACCESS()
#endif

namespace gpunvme {

// What threads of different parts of a queue write is this far apart: two cache lines of a CPU, which are fetched in
// pairs, one of a GPU.
inline constexpr std::size_t kApart = 128;

template <typename T>
class alignas(sizeof(T)) Atomic {
 public:
#if defined(__CUDACC__)
  // Every access is for the whole system: the host, other GPUs and the controller look at the same memory.
  GPUNVME_HD T load_relaxed() const { return reference().load(cuda::std::memory_order_relaxed); }
  GPUNVME_HD T load_acquire() const { return reference().load(cuda::std::memory_order_acquire); }
  GPUNVME_HD void store_relaxed(T value) { reference().store(value, cuda::std::memory_order_relaxed); }
  GPUNVME_HD void store_release(T value) { reference().store(value, cuda::std::memory_order_release); }
  // The read-modify-writes are acquire and release.
  GPUNVME_HD T exchange(T value) { return reference().exchange(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_HD T fetch_add(T value) { return reference().fetch_add(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_HD T fetch_sub(T value) { return reference().fetch_sub(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_HD T fetch_and(T value) { return reference().fetch_and(value, cuda::std::memory_order_acq_rel); }
  GPUNVME_HD T fetch_or(T value) { return reference().fetch_or(value, cuda::std::memory_order_acq_rel); }
  // True if the value was `expected` and now is `desired`; otherwise `expected` is what it was.
  GPUNVME_HD bool compare_exchange(T& expected, T desired) {
    return reference().compare_exchange_strong(expected, desired, cuda::std::memory_order_acq_rel,
                                               cuda::std::memory_order_acquire);
  }

 private:
  using Reference = cuda::atomic_ref<T, cuda::thread_scope_system>;
  GPUNVME_HD Reference reference() const { return Reference(const_cast<T&>(value_)); }
#else
  T load_relaxed() const {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_load_n(&value_, __ATOMIC_RELAXED);
  }
  T load_acquire() const {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_load_n(&value_, __ATOMIC_ACQUIRE);
  }
  void store_relaxed(T value) {
    GPUNVME_BEFORE_ACCESS();
    __atomic_store_n(&value_, value, __ATOMIC_RELAXED);
  }
  void store_release(T value) {
    GPUNVME_BEFORE_ACCESS();
    __atomic_store_n(&value_, value, __ATOMIC_RELEASE);
  }
  // The read-modify-writes are acquire and release.
  T exchange(T value) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_exchange_n(&value_, value, __ATOMIC_ACQ_REL);
  }
  T fetch_add(T value) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_fetch_add(&value_, value, __ATOMIC_ACQ_REL);
  }
  T fetch_sub(T value) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_fetch_sub(&value_, value, __ATOMIC_ACQ_REL);
  }
  T fetch_and(T value) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_fetch_and(&value_, value, __ATOMIC_ACQ_REL);
  }
  T fetch_or(T value) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_fetch_or(&value_, value, __ATOMIC_ACQ_REL);
  }
  // True if the value was `expected` and now is `desired`; otherwise `expected` is what it was.
  bool compare_exchange(T& expected, T desired) {
    GPUNVME_BEFORE_ACCESS();
    return __atomic_compare_exchange_n(&value_, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }

 private:
#endif
  T value_;
};

// The number of the lowest bit that is set. `bits` is not 0.
GPUNVME_HD inline std::uint32_t lowest_bit(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return static_cast<std::uint32_t>(__ffs(static_cast<int>(bits)) - 1);
#else
  return static_cast<std::uint32_t>(__builtin_ctz(bits));
#endif
}

}  // namespace gpunvme
