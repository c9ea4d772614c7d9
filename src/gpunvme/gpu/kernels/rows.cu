// gather and scatter: many short runs of blocks, packed in memory. Some lanes of each warp have one of them on its way;
// all lanes copy the data of each.
#include "job.cuh"

namespace gpunvme {

struct RowsJob : Job {
  const std::int64_t* lbas;  // where each row begins
  std::uint64_t rows;
  std::uint64_t row_blocks;
  std::uint64_t row_pieces;
  std::uint64_t width;  // lanes of a warp that have commands; all copy
  std::uint64_t batch;  // as for warp_move
};

__device__ void move_rows(const RowsJob& job, std::uint32_t opcode) {
  const std::uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const std::uint32_t lane = threadIdx.x % 32;
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x / 32 * job.width;
  const GpuQueue queue = job.queues[warp % job.queue_count];
  const std::uint64_t count_of_pieces = job.rows * job.row_pieces;
  const std::uint64_t block_bytes = queue.block_bytes;
  std::uint64_t at = lane < job.width ? warp * job.width + lane : count_of_pieces;
  std::uint64_t now = 0;
  std::uint32_t commands = 0;
  std::uint32_t moved = 0;
  bool broken = false;
  const auto next = [&](Piece& piece) {
    for (; at < count_of_pieces && !broken; at += stride) {
      if (job.pieces[at] != kUnsettled) continue;
      if (is_told_to_stop(*job.state)) break;
      const std::uint64_t row = job.row_pieces == 1 ? at : at / job.row_pieces;
      const std::uint64_t first = job.row_pieces == 1 ? 0 : (at - row * job.row_pieces) * job.piece_blocks;
      const std::uint64_t rest = job.row_blocks - first;
      piece = {static_cast<std::uint64_t>(job.lbas[row]) + first,
               job.memory + (row * job.row_blocks + first) * block_bytes,
               static_cast<std::uint32_t>(rest < job.piece_blocks ? rest : job.piece_blocks)};
      now = at;
      at += stride;
      return true;
    }
    return false;
  };
  const auto ended = [&](const Piece& piece, const Outcome& outcome) {
    if (outcome.fate == Fate::kDone) {
      ++commands;
      job.pieces[now] = outcome.status == 0 ? kMoved : kFailed;
      if (outcome.status == 0) ++moved;
    }
    // A queue that was stopped, or has no slot left, takes nothing more.
    if (outcome.fate == Fate::kStopped || outcome.fate == Fate::kFull) broken = true;
    if (!outcome.ok()) report(job, now, piece.lba, piece.blocks, queue, outcome);
  };
  warp_move(queue, opcode, static_cast<std::uint32_t>(job.batch), next, ended);
  count(job, commands, moved);
}

}  // namespace gpunvme

extern "C" __global__ void __launch_bounds__(128) gpunvme_gather(const __grid_constant__ gpunvme::RowsJob job) {
  gpunvme::move_rows(job, gpunvme::kRead);
}

extern "C" __global__ void __launch_bounds__(128) gpunvme_scatter(const __grid_constant__ gpunvme::RowsJob job) {
  gpunvme::move_rows(job, gpunvme::kWrite);
}
