// The emulated GPU itself. If it were wrong, kernels would be called right that are not: lanes that cannot be apart
// hide a missing mask, and a collective that takes whoever comes hides lanes that are missing.
#include "check.h"
#include "simt/cuda.h"
// In front, so that kernels may call the macros of CUDA only.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

SIMT_KERNELS_BEGIN

// --- indices

extern "C" __global__ void indices(unsigned* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(&seen[block * blockDim.x * blockDim.y * blockDim.z + thread], 1 + thread % 32 + simt::lane_number());
}

// --- collectives

struct Told {
  unsigned ballot, match, any, all;
  unsigned from, up, down, flipped;
  double half;
};

extern "C" __global__ void collectives(Told* told) {
  const unsigned lane = threadIdx.x;
  const unsigned mask = 0xffffffff;
  Told& mine = told[lane];
  mine.ballot = __ballot_sync(mask, lane % 3 == 0);
  mine.match = __match_any_sync(mask, static_cast<unsigned long long>(lane / 5) << 40);
  mine.any = __any_sync(mask, lane == 31);
  mine.all = __all_sync(mask, lane != 31);
  mine.from = __shfl_sync(mask, lane * 10, (lane + 7) % 32);
  mine.up = __shfl_up_sync(mask, lane, 3);
  mine.down = __shfl_down_sync(mask, lane, 4, 8);
  mine.flipped = __shfl_xor_sync(mask, lane, 5);
  mine.half = __shfl_sync(mask, lane / 2.0, 9);
}

// Two parts of a warp go ways of their own and do not wait for each other.
extern "C" __global__ void parts(unsigned* sums, unsigned rounds) {
  const unsigned lane = threadIdx.x;
  const unsigned even = 0x55555555;
  if (lane % 2 == 0) {
    for (unsigned i = 0; i < rounds; ++i) sums[lane] += __shfl_sync(even, lane, static_cast<int>(2 * i % 32));
  } else {
    sums[lane] = __popc(__ballot_sync(~even, lane > 8));
  }
  __syncwarp();
  sums[lane] += __shfl_sync(0xffffffff, sums[lane], 0);
}

// --- which lanes are together

extern "C" __global__ void together(unsigned* groups, unsigned* wrong) {
  const unsigned lane = threadIdx.x;
  if (lane % 4 == 1) {
    const unsigned mask = __activemask();
    if ((mask & ~0x22222222u) != 0 || (mask & 1u << lane) == 0) atomicAdd(wrong, 1u);
    if (__shfl_sync(mask, mask, __ffs(static_cast<int>(mask)) - 1) != mask) atomicAdd(wrong, 1u);
    groups[lane] = mask;
  } else if (lane % 4 == 2) {
    const unsigned mask = __activemask();
    if ((mask & ~0x44444444u) != 0) atomicAdd(wrong, 1u);
    __syncwarp(mask);
    groups[lane] = mask;
  }
}

// One function, called from two places: lanes in it are not together for that.
__device__ unsigned who_is_here() { return __activemask(); }
extern "C" __global__ void places(unsigned* groups) {
  groups[threadIdx.x] = threadIdx.x < 16 ? who_is_here() : who_is_here();
}

// --- progress

// Lanes of one warp wait for each other without a collective.
extern "C" __global__ void relay(unsigned* turn, unsigned lanes) {
  while (atomicAdd(turn, 0u) % lanes != threadIdx.x) {
  }
  atomicAdd(turn, 1u);
}

// Who spins does not keep the others from __activemask().
extern "C" __global__ void spinning(unsigned* flag, unsigned* mask) {
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0u) == 0) {
    }
  } else {
    *mask = __activemask();
    atomicExch(flag, 1u);
  }
}

extern "C" __global__ void wait_for(unsigned* flag) {
  while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
}
extern "C" __global__ void set(unsigned* flag) { atomicExch(flag, 1u); }

// Load and store apart: of two lanes that come at once one loses.
extern "C" __global__ void racing(unsigned* count) {
  for (int i = 0; i < 10; ++i) {
    const unsigned seen = *count;
    simt::turn();
    *count = seen + 1;
  }
}

// --- blocks

__device__ inline unsigned shared_sum(unsigned value) {
  __shared__ unsigned sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, value);
  __syncthreads();
  const unsigned result = sum;
  __syncthreads();
  return result;
}

