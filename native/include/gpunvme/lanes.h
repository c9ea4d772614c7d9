// The lanes of a warp that are at one place together, and what they tell each other.
//
// A GPU runs 32 threads, the lanes of a warp, side by side; any of them may have taken another way for a while. Code
// that works for a group of lanes asks which ones are here (`Lanes::here`) and goes on with these, be it one or all.
// Compiled for a CPU, a group is one thread: the same code, for ThreadSanitizer to look at.
//
// CUDA C++ Programming Guide: warp vote, match and shuffle functions; independent thread scheduling (sm_70 and later).
#pragma once

#include "gpunvme/atomics.h"

#if !defined(GPUNVME_WARPS)
#include <chrono>
#include <thread>
#endif

namespace gpunvme {

// --- what the target itself knows: special registers (PTX ISA, "Special Registers")

#if defined(__CUDACC__)

// The lanes of this warp whose numbers are lower than this one's.
GPUNVME_DEVICE inline std::uint32_t lanes_before() {
  std::uint32_t before;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(before));
  return before;
}

// Nanoseconds on a clock that all threads share. Its steps may be as long as a microsecond.
GPUNVME_DEVICE inline std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// A clock of this thread's processor, for short times.
GPUNVME_DEVICE inline std::uint64_t cycles() { return static_cast<std::uint64_t>(clock64()); }

// A number that is another one for other threads and other times.
GPUNVME_DEVICE inline std::uint32_t any_number() {
  std::uint32_t clock;
  std::uint32_t multiprocessor;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  return ((clock >> 4) ^ (multiprocessor << 16 | threadIdx.x)) * 0x9e3779b1u >> 8;
}

#elif defined(GPUNVME_SIMT)

inline std::uint32_t lanes_before() { return (1u << simt::lane_number()) - 1; }
inline std::uint64_t now_ns() { return simt::now_ns(); }
inline std::uint64_t cycles() { return now_ns(); }
inline std::uint32_t any_number() { return simt::random_number(); }

#else

inline std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline std::uint64_t cycles() { return now_ns(); }
inline std::uint32_t any_number() { return static_cast<std::uint32_t>(now_ns()) * 0x9e3779b1u >> 8; }

#endif

// Leaves the machine to others for a moment: for who waits for another thread.
GPUNVME_DEVICE inline void pause() {
#if defined(GPUNVME_WARPS)
  __nanosleep(64);
#else
  std::this_thread::yield();
#endif
}

// --- groups

// The number of bits that are set.
GPUNVME_DEVICE inline std::uint32_t count_bits(std::uint32_t bits) {
#if defined(GPUNVME_WARPS)
  return static_cast<std::uint32_t>(__popc(bits));
#else
  return static_cast<std::uint32_t>(__builtin_popcount(bits));
#endif
}

// The number of the set bit that `nth` set ones lie below.
GPUNVME_DEVICE inline std::uint32_t nth_bit(std::uint32_t bits, std::uint32_t nth) {
  for (; nth != 0; --nth) bits &= bits - 1;
  return lowest_bit(bits);
}

// The calling thread, for itself. What is asked of a group answers itself, and costs nothing.
class Alone {
 public:
  GPUNVME_DEVICE static constexpr std::uint32_t count() { return 1; }
  GPUNVME_DEVICE static constexpr std::uint32_t rank() { return 0; }
  GPUNVME_DEVICE static constexpr bool leads() { return true; }
  GPUNVME_DEVICE void meet() const {}
  template <typename T>
  GPUNVME_DEVICE T from(std::uint32_t, T value) const {
    return value;
  }
  template <typename T>
  GPUNVME_DEVICE T leaders(T value) const {
    return value;
  }
  template <typename T>
  GPUNVME_DEVICE T of(std::uint32_t, T value) const {
    return value;
  }
  GPUNVME_DEVICE std::uint32_t vote(bool yes) const { return yes ? 1 : 0; }
  GPUNVME_DEVICE bool any(bool yes) const { return yes; }
  GPUNVME_DEVICE bool all(bool yes) const { return yes; }
  GPUNVME_DEVICE std::uint32_t how_many(bool yes) const { return yes ? 1 : 0; }
  GPUNVME_DEVICE std::uint32_t prefix(bool yes) const { return yes ? 1 : 0; }
  GPUNVME_DEVICE std::uint64_t sum(std::uint64_t value) const { return value; }
  GPUNVME_DEVICE std::uint64_t largest(std::uint64_t value, std::uint32_t) const { return value; }

#if !defined(GPUNVME_WARPS)
  // As Lanes, which are one thread each here.
  static Alone here() { return {}; }
  Alone alike(const void*) const { return {}; }
  Alone alike(std::uint64_t) const { return {}; }
#endif
};

