// NVMe queues for GPU kernels: read and write blocks from device code.
//
//   __global__ void sum(const gpunvme::GpuQueue* queues, unsigned count, …) {
//     const gpunvme::GpuQueue& queue = queues[blockIdx.x % count];
//     const gpunvme::Outcome outcome = gpunvme::read(queue, lba, 1, mine);       // one thread for itself
//     const gpunvme::Outcome outcome = gpunvme::warp_read(queue, lba, 8, row);   // 32 threads together
//     const gpunvme::Outcome outcome = gpunvme::block_read(queue, lba, 64, tile);
//     if (!outcome.ok()) …
//
// `gpunvme.nvme.Namespace.gpu_queues` (Python) makes the queues. Any thread may call at any time: lanes that have taken
// different ways, part of a warp, more blocks than fit on the GPU. Lanes that are at one place share reservation and
// doorbell. Each call has the deadline `timeout_ns`: a command that is not answered by then is given up, and its slot
// and buffer stay reserved until the controller answers or the host has reset it.
//
// A command's data passes through its slot's buffer, which the controller reaches. Who wants to compute while a read is
// on its way uses a Token: start(), then poll() or wait(), data(), finish(). start() never waits, so that a thread that
// holds some tokens can always finish them; one that waits for a slot must hold none.
//
// C++17, for nvcc and NVRTC, sm_75 and later. For host compilers it is the same code on groups of one thread.
#pragma once

#include "gpunvme/warp_queue.h"

namespace gpunvme {

// One I/O queue pair with what commands need. Made by the host, never changed by kernels.
struct GpuQueue {
  QueuePair pair;              // slots < SQ entries
  unsigned char* data;         // buffers, pages_per_slot * page_bytes bytes a slot, as threads reach them
  const std::uint64_t* pages;  // addresses of their pages for the controller, pages_per_slot a slot
  const std::uint64_t* lists;  // of each slot's PRP list: its pages from the second on, all in one page
  std::uint64_t blocks;        // of the namespace
  std::uint64_t timeout_ns;
  std::uint32_t page_bytes;
  std::uint32_t pages_per_slot;
  std::uint32_t block_bytes;
  std::uint32_t max_blocks;  // of one command: MDTS, and what a slot's buffer holds
  std::uint32_t nsid;
  std::uint32_t id;

  GPUNVME_DEVICE std::uint64_t slot_bytes() const { return std::uint64_t{pages_per_slot} * page_bytes; }
};

enum class Fate : std::uint32_t {
  kDone,     // the controller answered: see `status`
  kTimeout,  // it did not, and the command was given up
  kStopped,  // the host stopped the queue; whether the command was executed is unknown
  kFull,     // not submitted: no slot
};

struct Outcome {
  Fate fate;
  std::uint16_t status;  // 15 bits: SC 7:0, SCT 10:8, CRD 12:11, More 13, DNR 14
  std::uint16_t cid;

  GPUNVME_DEVICE bool ok() const { return fate == Fate::kDone && status == 0; }
  // Whether the same command might succeed another time.
  GPUNVME_DEVICE bool may_retry() const { return fate == Fate::kDone && status != 0 && !nvme::status_dnr(status); }
};

// One command: a slot from its claim on, a CID once it is submitted.
struct Token {
  std::uint32_t slot = QueuePair::kNoSlot;
  std::uint16_t cid = 0;
  std::uint64_t deadline = 0;