extern "C" __global__ void blocks(unsigned* results, unsigned* wrong) {
  __shared__ unsigned fresh;
  if (threadIdx.x == 0 && fresh == 0) atomicAdd(wrong, 1u);  // nobody has zeroed it
  for (unsigned round = 0; round < 3; ++round) {
    const unsigned sum = shared_sum(blockIdx.x + threadIdx.x + round);
    const unsigned n = blockDim.x;
    if (sum != n * (blockIdx.x + round) + n * (n - 1) / 2) atomicAdd(wrong, 1u);
  }
  const int odd = static_cast<int>(threadIdx.x % 2);
  if (__syncthreads_or(threadIdx.x == 5) != 1 || __syncthreads_or(0) != 0) atomicAdd(wrong, 1u);
  if (__syncthreads_and(1) != 1 || __syncthreads_and(odd) != 0) atomicAdd(wrong, 1u);
  if (__syncthreads_count(odd) != static_cast<int>(blockDim.x / 2)) atomicAdd(wrong, 1u);
  if (threadIdx.x == 0) atomicAdd(&results[blockIdx.x], 1u);
}

// Who has ended is not waited for.
extern "C" __global__ void some_end(unsigned* sum) {
  if (threadIdx.x % 2 == 0) return;
  __syncthreads();
  atomicAdd(sum, static_cast<unsigned>(__popc(__ballot_sync(0xffffffff, 1))));
}

extern "C" __global__ void traps(unsigned number) {
  if (threadIdx.x == number) __trap();
  __syncthreads();
}

// --- what must not be

extern "C" __global__ void different_functions(unsigned* out) {
  if (threadIdx.x < 16) {
    *out = __ballot_sync(0xffffffff, 1);
  } else {
    *out = static_cast<unsigned>(__any_sync(0xffffffff, 1));
  }
}
extern "C" __global__ void different_places(unsigned* out) {
  if (threadIdx.x < 16) {
    *out = __ballot_sync(0xffffffff, 1);
  } else {
    *out = __ballot_sync(0xffffffff, 1);
  }
}
extern "C" __global__ void different_masks(unsigned* out) {
  *out = __ballot_sync(threadIdx.x < 16 ? ~0u : 0xfffffffe, 1);
}
extern "C" __global__ void not_itself(unsigned* out) { *out = __ballot_sync(0xfffffffe, 1); }
extern "C" __global__ void absent(unsigned* out) {
  if (threadIdx.x < 8) *out = __shfl_sync(0xffu, threadIdx.x, 8);
}
extern "C" __global__ void missing(unsigned* out) {
  if (threadIdx.x != 3) __syncwarp();
  __syncthreads();
  *out = 1;
}
extern "C" __global__ void two_barriers(unsigned* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  *out = 1;
}

SIMT_KERNELS_END(SIMT_KERNEL(indices), SIMT_KERNEL(collectives), SIMT_KERNEL(parts), SIMT_KERNEL(together),
                 SIMT_KERNEL(places), SIMT_KERNEL(relay), SIMT_KERNEL(spinning), SIMT_KERNEL(wait_for),
                 SIMT_KERNEL(set), SIMT_KERNEL(racing), SIMT_KERNEL(blocks), SIMT_KERNEL(some_end), SIMT_KERNEL(traps),
                 SIMT_KERNEL(different_functions), SIMT_KERNEL(different_places), SIMT_KERNEL(different_masks),
                 SIMT_KERNEL(not_itself), SIMT_KERNEL(absent), SIMT_KERNEL(missing), SIMT_KERNEL(two_barriers))

