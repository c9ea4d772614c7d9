#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "page_cache.h"
#include "worker.h"

namespace gpunvme {
namespace {

constexpr std::uint64_t kDirectPiece = Slots::kBlock;
// A range this small that is partly cached is read O_DIRECT as a whole.
constexpr std::uint64_t kSmallestRange = 128u << 10;
constexpr std::size_t kMostVectors = 256;

std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) { return value & ~(alignment - 1); }
std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return align_down(value + alignment - 1, alignment);
}

// Cuts a range into O_DIRECT pieces at multiples of their size in the file.
void push_direct(const Piece& range, std::uint64_t begin, std::uint64_t end, std::vector<Piece>& pieces) {
  for (std::uint64_t at = begin; at < end;) {
    const std::uint64_t next = std::min(end, align_down(at, kDirectPiece) + kDirectPiece);
    pieces.push_back({Piece::Kind::kDirect, range.extent, nullptr, at, next});
    at = next;
  }
}

void split(const SourceFile& file, const Piece& range, std::uint64_t begin, std::uint64_t end,
           std::vector<Piece>& pieces) {
  const Residency found = residency(file, begin, end - begin);
  if (found == Residency::kAll) {
    Piece* last = pieces.empty() ? nullptr : &pieces.back();
    if (last != nullptr && last->kind == Piece::Kind::kCached && last->end == begin) {
      last->end = end;
    } else {
      pieces.push_back({Piece::Kind::kCached, range.extent, nullptr, begin, end});
    }
  } else if (found == Residency::kNone || end - begin <= kSmallestRange) {
    push_direct(range, begin, end, pieces);
  } else {
    const std::uint64_t half = (end - begin + 1) / 2;
    const std::uint64_t middle = align_up(begin + half, kSmallestRange);
    if (middle >= end) return push_direct(range, begin, end, pieces);
    split(file, range, begin, middle, pieces);
    split(file, range, middle, end, pieces);
  }
}

// A preadv2 that goes on after signals. `flags` loses RWF_NOWAIT where the file system does not know it.
ssize_t read_vectors(int fd, const iovec* vectors, std::size_t count, std::uint64_t offset, int& flags) {
  for (;;) {
    const ssize_t got = preadv2(fd, vectors, static_cast<int>(count), static_cast<off_t>(offset), flags);
    if (got >= 0) return got;
    if (errno == EOPNOTSUPP && flags != 0) {
      flags = 0;
    } else if (errno != EINTR) {
      return -errno;
    }
  }
}

}  // namespace

void Worker::classify(Job& job, const Piece& window) {
  const SourceFile& file = job.file(window.extent->file);
  std::vector<Piece> pieces;
  if (file.direct_fd() < 0) {
    pieces.push_back({Piece::Kind::kBuffered, window.extent, nullptr, window.begin, window.end});
  } else {
    split(file, window, window.begin, window.end, pieces);
  }
  job.push(pieces, operations_.empty());
}

// Reads a piece out of the page cache: what is there without waiting; the rest by waiting if we may, else O_DIRECT.
void Worker::read_through_cache(Operation& operation, bool may_block) {
  Piece& piece = operation.piece;
  const SourceFile& file = operation.job->file(piece.extent->file);
  const bool to_host = operation.job->options().device == kHost;
  if (!to_host) {
    acquire_slot(operation, piece.end - piece.begin, Slots::From::kBottom);
    operation.slot_begin = piece.begin;
  }
  int flags = RWF_NOWAIT;
  std::uint64_t at = piece.begin;
  std::uint64_t cached_end = 0;  // where reading began to wait, once it did
  iovec vectors[kMostVectors];
  while (at < piece.end && !operation.job->stopped()) {
    std::size_t count = 0;
    if (!to_host) {
      vectors[count++] = {operation.slot + (at - piece.begin), piece.end - at};
    } else {
      std::uint64_t next = at;
      const auto [first, last] = piece.extent->overlap(at, piece.end);
      for (const Segment* segment = first; segment != last && count + 2 <= kMostVectors; ++segment) {
        if (segment->offset > next) {
          vectors[count++] = {gap_.data(), segment->offset - next};
          next = segment->offset;
        }
        const std::uint64_t skip = next - segment->offset;
        const std::uint64_t nbytes = std::min(piece.end, segment->offset + segment->nbytes) - next;
        vectors[count++] = {reinterpret_cast<void*>(segment->address + skip), nbytes};
        next += nbytes;
      }
    }
    if (count == 0) {  // nothing but a gap is left
      at = piece.end;
      break;
    }
    const ssize_t got = read_vectors(file.fd(), vectors, count, at, flags);
    if (got == -EAGAIN) {
      if (!may_block) break;
      cached_end = at;
      flags = 0;
    } else if (got < 0) {
      throw file_failure(static_cast<int>(-got), "cannot read", file.name(), static_cast<std::int64_t>(at));
    } else if (got == 0) {
      throw truncated_failure(file.name(), static_cast<std::int64_t>(at));
    } else {
      at += static_cast<std::uint64_t>(got);
    }
  }
  if (at < piece.end && !operation.job->stopped()) {
    std::vector<Piece> rest;
    push_direct(piece, at, piece.end, rest);
    operation.job->push(rest, false);
  }
  piece.end = at;
  const std::uint64_t moved = piece.extent->wanted(piece.begin, piece.end);
  const bool waited = cached_end != 0 || (may_block && flags == 0 && !file.in_memory());
  operation.counts.cached = waited ? piece.extent->wanted(piece.begin, std::max(cached_end, piece.begin)) : moved;
  operation.counts.buffered = moved - operation.counts.cached;
  if (to_host || moved == 0 || operation.job->stopped()) return end(operation);
  operation.counts.bounced = moved;
  copy_to_device(operation);
}

