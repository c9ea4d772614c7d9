// O_DIRECT reads and writes at depth for one worker: by io_uring, or by threads where io_uring is refused.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace gpunvme {

struct DirectRequest {
  int fd = -1;
  bool write = false;
  std::uint8_t* address = nullptr;
  std::uint32_t nbytes = 0;
  std::uint64_t offset = 0;
  void* tag = nullptr;
};

struct DirectResult {
  void* tag = nullptr;
  int result = 0;  // bytes, or a negative errno
};

// Used by one thread only.
class DirectQueue {
 public:
  // Never fails: threads do the work where io_uring is refused, or where GPUNVME_IO=threads asks for it.
  static std::unique_ptr<DirectQueue> make(unsigned depth);

  virtual ~DirectQueue() = default;
  // Expects room(). Started at the latest by the next reap().
  virtual void push(const DirectRequest& request) = 0;
  // Up to `most` completions; where none is there, waits for one at most `wait`.
  virtual std::size_t reap(DirectResult* results, std::size_t most, std::chrono::microseconds wait) = 0;
  virtual bool is_io_uring() const = 0;

  bool room() const { return in_flight_ < depth_; }
  unsigned in_flight() const { return in_flight_; }

 protected:
  explicit DirectQueue(unsigned depth) : depth_(depth) {}
  unsigned depth_;
  unsigned in_flight_ = 0;
};

// Why io_uring cannot be used in this process, or an empty string.
std::string io_uring_refusal();

}  // namespace gpunvme
