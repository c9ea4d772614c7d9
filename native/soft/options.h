// What a software controller is made with.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace gpunvme::soft {

struct Options {
  std::optional<std::string> path;  // the image; none: memory
  std::uint64_t size = 0;           // bytes; 0: as large as the image is
  std::uint32_t lba_bytes = 512;    // of one logical block: 512 or 4096
  unsigned mdts = 5;                // largest transfer: 2^mdts pages of the smallest size; 0: no limit
  unsigned queues = 8;              // I/O queue pairs that there may be
  unsigned dstrd = 0;               // CAP.DSTRD: doorbells are 4 << dstrd bytes apart
  unsigned threads = 1;             // workers; 0: the caller's own thread, by Controller::step
  std::uint32_t mqes = 1024;        // entries that an I/O queue may have
  unsigned mpsmin = 0;              // memory pages are at least 4096 << mpsmin bytes …
  unsigned mpsmax = 4;              // … and at most 4096 << mpsmax
  bool cqr = true;                  // CAP.CQR: queues have to be contiguous
  bool vwc = true;                  // a volatile write cache: writes last from the next Flush on
  unsigned namespaces = 1;          // the image is divided equally
  unsigned to = 20;                 // CAP.TO, 500 ms
  std::string faults;               // see faults.h
  std::uint64_t seed = 0;
  std::string serial;  // up to 20 ASCII characters; empty: made from the image's identity
  bool read_only = false;
};

// Throws std::invalid_argument with the option's name, what it was and what it may be.
void check(const Options& options);

// "64.0 MiB (67108864 bytes)", for messages.
std::string describe_bytes(std::uint64_t nbytes);

}  // namespace gpunvme::soft
