// What a controller's blocks are kept in: memory, or an image file.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "options.h"

namespace gpunvme::soft {

class Backend {
 public:
  // Memory, or the image, locked. Throws Failure with the file's name and what to do: it cannot be opened, is locked by
  // another controller, too small, or not a whole number of blocks.
  static std::unique_ptr<Backend> open(const Options& options);

  virtual ~Backend() = default;

  std::uint64_t size() const { return size_; }
  bool read_only() const { return read_only_; }
  // What makes this image different from others, for serial numbers.
  std::uint64_t identity() const { return identity_; }
  // Not null: all blocks are in this memory, to be copied directly.
  std::byte* memory() const { return memory_; }
  // Not negative: a file, which may also be read by io_uring.
  int fd() const { return fd_; }

  // Gives the image free. Nothing else may be called after this.
  virtual void close() {}

  // Each returns 0 or an errno. The segments hold `nbytes` together.
  virtual int read(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes) = 0;
  // `durable`: on the media when this returns.
  virtual int write(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes,
                    bool durable) = 0;
  virtual int flush() = 0;
  // The range reads as zeroes from now on; `deallocate`: its space may be given back.
  virtual int zero(std::uint64_t offset, std::uint64_t nbytes, bool deallocate) = 0;
  // A hint that this range is read soon.
  virtual void prefetch(std::uint64_t offset, std::uint64_t nbytes) const = 0;
  // Reads the range where that takes no system call. False: it does, and the segments may hold anything.
  virtual bool read_mapped(const iovec*, std::size_t, std::uint64_t, std::uint64_t) { return false; }
  // What can be read without waiting for a drive: bytes from the start of the range, 0 for nothing.
  virtual std::uint64_t read_cached(const iovec* segments, std::size_t count, std::uint64_t offset,
                                    std::uint64_t nbytes) = 0;

 protected:
  std::uint64_t size_ = 0;
  std::uint64_t identity_ = 0;
  std::byte* memory_ = nullptr;
  int fd_ = -1;
  bool read_only_ = false;
};

std::unique_ptr<Backend> open_memory(const Options& options);
std::unique_ptr<Backend> open_image(const Options& options);

}  // namespace gpunvme::soft
