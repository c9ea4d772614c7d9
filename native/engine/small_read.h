// A small read of cached bytes by the calling thread: waking a worker would cost more than the read.
#pragma once

#include <cstdint>

#include "job.h"
#include "source_file.h"

namespace gpunvme {

inline constexpr std::uint64_t kMostSmallBytes = 64u << 10;

// True if the whole range was in the page cache and is now at `address` on `device`. False says nothing of what was
// written there; the engine then reads it all. Never waits for a drive. On a GPU the copy is ordered on `stream`, and
// waited for.
bool small_read(const SourceFile& file, std::uint64_t offset, std::uint64_t nbytes, int device, std::uint64_t stream,
                std::uint64_t address);

}  // namespace gpunvme
