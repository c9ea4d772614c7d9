// The data of one command, as host memory to work on, wherever it is.
#pragma once

#include <cstdint>
#include <memory>

#include "prp_walk.h"

namespace gpunvme::soft {

class CommandData {
 public:
  // As resolve_prps. Where some of the memory is a device's, segments() is a buffer of the controller's own: filled
  // already if the command reads memory; if it writes, to be filled, and then brought there by deliver().
  std::uint16_t find(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes, std::uint64_t page_bytes,
                     bool write) {
    pieces_.clear();
    const std::uint16_t status = resolve_prps(dma, prp1, prp2, nbytes, page_bytes, write, segments_);
    if (status == nvme::kStatusDataTransferError && dma.is_device()) [[unlikely]] {
      return find_device(dma, prp1, prp2, nbytes, page_bytes, write);
    }
    return status;
  }

  const Segments& segments() const { return segments_; }
  // Some of it is a device's.
  bool is_device() const { return !pieces_.empty(); }
  // Returns a status: a data transfer error where a copy failed. Nothing is written after that.
  std::uint16_t deliver(Dma& dma);

 private:
  std::uint16_t find_device(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                            std::uint64_t page_bytes, bool write);

  Segments segments_;
  Pieces pieces_;
  std::unique_ptr<std::byte[]> buffer_;
  std::uint64_t room_ = 0;
};

}  // namespace gpunvme::soft
