// The NVM command set: what a worker does for each I/O command (NVM Command Set 1.0, 3.2).
#pragma once

#include <cstdint>
#include <vector>

#include "command_data.h"
#include "device.h"
#include "file_ring.h"

namespace gpunvme::soft {

class IoCommands {
 public:
  // Not a status: the command goes on in the ring.
  static constexpr std::uint16_t kPending = 0xFFFF;

  IoCommands(Device& device, Dma& dma, Counters& counters)
      : device_(device),
        dma_(dma),
        counters_(counters),
        memory_(device.backend->memory()),
        ring_(device.backend->fd(), device.options.threads > 0) {}

  // A hint that this command is executed soon.
  void prefetch(const nvme::Sqe& sqe) const;
  // Returns a status, or kPending. `sqe` is the worker's own copy.
  std::uint16_t execute(const nvme::Sqe& sqe, const Ticket& ticket);
  // Whether a command is a copy of some microseconds, or goes on in the ring if the image has to be waited for.
  bool is_quick(const nvme::Sqe& sqe) const {
    return sqe.opcode == nvme::kNvmRead && (sqe.cdw12 & nvme::kRwNlbMask) >> (kQuickShift - device_.lba_shift) == 0 &&
           (memory_ != nullptr || !ring_.is_refused());
  }
  // The status of a command that went on in the ring.
  std::uint16_t finish(const FileRing::Finished& finished);

  FileRing& ring() { return ring_; }

 private:
  static constexpr unsigned kQuickShift = 14;  // 16 KiB

  struct Range {
    std::uint64_t offset;  // in the image
    std::uint64_t nbytes;
  };

  std::uint16_t run(const nvme::Sqe& sqe, const Ticket& ticket);
  std::uint16_t find_range(const nvme::Sqe& sqe, Range& range) const;
  std::uint16_t find_data(const nvme::Sqe& sqe, std::uint64_t nbytes, bool write);

  std::uint16_t read(const nvme::Sqe& sqe, const Ticket& ticket);
  std::uint16_t write(const nvme::Sqe& sqe);
  std::uint16_t flush(const nvme::Sqe& sqe, const Ticket& ticket);
  std::uint16_t write_zeroes(const nvme::Sqe& sqe);
  std::uint16_t dataset_management(const nvme::Sqe& sqe);
  std::uint16_t compare(const nvme::Sqe& sqe);
  std::uint16_t verify(const nvme::Sqe& sqe);

  void count_read(std::uint64_t nbytes);
  std::uint16_t deliver(std::uint64_t nbytes);
  int sync();

  Device& device_;
  Dma& dma_;
  Counters& counters_;
  std::byte* const memory_;
  FileRing ring_;
  CommandData data_;
  std::vector<std::byte> scratch_;
};

}  // namespace gpunvme::soft
