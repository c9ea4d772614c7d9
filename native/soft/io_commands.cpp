#include "io_commands.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace gpunvme::soft {
namespace {

constexpr std::uint64_t kScratchBytes = 128 << 10;

// A request that would be wrong again.
constexpr std::uint16_t refuse(std::uint16_t code) { return code | nvme::kStatusDnr; }

std::uint16_t read_status(int error) { return error == 0 ? nvme::kStatusSuccess : nvme::kStatusUnrecoveredReadError; }

std::uint16_t write_status(int error) {
  if (error == 0) return nvme::kStatusSuccess;
  return error == ENOSPC || error == EDQUOT ? nvme::kStatusCapacityExceeded : nvme::kStatusWriteFault;
}

std::uint64_t first_lba(const nvme::Sqe& sqe) { return sqe.cdw10 | std::uint64_t{sqe.cdw11} << 32; }

}  // namespace

std::uint16_t IoCommands::execute(const nvme::Sqe& sqe, const Ticket& ticket) {
  std::uint16_t status = run(sqe, ticket);
  if (status != nvme::kStatusSuccess && status != kPending) [[unlikely]] {
    counters_.add(Count::kErrors);
    status |= nvme::kStatusMore;
    device_.events.log_error(ticket.sq->id, sqe.cid, status, sqe.nsid, first_lba(sqe));
  }
  return status;
}

std::uint16_t IoCommands::run(const nvme::Sqe& sqe, const Ticket& ticket) {
  // No fused commands, no SGLs.
  if ((sqe.flags & (nvme::kSqeFuseMask | nvme::kSqePsdtMask)) != 0) [[unlikely]] {
    return refuse(nvme::kStatusInvalidField);
  }
  switch (sqe.opcode) {
    case nvme::kNvmRead:
      return read(sqe, ticket);
    case nvme::kNvmWrite:
      return write(sqe);
    case nvme::kNvmFlush:
      return flush(sqe, ticket);
    case nvme::kNvmWriteZeroes:
      return write_zeroes(sqe);
    case nvme::kNvmDatasetManagement:
      return dataset_management(sqe);
    case nvme::kNvmCompare:
      return compare(sqe);
    case nvme::kNvmVerify:
      return verify(sqe);
    default:
      return refuse(nvme::kStatusInvalidOpcode);
  }
}

// The part of the image that SLBA and NLB mean.
std::uint16_t IoCommands::find_range(const nvme::Sqe& sqe, Range& range) const {
  const Namespace* const space = device_.find(sqe.nsid);
  if (space == nullptr) [[unlikely]]
    return refuse(nvme::kStatusInvalidNamespaceOrFormat);
  const std::uint64_t lba = first_lba(sqe);
  const std::uint64_t blocks = (sqe.cdw12 & nvme::kRwNlbMask) + 1;
  // Not lba + blocks: that may wrap around.
  if (lba >= space->blocks || blocks > space->blocks - lba) [[unlikely]]
    return refuse(nvme::kStatusLbaOutOfRange);
  range = {space->offset + (lba << device_.lba_shift), blocks << device_.lba_shift};
  return nvme::kStatusSuccess;
}

std::uint16_t IoCommands::find_data(const nvme::Sqe& sqe, std::uint64_t nbytes, bool write) {
  if (nbytes > device_.most_bytes) [[unlikely]]
    return refuse(nvme::kStatusInvalidField);
  return data_.find(dma_, sqe.prp1, sqe.prp2, nbytes, device_.page_bytes, write);
}

void IoCommands::prefetch(const nvme::Sqe& sqe) const {
  Range range;
  if (sqe.opcode != nvme::kNvmRead || find_range(sqe, range) != nvme::kStatusSuccess) return;
  device_.backend->prefetch(range.offset, range.nbytes);
}

void IoCommands::count_read(std::uint64_t nbytes) {
  counters_.add(Count::kReads);
  counters_.add(Count::kReadBlocks512, nbytes / 512);
}

