#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "page_cache.h"
#include "worker.h"

namespace gpunvme {
namespace {

Residency region_residency(Gather& gather, const SourceFile& file, std::uint64_t region) {
  std::atomic<std::uint8_t>& known = gather.regions[region];
  std::uint8_t value = known.load(std::memory_order_relaxed);
  if (value == 0) {  // two workers may both ask; they get about the same answer
    const std::uint64_t begin = region * FileMapping::kRegion;
    const std::uint64_t nbytes = std::min(FileMapping::kRegion, gather.file_size - begin);
    value = static_cast<std::uint8_t>(1 + static_cast<std::uint8_t>(residency(file, begin, nbytes)));
    known.store(value, std::memory_order_relaxed);
  }
  return static_cast<Residency>(value - 1);
}

}  // namespace

void Worker::gather(Operation& operation) {
  Gather& gather = *operation.piece.gather;
  SourceFile& file = operation.job->file(gather.file);
  const std::uint64_t begin = operation.piece.begin;
  const std::uint64_t end = operation.piece.end;
  auto* base = reinterpret_cast<std::uint8_t*>(gather.address + begin * gather.nbytes);
  if (operation.job->options().device != kHost) {
    acquire_slot(operation, (end - begin) * gather.nbytes, Slots::From::kBottom);
    base = operation.slot;
  }
  std::vector<MappedRange> mapped;
  std::uint64_t furthest = 0;
  for (std::uint64_t i = begin; i < end && !operation.job->stopped();) {
    const auto offset = static_cast<std::uint64_t>(gather.offsets[i]);
    std::uint64_t next = i + 1;
    while (next < end && static_cast<std::uint64_t>(gather.offsets[next]) == offset + (next - i) * gather.nbytes)
      ++next;
    const std::uint64_t nbytes = (next - i) * gather.nbytes;
    if (offset > gather.file_size || nbytes > gather.file_size - offset) {
      throw truncated_failure(file.name(), static_cast<std::int64_t>(offset));
    }
    furthest = std::max(furthest, offset + nbytes);
    std::uint8_t* const to = base + (i - begin) * gather.nbytes;
    if (!gather_cached(operation, file, offset, nbytes, to, mapped)) gather_direct(operation, file, offset, nbytes, to);
    i = next;
  }
  if (!mapped.empty()) {
    contain_sigbus();
    const std::size_t copied = copy_mapped(mapped.data(), mapped.size());
    if (copied < mapped.size()) {
      const auto offset = mapped[copied].from - file.mapping()->data();
      throw truncated_failure(file.name(), offset);
    }
    for (const MappedRange& range : mapped) operation.counts.mapped += range.nbytes;
    operation.counts.cached += operation.counts.mapped;
  }
  // Between the end of a file and the end of its page a mapping reads as zeros, without a fault: if the file was cut
  // short meanwhile, they may be what was copied.
  if (const std::uint64_t size = file.size(); furthest > size) {
    throw truncated_failure(file.name(), static_cast<std::int64_t>(size));
  }
  if (!operation.requests.empty()) return begin_requests(operation);
  read_done(operation);
}

// Serves one read from the page cache, now or by adding it to `mapped`; false if the drive has to be asked.
bool Worker::gather_cached(Operation& operation, SourceFile& file, std::uint64_t offset, std::uint64_t nbytes,
                           std::uint8_t* to, std::vector<MappedRange>& mapped) {
  Gather& gather = *operation.piece.gather;
  const bool direct_possible = file.direct_fd() >= 0 && file.offset_align() <= kBounce / 2;
  const std::uint64_t region = FileMapping::region_of(offset);
  const bool one_region = region == FileMapping::region_of(offset + nbytes - 1);
  Residency found = Residency::kSome;
  if (gather.regions != nullptr && one_region) found = region_residency(gather, file, region);
  const bool region_cached = found == Residency::kAll;
  if (found == Residency::kSome) found = residency(file, offset, nbytes);
  if (found != Residency::kAll && direct_possible) return false;

  FileMapping* const mapping = region_cached ? file.mapping() : nullptr;
  if (mapping != nullptr && offset + nbytes <= mapping->nbytes()) {
    if (!mapping->is_populated(region) && mapping->count_hit(region, gather.dense)) mapping->populate(region);
    if (mapping->is_populated(region)) {
      mapped.push_back({to, mapping->data() + offset, nbytes});
      return true;
    }
  }

  int flags = direct_possible ? RWF_NOWAIT : 0;
  std::uint64_t done = 0;
  while (done < nbytes) {
    const iovec vector{to + done, nbytes - done};
    const ssize_t got = preadv2(file.fd(), &vector, 1, static_cast<off_t>(offset + done), flags);
    if (got > 0) {
      done += static_cast<std::uint64_t>(got);
    } else if (got == 0) {
      throw truncated_failure(file.name(), static_cast<std::int64_t>(offset + done));
    } else if (errno == EOPNOTSUPP && flags != 0) {
      flags = 0;
    } else if (errno == EAGAIN && flags != 0) {
      return false;
    } else if (errno != EINTR) {
      throw file_failure(errno, "cannot read", file.name(), static_cast<std::int64_t>(offset + done));
    }
  }
  (found == Residency::kAll ? operation.counts.cached : operation.counts.buffered) += nbytes;
  return true;
}

// Adds O_DIRECT requests for one read: one in place where alignment allows, else as many as bounce buffers hold.
void Worker::gather_direct(Operation& operation, SourceFile& file, std::uint64_t offset, std::uint64_t nbytes,
                           std::uint8_t* to) {
  const std::uint64_t align = file.offset_align();
  const auto address = reinterpret_cast<std::uintptr_t>(to);
  if (offset % align == 0 && nbytes % align == 0 && address % file.memory_align() == 0) {
    operation.requests.push_back(
        {&operation, &file, offset, static_cast<std::uint32_t>(nbytes), to, offset, offset + nbytes, nullptr, -1});
    return;
  }
  for (std::uint64_t at = offset; at < offset + nbytes;) {
    const std::uint64_t from = at / align * align;
    const std::uint64_t end = std::min(offset + nbytes, from + kBounce);
    const std::uint64_t covered = (end + align - 1) / align * align - from;
    operation.requests.push_back(
        {&operation, &file, from, static_cast<std::uint32_t>(covered), nullptr, at, end, to + (at - offset), -1});
    at = end;
  }
}

}  // namespace gpunvme
