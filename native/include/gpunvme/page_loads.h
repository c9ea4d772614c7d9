// A page cache as the host makes it, and how lines come into it: each is read once, whoever asks, and whoever asks for
// one that is on its way waits for it. What kernels use is in page_cache.h. C++17, for nvcc and NVRTC, sm_75 and later.
#pragma once

#include "gpunvme/device.h"
#include "gpunvme/page_frames.h"

namespace gpunvme {

// Counters of some threads; those of all are the sums.
struct alignas(kApart) CacheCounters {
  Atomic<std::uint64_t> hits;    // accesses, one a thread, to lines that were there
  Atomic<std::uint64_t> misses;  // that waited for theirs
  Atomic<std::uint64_t> loads;   // lines read
  Atomic<std::uint64_t> evictions;
  Atomic<std::uint64_t> failures;  // lines that could not be read
};

// The first failure that nobody asked for.
struct CacheError {
  static constexpr std::uint32_t kSet = 2;
  Atomic<std::uint32_t> state;  // 0; 1 while it is written; kSet
  std::uint32_t element_bytes;
  std::uint64_t index;
  std::uint64_t failure;  // as Failure::word
};

// What became of a load, in one word; 0 is well.
struct Failure {
  GPUNVME_DEVICE static std::uint64_t word(const Outcome& outcome, std::uint32_t queue_id) {
    return static_cast<std::uint64_t>(outcome.fate) | std::uint64_t{outcome.status} << 16 |
           std::uint64_t{outcome.cid} << 32 | std::uint64_t{queue_id} << 48;
  }
  GPUNVME_DEVICE static Outcome outcome(std::uint64_t word) {
    return {static_cast<Fate>(word & 0xff), static_cast<std::uint16_t>(word >> 16),
            static_cast<std::uint16_t>(word >> 32)};
  }
};

// One cache. Made by the host, never changed by kernels.
struct PageCache {
  static constexpr std::uint32_t kStripes = 32;

  PageFrames frames;
  const GpuQueue* queues;
  CacheCounters* counters;  // kStripes of them
  CacheError* error;
  std::uint64_t nbytes;  // of the array
  std::uint64_t lba;     // of its first byte
  std::uint64_t blocks;  // that it lies in
  std::uint32_t queue_count;
  std::uint32_t line_blocks;

  GPUNVME_DEVICE CacheCounters& some_counters() const { return counters[any_number() % kStripes]; }