std::uint16_t IoCommands::read(const nvme::Sqe& sqe, const Ticket& ticket) {
  Range range;
  if (const auto status = find_range(sqe, range); status != nvme::kStatusSuccess) [[unlikely]]
    return status;
  if (const auto status = find_data(sqe, range.nbytes, true); status != nvme::kStatusSuccess) [[unlikely]] {
    return status;
  }
  if (memory_ != nullptr) {
    const std::byte* from = memory_ + range.offset;
    for (const iovec& segment : data_.segments()) {
      std::memcpy(segment.iov_base, from, segment.iov_len);
      from += segment.iov_len;
    }
    counters_.add(Count::kCopiedBytes, range.nbytes);
    return deliver(range.nbytes);
  }
  Backend& image = *device_.backend;
  if (image.read_mapped(data_.segments().data(), data_.segments().size(), range.offset, range.nbytes)) [[likely]] {
    counters_.add(Count::kCopiedBytes, range.nbytes);
    counters_.add(Count::kMappedBytes, range.nbytes);
    return deliver(range.nbytes);
  }
  const std::uint64_t cached =
      image.read_cached(data_.segments().data(), data_.segments().size(), range.offset, range.nbytes);
  counters_.add(Count::kCopiedBytes, cached);
  if (cached < range.nbytes) {
    if (!data_.is_device() && ring_.usable() && ring_.room() > 0) {
      ring_.read(ticket, data_.segments(), range.offset, range.nbytes, cached, dma_.generation());
      return kPending;
    }
    const int error = image.read(data_.segments().data(), data_.segments().size(), range.offset, range.nbytes);
    if (error != 0) return read_status(error);
    counters_.add(Count::kCopiedBytes, range.nbytes - cached);
  }
  return deliver(range.nbytes);
}

// A read has its data, which may have to go to a device yet.
std::uint16_t IoCommands::deliver(std::uint64_t nbytes) {
  if (data_.is_device()) [[unlikely]] {
    if (const auto status = data_.deliver(dma_); status != nvme::kStatusSuccess) return status;
  }
  count_read(nbytes);
  return nvme::kStatusSuccess;
}

std::uint16_t IoCommands::finish(const FileRing::Finished& finished) {
  counters_.add(Count::kUringBytes, finished.bytes);
  if (finished.error == 0) {
    if (finished.flush) {
      counters_.add(Count::kFlushes);
    } else {
      count_read(finished.nbytes);
    }
    return nvme::kStatusSuccess;
  }
  const std::uint16_t status =
      (finished.flush ? nvme::kStatusWriteFault : read_status(finished.error)) | nvme::kStatusMore;
  counters_.add(Count::kErrors);
  device_.events.log_error(finished.ticket.sq->id, finished.ticket.cid, status, 0, 0);
  return status;
}

std::uint16_t IoCommands::write(const nvme::Sqe& sqe) {
  Range range;
  if (const auto status = find_range(sqe, range); status != nvme::kStatusSuccess) [[unlikely]]
    return status;
  if (const auto status = find_data(sqe, range.nbytes, false); status != nvme::kStatusSuccess) [[unlikely]] {
    return status;
  }
  if (device_.backend->read_only()) return refuse(nvme::kStatusNamespaceWriteProtected);
  // Without a write cache, or with it switched off, data is on the media when the command completes
  // (Base 2.0, 5.27.1.4).
  const bool durable = (sqe.cdw12 & nvme::kRwFua) != 0 || !device_.write_cache.load(std::memory_order_relaxed);
  const int error =
      device_.backend->write(data_.segments().data(), data_.segments().size(), range.offset, range.nbytes, durable);
  if (error != 0) return write_status(error);
  if (durable && memory_ == nullptr) counters_.add(Count::kFsyncs);
  counters_.add(Count::kCopiedBytes, range.nbytes);
  counters_.add(Count::kWrites);
  counters_.add(Count::kWrittenBlocks512, range.nbytes / 512);
  return nvme::kStatusSuccess;
}

int IoCommands::sync() {
  counters_.add(Count::kFsyncs);
  return device_.backend->flush();
}

std::uint16_t IoCommands::flush(const nvme::Sqe& sqe, const Ticket& ticket) {
  // All namespaces are in one image, so that FFFFFFFFh (VWC bits 2:1 say that it is allowed) is no more work.
  if (sqe.nsid != nvme::kNsidAll && device_.find(sqe.nsid) == nullptr) {
    return refuse(nvme::kStatusInvalidNamespaceOrFormat);
  }
  if (memory_ == nullptr && !device_.backend->read_only()) {
    if (ring_.usable() && ring_.room() > 0) {
      counters_.add(Count::kFsyncs);
      ring_.flush(ticket);
      return kPending;
    }
    if (const int error = sync(); error != 0) return write_status(error);
  }
  counters_.add(Count::kFlushes);
  return nvme::kStatusSuccess;
}

