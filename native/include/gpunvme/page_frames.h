// Which lines of a backing store are in memory, and where: frames, each with one 64-bit word that says everything.
//
// A line may be in any of the kWays frames of its set. The word of a frame holds the line's number, its state, how many
// threads use it (pins), and whether it was used since the clock's hand passed. A word changes by read-modify-writes
// only, and a pin is taken by an addition whose result shows whose line was pinned: so nobody uses a frame under a name
// that it has no more. A frame changes its name by a compare-and-swap that fails if anybody has pinned it, and only
// under the lock of its set, behind a look at the whole set: so a line is never in two frames, nor loaded twice at
// once. Nobody waits for the lock: who does not get it looks again.
#pragma once

#include "gpunvme/warp_queue.h"

namespace gpunvme {

enum class Look : std::uint32_t {
  kReady,    // pinned, and its bytes are there
  kLoading,  // pinned; somebody is loading it
  kMine,     // pinned; the caller has to load it
  kAbsent,   // not there
  kBusy,     // not there now: look again
  kFull,     // all frames of the set are in use: look again
};

class PageFrames {
 public:
  static constexpr std::uint32_t kWays = 8;  // their words are two sectors of GPU memory
  static constexpr std::uint32_t kNoFrame = 0xffffffff;
  static constexpr std::uint32_t kLineBits = 37;

  // Of a set; both are used by who loads, not by who finds.
  struct Control {
    Atomic<std::uint32_t> lock;
    Atomic<std::uint32_t> hand;  // of the clock, and above its place how often a frame was given out
  };

  // `words` and `failures` have one entry a frame, `controls` one a set; all zeroed.
  GPUNVME_DEVICE void initialise(std::uint64_t sets, std::uint32_t line_shift, void* words, void* controls,
                                 void* failures, void* memory) {
    sets_ = sets;
    inverse_ = ~std::uint64_t{0} / sets;
    line_shift_ = line_shift;
    words_ = static_cast<Atomic<std::uint64_t>*>(words);
    controls_ = static_cast<Control*>(controls);
    failures_ = static_cast<Atomic<std::uint64_t>*>(failures);
    memory_ = static_cast<unsigned char*>(memory);
  }

  GPUNVME_DEVICE std::uint32_t line_shift() const { return line_shift_; }
  GPUNVME_DEVICE unsigned char* data(std::uint32_t frame) const {
    return memory_ + (std::uint64_t{frame} << line_shift_);
  }

  // Pins a line for `count` threads if it is there; its frame. Called by one of them.
  GPUNVME_DEVICE Look pin(std::uint64_t line, std::uint32_t count, std::uint32_t& frame) const {
    const std::uint64_t first = set_of(line) * kWays;
    frame = find(line, first);
    if (frame == kNoFrame) return Look::kAbsent;
    // Acquire: the bytes were written before the line became ready.
    const std::uint64_t before = Near(words_[frame]).add_acquire(count * kPin);
    if (!has(before, line)) {  // it was, a moment ago
      Near(words_[frame]).add_relaxed(~(count * kPin) + 1);
      frame = kNoFrame;
      return Look::kBusy;
    }
    if ((before & kState) == kLoadingState) return Look::kLoading;
    if ((before & kUsed) == 0) Near(words_[frame]).or_relaxed(kUsed);
    return Look::kReady;
  }

  // As pin(), for lines whose bytes are there: everything else is none of the caller's business.
  GPUNVME_DEVICE std::uint32_t pin_ready(std::uint64_t line, std::uint32_t count) const {
    std::uint32_t frame = kNoFrame;
    const Look look = pin(line, count, frame);
    if (look == Look::kLoading) unpin(frame, count);
    return look == Look::kReady ? frame : kNoFrame;
  }

  // Gives the pins of `count` threads back: they have read what they wanted.
  GPUNVME_DEVICE void unpin(std::uint32_t frame, std::uint32_t count) const {
    // Release: what they read comes before the bytes of the next line.
    Near(words_[frame]).subtract_release(count * kPin);
  }

  // Takes a frame for a line that is absent, pinned for `count` threads; the caller has to load it, and to say
  // publish() or fail() then. Called by one of them.
  GPUNVME_DEVICE Look claim(std::uint64_t line, std::uint32_t count, std::uint32_t& frame, bool& evicted) const {
    const std::uint64_t set = set_of(line);
    Near lock(controls_[set].lock);
    // Acquire: names that others gave under this lock are seen.
    if (lock.load_relaxed() != 0 || lock.exchange_acquire(1) != 0) return Look::kBusy;
    Look look = Look::kFull;
    if (find(line, set * kWays) != kNoFrame) {
      look = Look::kBusy;  // somebody was faster
    } else if (take(set, line, count, frame, evicted)) {
      look = Look::kMine;
    }
    lock.store_release(0);
    return look;
  }

  // The bytes of a claimed line are in its frame, written by the caller or by lanes that it has met since.
  GPUNVME_DEVICE void publish(std::uint32_t frame) const {
    // Release: whoever finds the line ready finds its bytes.
    Near(words_[frame]).add_release(kReadyState - kLoadingState);
  }