  // Keeps a failure for the host, unless there is one.
  GPUNVME_DEVICE void record(std::uint64_t index, std::uint32_t element_bytes, std::uint64_t failure) const {
    std::uint32_t none = 0;
    if (error->state.load_relaxed() != 0 || !error->state.compare_exchange(none, 1)) return;
    error->element_bytes = element_bytes;
    error->index = index;
    error->failure = failure;
    error->state.store_release(CacheError::kSet);
  }
};

namespace detail {

// Gives back the pin that each of the lanes that are here has on its frame.
GPUNVME_DEVICE inline void unpin_here(const PageFrames& frames, std::uint32_t frame) {
  const Lanes same = Lanes::here().alike(std::uint64_t{frame});
  same.meet();  // all have read
  if (same.leads()) frames.unpin(frame, same.count());
}

// Looks after wishes for lines until there are none left: a lane has one at a time. `next(line)` says what the calling
// lane wishes for, or false. `ready(frame, failure)` hears of each wish's end: the line is in the frame until it
// returns, and on if it returns true; kNoFrame if the line could not be loaded. New commands are sent when `batch`
// lanes want to, or nothing else is left to wait for; all on the queue with the number `queue_number` modulo those that
// there are.
//
// Lanes never wait for each other with a pinned line that is ready, nor for a frame with a slot: so whoever has one or
// the other gets to its end, and gives it back.
template <typename Next, typename Ready>
GPUNVME_DEVICE void serve(const Lanes& lanes, const PageCache& cache, std::uint32_t queue_number, std::uint32_t batch,
                          const Next& next, const Ready& ready) {
  enum class Step { kNone, kLook, kWait, kLoad };
  const GpuQueue queue = cache.queues[lanes.leaders(queue_number) % cache.queue_count];  // in registers
  const PageFrames frames = cache.frames;
  const WarpQueue pair(queue.pair);
  // Longer than the one who loads may take: each command is waited for, for a slot first, and some are repeated.
  const std::uint64_t commands = (cache.line_blocks + queue.max_blocks - 1) / queue.max_blocks;
  const std::uint64_t patience_ns = (commands * (kTries + 1) + 1) * queue.timeout_ns;
  std::uint64_t line = 0;
  Step step = next(line) ? Step::kLook : Step::kNone;
  std::uint64_t give_up = now_ns() + queue.timeout_ns;
  std::uint64_t seen = 0;
  // At the end of a deadline: whether nobody else has got on either, as `moved` tells. Then waiting is in vain.
  const auto is_in_vain = [&](std::uint64_t moved, std::uint64_t wait_ns) {
    if (moved == seen) return true;
    seen = moved;
    give_up = now_ns() + wait_ns;
    return false;
  };
  const auto completed = [&] { return Near(queue.pair.state().completed).load_relaxed(); };
  std::uint32_t frame = PageFrames::kNoFrame;
  std::uint32_t loaded = 0;  // blocks of the line
  std::uint32_t tries = 0;
  bool submitted = false;
  Token token;
  Outcome outcome{Fate::kDone, 0, 0};
  while (lanes.any(step != Step::kNone)) {
    bool over = false;
    std::uint64_t failure = 0;
    if (step == Step::kLook) {
      const Lanes same = Lanes::here().alike(line);
      bool evicted = false;
      auto found = static_cast<std::uint32_t>(Look::kAbsent);
      if (same.leads()) {
        Look look = frames.pin(line, same.count(), frame);
        if (look == Look::kAbsent) look = frames.claim(line, same.count(), frame, evicted);
        if (evicted) Near(cache.some_counters().evictions).add_relaxed(1);
        found = static_cast<std::uint32_t>(look);
      }
      const auto look = static_cast<Look>(same.leaders(found));
      frame = same.leaders(frame);
      same.meet();  // what the leader acquired, all have
      if (look == Look::kReady) {
        over = true;
      } else if (look == Look::kMine && same.leads()) {
        step = Step::kLoad;
        loaded = tries = 0;
        give_up = now_ns() + queue.timeout_ns;
      } else if (look == Look::kMine || look == Look::kLoading) {
        step = Step::kWait;
        give_up = now_ns() + patience_ns;
      } else if (now_ns() > give_up && is_in_vain(frames.turn(line), queue.timeout_ns)) {
        failure = Failure::word({Fate::kFull, 0, 0}, 0);
        frame = PageFrames::kNoFrame;
        over = true;
      }
    }
    lanes.meet();
    // Slots for those who have none, and commands in them.
    const std::uint64_t at = line * cache.line_blocks + loaded;
    const std::uint64_t rest = cache.blocks - at;
    std::uint32_t blocks = cache.line_blocks - loaded;
    if (blocks > queue.max_blocks) blocks = queue.max_blocks;
    if (blocks > rest) blocks = static_cast<std::uint32_t>(rest);
    const bool wants = step == Step::kLoad && !submitted;
    const std::uint32_t wanting = lanes.how_many(wants);
    const bool on_their_way = lanes.any(submitted);
    bool claimed = false;
    bool failed = false;
    if (wants && (wanting >= batch || !on_their_way)) claimed = claim(queue, token);
    lanes.meet();
    if (claimed) {
      outcome = {submit(queue, token, kRead, cache.lba + at, blocks), 0, 0};
      submitted = outcome.fate == Fate::kDone;
      failed = !submitted;
    } else if (wants && (pair.stopped() || (now_ns() > give_up && is_in_vain(completed(), queue.timeout_ns)))) {
      outcome = {pair.stopped() ? Fate::kStopped : Fate::kFull, 0, 0};
      failed = true;
    }
    lanes.meet();
    // Completions: all lanes copy what each has read.
    bool arrived = false;
    if (submitted && poll(queue, token, outcome)) {
      submitted = false;
      arrived = outcome.fate == Fate::kDone;
      failed = !arrived;
    }
    unsigned char* const memory = step == Step::kLoad ? frames.data(frame) : nullptr;
    for (std::uint32_t left = lanes.vote(arrived && outcome.status == 0); left != 0; left &= left - 1) {
      const std::uint32_t whose = lowest_bit(left);
      const std::uint64_t nbytes = std::uint64_t{lanes.of(whose, blocks)} * queue.block_bytes;
      const std::uint64_t skip = std::uint64_t{lanes.of(whose, loaded)} * queue.block_bytes;
      const auto to = lanes.of(whose, reinterpret_cast<unsigned long long>(memory));
      const std::uint32_t slot = lanes.of(whose, token.slot);
      copy(reinterpret_cast<unsigned char*>(to) + skip, queue.data + slot * queue.slot_bytes(), nbytes, lanes.rank(),
           lanes.count());
    }
    lanes.meet();  // all have copied
    if (arrived) {
      finish(queue, token);
      give_up = now_ns() + queue.timeout_ns;
      if (outcome.status == 0) {
        loaded += blocks;
        tries = 0;
        if (loaded == cache.line_blocks || blocks == rest) {
          frames.publish(frame);
          Near(cache.some_counters().loads).add_relaxed(1);
          over = true;
        }
      } else {
        failed = !outcome.may_retry() || ++tries >= kTries;
      }
    }
    if (failed) {
      failure = Failure::word(outcome, queue.id);
      frames.fail(frame, failure);
      Near(cache.some_counters().failures).add_relaxed(1);
      over = true;
    }
    if (step == Step::kWait) {
      const Look look = frames.look(frame, failure);
      over = look != Look::kLoading;
      if (!over && now_ns() > give_up && is_in_vain(completed(), patience_ns)) {
        failure = Failure::word({Fate::kTimeout, 0, 0}, 0);
        over = true;
      }
    }
    lanes.meet();
    if (over) {
      const bool kept = ready(failure == 0 ? frame : PageFrames::kNoFrame, failure);
      if (frame != PageFrames::kNoFrame && (!kept || failure != 0)) unpin_here(frames, frame);
      step = next(line) ? Step::kLook : Step::kNone;
      frame = PageFrames::kNoFrame;
      give_up = now_ns() + queue.timeout_ns;
    }
    const bool waits = !lanes.any(over || claimed || arrived);
    if (waits && (on_their_way || wanting != 0)) reap(queue, lanes);
    if (waits && !on_their_way) pause();  // for others
  }
}

}  // namespace detail

}  // namespace gpunvme
