// The controller's registers as values: what reads return and which bits writes change (Base 2.0, 3.1.3). What a write
// sets in motion is the controller's business.
#pragma once

#include <cstdint>

#include "gpunvme/nvme_spec.h"
#include "options.h"

namespace gpunvme::soft {

class Registers {
 public:
  explicit Registers(const Options& options);

  // The aligned 32 bits at `offset`; what is not there reads as 0. CSTS is composed by the caller.
  std::uint32_t read(std::uint32_t offset) const;
  // AQA, ASQ, ACQ and CC, 32 bits at a time: 64-bit registers may be written in halves, in either order.
  void write(std::uint32_t offset, std::uint32_t value);

  // Why the controller cannot be enabled like this; null: it can.
  const char* refusal() const;

  std::uint64_t cap() const { return cap_; }
  std::uint32_t cc() const { return cc_; }
  std::uint32_t aqa() const { return aqa_; }
  std::uint64_t asq() const { return asq_; }
  std::uint64_t acq() const { return acq_; }

  // As after a function-level reset. A controller reset (CC.EN to 0) leaves AQA, ASQ and ACQ (Base 2.0, 3.7.2).
  void reset();

 private:
  const std::uint64_t cap_;
  const std::uint32_t crto_;
  std::uint32_t cc_ = 0;
  std::uint32_t aqa_ = 0;
  std::uint64_t asq_ = 0;
  std::uint64_t acq_ = 0;
};

}  // namespace gpunvme::soft