  GPUNVME_DEVICE bool has_slot() const { return slot != QueuePair::kNoSlot; }
};

// How often a warp that reaps looks at the CQ before it lets another one.
inline constexpr std::uint32_t kPatience = 8;
// How often a command whose status allows it is tried in all.
inline constexpr std::uint32_t kTries = 4;
// What the driver itself answers where blocks are not in the namespace, without asking the controller.
inline constexpr std::uint16_t kOutOfRange = nvme::kStatusLbaOutOfRange | nvme::kStatusDnr;

inline constexpr std::uint32_t kRead = nvme::kNvmRead;
inline constexpr std::uint32_t kWrite = nvme::kNvmWrite;

GPUNVME_DEVICE inline bool in_range(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks) {
  return blocks <= queue.blocks && lba <= queue.blocks - blocks;
}

// Those that are here for the same queue.
GPUNVME_DEVICE inline Lanes group(const GpuQueue& queue) { return Lanes::here().alike(&queue.pair.state()); }

// --- the steps of one command

// A slot, if there is one. Before a write: fill data(), then submit(). `lanes`, if they are known: those that are here
// for this queue.
template <typename Group>
GPUNVME_DEVICE inline bool claim(const GpuQueue& queue, Token& token, const Group& lanes) {
  token.slot = WarpQueue(queue.pair).claim(lanes);
  return token.has_slot();
}
GPUNVME_DEVICE inline bool claim(const GpuQueue& queue, Token& token) { return claim(queue, token, group(queue)); }

// The buffer of a token that has a slot; 4096 bytes or more, aligned to that.
GPUNVME_DEVICE inline unsigned char* data(const GpuQueue& queue, const Token& token) {
  return queue.data + token.slot * queue.slot_bytes();
}

// Gives a slot back: of a command that is done, when nobody reads data() any more, or that was never submitted.
GPUNVME_DEVICE inline void finish(const GpuQueue& queue, Token& token) {
  WarpQueue(queue.pair).release(token.slot);
  token.slot = QueuePair::kNoSlot;
}

// One command, as submit() takes it.
struct Request {
  std::uint32_t opcode;
  std::uint32_t blocks;
  std::uint64_t lba;
  std::uint64_t prp1 = 0;
  std::uint64_t prp2 = 0;
};

namespace detail {

// submit() for the lanes that `here()` says are at this place for this queue; it is asked again where they may be
// others.
template <typename Here>
GPUNVME_DEVICE inline Fate submit(const GpuQueue& queue, Token& token, Request request, const Here& here) {
  const WarpQueue pair(queue.pair);
  token.deadline = now_ns() + queue.timeout_ns;
  if (request.prp1 == 0) {
    const std::uint64_t nbytes = std::uint64_t{request.blocks} * queue.block_bytes;
    const std::uint64_t* const pages = queue.pages + std::uint64_t{token.slot} * queue.pages_per_slot;
    request.prp1 = pages[0];
    if (nbytes > queue.page_bytes)
      request.prp2 = nbytes > 2 * std::uint64_t{queue.page_bytes} ? queue.lists[token.slot] : pages[1];
  }
  const IoCommand command{request.opcode, queue.nsid, request.prp1, request.prp2, request.lba, request.blocks - 1};
  for (;;) {
    const auto lanes = here();
    const Submitted submitted = pair.submit(lanes, token.slot, command, token.cid);
    if (submitted == Submitted::kOk) return Fate::kDone;
    // The SQ is full of commands that were fetched long ago, or the controller fetches none.
    bool busy = false;
    const bool moved = submitted == Submitted::kFull && pair.reap(lanes, kPatience, busy) != 0;
    const bool expired = lanes.leaders(static_cast<std::uint32_t>(!moved && now_ns() > token.deadline)) != 0;
    if (submitted == Submitted::kStopped || expired) {
      pair.release(token.slot);
      token.slot = QueuePair::kNoSlot;
      return submitted == Submitted::kStopped ? Fate::kStopped : Fate::kFull;
    }
    if (busy) pause();
  }
}

// Reaps for everybody on the queue, if nobody is about it; whether there was anything.
template <typename Group>
GPUNVME_DEVICE inline bool reap(const GpuQueue& queue, const Group& lanes) {
  bool busy = false;
  const bool any = WarpQueue(queue.pair).reap(lanes, kPatience, busy) != 0;
  if (busy) pause();
  return any;
}

}  // namespace detail

// Sends a command for the slot of the token: `blocks` is 1 .. max_blocks, all in the namespace. With `prp1` other than
// 0, the command uses this memory and not the slot's buffer. kDone means: sent. Otherwise the slot is given back.
GPUNVME_DEVICE inline Fate submit(const GpuQueue& queue, Token& token, std::uint32_t opcode, std::uint64_t lba,
                                  std::uint32_t blocks, std::uint64_t prp1 = 0, std::uint64_t prp2 = 0) {
  return detail::submit(queue, token, {opcode, blocks, lba, prp1, prp2}, [&] { return group(queue); });
}

// A slot and a command in one: for reads. kFull at once if there is no slot.
GPUNVME_DEVICE inline Fate start(const GpuQueue& queue, Token& token, std::uint32_t opcode, std::uint64_t lba,
                                 std::uint32_t blocks) {
  return claim(queue, token) ? submit(queue, token, opcode, lba, blocks) : Fate::kFull;
}

// Reaps for everybody on the queue, if nobody is about it; whether there was anything.
GPUNVME_DEVICE inline bool reap(const GpuQueue& queue) { return detail::reap(queue, group(queue)); }

// Whether a submitted command has come to its end: done, given up because its time was over, or stopped. When it is
// done its data() is there until finish(). Otherwise the token has no slot any more. Reaps nothing itself.
GPUNVME_DEVICE inline bool poll(const GpuQueue& queue, Token& token, Outcome& outcome) {
  outcome.cid = token.cid;
  if (WarpQueue(queue.pair).is_done(token.slot, token.cid, outcome.status)) {
    outcome.fate = Fate::kDone;
    return true;
  }
  outcome.status = 0;
  const bool stopped = WarpQueue(queue.pair).stopped();
  if (!stopped && now_ns() <= token.deadline) return false;
  if (!stopped && !queue.pair.quarantine(token.cid)) return false;  // it is done after all
  outcome.fate = stopped ? Fate::kStopped : Fate::kTimeout;
  token.slot = QueuePair::kNoSlot;
  return true;
}

// Waits for a submitted command; as poll().
GPUNVME_DEVICE inline Outcome wait(const GpuQueue& queue, Token& token) {
  Outcome outcome{};
  while (!poll(queue, token, outcome)) reap(queue);
  return outcome;
}

// --- copying between a slot's buffer and memory

namespace detail {

// `lanes` threads copy together, this one being number `lane`; 16 bytes at a time where both sides are aligned.
GPUNVME_DEVICE inline void copy(void* to, const void* from, std::uint64_t nbytes, std::uint32_t lane,
                                std::uint32_t lanes) {
  std::uint64_t done = 0;
#if defined(GPUNVME_WARPS)
  if (((reinterpret_cast<std::uint64_t>(to) | reinterpret_cast<std::uint64_t>(from)) & 15) == 0) {
    constexpr std::uint32_t kAtOnce = 8;  // loads on their way before the first is stored: PCIe is far
    const auto* const source = static_cast<const uint4*>(from);
    auto* const target = static_cast<uint4*>(to);
    const std::uint64_t count = nbytes / 16;
    std::uint64_t at = lane;
    for (; at + (kAtOnce - 1) * std::uint64_t{lanes} < count; at += kAtOnce * std::uint64_t{lanes}) {
      uint4 held[kAtOnce];
#pragma unroll
      for (std::uint32_t i = 0; i < kAtOnce; ++i) held[i] = source[at + i * lanes];
#pragma unroll
      for (std::uint32_t i = 0; i < kAtOnce; ++i) target[at + i * lanes] = held[i];
    }
    for (; at < count; at += lanes) target[at] = source[at];
    done = count * 16;
  }
#endif
  const auto* const source = static_cast<const unsigned char*>(from);
  auto* const target = static_cast<unsigned char*>(to);
  for (std::uint64_t at = done + lane; at < nbytes; at += lanes) target[at] = source[at];
}

// A transfer of any size by one thread, a command at a time. One loop for all steps: lanes that wait for a slot never
// stand in the way of those that have one.
GPUNVME_DEVICE inline Outcome transfer(const GpuQueue& where, std::uint32_t opcode, std::uint64_t lba,
                                       std::uint64_t blocks, unsigned char* memory) {
  const GpuQueue queue = where;  // in registers: see WarpQueue
  Outcome outcome{Fate::kDone, 0, 0};
  if (!in_range(queue, lba, blocks)) outcome.status = kOutOfRange;
  Token token;
  std::uint64_t give_up = now_ns() + queue.timeout_ns;
  while (outcome.ok() && blocks != 0) {
    const auto some = static_cast<std::uint32_t>(blocks < queue.max_blocks ? blocks : queue.max_blocks);
    const std::uint64_t nbytes = std::uint64_t{some} * queue.block_bytes;
    bool advanced = false;
    if (!token.has_slot()) {
      if (claim(queue, token)) {
        if (opcode == kWrite) copy(data(queue, token), memory, nbytes, 0, 1);
        outcome.fate = submit(queue, token, opcode, lba, some);
        advanced = true;
      } else if (WarpQueue(queue.pair).stopped()) {
        outcome.fate = Fate::kStopped;
      } else if (now_ns() > give_up) {
        outcome.fate = Fate::kFull;
      }
    } else if (poll(queue, token, outcome)) {
      if (outcome.fate == Fate::kDone) {
        if (opcode == kRead && outcome.status == 0) copy(memory, data(queue, token), nbytes, 0, 1);
        finish(queue, token);
      }
      lba += some;
      blocks -= some;
      memory += nbytes;
      give_up = now_ns() + queue.timeout_ns;
      advanced = true;
    } else {
      outcome.fate = Fate::kDone;
    }
    if (!advanced) reap(queue);
  }
  return outcome;
}

}  // namespace detail

// --- one thread

// Reads `blocks` blocks from `lba` on, for the calling thread alone.
GPUNVME_DEVICE inline Outcome read(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks, void* memory) {
  return detail::transfer(queue, kRead, lba, blocks, static_cast<unsigned char*>(memory));
}

GPUNVME_DEVICE inline Outcome write(const GpuQueue& queue, std::uint64_t lba, std::uint64_t blocks,
                                    const void* memory) {
  return detail::transfer(queue, kWrite, lba, blocks, static_cast<unsigned char*>(const_cast<void*>(memory)));
}

#if defined(GPUNVME_WARPS)

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

#endif  // GPUNVME_WARPS

}  // namespace gpunvme
