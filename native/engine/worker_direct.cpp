#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "worker.h"

namespace gpunvme {
namespace {

constexpr unsigned kDepth = 64;

// Reads or writes all of a range through the page cache; what O_DIRECT left over.
void finish_buffered(const SourceFile& file, bool write, std::uint8_t* address, std::uint64_t from, std::uint64_t to) {
  while (from < to) {
    const auto offset = static_cast<off_t>(from);
    const ssize_t got =
        write ? pwrite(file.fd(), address, to - from, offset) : pread(file.fd(), address, to - from, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw file_failure(errno, write ? "cannot write" : "cannot read", file.name(), offset);
    if (got == 0) throw truncated_failure(file.name(), offset);
    address += got;
    from += static_cast<std::uint64_t>(got);
  }
}

}  // namespace

DirectQueue& Worker::direct() {
  // Made in this thread: a ring with a single issuer belongs to the thread that makes it.
  if (direct_ == nullptr) direct_ = DirectQueue::make(kDepth);
  return *direct_;
}

void Worker::begin_requests(Operation& operation) {
  operation.job->note_io(direct().is_io_uring());
  pumping_.push_back(&operation);
  pump();
}

// Starts requests, oldest operation first, while there is room in the queue.
void Worker::pump() {
  while (!pumping_.empty()) {
    Operation& operation = *pumping_.front();
    const bool write = operation.piece.kind == Piece::Kind::kWrite;
    if (operation.job->stopped()) operation.next_request = operation.requests.size();
    while (operation.next_request < operation.requests.size()) {
      Request& request = operation.requests[operation.next_request];
      if (!direct().room()) return;
      if (request.address == nullptr) {
        if (bounce_memory_ == nullptr) {
          bounce_memory_.reset(static_cast<std::uint8_t*>(::operator new[](kBounce* kDepth, std::align_val_t{4096})));
          free_bounces_.resize(kDepth);
          std::iota(free_bounces_.begin(), free_bounces_.end(), 0);
        }
        if (free_bounces_.empty()) return;
        request.bounce = free_bounces_.back();
        free_bounces_.pop_back();
        request.address = bounce_memory_.get() + static_cast<std::size_t>(request.bounce) * kBounce;
      }
      direct().push(
          {request.file->direct_descriptor(), write, request.address, request.nbytes, request.from, &request});
      ++operation.next_request;
      ++operation.pending;
    }
    pumping_.pop_front();
    if (operation.pending == 0) end(operation);  // its job was stopped before it began
  }
}

void Worker::request_done(Request& request, int result) {
  Operation& operation = *request.operation;
  SourceFile& file = *request.file;
  const bool write = operation.piece.kind == Piece::Kind::kWrite;
  if ((result == -EINTR || result == -EAGAIN) && !operation.job->stopped()) {
    direct().push({file.direct_descriptor(), write, request.address, request.nbytes, request.from, &request});
    return;
  }
  --operation.pending;
  // Gaps between segments are read too, and count as nothing.
  const auto wanted = [&](std::uint64_t begin, std::uint64_t end) {
    return operation.piece.extent != nullptr ? operation.piece.extent->wanted(begin, end) : end - begin;
  };
  try {
    std::uint64_t direct_end = 0;
    if (result >= 0) {
      const std::uint64_t got_end = request.from + static_cast<std::uint64_t>(result);
      direct_end = std::clamp(got_end, request.wanted_begin, request.wanted_end);
    } else if (result == -EINVAL) {
      // Aligned as the file system said, and refused: some stacked file systems promise more than they hold.
      file.refuse_direct();
      direct_end = request.wanted_begin;
    } else {
      throw file_failure(-result, write ? "cannot write" : "cannot read", file.name(),
                         static_cast<std::int64_t>(request.wanted_begin));
    }
    operation.counts.direct += wanted(request.wanted_begin, direct_end);
    finish_buffered(file, write, request.address + (direct_end - request.from), direct_end, request.wanted_end);
    (write ? operation.counts.cached : operation.counts.buffered) += wanted(direct_end, request.wanted_end);
    if (request.deliver != nullptr && !operation.job->stopped()) {
      const std::uint64_t nbytes = request.wanted_end - request.wanted_begin;
      std::memcpy(request.deliver, request.address + (request.wanted_begin - request.from), nbytes);
      operation.counts.bounced += nbytes;
    }
  } catch (const Failure& failure) {
    operation.job->stop(failure);
    operation.next_request = operation.requests.size();
    std::erase(pumping_, &operation);
  }
  if (request.bounce >= 0) free_bounces_.push_back(request.bounce);
  if (operation.pending == 0 && operation.next_request == operation.requests.size()) {
    std::erase(pumping_, &operation);
    if (write) return end(operation);
    try {
      read_done(operation);
    } catch (const Failure& failure) {
      fail(operation, failure);
    }
  }
}

}  // namespace gpunvme
