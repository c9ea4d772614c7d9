// Set Features and Get Features: values that the host may change (Base 2.0, 5.27; NVM Command Set 1.0, 4.1.3).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "device.h"
#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {

// Used by the worker that serves the admin queue.
class Features {
 public:
  explicit Features(Device& device) : device_(device) { reset(); }

  // Each returns a status and leaves the completion's DW0 in `dw0`.
  std::uint16_t set(const nvme::Sqe& sqe, std::uint32_t& dw0);
  std::uint16_t get(const nvme::Sqe& sqe, std::uint32_t& dw0) const;

  // To the defaults, as a controller reset does.
  void reset();

 private:
  std::uint32_t number_of_queues() const;
  std::uint16_t check(const nvme::Sqe& sqe) const;
  std::uint32_t key(std::uint8_t feature, const nvme::Sqe& sqe) const;
  std::uint32_t default_value(std::uint8_t feature, std::uint32_t cdw11) const;

  Device& device_;
  // By feature and what else selects a value (temperature threshold, vector, namespace); what is not here is default.
  std::map<std::uint64_t, std::uint32_t> values_;
};

}  // namespace gpunvme::soft
