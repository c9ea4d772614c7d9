// The memory that a page cache's frames are made of.
#pragma once

#include <cstdint>
#include <vector>

#include "gpunvme/page_frames.h"

namespace testing {

using gpunvme::PageFrames;

// The memory of a cache's frames.
struct FrameMemory {
  struct alignas(gpunvme::kApart) Unit {
    unsigned char bytes[gpunvme::kApart];
  };
  FrameMemory(std::uint64_t sets, std::uint32_t shift)
      : words(sets * PageFrames::kWays),
        controls(sets),
        failures(sets * PageFrames::kWays),
        lines((sets * PageFrames::kWays << shift) / sizeof(Unit)) {
    frames.initialise(sets, shift, words.data(), controls.data(), failures.data(), lines.data());
  }
  std::vector<std::uint64_t> words;
  std::vector<std::uint64_t> controls;
  std::vector<std::uint64_t> failures;
  std::vector<Unit> lines;
  PageFrames frames;
};

}  // namespace testing