// Reads a piece O_DIRECT: into its destination where host memory and alignment allow it, else into a slot.
void Worker::read_direct(Operation& operation) {
  const Piece& piece = operation.piece;
  SourceFile& file = operation.job->file(piece.extent->file);
  if (file.direct_fd() < 0) return read_through_cache(operation, true);
  const std::uint64_t align = file.offset_align();
  const auto request = [&](std::uint64_t begin, std::uint64_t end, std::uint8_t* address, std::uint8_t* deliver) {
    const std::uint64_t from = align_down(begin, align);
    operation.requests.push_back({&operation, &file, from, static_cast<std::uint32_t>(align_up(end, align) - from),
                                  address, begin, end, deliver, -1});
  };
  const auto [first, last] = piece.extent->overlap(piece.begin, piece.end);
  if (operation.job->options().device == kHost && last - first == 1) {
    // A piece may begin or end in a gap: beyond the segment the memory is somebody else's.
    const std::uint64_t begin = std::max(piece.begin, first->offset);
    const std::uint64_t end = std::min(piece.end, first->offset + first->nbytes);
    std::uint8_t* const to = reinterpret_cast<std::uint8_t*>(first->address) + (begin - first->offset);
    const std::uint64_t middle = align_up(begin, align);
    const std::uint64_t middle_end = align_down(end, align);
    const auto address = reinterpret_cast<std::uintptr_t>(to + (middle - begin));
    if (middle < middle_end && address % file.memory_align() == 0 && align <= Slots::kBlock / 2) {
      operation.in_place = true;
      if (begin < middle || middle_end < end) acquire_slot(operation, Slots::kBlock, Slots::From::kTop);
      if (begin < middle) request(begin, middle, operation.slot, to);
      request(middle, middle_end, to + (middle - begin), nullptr);
      if (middle_end < end) {
        request(middle_end, end, operation.slot + Slots::kBlock / 2, to + (middle_end - begin));
      }
      return begin_requests(operation);
    }
  }
  operation.slot_begin = align_down(piece.begin, align);
  acquire_slot(operation, align_up(piece.end, align) - operation.slot_begin, Slots::From::kTop);
  request(piece.begin, piece.end, operation.slot, nullptr);
  begin_requests(operation);
}

// Everything that the piece asked of the drive has come.
void Worker::read_done(Operation& operation) {
  const Piece& piece = operation.piece;
  if (operation.job->stopped()) return end(operation);
  if (operation.job->options().device != kHost) {
    operation.counts.bounced = operation.counts.total();
    return copy_to_device(operation);
  }
  if (piece.gather == nullptr && !operation.in_place) {
    const auto [first, last] = piece.extent->overlap(piece.begin, piece.end);
    for (const Segment* segment = first; segment != last; ++segment) {
      const std::uint64_t begin = std::max(piece.begin, segment->offset);
      const std::uint64_t end = std::min(piece.end, segment->offset + segment->nbytes);
      std::memcpy(reinterpret_cast<std::uint8_t*>(segment->address) + (begin - segment->offset),
                  operation.slot + (begin - operation.slot_begin), end - begin);
    }
    operation.counts.bounced = operation.counts.total();
  }
  end(operation);
}

}  // namespace gpunvme