  // A claimed line cannot be loaded; `failure` tells those who wait for it. Whoever asks from now on loads it anew.
  GPUNVME_DEVICE void fail(std::uint32_t frame, std::uint64_t failure) const {
    Near(failures_[frame]).store_relaxed(failure);
    // Release: whoever sees that it failed sees why.
    Near(words_[frame]).add_release(kFailedState - kLoadingState);
  }

  // Another number whenever a frame of the line's set was given out.
  GPUNVME_DEVICE std::uint32_t turn(std::uint64_t line) const {
    return Near(controls_[set_of(line)].hand).load_relaxed();
  }

  // What has become of a line that the caller has pinned: kReady, kLoading, or kAbsent with the reason.
  GPUNVME_DEVICE Look look(std::uint32_t frame, std::uint64_t& failure) const {
    const std::uint64_t state = Near(words_[frame]).load_acquire() & kState;
    if (state == kFailedState) failure = Near(failures_[frame]).load_relaxed();
    return state == kReadyState ? Look::kReady : state == kFailedState ? Look::kAbsent : Look::kLoading;
  }

 private:
  // A word: state 1:0, used 2, pins 26:3, line 63:27. The lowest bit says that the frame has the name of its line.
  static constexpr std::uint64_t kState = 3;
  static constexpr std::uint64_t kNamed = 1;
  static constexpr std::uint64_t kLoadingState = 1;
  static constexpr std::uint64_t kFailedState = 2;
  static constexpr std::uint64_t kReadyState = 3;
  static constexpr std::uint64_t kUsed = 4;
  static constexpr std::uint64_t kPin = 8;
  static constexpr std::uint32_t kLineAt = 64 - kLineBits;
  static constexpr std::uint64_t kPins = (std::uint64_t{1} << kLineAt) - kPin;

  GPUNVME_DEVICE static bool has(std::uint64_t word, std::uint64_t line) {
    return word >> kLineAt == line && (word & kNamed) != 0;
  }

  // line % sets_, without a division: neighbours are in different sets.
  GPUNVME_DEVICE std::uint64_t set_of(std::uint64_t line) const {
#if defined(__CUDA_ARCH__)
    std::uint64_t set = line - __umul64hi(line, inverse_) * sets_;
#else
    __extension__ using Wide = unsigned __int128;
    std::uint64_t set = line - static_cast<std::uint64_t>(Wide{line} * inverse_ >> 64) * sets_;
#endif
    while (set >= sets_) set -= sets_;  // once, for lines of kLineBits
    return set;
  }

  // The frame that has the line's name, from `first` on.
  GPUNVME_DEVICE std::uint32_t find(std::uint64_t line, std::uint64_t first) const {
    std::uint64_t seen[kWays];
    // All on their way at once.
    for (std::uint32_t way = 0; way < kWays; ++way) seen[way] = Near(words_[first + way]).load_relaxed();
    std::uint32_t frame = kNoFrame;
    for (std::uint32_t way = 0; way < kWays; ++way) {
      if (has(seen[way], line)) frame = static_cast<std::uint32_t>(first + way);
    }
    return frame;
  }

  // Under the set's lock: a frame for the line. Empty ones first, then by the clock: what was used since the hand
  // passed has a second chance.
  GPUNVME_DEVICE bool take(std::uint64_t set, std::uint64_t line, std::uint32_t count, std::uint32_t& frame,
                           bool& evicted) const {
    const std::uint64_t first = set * kWays;
    const std::uint64_t name = line << kLineAt | count * kPin | kLoadingState;
    Near hand(controls_[set].hand);
    const std::uint32_t before = hand.load_relaxed();
    for (std::uint32_t way = 0; way < kWays; ++way) {
      Near word(words_[first + way]);
      std::uint64_t seen = word.load_relaxed();
      if ((seen & (kPins | kNamed)) != 0) continue;
      // Acquire: those who pinned it before have read what they wanted.
      if (!word.compare_exchange_acquire(seen, name)) continue;
      frame = static_cast<std::uint32_t>(first + way);
      evicted = false;
      hand.store_relaxed(before + kWays);
      return true;
    }
    std::uint32_t way = before % kWays;
    for (std::uint32_t steps = 0; steps < 2 * kWays; ++steps) {
      Near word(words_[first + way]);
      frame = static_cast<std::uint32_t>(first + way);
      way = way + 1 < kWays ? way + 1 : 0;
      std::uint64_t seen = word.load_relaxed();
      if ((seen & kPins) != 0 || (seen & kState) != kReadyState) continue;
      if ((seen & kUsed) != 0) {
        word.and_relaxed(~kUsed);
      } else if (word.compare_exchange_acquire(seen, name)) {
        hand.store_relaxed((before - before % kWays + kWays) | way);
        evicted = true;
        return true;
      }
    }
    frame = kNoFrame;
    return false;
  }

  Atomic<std::uint64_t>* words_;
  unsigned char* memory_;
  std::uint64_t sets_;
  std::uint64_t inverse_;
  Control* controls_;
  Atomic<std::uint64_t>* failures_;
  std::uint32_t line_shift_;
};

}  // namespace gpunvme
