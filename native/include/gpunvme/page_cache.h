// A read-only array on a drive that a kernel indexes like one in memory: lines of it are kept in GPU memory.
//
//   __global__ void sum(const gpunvme::PageCache* cache, const long long* indices, …) {
//     const gpunvme::CachedArray<float> array(cache);   // one a thread, from the beginning of the kernel to its end
//     total += array[indices[i]];                       // read from the drive unless it is there
//     float value;
//     const gpunvme::Outcome outcome = array.read(i, value);  // the same, and what went wrong
//     const gpunvme::Line<float> line = array.line(i);  // holds the line with element i until it goes out of scope
//     if (line.ok()) for (auto j = line.first(); j < line.end(); ++j) total += line[j];
//   }
//
// `gpunvme.gpu.GpuQueues.cached_array` (Python) makes caches. Any thread may ask for any element at any time: lanes
// that ask together share look-ups, commands and copies, and whoever asks for a line that is on its way waits for it.
// A read that failed is not kept: it is told to all who waited for it, and tried anew by who asks later. Without
// anybody to ask for the Outcome, array[i] is T{}, and the first failure is kept for Python to raise.
//
// Who holds lines and asks for others may find all frames of a set held, by itself or by others who wait like it: it is
// told kFull when nobody has got on for as long as a command may take. The lanes of a warp wait for each other, so what
// counts is what a warp holds: one line at a time for all its lanes is always safe; a line for each lane needs a cache
// of many sets.
//
// Elements have 1, 2, 4, 8 or 16 bytes, and so lie in one line. C++17, for nvcc and NVRTC, sm_75 and later.
#pragma once

#include "gpunvme/device.h"
#include "gpunvme/page_frames.h"

#if !defined(__CUDACC_RTC__)
#include <cstring>
#endif

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
// lanes want to, or nothing else is left to wait for.
//
// Lanes never wait for each other with a pinned line that is ready, nor for a frame with a slot: so whoever has one or
// the other gets to its end, and gives it back.
template <typename Next, typename Ready>
GPUNVME_DEVICE void serve(const Lanes& lanes, const PageCache& cache, std::uint32_t batch, const Next& next,
                          const Ready& ready) {
  enum class Step { kNone, kLook, kWait, kLoad };
  const GpuQueue queue = cache.queues[lanes.leaders(any_number()) % cache.queue_count];  // in registers
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
    if (waits && (on_their_way || wanting != 0)) reap(queue);
    if (waits && !on_their_way) pause();  // for others
  }
}

struct alignas(16) Got {
  unsigned char value[16] = {};
  std::uint64_t failure = 0;
  std::uint32_t frame = PageFrames::kNoFrame;
};

template <std::size_t nbytes>
GPUNVME_DEVICE inline void copy_aligned(void* to, const void* from) {
  memcpy(__builtin_assume_aligned(to, nbytes), __builtin_assume_aligned(from, nbytes), nbytes);
}

// Copies an element between places that are aligned to its size: 1, 2, 4, 8 or 16.
GPUNVME_DEVICE inline void copy_element(void* to, const void* from, std::uint32_t nbytes) {
  switch (nbytes) {
    case 1:
      return copy_aligned<1>(to, from);
    case 2:
      return copy_aligned<2>(to, from);
    case 4:
      return copy_aligned<4>(to, from);
    case 8:
      return copy_aligned<8>(to, from);
    default:
      return copy_aligned<16>(to, from);
  }
}

// For the lanes of which some did not find what they want: one element each, or its line pinned (`keeps`). All lanes
// take part, those that want nothing too: they copy. Not inlined, so that who finds it all pays for nothing of this.
GPUNVME_DEVICE GPUNVME_NOINLINE inline Got bring(const PageCache* cache, Lanes lanes, bool wants, std::uint64_t at,
                                                 std::uint32_t nbytes, bool keeps) {
  const PageFrames& frames = cache->frames;
  const std::uint32_t shift = frames.line_shift();
  Got got{};
  bool begun = !wants;
  const auto next = [&](std::uint64_t& line) {
    if (begun) return false;
    begun = true;
    line = at >> shift;
    return true;
  };
  const auto ready = [&](std::uint32_t frame, std::uint64_t failure) {
    got.failure = failure;
    got.frame = frame;
    if (failure == 0 && !keeps)
      copy_element(got.value, frames.data(frame) + (at & ((std::uint64_t{1} << shift) - 1)), nbytes);
    return keeps;
  };
  serve(lanes, *cache, 1, next, ready);
  return got;
}

}  // namespace detail

