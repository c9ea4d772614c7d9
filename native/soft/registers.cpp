#include "registers.h"

namespace gpunvme::soft {
namespace {

std::uint64_t make_cap(const Options& options) {
  const auto field = [](std::uint64_t value, unsigned shift) { return value << shift; };
  return field(options.mqes - 1, 0) | field(options.cqr ? 1 : 0, nvme::kCapCqrShift) |
         field(options.to, nvme::kCapToShift) | field(options.dstrd, nvme::kCapDstrdShift) |
         field(nvme::kCapCssNvm | nvme::kCapCssIo, nvme::kCapCssShift) | field(options.mpsmin, nvme::kCapMpsminShift) |
         field(options.mpsmax, nvme::kCapMpsmaxShift) | field(nvme::kCapCrmsWithMedia, nvme::kCapCrmsShift);
}

void put_half(std::uint64_t& value, bool high, std::uint32_t half) {
  const unsigned shift = high ? 32 : 0;
  value = (value & ~(std::uint64_t{0xFFFFFFFF} << shift)) | std::uint64_t{half} << shift;
}

}  // namespace

// CRTO.CRWMT (3.1.3.16) says in 16 bits what CAP.TO says in 8.
Registers::Registers(const Options& options) : cap_(make_cap(options)), crto_(options.to) {}

std::uint32_t Registers::read(std::uint32_t offset) const {
  switch (offset) {
    case nvme::kRegCap:
      return static_cast<std::uint32_t>(cap_);
    case nvme::kRegCap + 4:
      return static_cast<std::uint32_t>(cap_ >> 32);
    case nvme::kRegVs:
      return nvme::kVersion20;
    case nvme::kRegCc:
      return cc_;
    case nvme::kRegAqa:
      return aqa_;
    case nvme::kRegAsq:
      return static_cast<std::uint32_t>(asq_);
    case nvme::kRegAsq + 4:
      return static_cast<std::uint32_t>(asq_ >> 32);
    case nvme::kRegAcq:
      return static_cast<std::uint32_t>(acq_);
    case nvme::kRegAcq + 4:
      return static_cast<std::uint32_t>(acq_ >> 32);
    case nvme::kRegCrto:
      return crto_;
    default:
      return 0;  // no controller memory buffer, no boot partitions, no persistent memory region
  }
}

void Registers::write(std::uint32_t offset, std::uint32_t value) {
  switch (offset) {
    case nvme::kRegCc:
      cc_ = value & 0x00FFFFF1;  // CRIME is read-only where CAP.CRMS offers no choice
      break;
    case nvme::kRegAqa:
      aqa_ = value & 0x0FFF0FFF;
      break;
    case nvme::kRegAsq:
    case nvme::kRegAsq + 4:
      put_half(asq_, offset != nvme::kRegAsq, value);
      break;
    case nvme::kRegAcq:
    case nvme::kRegAcq + 4:
      put_half(acq_, offset != nvme::kRegAcq, value);
      break;
    default:
      break;
  }
}

const char* Registers::refusal() const {
  const std::uint32_t mps = nvme::cc_mps(cc_);
  if (mps < nvme::cap_mpsmin(cap_) || mps > nvme::cap_mpsmax(cap_)) return "CC.MPS is outside CAP.MPSMIN to CAP.MPSMAX";
  if (nvme::cc_css(cc_) != nvme::kCcCssNvm && nvme::cc_css(cc_) != nvme::kCcCssIo) return "CC.CSS is not supported";
  if (nvme::cc_ams(cc_) != nvme::kCcAmsRoundRobin) return "CC.AMS is not supported";
  if (nvme::aqa_asqs(aqa_) == 0 || nvme::aqa_acqs(aqa_) == 0) return "AQA: an admin queue has less than 2 entries";
  // Bits 11:0 are reserved. A driver that sets them has a bug, which is better found here than in its data.
  const std::uint64_t page = nvme::cc_page_bytes(cc_);
  if (asq_ % page != 0) return "ASQ is not aligned to a memory page";
  if (acq_ % page != 0) return "ACQ is not aligned to a memory page";
  return nullptr;
}

void Registers::reset() {
  cc_ = 0;
  aqa_ = 0;
  asq_ = 0;
  acq_ = 0;
}

}  // namespace gpunvme::soft
