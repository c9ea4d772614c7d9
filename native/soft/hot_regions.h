// The parts of an image that are read again and again, while the page cache has them: copied from a mapping of the
// file, where a system call for each block would cost more than the copy.
//
// A mapping shows what is in the page cache, so that writes, holes punched and O_DIRECT by others are seen at once.
// Two things it does not do as a read does, and both are looked after here. A page that is not there any more is read
// from the drive while the queue waits: a region is believed in only for kBelievedMs after all of it was seen in the
// page cache. And a file that was cut short raises SIGBUS, or shows zeros in its last page: then the file is asked.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "file_mapping.h"

namespace gpunvme::soft {

class HotRegions {
 public:
  // How long it may be that pages which were evicted meanwhile are waited for.
  static constexpr std::uint32_t kBelievedMs = 250;

  // Of a file, which stays open. Null where it cannot be mapped.
  static std::unique_ptr<HotRegions> of(int fd, std::uint64_t nbytes);

  // Copies the range if all of it is hot; false if the file has to be asked. Any thread.
  bool read(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes);
  // A hint that this range is read soon.
  void prefetch(std::uint64_t offset, std::uint64_t nbytes) const;
  // The page cache has served this range to somebody who asked the file.
  void count_hit(std::uint64_t offset, std::uint64_t nbytes);

 private:
  HotRegions(int fd, std::unique_ptr<FileMapping> mapping);
  bool is_hot(std::uint64_t region);
  bool is_cached(std::uint64_t region) const;
  bool look(std::uint64_t region);
  void cool(std::uint64_t region);
  bool has_been_cut(const iovec* segments, std::size_t count, std::uint64_t end) const;

  const int fd_;
  const std::unique_ptr<FileMapping> mapping_;
  // Of each region: the time, in milliseconds, at which all of it was in the page cache; 0: it is not copied from.
  const std::unique_ptr<std::atomic<std::uint32_t>[]> seen_;
};

}  // namespace gpunvme::soft