namespace {

template <typename... Arguments>
[[maybe_unused]] int launch_in(int context, const char* name, simt::Index grid, simt::Index block,
                               Arguments... arguments) {
  const simt::Kernel* const kernel = simt_find_kernel(name);
  CHECK(kernel != nullptr);
  void* parameters[] = {&arguments...};
  return simt::run({kernel, grid, block, kernel->bind(parameters), context});
}

template <typename... Arguments>
[[maybe_unused]] int launch(const char* name, simt::Index grid, simt::Index block, Arguments... arguments) {
  return launch_in(0, name, grid, block, arguments...);
}

// What a kernel of one warp, or two, ends the process with.
[[maybe_unused]] std::string last_words(const char* name, unsigned threads = 32) {
  const int file = memfd_create("words", 0);
  const int status = check::in_child([&] {
    dup2(file, STDERR_FILENO);
    unsigned out = 0;
    launch(name, {1, 1, 1}, {threads, 1, 1}, &out);
  });
  std::string words(static_cast<std::size_t>(lseek(file, 0, SEEK_END)), ' ');
  CHECK_EQ(pread(file, words.data(), words.size(), 0), static_cast<ssize_t>(words.size()));
  close(file);
  CHECK(WIFSIGNALED(status));
  CHECK_EQ(WTERMSIG(status), SIGABRT);
  return words;
}

[[maybe_unused]] bool has(const std::string& words, const char* part) { return words.find(part) != std::string::npos; }

}  // namespace

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)

TEST(the_emulated_gpu) { SKIP("sanitizers do not know the stacks of its lanes"); }

#else

TEST(every_thread_runs_once_and_knows_who_it_is) {
  std::vector<unsigned> seen(2 * 3 * 2 * 5 * 7 * 3);
  CHECK_EQ(launch("indices", {2, 3, 2}, {5, 7, 3}, seen.data()), 0);
  for (std::size_t i = 0; i < seen.size(); ++i) CHECK_EQ(seen[i], 1 + 2 * (i % 105 % 32));
}

TEST(collectives_say_what_cuda_says) {
  for (int round = 0; round < 20; ++round) {
    Told told[32] = {};
    CHECK_EQ(launch("collectives", {1, 1, 1}, {32, 1, 1}, &told[0]), 0);
    for (unsigned lane = 0; lane < 32; ++lane) {
      const Told& mine = told[lane];
      CHECK_EQ(mine.ballot, 0x49249249u);
      const unsigned first = lane / 5 * 5;
      CHECK_EQ(mine.match, (first == 30 ? 3u : 31u) << first);
      CHECK_EQ(mine.any, 1u);
      CHECK_EQ(mine.all, 0u);
      CHECK_EQ(mine.from, (lane + 7) % 32 * 10);
      CHECK_EQ(mine.up, lane < 3 ? lane : lane - 3);
      CHECK_EQ(mine.down, lane % 8 < 4 ? lane + 4 : lane);
      CHECK_EQ(mine.flipped, lane ^ 5);
      CHECK_EQ(mine.half, 4.5);
    }
  }
}

TEST(parts_of_a_warp_go_their_own_ways) {
  for (int round = 0; round < 20; ++round) {
    unsigned sums[32] = {};
    CHECK_EQ(launch("parts", {1, 1, 1}, {32, 1, 1}, &sums[0], 16u), 0);
    CHECK_EQ(sums[2], 2 * 240u);
    CHECK_EQ(sums[1], 12 + 240u);
  }
}

TEST(lanes_at_one_place_are_together_in_whole_or_in_part) {
  bool whole = false;
  bool part = false;
  for (int round = 0; round < 200; ++round) {
    unsigned groups[32] = {};
    unsigned wrong = 0;
    CHECK_EQ(launch("together", {1, 1, 1}, {32, 1, 1}, &groups[0], &wrong), 0);
    CHECK_EQ(wrong, 0u);
    for (unsigned lane = 1; lane < 32; lane += 4) (groups[lane] == 0x22222222u ? whole : part) = true;
  }
  CHECK(whole);
  CHECK(part);
}

TEST(calls_of_one_function_are_different_places) {
  unsigned all = 0;
  for (int round = 0; round < 100; ++round) {
    unsigned groups[32] = {};
    CHECK_EQ(launch("places", {1, 1, 1}, {32, 1, 1}, &groups[0]), 0);
    for (unsigned lane = 0; lane < 32; ++lane) CHECK_EQ(groups[lane] & (lane < 16 ? 0xffff0000u : 0xffffu), 0u);
    all |= groups[0];
  }
  CHECK_EQ(all, 0xffffu);
}

TEST(lanes_may_wait_for_each_other) {
  unsigned turn = 0;
  CHECK_EQ(launch("relay", {1, 1, 1}, {32, 1, 1}, &turn, 32u), 0);
  CHECK_EQ(turn, 32u);
  for (int round = 0; round < 20; ++round) {
    unsigned flag = 0;
    unsigned mask = 0;
    CHECK_EQ(launch("spinning", {1, 1, 1}, {2, 1, 1}, &flag, &mask), 0);
    CHECK_EQ(mask, 2u);
  }
}

