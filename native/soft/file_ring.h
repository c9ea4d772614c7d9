// Reads and flushes of an image that have to wait for its drive: by io_uring, so that the worker need not wait too.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "faults.h"
#include "prp_walk.h"
#include "queues.h"

struct io_uring;

namespace gpunvme::soft {

// Whose command it is, and what is to happen to its completion.
struct Ticket {
  SubmissionQueue* sq = nullptr;
  std::uint16_t cid = 0;
  Decision decision;
};

class FileRing {
 public:
  // `allowed`: false for a controller that is stepped, where everything is done on the spot.
  FileRing(int fd, bool allowed);
  ~FileRing();
  FileRing(const FileRing&) = delete;
  FileRing& operator=(const FileRing&) = delete;

  // Makes the ring at the first call. False: io_uring is refused here, or not wanted.
  bool usable();
  // There is none: it was tried, or is not wanted.
  bool is_refused() const { return ring_ == nullptr && (tried_ || !allowed_); }

  unsigned in_flight() const { return in_flight_; }
  unsigned room() const { return kDepth - in_flight_; }

  // Reads `nbytes` from `offset` into `segments`, of which `done` bytes are there already. `generation`: of the IOVA
  // table's snapshot that the segments come from. Only while there is room.
  void read(const Ticket& ticket, const Segments& segments, std::uint64_t offset, std::uint64_t nbytes,
            std::uint64_t done, std::uint64_t generation);
  void flush(const Ticket& ticket);

  struct Finished {
    Ticket ticket;
    bool flush;
    int error;             // errno, or 0
    std::uint64_t bytes;   // read by io_uring
    std::uint64_t nbytes;  // of the command
  };
  // Submits what is new and takes back what has finished; waits for at least one if told so.
  void reap(std::vector<Finished>& finished, bool wait);

  // The oldest snapshot that reads in flight were resolved by, or `newest`.
  std::uint64_t oldest_generation(std::uint64_t newest) const;

 private:
  struct Operation;
  void submit(Operation& operation);
  bool advance(Operation& operation, int result);

  static constexpr unsigned kDepth = 128;

  int fd_;
  bool allowed_;
  bool tried_ = false;
  std::unique_ptr<io_uring> ring_;
  std::vector<std::unique_ptr<Operation>> operations_;
  std::vector<Operation*> free_;
  unsigned in_flight_ = 0;
};

}  // namespace gpunvme::soft
