// Copying out of a file's mapping. Pages of a file that was truncated since are gone and touching them raises SIGBUS;
// here that ends the copy instead of the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpunvme {

struct MappedRange {
  std::uint8_t* to;
  const std::uint8_t* from;
  std::size_t nbytes;
};

// Puts our SIGBUS handler in front of whatever is installed, if it is not there already. Faults elsewhere are handed
// to the handler that was there before.
void contain_sigbus();

// Copies the ranges in order; returns how many were copied whole before one faulted (`count`: all).
std::size_t copy_mapped(const MappedRange* ranges, std::size_t count);

}  // namespace gpunvme
