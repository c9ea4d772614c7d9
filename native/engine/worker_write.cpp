#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "worker.h"

namespace gpunvme {
namespace {

// Less than this is written through the page cache: O_DIRECT would wait for the drive for each small write.
constexpr std::uint64_t kSmallestDirectWrite = 1u << 20;

void write_buffered(const SourceFile& file, const std::uint8_t* data, std::uint64_t begin, std::uint64_t end) {
  while (begin < end) {
    const auto offset = static_cast<off_t>(begin);
    const ssize_t got = pwrite(file.fd(), data, end - begin, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw file_failure(errno, "cannot write", file.name(), offset);
    data += got;
    begin += static_cast<std::uint64_t>(got);
  }
}

}  // namespace

void Worker::write(Operation& operation) {
  const Piece& piece = operation.piece;
  // The same place in its page as in the file, so that what is aligned in the file is aligned in memory.
  operation.slot_begin = piece.begin / 4096 * 4096;
  const bool from_host = operation.job->options().device == kHost;
  const auto [first, last] = piece.extent->overlap(piece.begin, piece.end);
  if (from_host && last - first == 1) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(first->address) + (piece.begin - first->offset);
    const std::uint32_t align = operation.job->file(piece.extent->file).memory_align();
    const auto shift = reinterpret_cast<std::uintptr_t>(data) - piece.begin;
    if (shift % align == 0) return write_out(operation, data);
  }
  acquire_slot(operation, piece.end - operation.slot_begin, Slots::From::kTop);
  operation.counts.bounced = piece.end - piece.begin;
  if (!from_host) return copy_from_device(operation);
  for (const Segment* segment = first; segment != last; ++segment) {
    const std::uint64_t begin = std::max(piece.begin, segment->offset);
    const std::uint64_t end = std::min(piece.end, segment->offset + segment->nbytes);
    std::memcpy(operation.slot + (begin - operation.slot_begin),
                reinterpret_cast<const std::uint8_t*>(segment->address) + (begin - segment->offset), end - begin);
  }
  write_out(operation, operation.slot + (piece.begin - operation.slot_begin));
}

// Writes the piece from host memory: whole pages O_DIRECT where that helps, the ends through the page cache.
void Worker::write_out(Operation& operation, const std::uint8_t* data) {
  const Piece& piece = operation.piece;
  SourceFile& file = operation.job->file(piece.extent->file);
  if (operation.job->stopped()) return end(operation);
  // Whole pages: a page must not be written both ways at once.
  const std::uint64_t align = std::max<std::uint64_t>(4096, file.offset_align());
  const std::uint64_t middle = (piece.begin + align - 1) / align * align;
  const std::uint64_t middle_end = piece.end / align * align;
  const bool large = piece.extent->end - piece.extent->begin >= kSmallestDirectWrite;
  if (file.direct_fd() < 0 || !large || middle >= middle_end) {
    write_buffered(file, data, piece.begin, piece.end);
    operation.counts.cached += piece.end - piece.begin;
    return end(operation);
  }
  write_buffered(file, data, piece.begin, middle);
  write_buffered(file, data + (middle_end - piece.begin), middle_end, piece.end);
  operation.counts.cached += (middle - piece.begin) + (piece.end - middle_end);
  auto* const address = const_cast<std::uint8_t*>(data + (middle - piece.begin));
  operation.requests.push_back({&operation, &file, middle, static_cast<std::uint32_t>(middle_end - middle), address,
                                middle, middle_end, nullptr, -1});
  begin_requests(operation);
}

}  // namespace gpunvme