// A line of an array that stays in memory as long as this holds it. Not copied; it may be moved. Each lane that asked
// for it has a pin of its own, and may give it back when it likes.
template <typename T>
class Line {
 public:
  Line() = default;
  GPUNVME_DEVICE Line(Line&& other) noexcept { swap(other); }
  GPUNVME_DEVICE Line& operator=(Line&& other) noexcept {
    release();
    swap(other);
    return *this;
  }
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  GPUNVME_DEVICE ~Line() { release(); }

  // Without ok(), it holds nothing.
  GPUNVME_DEVICE bool ok() const { return data_ != nullptr; }
  GPUNVME_DEVICE Outcome outcome() const { return Failure::outcome(failure_); }

  // Its elements: those of the array from first() to end() - 1.
  GPUNVME_DEVICE std::uint64_t first() const { return first_; }
  GPUNVME_DEVICE std::uint64_t end() const { return first_ + count_; }
  GPUNVME_DEVICE bool holds(std::uint64_t index) const { return index - first_ < count_; }
  GPUNVME_DEVICE const T* data() const { return data_; }
  // By the array's index; the line holds it.
  GPUNVME_DEVICE const T& operator[](std::uint64_t index) const { return data_[index - first_]; }

  // Does nothing the second time.
  GPUNVME_DEVICE void release() {
    if (data_ != nullptr) detail::unpin_here(*frames_, frame_);
    data_ = nullptr;
    count_ = 0;
  }

 private:
  template <typename>
  friend class CachedArray;

  GPUNVME_DEVICE void swap(Line& other) {
    exchange(data_, other.data_);
    exchange(frames_, other.frames_);
    exchange(first_, other.first_);
    exchange(count_, other.count_);
    exchange(failure_, other.failure_);
    exchange(frame_, other.frame_);
  }
  template <typename Value>
  GPUNVME_DEVICE static void exchange(Value& one, Value& other) {
    const Value value = one;
    one = other;
    other = value;
  }

  const T* data_ = nullptr;
  const PageFrames* frames_ = nullptr;
  std::uint64_t first_ = 0;
  std::uint64_t count_ = 0;
  std::uint64_t failure_ = 0;
  std::uint32_t frame_ = PageFrames::kNoFrame;
};