TEST(kernels_run_beside_each_other) {
  unsigned flag = 0;
  std::atomic<int> error{-1};
  std::thread waits([&] { error = launch("wait_for", {1, 1, 1}, {64, 1, 1}, &flag); });
  CHECK_EQ(launch("set", {1, 1, 1}, {1, 1, 1}, &flag), 0);
  waits.join();
  CHECK_EQ(error.load(), 0);
}

TEST(turns_come_between_accesses) {
  // Threads that took their turns one after the other would lose nothing.
  unsigned count = 0;
  CHECK_EQ(launch("racing", {2, 1, 1}, {64, 1, 1}, &count), 0);
  CHECK(count >= 10);
  CHECK(count < 1280);
}

TEST(more_blocks_than_there_is_room_for_have_memory_of_their_own) {
  // A barrier of a block of 96 threads; 50 blocks of them are more than are resident.
  std::vector<unsigned> results(50);
  unsigned wrong = 0;
  CHECK_EQ(launch("blocks", {50, 1, 1}, {96, 1, 1}, results.data(), &wrong), 0);
  CHECK_EQ(wrong, 0u);
  CHECK_EQ(std::accumulate(results.begin(), results.end(), 0u), 50u);
}

TEST(who_has_ended_is_not_waited_for) {
  unsigned sum = 0;
  CHECK_EQ(launch("some_end", {1, 1, 1}, {70, 1, 1}, &sum), 0);
  CHECK_EQ(sum, 16 * 16u + 16 * 16 + 3 * 3);
}

TEST(a_trap_ends_the_kernels_of_its_context) {
  unsigned flag = 0;
  unsigned other_flag = 0;
  std::atomic<int> same{-1};
  std::atomic<int> other{-1};
  std::thread waits([&] { same = launch("wait_for", {3, 1, 1}, {64, 1, 1}, &flag); });
  std::thread waits_elsewhere([&] { other = launch_in(1, "wait_for", {1, 1, 1}, {64, 1, 1}, &other_flag); });
  CHECK_EQ(launch("traps", {4, 1, 1}, {64, 1, 1}, 200u), 0);
  // Until the one that waits has been seen, it may come too late to fail.
  while (same.load() == -1) CHECK_EQ(launch("traps", {4, 1, 1}, {64, 1, 1}, 33u), simt::kTrapped);
  waits.join();
  CHECK_EQ(same.load(), simt::kTrapped);
  CHECK_EQ(other.load(), -1);
  CHECK_EQ(launch_in(1, "set", {1, 1, 1}, {1, 1, 1}, &other_flag), 0);
  waits_elsewhere.join();
  CHECK_EQ(other.load(), 0);
}

TEST(lanes_that_name_each_other_must_do_the_same) {
  for (const char* kernel : {"different_functions", "different_places", "different_masks"}) {
    const std::string words = last_words(kernel);
    CHECK(has(words, "lanes that name each other do not do the same"));
    CHECK(has(words, "__ballot_sync(0xffffffff)"));
    CHECK(has(words, "test_simt.cpp:"));
  }
  CHECK(has(last_words("different_functions"), "__any_sync(0xffffffff)"));
  CHECK(has(last_words("different_masks"), "__ballot_sync(0xfffffffe)"));
}

TEST(a_mask_names_the_lane_itself) { CHECK(has(last_words("not_itself"), "whose mask does not name it")); }

TEST(nothing_is_asked_of_lanes_that_are_elsewhere) {
  CHECK(has(last_words("absent"), "asks for the value of lane 8, which does not take part"));
}

TEST(a_warp_in_which_all_wait_says_so) {
  const std::string words = last_words("missing");
  CHECK(has(words, "kernel missing: all lanes of a warp wait for each other"));
  CHECK(has(words, "is at __syncwarp(0xffffffff)"));
  CHECK(has(words, "is at __syncthreads()"));
}

TEST(a_barrier_is_one_place) { CHECK(has(last_words("two_barriers", 64), "threads of a block are at two barriers")); }

TEST(device_functions_are_for_kernels) {
  const int status = check::in_child([] {
    close(STDERR_FILENO);
    (void)__activemask();
  });
  CHECK(WIFSIGNALED(status));
}

#endif
