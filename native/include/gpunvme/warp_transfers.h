// Reads and writes by a warp, or by a block, whose threads share the work; see device.h.
#pragma once

#include "gpunvme/gpu_queue.h"

#if defined(GPUNVME_WARPS)

namespace gpunvme {

// --- one warp: all 32 lanes call, and work is shared between them

// A run of blocks in one command, at most max_blocks, and the memory that it goes to or comes from.
struct Piece {
  std::uint64_t lba;
  unsigned char* memory;
  std::uint32_t blocks;
};

// How many commands a warp sends together, where it can.
inline constexpr std::uint32_t kBatch = 8;

// Moves pieces, one in flight for each lane that has some. New commands are sent when `batch` lanes want to, or nothing
// else is left to wait for: they share a reservation and a doorbell. `next(piece)` says what the calling lane moves
// next, or false if nothing is left for it. `ended(piece, outcome)` hears how each ended, from the lane that moved it.
template <typename Next, typename Ended>
__device__ void warp_move(const GpuQueue& where, std::uint32_t opcode, std::uint32_t batch, const Next& next,
                          const Ended& ended) {
  const GpuQueue queue = where;  // in registers: see WarpQueue
  constexpr std::uint32_t kAll = 0xffffffff;
  const WarpQueue pair(queue.pair);
  const std::uint32_t lane = threadIdx.x % 32;
  Token token;
  Piece piece{};
  Outcome outcome{};
  std::uint32_t tries = 0;
  std::uint64_t give_up = now_ns() + queue.timeout_ns;
  bool has_piece = next(piece);
  bool submitted = false;
  while (__any_sync(kAll, has_piece)) {
    bool is_over = false;  // the piece is, with `outcome`
    if (has_piece && !in_range(queue, piece.lba, piece.blocks)) {
      outcome = {Fate::kDone, kOutOfRange, 0};
      is_over = true;
    }
    // Slots for those who have none, and commands in them. Whoever has a slot goes all the way without another.
    bool claimed = false;
    const bool wants = has_piece && !submitted && !is_over;
    const std::uint32_t wanting = count_bits(__ballot_sync(kAll, wants));
    const bool enough = wanting >= batch || !__any_sync(kAll, submitted);
    if (wants && enough) claimed = claim(queue, token, Lanes::here());
    if (opcode == kWrite) {
      for (std::uint32_t left = __ballot_sync(kAll, claimed); left != 0; left &= left - 1) {
        const int whose = __ffs(static_cast<int>(left)) - 1;
        const std::uint64_t nbytes = std::uint64_t{__shfl_sync(kAll, piece.blocks, whose)} * queue.block_bytes;
        const auto from = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(piece.memory), whose);
        const std::uint32_t slot = __shfl_sync(kAll, token.slot, whose);
        detail::copy(queue.data + slot * queue.slot_bytes(), reinterpret_cast<const void*>(from), nbytes, lane, 32);
      }
      __syncwarp();
    }
    if (claimed) {
      const Fate fate = detail::submit(queue, token, {opcode, piece.blocks, piece.lba}, [] { return Lanes::here(); });
      submitted = fate == Fate::kDone;
      if (!submitted) {
        outcome = {fate, 0, 0};
        is_over = true;
      }
    }
    __syncwarp();
    // Completions.
    bool arrived = false;
    if (submitted) {
      if (poll(queue, token, outcome)) {
        submitted = false;
        is_over = true;
        arrived = outcome.fate == Fate::kDone;
      }
    } else if (has_piece && !is_over) {  // it waits for a slot
      if (pair.stopped() || now_ns() > give_up) {
        outcome = {pair.stopped() ? Fate::kStopped : Fate::kFull, 0, 0};
        is_over = true;
      }
    }
    if (opcode == kRead) {
      for (std::uint32_t left = __ballot_sync(kAll, arrived && outcome.status == 0); left != 0; left &= left - 1) {
        const int whose = __ffs(static_cast<int>(left)) - 1;
        const std::uint64_t nbytes = std::uint64_t{__shfl_sync(kAll, piece.blocks, whose)} * queue.block_bytes;
        const auto to = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(piece.memory), whose);
        const std::uint32_t slot = __shfl_sync(kAll, token.slot, whose);
        detail::copy(reinterpret_cast<void*>(to), queue.data + slot * queue.slot_bytes(), nbytes, lane, 32);
      }
      __syncwarp();
    }
    if (arrived) finish(queue, token);
    const bool moved = __any_sync(kAll, is_over);
    if (is_over) {
      if (outcome.may_retry() && ++tries < kTries) {
        is_over = false;
      } else {
        ended(piece, outcome);
        has_piece = next(piece);
        tries = 0;
      }
      give_up = now_ns() + queue.timeout_ns;
    }
    __syncwarp();
    if (!moved) detail::reap(queue, Warp());
  }
}

