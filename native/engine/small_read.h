// A small read of cached bytes into host memory, by the calling thread: waking a worker would cost more than the read.
#pragma once

#include <cstdint>

#include "source_file.h"

namespace gpunvme {

// True if the whole range was in the page cache and is now at `address`. False says nothing of what was written
// there; the engine then reads it all. Never waits for a drive.
bool small_read(const SourceFile& file, std::uint64_t offset, std::uint64_t nbytes, std::uint64_t address);

}  // namespace gpunvme
