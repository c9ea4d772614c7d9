// Atomic accesses for memory that only threads of one GPU look at while it is used so: order need reach no further.
// Host code has nothing nearer than its memory: there they are those of atomics.h.
#pragma once

#include "gpunvme/atomics.h"

namespace gpunvme {

// Orders everything before it before the accesses called "published" after it, for the threads of one GPU: one fence
// where there would be one for each of them. On the host these accesses are releases themselves, which
// ThreadSanitizer sees.
GPUNVME_DEVICE inline void publish() {
#if defined(__CUDACC__)
  cuda::atomic_thread_fence(cuda::std::memory_order_acq_rel, cuda::thread_scope_device);
#endif
}

#if defined(__CUDACC__)
// Read-modify-writes of T `value` at where(), with and without a result (PTX ISA, "atom" and "red"). They say that the
// memory is global, which libcu++'s cannot: those come with code for shared memory, and are waited for even if nobody
// wants the result.
#define GPUNVME_RED(order, operation)                                                                           \
  do {                                                                                                          \
    if constexpr (sizeof(T) == 8)                                                                               \
      asm volatile("red." order ".gpu.global." operation "64 [%0], %1;" ::"l"(where()), "l"(value) : "memory"); \
    else                                                                                                        \
      asm volatile("red." order ".gpu.global." operation "32 [%0], %1;" ::"l"(where()), "r"(value) : "memory"); \
  } while (false)
#define GPUNVME_ATOM(order, operation)                                       \
  do {                                                                       \
    T before;                                                                \
    if constexpr (sizeof(T) == 8)                                            \
      asm volatile("atom." order ".gpu.global." operation "64 %0, [%1], %2;" \
                   : "=l"(before)                                            \
                   : "l"(where()), "l"(value)                                \
                   : "memory");                                              \
    else                                                                     \
      asm volatile("atom." order ".gpu.global." operation "32 %0, [%1], %2;" \
                   : "=r"(before)                                            \
                   : "l"(where()), "r"(value)                                \
                   : "memory");                                              \
    return before;                                                           \
  } while (false)
#define GPUNVME_CAS(order)                                               \
  do {                                                                   \
    T before;                                                            \
    if constexpr (sizeof(T) == 8)                                        \
      asm volatile("atom." order ".gpu.global.cas.b64 %0, [%1], %2, %3;" \
                   : "=l"(before)                                        \
                   : "l"(where()), "l"(expected), "l"(desired)           \
                   : "memory");                                          \
    else                                                                 \
      asm volatile("atom." order ".gpu.global.cas.b32 %0, [%1], %2, %3;" \
                   : "=r"(before)                                        \
                   : "l"(where()), "r"(expected), "r"(desired)           \
                   : "memory");                                          \
    const bool was_expected = before == expected;                        \
    expected = before;                                                   \
    return was_expected;                                                 \
  } while (false)
#endif

template <typename T>
class Near {
 public:
  GPUNVME_DEVICE explicit Near(Atomic<T>& atomic) : atomic_(atomic) {}
#if defined(__CUDACC__)
  GPUNVME_DEVICE T load_relaxed() const { return reference().load(cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE T load_acquire() const { return reference().load(cuda::std::memory_order_acquire); }
  GPUNVME_DEVICE void store_relaxed(T value) const { reference().store(value, cuda::std::memory_order_relaxed); }
  GPUNVME_DEVICE void store_release(T value) const { reference().store(value, cuda::std::memory_order_release); }
  GPUNVME_DEVICE T exchange_acquire(T value) const { GPUNVME_ATOM("acquire", "exch.b"); }
  GPUNVME_DEVICE T add(T value) const { GPUNVME_ATOM("acq_rel", "add.u"); }
  GPUNVME_DEVICE T add_acquire(T value) const { GPUNVME_ATOM("acquire", "add.u"); }
  GPUNVME_DEVICE void add_release(T value) const { GPUNVME_RED("release", "add.u"); }
  GPUNVME_DEVICE void subtract_release(T value) const { add_release(~value + 1); }
  GPUNVME_DEVICE T subtract(T value) const { return add(~value + 1); }
  GPUNVME_DEVICE T and_acquire(T value) const { GPUNVME_ATOM("acquire", "and.b"); }
  GPUNVME_DEVICE void or_release(T value) const { GPUNVME_RED("release", "or.b"); }
  // True if the value was `expected` and now is `desired`; otherwise `expected` is what it was.
  GPUNVME_DEVICE bool compare_exchange_relaxed(T& expected, T desired) const { GPUNVME_CAS("relaxed"); }
  GPUNVME_DEVICE bool compare_exchange_acquire(T& expected, T desired) const { GPUNVME_CAS("acquire"); }
  GPUNVME_DEVICE void or_relaxed(T value) const { GPUNVME_RED("relaxed", "or.b"); }
  GPUNVME_DEVICE void and_relaxed(T value) const { GPUNVME_RED("relaxed", "and.b"); }
  GPUNVME_DEVICE void add_relaxed(T value) const { GPUNVME_RED("relaxed", "add.u"); }
  // An acquire once a fence follows.
  GPUNVME_DEVICE T load_before_fence() const { return load_relaxed(); }
  // After publish().
  GPUNVME_DEVICE void store_published(T value) const { store_relaxed(value); }
  GPUNVME_DEVICE void raise_published(T value) const { GPUNVME_RED("relaxed", "max.u"); }
  GPUNVME_DEVICE bool compare_exchange_published(T& expected, T desired) const {
    return compare_exchange_relaxed(expected, desired);
  }

 private:
  using Reference = cuda::atomic_ref<T, cuda::thread_scope_device>;
  GPUNVME_DEVICE Reference reference() const { return Reference(reinterpret_cast<T&>(atomic_)); }
  GPUNVME_DEVICE std::size_t where() const { return __cvta_generic_to_global(&atomic_); }
#else
  T load_relaxed() const { return atomic_.load_relaxed(); }
  T load_acquire() const { return atomic_.load_acquire(); }
  void store_relaxed(T value) const { atomic_.store_relaxed(value); }
  void store_release(T value) const { atomic_.store_release(value); }
  T exchange_acquire(T value) const { return atomic_.exchange(value); }
  T add(T value) const { return atomic_.fetch_add(value); }
  T add_acquire(T value) const { return atomic_.fetch_add(value); }
  void add_release(T value) const { atomic_.fetch_add(value); }
  void subtract_release(T value) const { atomic_.fetch_sub(value); }
  T subtract(T value) const { return atomic_.fetch_sub(value); }
  T and_acquire(T value) const { return atomic_.fetch_and(value); }
  T or_release(T value) const { return atomic_.fetch_or(value); }
  bool compare_exchange_relaxed(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }
  bool compare_exchange_acquire(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }
  void or_relaxed(T value) const { atomic_.fetch_or(value); }
  void and_relaxed(T value) const { atomic_.fetch_and(value); }
  void add_relaxed(T value) const { atomic_.fetch_add(value); }
  T load_before_fence() const { return atomic_.load_acquire(); }
  void store_published(T value) const { atomic_.store_release(value); }
  void raise_published(T value) const {
    T seen = atomic_.load_relaxed();
    while (seen < value && !atomic_.compare_exchange(seen, value)) {
    }
  }
  bool compare_exchange_published(T& expected, T desired) const { return atomic_.compare_exchange(expected, desired); }

 private:
#endif
  Atomic<T>& atomic_;
};
template <typename T>
Near(Atomic<T>&) -> Near<T>;

#if defined(__CUDACC__)
#undef GPUNVME_RED
#undef GPUNVME_ATOM
#undef GPUNVME_CAS
#endif

}  // namespace gpunvme
