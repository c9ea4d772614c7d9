// A read-only array on a drive that a kernel indexes like one in memory: lines of it are kept in GPU memory.
//
//   __global__ void sum(const gpunvme::PageCache* cache, const long long* indices, …) {
//     const gpunvme::CachedArray<float> array(cache);   // one a thread, from the beginning of the kernel to its end
//     total += array[indices[i]];                       // read from the drive unless it is there
//     float value;
//     const gpunvme::Outcome outcome = array.read(i, value);  // the same, and what went wrong
//     gpunvme::Line<float> held;                        // an ordinary loop over neighbours: the line is looked up once
//     for (auto j = first; j < last; ++j) if (array.read(j, value, held).ok()) total += value;
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
// A miss needs 128 registers. A kernel that finds most of what it asks for is faster if it says how many of its blocks
// shall fit on a multiprocessor, `__launch_bounds__(256, 4)`: then it spills where it misses, and more warps wait for
// memory.
//
// Elements have 1, 2, 4, 8 or 16 bytes, and so lie in one line. C++17, for nvcc and NVRTC, sm_75 and later.
#pragma once

#include "gpunvme/page_loads.h"

#if !defined(__CUDACC_RTC__)
#include <cstring>
#endif

namespace gpunvme {

namespace detail {

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
  serve(lanes, *cache, any_number(), 1, next, ready);
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