// An array of T behind a cache. Each thread makes one of its own, and the counters are complete when it is gone.
template <typename T>
class CachedArray {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0,
                "an element has 1, 2, 4, 8 or 16 bytes: others would lie across two lines");
  static_assert(__is_trivially_copyable(T), "an element is plain bytes");

 public:
  GPUNVME_DEVICE explicit CachedArray(const PageCache* cache)
      : cache_(cache), frames_(cache->frames), size_(cache->nbytes / sizeof(T)) {}
  CachedArray(const CachedArray&) = delete;
  CachedArray& operator=(const CachedArray&) = delete;
  GPUNVME_DEVICE ~CachedArray() {
    const Lanes lanes = Lanes::here();
    const std::uint64_t hits = lanes.sum(hits_);
    const std::uint64_t misses = lanes.sum(misses_);
    if (!lanes.leads()) return;
    CacheCounters& counters = cache_->some_counters();
    if (hits != 0) Near(counters.hits).add_relaxed(hits);
    if (misses != 0) Near(counters.misses).add_relaxed(misses);
  }

  // Elements.
  GPUNVME_DEVICE std::uint64_t size() const { return size_; }

  // An element. If it cannot be had: T{}, and the first such failure of the cache is kept for the host.
  GPUNVME_DEVICE T operator[](std::uint64_t index) const {
    T value{};
    std::uint32_t frame;
    const std::uint64_t failure = get(index, frame, false, value);
    if (failure != 0) cache_->record(index, sizeof(T), failure);
    return value;
  }

  // An element into `value`, which is left as it is unless the outcome is ok().
  GPUNVME_DEVICE Outcome read(std::uint64_t index, T& value) const {
    std::uint32_t frame;
    return Failure::outcome(get(index, frame, false, value));
  }

  // An element if it is in memory now; otherwise false, and nothing is read from the drive.
  GPUNVME_DEVICE bool find(std::uint64_t index, T& value) const {
    std::uint32_t frame;
    return look_up(Lanes::here(), index, frame, false, value);
  }

  // The same for who reads many elements close to each other: the line is held from one call to the next, and as long
  // as it has what is asked for, nothing else is touched.
  GPUNVME_DEVICE Outcome read(std::uint64_t index, T& value, Line<T>& held) const {
    if (!held.holds(index)) {
      held.release();
      held = line(index);
      if (!held.ok()) return held.outcome();
    }
    value = held[index];
    return {Fate::kDone, 0, 0};
  }

  // The line that an element is in.
  GPUNVME_DEVICE Line<T> line(std::uint64_t index) const {
    Line<T> line;
    T value;
    line.failure_ = get(index, line.frame_, true, value);
    if (line.failure_ != 0) return line;
    const std::uint32_t shift = frames_.line_shift();
    line.frames_ = &cache_->frames;
    line.data_ = reinterpret_cast<const T*>(frames_.data(line.frame_));
    line.count_ = (std::uint64_t{1} << shift) / sizeof(T);
    line.first_ = index / line.count_ * line.count_;
    if (line.count_ > size_ - line.first_) line.count_ = size_ - line.first_;
    return line;
  }

 private:
  // For all lanes that are here, each with an index of its own: the element if its line is in memory, and the line
  // pinned if it is to be kept.
  GPUNVME_DEVICE bool look_up(const Lanes& lanes, std::uint64_t index, std::uint32_t& frame, bool keeps,
                              T& value) const {
    const bool inside = index < size_;
    const std::uint64_t at = index * sizeof(T);
    const Lanes same = lanes.alike(inside ? at >> frames_.line_shift() : ~std::uint64_t{0});
    frame = PageFrames::kNoFrame;
    if (inside && same.leads()) frame = frames_.pin_ready(at >> frames_.line_shift(), same.count());
    frame = same.leaders(frame);
    same.meet();  // what the leader acquired, all have
    const bool found = frame != PageFrames::kNoFrame;
    if (found) {
      ++hits_;
      if (!keeps) {
        value =
            *reinterpret_cast<const T*>(frames_.data(frame) + (at & ((std::uint64_t{1} << frames_.line_shift()) - 1)));
      }
    }
    same.meet();  // all have read
    if (found && !keeps && same.leads()) frames_.unpin(frame, same.count());
    return found;
  }

  // The same, from the drive if need be; what went wrong, or 0.
  GPUNVME_DEVICE std::uint64_t get(std::uint64_t index, std::uint32_t& frame, bool keeps, T& value) const {
    const Lanes lanes = Lanes::here();
    const bool inside = index < size_;
    const bool missing = !look_up(lanes, index, frame, keeps, value) && inside;
    if (!lanes.any(missing)) return inside ? 0 : Failure::word({Fate::kDone, kOutOfRange, 0}, 0);
    const detail::Got got = detail::bring(cache_, lanes, missing, index * sizeof(T), sizeof(T), keeps);
    if (!missing) return inside ? 0 : Failure::word({Fate::kDone, kOutOfRange, 0}, 0);
    ++misses_;
    frame = got.frame;
    if (got.failure == 0 && !keeps) detail::copy_aligned<sizeof(T)>(&value, got.value);
    return got.failure;
  }

  const PageCache* const cache_;
  const PageFrames frames_;  // a copy: in registers
  const std::uint64_t size_;
  mutable std::uint64_t hits_ = 0;
  mutable std::uint64_t misses_ = 0;
};

}  // namespace gpunvme
