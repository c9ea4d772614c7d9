// A GPU made of fibers: blocks of threads, warps of 32 lanes that go ways of their own, and what they ask of each
// other.
//
// All lanes of all kernels take turns on one thread. Whose turn it is next is chosen by a random number wherever
// independent thread scheduling leaves it open: before accesses to atomics, at every collective, and when the lanes
// that are at one __activemask() are told which of them are together. Wrong use ends the process with a message that
// says where: lanes that a mask names and that do something else, lanes that wait for ever, __syncthreads() at two
// places.
//
// What it does not model: memory order (lanes see each other's accesses in one order), caches, dynamic shared memory,
// the number of registers, textures, more than one GPU's worth of scheduling.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define SIMT_API __attribute__((visibility("default")))

namespace simt {

inline constexpr unsigned kLanes = 32;

struct Index {
  unsigned x, y, z;
};

// --- launching

struct Kernel {
  const char* name;
  // A call of the kernel with a copy of its parameters, each lane makes it once.
  std::function<void()> (*bind)(void** parameters);
  // Variables in shared memory: their values belong to the block whose turn it is.
  std::byte* shared;
  std::size_t shared_bytes;
};

inline constexpr int kTrapped = 719;            // CUDA_ERROR_LAUNCH_FAILED
inline constexpr unsigned kMostThreads = 1024;  // of a block

struct Launch {
  const Kernel* kernel;
  Index grid;
  Index block;
  std::function<void()> call;  // of kernel->bind
  int context;                 // when one kernel fails, all of its context do
};

// Runs a kernel to its end, on the machine's thread beside all other kernels; 0, or why it failed. Any thread.
SIMT_API int run(const Launch& launch);
// Random numbers from now on are others.
SIMT_API void seed(std::uint64_t seed);

// --- what kernels call

// Where in the source.
struct Place {
  const char* file;
  int line;
  const char* function;
  // As a default argument: where the function is called.
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                              const char* function = __builtin_FUNCTION()) {
    return {file, line, function};
  }
};

enum class Collective { kSync, kBallot, kAny, kAll, kMatch, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor };
enum class Barrier { kPlain, kOr, kAnd, kCount };

SIMT_API Index thread_index();
SIMT_API Index block_index();
SIMT_API Index block_size();
SIMT_API Index grid_size();
SIMT_API unsigned lane_number();
SIMT_API std::uint64_t now_ns();
SIMT_API std::uint32_t random_number();
// Maybe another lane's turn.
SIMT_API void turn();
// Another lane's turn.
SIMT_API void sleep();
// Ends the kernel, and all of its context.
[[noreturn]] SIMT_API void trap();

// `frame` is the caller's: the way to it tells one call from another.
SIMT_API std::uint32_t active_mask(void* frame, Place place);
// What this lane gets when all lanes of the mask have come: `value` of the lane that `argument` and `width` say, or
// what all say together.
SIMT_API std::uint64_t meet(Collective what, std::uint32_t mask, std::uint64_t value, int argument, int width,
                            void* frame, Place place);
SIMT_API int barrier(Barrier what, int value, void* frame, Place place);

}  // namespace simt
