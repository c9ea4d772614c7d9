// Blocks at random: where the next one begins no hardware can guess, but whoever copies a list of them knows it.
#pragma once

#include <algorithm>
#include <cstddef>

namespace gpunvme {

// How many blocks ahead of the one that is being copied. Found by measuring, as the size is: docs/performance.md.
constexpr std::size_t kPrefetchAhead = 2;

// Begins to bring in the start of a block: the walk through the page tables, and the first lines, after which the
// hardware sees a stream. Only a hint, which faults nowhere: the block may be unmapped, or behind the end of its file.
inline void prefetch(const void* block, std::size_t nbytes) {
  constexpr std::size_t kLine = 64;
  constexpr std::size_t kMost = 4 * kLine;
  const auto* const bytes = static_cast<const char*>(block);
  for (std::size_t at = 0; at < std::min(nbytes, kMost); at += kLine) __builtin_prefetch(bytes + at);
}

}  // namespace gpunvme