namespace detail {

// A transfer that takes one command: one lane sends it, all look for completions, and all copy.
__device__ inline Outcome warp_command(const GpuQueue& where, std::uint32_t opcode, std::uint64_t lba,
                                       std::uint32_t blocks, unsigned char* memory) {
  const GpuQueue queue = where;  // in registers: see WarpQueue
  const WarpQueue pair(queue.pair);
  const Warp warp;
  const std::uint64_t nbytes = std::uint64_t{blocks} * queue.block_bytes;
  for (std::uint32_t tries = 1;; ++tries) {
    Outcome outcome{Fate::kDone, 0, 0};
    Token token;  // the first lane's; the others know the slot
    for (const std::uint64_t give_up = now_ns() + queue.timeout_ns;;) {
      if (warp.leads()) {
        if (!claim(queue, token, Alone())) {
          outcome.fate = pair.stopped() ? Fate::kStopped : now_ns() > give_up ? Fate::kFull : Fate::kDone;
        }
      }
      token.slot = warp.leaders(token.slot);
      if (token.has_slot()) break;
      outcome.fate = static_cast<Fate>(warp.leaders(static_cast<std::uint32_t>(outcome.fate)));
      if (outcome.fate != Fate::kDone) return outcome;
      detail::reap(queue, warp);
    }
    unsigned char* const buffer = data(queue, token);
    if (opcode == kWrite) {
      copy(buffer, memory, nbytes, warp.rank(), warp.count());
      warp.meet();
    }
    if (warp.leads()) outcome.fate = submit(queue, token, {opcode, blocks, lba}, [] { return Alone(); });
    bool waits = warp.any(warp.leads() && outcome.fate == Fate::kDone);
    while (waits) {
      detail::reap(queue, warp);
      waits = warp.any(warp.leads() && !poll(queue, token, outcome));
    }
    warp.meet();  // what the leader acquired, all have
    const std::uint64_t word = warp.leaders(static_cast<std::uint64_t>(outcome.fate) << 32 |
                                            std::uint32_t{outcome.cid} << 16 | outcome.status);
    outcome = {static_cast<Fate>(word >> 32), static_cast<std::uint16_t>(word), static_cast<std::uint16_t>(word >> 16)};
    if (opcode == kRead && outcome.ok()) copy(memory, buffer, nbytes, warp.rank(), warp.count());
    warp.meet();  // all have copied
    if (outcome.fate == Fate::kDone && warp.leads()) pair.release(token.slot, token.cid);
    if (!outcome.may_retry() || tries >= kTries) return outcome;
  }
}

// Large transfers by a warp: lane 0 takes the first piece, lane 1 the second …; the first thing that went wrong.
__device__ inline Outcome warp_transfer(const GpuQueue& queue, std::uint32_t opcode, std::uint64_t lba,
                                        std::uint64_t blocks, unsigned char* memory, std::uint32_t warp,
                                        std::uint32_t warps) {
  Outcome worst{Fate::kDone, 0, 0};
  if (!in_range(queue, lba, blocks)) return {Fate::kDone, kOutOfRange, 0};
  const std::uint64_t step = queue.max_blocks;
  if (blocks <= step) {
    if (warp != 0 || blocks == 0) return worst;
    return warp_command(queue, opcode, lba, static_cast<std::uint32_t>(blocks), memory);
  }
  std::uint64_t at = (std::uint64_t{warp} * 32 + threadIdx.x % 32) * step;
  const auto next = [&](Piece& piece) {
    if (at >= blocks || !worst.ok()) return false;
    piece = {lba + at, memory + at * queue.block_bytes,
             static_cast<std::uint32_t>(blocks - at < step ? blocks - at : step)};
    at += std::uint64_t{warps} * 32 * step;
    return true;
  };
  const auto ended = [&](const Piece&, const Outcome& outcome) {
    if (!outcome.ok()) worst = outcome;
  };
  warp_move(queue, opcode, kBatch, next, ended);
  const std::uint32_t bad = __ballot_sync(0xffffffff, !worst.ok());
  if (bad != 0) {
    const int whose = __ffs(static_cast<int>(bad)) - 1;
    worst.fate = static_cast<Fate>(__shfl_sync(0xffffffff, static_cast<std::uint32_t>(worst.fate), whose));
    worst.status = static_cast<std::uint16_t>(__shfl_sync(0xffffffff, std::uint32_t{worst.status}, whose));
    worst.cid = static_cast<std::uint16_t>(__shfl_sync(0xffffffff, std::uint32_t{worst.cid}, whose));
  }
  return worst;
}

__device__ inline Outcome block_transfer(const GpuQueue& queue, std::uint32_t opcode, std::uint64_t lba,
                                         std::uint64_t blocks, unsigned char* memory) {
  __shared__ unsigned long long shared_worst;
  if (threadIdx.x == 0) shared_worst = 0;
  __syncthreads();
  const Outcome mine = warp_transfer(queue, opcode, lba, blocks, memory, threadIdx.x / 32, blockDim.x / 32);
  if (!mine.ok() && threadIdx.x % 32 == 0) {
    atomicCAS(&shared_worst, 0ull,
              std::uint64_t{1} << 63 | static_cast<std::uint64_t>(mine.fate) << 32 | std::uint32_t{mine.cid} << 16 |
                  mine.status);
  }
  __syncthreads();
  const std::uint64_t worst = shared_worst;
  __syncthreads();  // before another call uses it
  return {static_cast<Fate>(worst >> 32 & 0xff), static_cast<std::uint16_t>(worst),
          static_cast<std::uint16_t>(worst >> 16)};
}

}  // namespace detail

// All 32 lanes call with the same arguments; the data is there for all of them when it returns. One-dimensional blocks.
__device__ inline Outcome warp_read(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks, void* memory) {
  return detail::warp_transfer(queue, kRead, lba, blocks, static_cast<unsigned char*>(memory), 0, 1);
}

__device__ inline Outcome warp_write(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks,
                                     const void* memory) {
  __syncwarp();  // whatever other lanes wrote there
  return detail::warp_transfer(queue, kWrite, lba, blocks, static_cast<unsigned char*>(const_cast<void*>(memory)), 0,
                               1);
}

// --- one block: all threads call with the same arguments; blockDim.x is a multiple of 32, and y and z are 1

__device__ inline Outcome block_read(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks, void* memory) {
  return detail::block_transfer(queue, kRead, lba, blocks, static_cast<unsigned char*>(memory));
}

__device__ inline Outcome block_write(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks,
                                      const void* memory) {
  return detail::block_transfer(queue, kWrite, lba, blocks, static_cast<unsigned char*>(const_cast<void*>(memory)));
}

}  // namespace gpunvme

#endif  // GPUNVME_WARPS
