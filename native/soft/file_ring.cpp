#include "file_ring.h"

#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <climits>

namespace gpunvme::soft {

struct FileRing::Operation {
  Ticket ticket;
  bool busy = false;
  bool flush = false;
  int error = 0;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t done = 0;
  std::uint64_t by_ring = 0;
  std::uint64_t generation = 0;
  Segments segments;  // all of them
  Segments rest;      // what is not read yet; the kernel looks at it while the operation is in flight
};

FileRing::FileRing(int fd, bool allowed) : fd_(fd), allowed_(allowed && fd >= 0) {}

FileRing::~FileRing() {
  std::vector<Finished> finished;
  while (in_flight_ > 0) reap(finished, true);
  if (ring_) io_uring_queue_exit(ring_.get());
}

bool FileRing::usable() {
  if (tried_ || !allowed_) return ring_ != nullptr;
  tried_ = true;
  auto ring = std::make_unique<io_uring>();
  if (io_uring_queue_init(kDepth, ring.get(), 0) != 0) return false;
  ring_ = std::move(ring);
  for (unsigned i = 0; i < kDepth; ++i) {
    free_.push_back(operations_.emplace_back(std::make_unique<Operation>()).get());
  }
  return true;
}

void FileRing::read(const Ticket& ticket, const Segments& segments, std::uint64_t offset, std::uint64_t nbytes,
                    std::uint64_t done, std::uint64_t generation) {
  Operation& operation = *free_.back();
  free_.pop_back();
  operation.ticket = ticket;
  operation.busy = true;
  operation.flush = false;
  operation.error = 0;
  operation.offset = offset;
  operation.nbytes = nbytes;
  operation.done = done;
  operation.by_ring = 0;
  operation.generation = generation;
  operation.segments = segments;
  ++in_flight_;
  submit(operation);
}

void FileRing::flush(const Ticket& ticket) {
  Operation& operation = *free_.back();
  free_.pop_back();
  operation.ticket = ticket;
  operation.busy = true;
  operation.flush = true;
  operation.error = 0;
  operation.nbytes = operation.done = operation.by_ring = 0;
  operation.generation = IovaTable::Reader::kOffline;  // it touches no memory of the host's
  ++in_flight_;
  submit(operation);
}

void FileRing::submit(Operation& operation) {
  // Never null: there are no more operations than entries, and each has at most one entry at a time.
  io_uring_sqe* const entry = io_uring_get_sqe(ring_.get());
  if (operation.flush) {
    io_uring_prep_fsync(entry, fd_, IORING_FSYNC_DATASYNC);
  } else {
    operation.rest.clear();
    std::uint64_t skip = operation.done;
    for (const iovec& segment : operation.segments) {
      if (skip >= segment.iov_len) {
        skip -= segment.iov_len;
        continue;
      }
      if (operation.rest.size() == IOV_MAX) break;
      operation.rest.push_back({static_cast<std::byte*>(segment.iov_base) + skip, segment.iov_len - skip});
      skip = 0;
    }
    io_uring_prep_readv(entry, fd_, operation.rest.data(), static_cast<unsigned>(operation.rest.size()),
                        operation.offset + operation.done);
  }
  io_uring_sqe_set_data(entry, &operation);
}

// True: finished, well or badly.
bool FileRing::advance(Operation& operation, int result) {
  if (result == -EINTR || result == -EAGAIN) return false;
  if (result < 0) {
    operation.error = -result;
    return true;
  }
  if (operation.flush) return true;
  if (result == 0) {
    operation.error = EIO;  // the image was truncated
    return true;
  }
  operation.done += static_cast<std::uint64_t>(result);
  operation.by_ring += static_cast<std::uint64_t>(result);
  return operation.done >= operation.nbytes;
}

void FileRing::reap(std::vector<Finished>& finished, bool wait) {
  finished.clear();
  if (wait) {
    io_uring_submit_and_wait(ring_.get(), 1);
  } else {
    io_uring_submit(ring_.get());
  }
  unsigned head = 0;
  unsigned count = 0;
  io_uring_cqe* entry = nullptr;
  std::vector<Operation*> again;
  io_uring_for_each_cqe(ring_.get(), head, entry) {
    ++count;
    auto& operation = *static_cast<Operation*>(io_uring_cqe_get_data(entry));
    if (!advance(operation, entry->res)) {
      again.push_back(&operation);
      continue;
    }
    finished.push_back({operation.ticket, operation.flush, operation.error, operation.by_ring, operation.nbytes});
    operation.busy = false;
    free_.push_back(&operation);
    --in_flight_;
  }
  io_uring_cq_advance(ring_.get(), count);
  for (Operation* operation : again) submit(*operation);
}

std::uint64_t FileRing::oldest_generation(std::uint64_t newest) const {
  std::uint64_t oldest = newest;
  for (const auto& operation : operations_) {
    if (operation->busy) oldest = std::min(oldest, operation->generation);
  }
  return oldest;
}

}  // namespace gpunvme::soft
