// CUDA C++ as an ordinary compiler takes it, for kernels that run on the emulated GPU. A file of kernels begins with
//
//   #include "simt/cuda.h"
//   SIMT_KERNELS_BEGIN
//   #include "kernels.cu"
//   SIMT_KERNELS_END(SIMT_KERNEL(gather), SIMT_KERNEL(scatter))
//
// and is compiled without optimisation: a call in the source is then one place in the program, which is how lanes that
// are together are told from others. Everything in between is in an unnamed namespace: __shared__ variables of inline
// functions then lie in one section with all others.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

#define GPUNVME_SIMT 1
#define GPUNVME_BEFORE_ACCESS() ::simt::turn()

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("simt_shared")))

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
#define warpSize 32

extern "C" {
__attribute__((weak, visibility("hidden"))) extern std::byte __start_simt_shared[];
__attribute__((weak, visibility("hidden"))) extern std::byte __stop_simt_shared[];
}

namespace simt {

template <auto kernel>
struct Bound;
template <typename... Parameters, void (*kernel)(Parameters...)>
struct Bound<kernel> {
  static std::function<void()> bind(void** parameters) {
    return bind(parameters, std::index_sequence_for<Parameters...>());
  }

 private:
  template <std::size_t... numbers>
  static std::function<void()> bind(void** parameters, std::index_sequence<numbers...>) {
    std::tuple<std::decay_t<Parameters>...> values;
    (std::memcpy(&std::get<numbers>(values), parameters[numbers], sizeof(std::get<numbers>(values))), ...);
    (void)parameters;
    return [values] { std::apply(kernel, values); };
  }
};

// The value of any type that fits, as bits.
template <typename T>
std::uint64_t bits_of(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "as CUDA's warp functions");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T of_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

#define SIMT_KERNELS_BEGIN                                                               \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wunused-function\"") \
      _Pragma("GCC diagnostic ignored \"-Wunknown-pragmas\"") namespace {
#define SIMT_KERNEL(function)                                                \
  ::simt::Kernel {                                                           \
#function, &::simt::Bound < &function> ::bind, __start_simt_shared,      \
        static_cast < std::size_t>(__stop_simt_shared - __start_simt_shared) \
  }
// Ends the kernels, and defines how they are found by name in the library that they are in.
#define SIMT_KERNELS_END(...)                                                                                  \
  }                                                                                                            \
  _Pragma("GCC diagnostic pop") extern "C" SIMT_API const ::simt::Kernel* simt_find_kernel(const char* name) { \
    static const ::simt::Kernel kernels[] = {__VA_ARGS__};                                                     \
    for (const ::simt::Kernel& kernel : kernels) {                                                             \
      if (std::strcmp(kernel.name, name) == 0) return &kernel;                                                 \
    }                                                                                                          \
    return nullptr;                                                                                            \
  }

// --- built-in types

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// --- integer functions

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits)); }

// --- warps

#define SIMT_FRAME __builtin_frame_address(0)

inline unsigned __activemask(simt::Place place = simt::Place::here()) { return simt::active_mask(SIMT_FRAME, place); }
inline void __syncwarp(unsigned mask = 0xffffffff, simt::Place place = simt::Place::here()) {
  simt::meet(simt::Collective::kSync, mask, 0, 0, 32, SIMT_FRAME, place);
}
inline unsigned __ballot_sync(unsigned mask, int yes, simt::Place place = simt::Place::here()) {
  return static_cast<unsigned>(simt::meet(simt::Collective::kBallot, mask, yes != 0, 0, 32, SIMT_FRAME, place));
}
inline int __any_sync(unsigned mask, int yes, simt::Place place = simt::Place::here()) {
  return static_cast<int>(simt::meet(simt::Collective::kAny, mask, yes != 0, 0, 32, SIMT_FRAME, place));
}
inline int __all_sync(unsigned mask, int yes, simt::Place place = simt::Place::here()) {
  return static_cast<int>(simt::meet(simt::Collective::kAll, mask, yes != 0, 0, 32, SIMT_FRAME, place));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, simt::Place place = simt::Place::here()) {
  return static_cast<unsigned>(
      simt::meet(simt::Collective::kMatch, mask, simt::bits_of(value), 0, 32, SIMT_FRAME, place));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Place place = simt::Place::here()) {
  return simt::of_bits<T>(
      simt::meet(simt::Collective::kShuffle, mask, simt::bits_of(value), lane, width, SIMT_FRAME, place));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Place place = simt::Place::here()) {
  return simt::of_bits<T>(simt::meet(simt::Collective::kShuffleUp, mask, simt::bits_of(value), static_cast<int>(by),
                                     width, SIMT_FRAME, place));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Place place = simt::Place::here()) {
  return simt::of_bits<T>(simt::meet(simt::Collective::kShuffleDown, mask, simt::bits_of(value), static_cast<int>(by),
                                     width, SIMT_FRAME, place));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Place place = simt::Place::here()) {
  return simt::of_bits<T>(
      simt::meet(simt::Collective::kShuffleXor, mask, simt::bits_of(value), lanes, width, SIMT_FRAME, place));
}

// --- blocks

inline void __syncthreads(simt::Place place = simt::Place::here()) {
  simt::barrier(simt::Barrier::kPlain, 0, SIMT_FRAME, place);
}
inline int __syncthreads_or(int yes, simt::Place place = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kOr, yes, SIMT_FRAME, place);
}
inline int __syncthreads_and(int yes, simt::Place place = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kAnd, yes, SIMT_FRAME, place);
}
inline int __syncthreads_count(int yes, simt::Place place = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kCount, yes, SIMT_FRAME, place);
}

// --- threads

inline void __nanosleep(unsigned) { simt::sleep(); }
[[noreturn]] inline void __trap() { simt::trap(); }
// Lanes see each other's accesses in one order; the fences are for controllers.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

// --- atomic functions: each returns what was there before

#define SIMT_ATOMIC(function, expression)                                                                 \
  template <typename T>                                                                                   \
  T function(T* at, std::common_type_t<T> value) {                                                        \
    simt::turn();                                                                                         \
    T before = __atomic_load_n(at, __ATOMIC_RELAXED);                                                     \
    while (!__atomic_compare_exchange_n(at, &before, static_cast<T>(expression), false, __ATOMIC_SEQ_CST, \
                                        __ATOMIC_SEQ_CST)) {                                              \
    }                                                                                                     \
    return before;                                                                                        \
  }
SIMT_ATOMIC(atomicAdd, before + value)
SIMT_ATOMIC(atomicSub, before - value)
SIMT_ATOMIC(atomicAnd, before& value)
SIMT_ATOMIC(atomicOr, before | value)
SIMT_ATOMIC(atomicXor, before ^ value)
SIMT_ATOMIC(atomicMin, value < before ? value : before)
SIMT_ATOMIC(atomicMax, before < value ? value : before)
SIMT_ATOMIC(atomicExch, value)
#undef SIMT_ATOMIC

template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> desired) {
  simt::turn();
  __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
