#include "feature_values.h"

#include "identify.h"

namespace gpunvme::soft {
namespace {

constexpr std::uint16_t refuse(std::uint16_t code) { return code | nvme::kStatusDnr; }

// Which half of a temperature threshold, CDW11 bits 21:20: 0 over, 1 under.
constexpr std::uint32_t threshold_type(std::uint32_t cdw11) { return cdw11 >> 20 & 3; }
constexpr std::uint32_t sensor(std::uint32_t cdw11) { return cdw11 >> 16 & 0xF; }

constexpr bool is_namespace_specific(std::uint8_t feature) { return feature == nvme::kFeatureErrorRecovery; }

}  // namespace

std::uint32_t Features::number_of_queues() const {
  const std::uint32_t number = device_.options.queues - 1;  // 0's based
  return number << 16 | number;
}

// What is wrong with the feature or with its namespace, before its value is looked at.
std::uint16_t Features::check(const nvme::Sqe& sqe) const {
  const std::uint8_t feature = sqe.cdw10 & 0xFF;
  switch (feature) {
    case nvme::kFeatureArbitration:
    case nvme::kFeaturePowerManagement:
    case nvme::kFeatureTemperatureThreshold:
    case nvme::kFeatureErrorRecovery:
    case nvme::kFeatureNumberOfQueues:
    case nvme::kFeatureInterruptCoalescing:
    case nvme::kFeatureInterruptVector:
    case nvme::kFeatureWriteAtomicity:
    case nvme::kFeatureAsyncEvents:
    case nvme::kFeatureCommandSetProfile:
      break;
    case nvme::kFeatureVolatileWriteCache:
      if (!device_.options.vwc) return refuse(nvme::kStatusInvalidField);
      break;
    default:
      return refuse(nvme::kStatusInvalidField);
  }
  if (is_namespace_specific(feature)) {
    const bool all = sqe.nsid == nvme::kNsidAll && sqe.opcode == nvme::kAdminSetFeatures;
    if (!all && device_.find(sqe.nsid) == nullptr) return refuse(nvme::kStatusInvalidNamespaceOrFormat);
  } else if (sqe.nsid != 0 && sqe.nsid != nvme::kNsidAll && sqe.opcode == nvme::kAdminSetFeatures) {
    const bool exists = device_.find(sqe.nsid) != nullptr;
    return refuse(exists ? nvme::kStatusFeatureNotNamespaceSpecific : nvme::kStatusInvalidNamespaceOrFormat);
  }
  if (feature == nvme::kFeatureTemperatureThreshold) {
    const std::uint32_t which = sensor(sqe.cdw11);
    const bool all = which == 0xF && sqe.opcode == nvme::kAdminSetFeatures;
    if ((which != 0 && !all) || threshold_type(sqe.cdw11) > 1) return refuse(nvme::kStatusInvalidField);
  }
  if (feature == nvme::kFeatureInterruptVector && (sqe.cdw11 & 0xFFFF) >= Interrupts::kVectors) {
    return refuse(nvme::kStatusInvalidField);
  }
  return nvme::kStatusSuccess;
}

std::uint32_t Features::key(std::uint8_t feature, const nvme::Sqe& sqe) const {
  switch (feature) {
    case nvme::kFeatureTemperatureThreshold:
      return threshold_type(sqe.cdw11);
    case nvme::kFeatureInterruptVector:
      return sqe.cdw11 & 0xFFFF;
    case nvme::kFeatureErrorRecovery:
      return sqe.nsid;
    default:
      return 0;
  }
}

std::uint32_t Features::default_value(std::uint8_t feature, std::uint32_t cdw11) const {
  switch (feature) {
    case nvme::kFeatureArbitration:
      return 4;  // bursts of 2^4, as Identify's RAB recommends
    case nvme::kFeatureTemperatureThreshold:
      return threshold_type(cdw11) == 0 ? kWarningTemperature : 0;
    case nvme::kFeatureVolatileWriteCache:
      return 1;
    case nvme::kFeatureNumberOfQueues:
      return number_of_queues();
    case nvme::kFeatureInterruptVector:
      return cdw11 & 0xFFFF;
    default:
      return 0;
  }
}

std::uint16_t Features::set(const nvme::Sqe& sqe, std::uint32_t& dw0) {
  const std::uint8_t feature = sqe.cdw10 & 0xFF;
  if (const auto status = check(sqe); status != nvme::kStatusSuccess) return status;
  if ((sqe.cdw10 & nvme::kSetFeaturesSave) != 0) return refuse(nvme::kStatusFeatureNotSaveable);
  std::uint32_t value = sqe.cdw11;
  switch (feature) {
    case nvme::kFeaturePowerManagement:
      if ((value & 0x1F) != 0) return refuse(nvme::kStatusInvalidField);  // there is one power state
      break;
    case nvme::kFeatureVolatileWriteCache:
      value &= 1;
      device_.write_cache.store(value != 0, std::memory_order_relaxed);
      // What was written before is made durable by the next flush, or here where there will be none.
      if (value == 0 && device_.backend->flush() != 0) return nvme::kStatusInternalError;
      break;
    case nvme::kFeatureNumberOfQueues:
      if ((value & 0xFFFF) == 0xFFFF || value >> 16 == 0xFFFF) return refuse(nvme::kStatusInvalidField);
      if (device_.queues.any_io_queue()) return refuse(nvme::kStatusCommandSequenceError);
      dw0 = number_of_queues();
      return nvme::kStatusSuccess;
    case nvme::kFeatureCommandSetProfile:
      if ((value & 0x1FF) != 0) return refuse(nvme::kStatusCommandSetCombinationRejected);
      break;
    case nvme::kFeatureTemperatureThreshold:
      value &= 0xFFFF;
      break;
    default:
      break;
  }
  if (is_namespace_specific(feature) && sqe.nsid == nvme::kNsidAll) {
    for (std::uint32_t nsid = 1; nsid <= device_.namespaces.size(); ++nsid) {
      values_[std::uint64_t{feature} << 32 | nsid] = value;
    }
  } else {
    values_[std::uint64_t{feature} << 32 | key(feature, sqe)] = value;
  }
  return nvme::kStatusSuccess;
}

std::uint16_t Features::get(const nvme::Sqe& sqe, std::uint32_t& dw0) const {
  const std::uint8_t feature = sqe.cdw10 & 0xFF;
  if (const auto status = check(sqe); status != nvme::kStatusSuccess) return status;
  switch (sqe.cdw10 >> nvme::kGetFeaturesSelectShift & 7) {
    case 0: {
      const auto found = values_.find(std::uint64_t{feature} << 32 | key(feature, sqe));
      dw0 = found != values_.end() ? found->second : default_value(feature, sqe.cdw11);
      return nvme::kStatusSuccess;
    }
    case 1:
    case 2:  // nothing can be saved: the saved value is the default one
      dw0 = default_value(feature, sqe.cdw11);
      return nvme::kStatusSuccess;
    case 3:  // capabilities: bit 1 namespace specific, bit 2 changeable
      dw0 = 1 << 2 | (is_namespace_specific(feature) ? 1 << 1 : 0);
      return nvme::kStatusSuccess;
    default:
      return refuse(nvme::kStatusInvalidField);
  }
}

void Features::reset() {
  values_.clear();
  device_.write_cache.store(device_.options.vwc, std::memory_order_relaxed);
}

}  // namespace gpunvme::soft
