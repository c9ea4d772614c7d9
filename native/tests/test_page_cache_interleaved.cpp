// The words of a page cache's frames in orders that real threads seldom take.
#include <vector>

#include "fibers.h"
#include "frame_memory.h"

using namespace testing;
using gpunvme::Look;

namespace {

// Who loads writes the line's number all over, in two halves; who reads checks both. `loads` counts loads per line that
// are on at once.
void use_frames(const PageFrames& frames, std::vector<int>& loading, std::uint64_t seed, unsigned count,
                std::uint64_t lines) {
  check::Random random(seed);
  for (unsigned i = 0; i < count;) {
    const std::uint64_t line = random.below(lines);
    std::uint32_t frame = PageFrames::kNoFrame;
    bool evicted = false;
    Look look = frames.pin(line, 1, frame);
    if (look == Look::kAbsent) look = frames.claim(line, 1, frame, evicted);
    if (look == Look::kBusy || look == Look::kFull) continue;
    auto* const words = reinterpret_cast<std::uint64_t*>(frames.data(frame));
    std::uint64_t failure = 0;
    if (look == Look::kMine) {
      CHECK_EQ(++loading[line], 1);
      words[0] = line;
      for (int turns = 0; turns < 20; ++turns) Fibers::step();
      words[1] = line;
      --loading[line];
      if (random.one_in(5)) {
        words[1] = ~std::uint64_t{0};
        frames.fail(frame, line + 1);
        frames.unpin(frame, 1);
        continue;
      }
      frames.publish(frame);
      look = Look::kReady;
    }
    while (look == Look::kLoading) {
      Fibers::step();
      look = frames.look(frame, failure);
    }
    if (look == Look::kReady) {
      CHECK_EQ(words[0], line);
      Fibers::step();
      CHECK_EQ(words[1], line);
      ++i;
    } else {
      CHECK_EQ(failure, line + 1);
    }
    frames.unpin(frame, 1);
  }
}

}  // namespace

TEST(in_every_order_no_line_is_loaded_twice_at_once_nor_read_under_anothers_name) {
  if (!kHasFibers) return;
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(check::rounds(150)); ++seed) {
    FrameMemory memory(1 + seed % 2, 4);
    std::vector<int> loading(12);
    Fibers fibers(seed);
    for (std::uint64_t fiber = 0; fiber < 10; ++fiber) {
      fibers.start([&, fiber] { use_frames(memory.frames, loading, seed * 100 + fiber, 12, 12); });
    }
    fibers.run();
    // Nothing is left pinned: all frames can be taken.
    for (std::uint64_t line = 100; line < 108; ++line) {
      std::uint32_t frame = PageFrames::kNoFrame;
      bool evicted = false;
      CHECK_EQ(memory.frames.claim(line * (1 + seed % 2), 1, frame, evicted), Look::kMine);
    }
  }
}
