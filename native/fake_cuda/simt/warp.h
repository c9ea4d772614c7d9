// Lanes, warps and blocks of the emulated GPU. Used by the machine's thread alone.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace simt {

// xorshift64*; another sequence for every seed.
class Random {
 public:
  std::uint32_t next() {
    std::uint64_t x = state_.load(std::memory_order_relaxed);
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    state_.store(x, std::memory_order_relaxed);
    return static_cast<std::uint32_t>(x * 0x2545F4914F6CDD1DULL >> 32);
  }
  std::uint32_t below(std::uint32_t limit) {
    return limit <= 1 ? 0 : static_cast<std::uint32_t>(std::uint64_t{next()} * limit >> 32);
  }
  bool one_in(std::uint32_t n) { return below(n) == 0; }
  void seed(std::uint64_t seed) { state_.store(seed * 0x9E3779B97F4A7C15ULL | 1, std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> state_{0x9E3779B97F4A7C15ULL};
};
Random& random();

// Of a pass over all warps: turns that lanes had, and those that ended with sleep.
unsigned& turns();
unsigned& sleeps();

// The calls that led somewhere: two lanes with the same are at the same instruction. Kernels are compiled without
// optimisation, so that no call is copied or merged.
struct Path {
  static constexpr unsigned kKept = 5;
  std::uint64_t hash = 0;
  std::array<void*, kKept> callers{};  // the nearest ones, for messages
};

class Block;
class Warp;

struct Lane {
  enum class At { kReady, kActiveMask, kCollective, kBarrier, kEnded };

  Fiber fiber;
  Warp* warp = nullptr;
  unsigned number = 0;  // in its warp
  Index index{};        // threadIdx
  At at = At::kReady;
  Path path;
  Place place{};
  // At a collective or barrier.
  Collective what{};
  Barrier barrier{};
  std::uint32_t mask = 0;
  std::uint64_t value = 0;
  int argument = 0;
  int width = 0;
  std::uint64_t result = 0;

  std::string describe() const;
};

class Warp {
 public:
  Warp(Block& block, unsigned first_thread, unsigned lanes);
  // At most so many lanes' turns.
  void run(unsigned most);

  std::uint32_t active_mask(Lane& lane);
  std::uint64_t meet(Lane& lane);
  void ended(Lane& lane);
  void ready(Lane& lane) {
    lane.at = Lane::At::kReady;
    ready_ |= 1u << lane.number;
  }
  // The scheduler's turn, until it is this lane's again.
  void wait(Lane& lane) {
    ready_ &= ~(1u << lane.number);
    lane.fiber.leave();
  }
  Block& block() const { return block_; }
  bool has_ended() const { return exists_ == ended_; }
  std::deque<Lane>& lanes() { return lanes_; }

 private:
  Lane& lane(unsigned number) { return lanes_[number]; }
  void tell_active();
  bool complete(Lane& lane);
  std::uint64_t result_for(const Lane& lane);
  [[noreturn]] void deadlock();

  Block& block_;
  std::deque<Lane> lanes_;
  std::uint32_t exists_;
  std::uint32_t ready_;
  std::uint32_t asking_ = 0;  // at __activemask
  std::uint32_t ended_ = 0;
};

class Block {
 public:
  Block(const Launch& launch, Index index);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Some turns for each warp. Not 0: a lane trapped.
  int run(unsigned most);
  bool ended() const { return live_ == 0; }
  unsigned threads() const { return threads_; }
  Index index() const { return index_; }
  const Launch& launch() const { return launch_; }

  int wait_at_barrier(Lane& lane);
  void lane_ended();
  void trap() { error_ = kTrapped; }
  int error() const { return error_; }

 private:
  void take_shared_memory();
  void open_barrier();

  const Launch& launch_;
  const Index index_;
  unsigned threads_;
  unsigned live_;
  std::deque<Warp> warps_;
  std::vector<Lane*> at_barrier_;
  std::vector<std::byte> shared_;
  int error_ = 0;
};

// Ends the process.
[[noreturn]] void wrong(const std::string& what);

}  // namespace simt
