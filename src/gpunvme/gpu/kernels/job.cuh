// What the kernels that come with the package share: how they count and report.
#pragma once

#include "gpunvme/device.h"

namespace gpunvme {

// Of one job, in GPU memory; all but `stop` zeroed before each launch.
struct JobState {
  unsigned long long commands;  // answered, well or not
  unsigned long long pieces;    // moved
  unsigned long long failed;    // reported, or more than there was room for
  unsigned long long stop;      // the host wants it to end: nothing more is begun
};

__device__ inline bool is_told_to_stop(const JobState& state) {
  return *const_cast<const volatile unsigned long long*>(&state.stop) != 0;
}

// A command that failed.
struct Record {
  std::uint64_t piece;
  std::uint64_t lba;
  std::uint32_t blocks;
  std::uint32_t fate;
  std::uint16_t status;
  std::uint16_t cid;
  std::uint32_t queue_id;
};

// What becomes of each piece. Pieces that are not settled are moved by the next launch of the job.
inline constexpr unsigned char kUnsettled = 0;
inline constexpr unsigned char kMoved = 1;
inline constexpr unsigned char kFailed = 2;

struct Job {
  const GpuQueue* queues;
  JobState* state;
  Record* records;
  unsigned char* pieces;  // what has become of each
  unsigned char* memory;
  std::uint64_t queue_count;
  std::uint64_t record_room;
  std::uint64_t piece_blocks;  // the last piece of a run may have fewer
};

__device__ inline void report(const Job& job, std::uint64_t piece, std::uint64_t lba, std::uint32_t blocks,
                              const GpuQueue& queue, const Outcome& outcome) {
  const unsigned long long number = atomicAdd(&job.state->failed, 1ull);
  if (number < job.record_room) {
    job.records[number] = {piece,          lba,         blocks,  static_cast<std::uint32_t>(outcome.fate),
                           outcome.status, outcome.cid, queue.id};
  }
}

// Each lane's own numbers, added up once by the warp. All 32 lanes call.
__device__ inline void count(const Job& job, std::uint32_t commands, std::uint32_t pieces) {
  for (int distance = 16; distance != 0; distance /= 2) {
    commands += __shfl_down_sync(0xffffffff, commands, distance);
    pieces += __shfl_down_sync(0xffffffff, pieces, distance);
  }
  if (threadIdx.x % 32 != 0) return;
  atomicAdd(&job.state->commands, static_cast<unsigned long long>(commands));
  atomicAdd(&job.state->pieces, static_cast<unsigned long long>(pieces));
}

}  // namespace gpunvme