std::uint16_t IoCommands::write_zeroes(const nvme::Sqe& sqe) {
  // No data moves, so that MDTS does not count; WZSL is 0: no limit of its own.
  Range range;
  if (const auto status = find_range(sqe, range); status != nvme::kStatusSuccess) return status;
  if (device_.backend->read_only()) return refuse(nvme::kStatusNamespaceWriteProtected);
  int error = device_.backend->zero(range.offset, range.nbytes, (sqe.cdw12 & nvme::kRwDeac) != 0);
  const bool durable = (sqe.cdw12 & nvme::kRwFua) != 0 || !device_.write_cache.load(std::memory_order_relaxed);
  if (error == 0 && durable) error = sync();
  return write_status(error);
}

std::uint16_t IoCommands::dataset_management(const nvme::Sqe& sqe) {
  const Namespace* const space = device_.find(sqe.nsid);
  if (space == nullptr) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
  const std::uint64_t count = (sqe.cdw10 & 0xFF) + 1;
  if (const auto status = find_data(sqe, count * sizeof(nvme::DsmRange), false); status != nvme::kStatusSuccess) {
    return status;
  }
  nvme::DsmRange ranges[nvme::kDsmRangesMost];
  auto* to = reinterpret_cast<std::byte*>(ranges);
  for (const iovec& segment : data_.segments()) {
    std::memcpy(to, segment.iov_base, segment.iov_len);
    to += segment.iov_len;
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    if (ranges[i].slba > space->blocks || ranges[i].length > space->blocks - ranges[i].slba) {
      return refuse(nvme::kStatusLbaOutOfRange);
    }
  }
  if ((sqe.cdw11 & nvme::kDsmAd) == 0) return nvme::kStatusSuccess;  // the other attributes are hints
  if (device_.backend->read_only()) return refuse(nvme::kStatusNamespaceWriteProtected);
  for (std::uint64_t i = 0; i < count; ++i) {
    if (ranges[i].length == 0) continue;
    const int error = device_.backend->zero(space->offset + (ranges[i].slba << device_.lba_shift),
                                            std::uint64_t{ranges[i].length} << device_.lba_shift, true);
    if (error != 0) return write_status(error);
  }
  return nvme::kStatusSuccess;
}

std::uint16_t IoCommands::compare(const nvme::Sqe& sqe) {
  Range range;
  if (const auto status = find_range(sqe, range); status != nvme::kStatusSuccess) return status;
  if (const auto status = find_data(sqe, range.nbytes, false); status != nvme::kStatusSuccess) return status;
  scratch_.resize(kScratchBytes);
  std::uint64_t offset = range.offset;
  for (const iovec& segment : data_.segments()) {
    for (std::uint64_t done = 0; done < segment.iov_len;) {
      const std::uint64_t now = std::min(segment.iov_len - done, kScratchBytes);
      const iovec into{scratch_.data(), now};
      if (const int error = device_.backend->read(&into, 1, offset, now); error != 0) return read_status(error);
      if (std::memcmp(scratch_.data(), static_cast<const std::byte*>(segment.iov_base) + done, now) != 0) {
        return refuse(nvme::kStatusCompareFailure);
      }
      done += now;
      offset += now;
    }
  }
  return nvme::kStatusSuccess;
}

std::uint16_t IoCommands::verify(const nvme::Sqe& sqe) {
  Range range;
  if (const auto status = find_range(sqe, range); status != nvme::kStatusSuccess) return status;
  scratch_.resize(kScratchBytes);
  while (range.nbytes > 0) {
    const std::uint64_t now = std::min(range.nbytes, kScratchBytes);
    const iovec into{scratch_.data(), now};
    if (const int error = device_.backend->read(&into, 1, range.offset, now); error != 0) return read_status(error);
    range.offset += now;
    range.nbytes -= now;
  }
  return nvme::kStatusSuccess;
}

}  // namespace gpunvme::soft
