// stream: one long run of blocks, or many runs that go to different places. Each block of threads has some large
// buffers of its own and keeps a command in flight for each; when one is done, all its threads copy while the
// controller fills the others.
#include "job.cuh"

namespace gpunvme {

// One buffer, as commands name it.
struct StreamBuffer {
  unsigned char* data;
  std::uint64_t prp1;
  std::uint64_t second;  // its second page
  std::uint64_t list;    // its PRP list: the pages from the second on
};

// One piece: what a command reads, and where it goes.
struct Extent {
  std::uint64_t lba;
  unsigned char* memory;
  std::uint64_t blocks;  // at most Job::piece_blocks
};

struct StreamJob : Job {
  const Extent* extents;        // each piece; null: the pieces of one run, from `lba` to Job::memory
  const StreamBuffer* buffers;  // `stages` for each block of threads
  std::uint64_t stages;         // at most kMostStages
  std::uint64_t count_of_pieces;
  std::uint64_t lba;
  std::uint64_t blocks;
};

inline constexpr std::uint32_t kMostStages = 8;

// A command on its way in a buffer. Known to the first lane of a block alone.
struct Stage {
  Token token;
  std::uint64_t piece;
  std::uint32_t tries;
  bool busy;
};

__device__ Extent extent_of(const StreamJob& job, std::uint64_t piece, std::uint64_t block_bytes) {
  if (job.extents != nullptr) return job.extents[piece];
  const std::uint64_t first = piece * job.piece_blocks;
  const std::uint64_t rest = job.blocks - first;
  return {job.lba + first, job.memory + first * block_bytes, rest < job.piece_blocks ? rest : job.piece_blocks};
}

// Sends the command for a stage's piece. By the first lane. Does not wait for a slot: the other stages hold some.
__device__ Fate send(const GpuQueue& queue, const StreamBuffer& buffer, const Extent& extent, Stage& stage) {
  const auto blocks = static_cast<std::uint32_t>(extent.blocks);
  const std::uint64_t nbytes = std::uint64_t{blocks} * queue.block_bytes;
  const std::uint64_t page = queue.page_bytes;
  const std::uint64_t prp2 = nbytes <= page ? 0 : nbytes <= 2 * page ? buffer.second : buffer.list;
  if (!claim(queue, stage.token)) return WarpQueue(queue.pair).stopped() ? Fate::kStopped : Fate::kFull;
  const Fate fate = submit(queue, stage.token, kRead, extent.lba, blocks, buffer.prp1, prp2);
  stage.busy = fate == Fate::kDone;
  return fate;
}

__device__ void stream(const StreamJob& job) {
  __shared__ Extent extents[kMostStages];  // of the piece of each stage
  __shared__ bool arrived;                 // it is to be copied
  constexpr std::uint64_t kNothing = ~std::uint64_t{0};
  const GpuQueue queue = job.queues[blockIdx.x % job.queue_count];
  const StreamBuffer* const buffers = job.buffers + blockIdx.x * job.stages;
  const std::uint64_t pieces = job.count_of_pieces;
  const auto count_of_stages = static_cast<std::uint32_t>(job.stages);
  const bool first_warp = threadIdx.x < 32;
  const bool first = threadIdx.x == 0;
  Stage stages[kMostStages];  // the first lane's; the others' are never looked at
  std::uint64_t next = blockIdx.x;
  std::uint32_t commands = 0;
  std::uint32_t moved = 0;
  std::uint64_t give_up = now_ns() + queue.timeout_ns;
  bool broken = false;  // a buffer may still be written, or the queue takes nothing

  const auto failed = [&](std::uint32_t number, const Outcome& outcome) {
    const Extent& extent = extents[number];
    report(job, stages[number].piece, extent.lba, static_cast<std::uint32_t>(extent.blocks), queue, outcome);
  };
  const auto fill = [&](std::uint32_t number) {
    Stage& stage = stages[number];
    stage.busy = false;
    stage.piece = kNothing;
    while (!broken && next < pieces && job.pieces[next] != kUnsettled) next += gridDim.x;
    broken = broken || is_told_to_stop(*job.state);
    if (broken || next >= pieces) return;
    stage.piece = next;
    extents[number] = extent_of(job, next, queue.block_bytes);
    stage.tries = 0;
    const Fate fate = send(queue, buffers[number], extents[number], stage);
    if (fate == Fate::kDone) {
      next += gridDim.x;
      give_up = now_ns() + queue.timeout_ns;
      return;
    }
    if (fate == Fate::kStopped || now_ns() > give_up) {
      broken = true;
      failed(number, {fate, 0, 0});
    }
    stage.piece = kNothing;  // later
  };
  // Looks after a stage's command; whether it is over, and in `outcome` how.
  const auto tend = [&](std::uint32_t number, Outcome& outcome) {
    Stage& stage = stages[number];
    if (!poll(queue, stage.token, outcome)) return false;
    stage.busy = false;
    if (outcome.fate != Fate::kDone) return true;
    ++commands;
    finish(queue, stage.token);
    // The same command again, where its status allows it.
    if (!outcome.may_retry() || ++stage.tries == kTries) return true;
    return send(queue, buffers[number], extents[number], stage) != Fate::kDone;
  };

  if (first) {
    for (std::uint32_t number = 0; number < count_of_stages; ++number) fill(number);
  }
  for (std::uint32_t number = 0;; number = number + 1 < count_of_stages ? number + 1 : 0) {
    Stage& stage = stages[number];
    if (first_warp) {
      Outcome outcome{Fate::kDone, 0, 0};
      for (;;) {
        std::uint32_t over = 1;
        if (first && stage.busy) over = tend(number, outcome) ? 1 : 0;
        if (__shfl_sync(0xffffffff, over, 0) != 0) break;
        reap(queue);
        __syncwarp();
      }
      if (first) {
        arrived = stage.piece != kNothing && outcome.ok();
        if (!outcome.ok()) {
          if (outcome.fate == Fate::kDone) {
            job.pieces[stage.piece] = kFailed;
          } else {
            broken = true;
          }
          failed(number, outcome);
        }
      }
    }
    __syncthreads();
    const bool copies = arrived;
    if (copies) {
      const Extent& extent = extents[number];
      detail::copy(extent.memory, buffers[number].data, extent.blocks * queue.block_bytes, threadIdx.x, blockDim.x);
    }
    __syncthreads();  // the buffer was read
    bool any = false;
    if (first) {
      if (copies) {
        job.pieces[stage.piece] = kMoved;
        ++moved;
      }
      fill(number);
      for (std::uint32_t each = 0; each < count_of_stages; ++each) any = any || stages[each].busy;
      if (!any) reap(queue);  // nobody else may be left to do it
      any = any || (!broken && next < pieces);
    }
    if (__syncthreads_or(any) == 0) break;
  }
  if (first_warp) count(job, commands, moved);
}

}  // namespace gpunvme

extern "C" __global__ void __launch_bounds__(256, 2) gpunvme_stream(const __grid_constant__ gpunvme::StreamJob job) {
  gpunvme::stream(job);
}