#if !defined(GPUNVME_WARPS)

using Lanes = Alone;
using Warp = Alone;

#else

// Lanes of one warp. `kWhole`: all 32, which the compiler then knows: it need not find out, wherever they tell each
// other something, who else is there.
template <bool kWhole>
class LaneGroup {
 public:
  GPUNVME_DEVICE std::uint32_t count() const { return kWhole ? 32 : count_; }
  // Their ranks are 0 to count() - 1; this thread's.
  GPUNVME_DEVICE std::uint32_t rank() const { return rank_; }
  GPUNVME_DEVICE bool leads() const { return rank_ == 0; }

  // All of them wait for each other; what each wrote before, all see after.
  GPUNVME_DEVICE void meet() const { __syncwarp(mask()); }

  // The value that the lane of this rank has.
  template <typename T>
  GPUNVME_DEVICE T from(std::uint32_t rank, T value) const {
    return __shfl_sync(mask(), value, static_cast<int>(mask() == kAll ? rank : nth_bit(mask(), rank)));
  }
  template <typename T>
  GPUNVME_DEVICE T leaders(T value) const {
    return __shfl_sync(mask(), value, kWhole ? 0 : static_cast<int>(lowest_bit(mask())));
  }

  // The value of the lane that has this bit in a vote().
  template <typename T>
  GPUNVME_DEVICE T of(std::uint32_t bit, T value) const {
    return __shfl_sync(mask(), value, static_cast<int>(bit));
  }

  // A bit for each that says yes: by rank from the lowest on where all 32 are here, otherwise by number of the lane.
  GPUNVME_DEVICE std::uint32_t vote(bool yes) const { return __ballot_sync(mask(), yes); }
  GPUNVME_DEVICE bool any(bool yes) const { return vote(yes) != 0; }
  GPUNVME_DEVICE bool all(bool yes) const { return vote(yes) == mask(); }
  GPUNVME_DEVICE std::uint32_t how_many(bool yes) const { return count_bits(vote(yes)); }
  // How many of them say yes before the first says no.
  GPUNVME_DEVICE std::uint32_t prefix(bool yes) const {
    const std::uint32_t no = mask() & ~vote(yes);
    return no == 0 ? count() : count_bits(mask() & ((no & (~no + 1)) - 1));
  }

  // What the values of all of them add up to; the leader's to use.
  GPUNVME_DEVICE std::uint64_t sum(std::uint64_t value) const {
    std::uint64_t total = value;
    if (mask() == kAll) {
      for (int distance = 16; distance != 0; distance /= 2) total += __shfl_down_sync(kAll, total, distance);
      return total;
    }
    for (std::uint32_t rank = 1; rank < count(); ++rank) {
      // The leader is the lowest lane: it adds the others' to its own.
      const std::uint64_t other = from(rank, value);
      if (leads()) total += other;
    }
    return total;
  }

  // The largest of the values of the first `count` ranks.
  GPUNVME_DEVICE std::uint64_t largest(std::uint64_t value, std::uint32_t count) const {
    std::uint64_t most = leaders(value);
    for (std::uint32_t rank = 1; rank < count; ++rank) {
      const std::uint64_t other = from(rank, value);
      if (other > most) most = other;
    }
    return most;
  }

 protected:
  static constexpr std::uint32_t kAll = 0xffffffff;

  GPUNVME_DEVICE explicit LaneGroup(std::uint32_t mask)
      : mask_(mask), rank_(count_bits(mask & lanes_before())), count_(count_bits(mask)) {}
  GPUNVME_DEVICE std::uint32_t mask() const { return kWhole ? kAll : mask_; }

 private:
  std::uint32_t mask_;
  std::uint32_t rank_;
  std::uint32_t count_;
};

// A whole warp: its 32 lanes are at this place together.
class Warp : public LaneGroup<true> {
 public:
  GPUNVME_DEVICE Warp() : LaneGroup(kAll) {}
};

// Any lanes of a warp.
class Lanes : public LaneGroup<false> {
 public:
  // Those that run together here. Another time it may be others.
  GPUNVME_DEVICE static Lanes here() { return Lanes(__activemask()); }

  // Those of them that say the same.
  GPUNVME_DEVICE Lanes alike(const void* what) const { return alike(reinterpret_cast<std::uint64_t>(what)); }
  GPUNVME_DEVICE Lanes alike(std::uint64_t what) const {
    // Most often all do, and finding groups takes longer.
    if (all(what == leaders(what))) return *this;
    return Lanes(__match_any_sync(mask(), static_cast<unsigned long long>(what)));
  }

 private:
  GPUNVME_DEVICE explicit Lanes(std::uint32_t mask) : LaneGroup(mask) {}
};

#endif  // GPUNVME_WARPS

}  // namespace gpunvme
