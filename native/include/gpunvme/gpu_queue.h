// One command of a GPU's queue, step by step, and what one thread does for itself; see device.h.
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

}  // namespace gpunvme
