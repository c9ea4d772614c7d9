#include "log_pages.h"

#include <cstring>

#include "identify.h"

namespace gpunvme::soft {
namespace {

constexpr std::uint16_t refuse(std::uint16_t code) { return code | nvme::kStatusDnr; }

template <typename Structure>
void put(std::vector<std::byte>& page, const Structure& structure) {
  page.resize(sizeof structure);
  std::memcpy(page.data(), &structure, sizeof structure);
}

void put_number(nvme::Uint128& field, std::uint64_t value) { std::memcpy(field, &value, sizeof value); }

void smart(const Device& device, std::vector<std::byte>& page) {
  nvme::SmartLog log{};
  constexpr std::uint16_t kTemperature = 300;  // kelvin: nothing here gets warm
  std::memcpy(log.composite_temperature, &kTemperature, 2);
  log.critical_warning = device.backend->read_only() ? nvme::kSmartReadOnly : 0;
  log.available_spare = 100;
  log.available_spare_threshold = 10;
  // In thousands of 512-byte units, rounded up.
  put_number(log.data_units_read, (device.total(Count::kReadBlocks512) + 999) / 1000);
  put_number(log.data_units_written, (device.total(Count::kWrittenBlocks512) + 999) / 1000);
  put_number(log.host_read_commands, device.total(Count::kReads));
  put_number(log.host_write_commands, device.total(Count::kWrites));
  put_number(log.power_cycles, 1);
  put_number(log.error_log_entries, device.events.error_count());
  put(page, log);
}

void errors(const Device& device, std::vector<std::byte>& page) {
  page.assign(Events::kErrorsKept * sizeof(nvme::ErrorLogEntry), std::byte{});
  const auto entries = device.events.errors();
  std::memcpy(page.data(), entries.data(), entries.size() * sizeof(nvme::ErrorLogEntry));
}

void firmware(std::vector<std::byte>& page) {
  nvme::FirmwareSlotLog log{};
  log.afi = 1;
  put_text(log.frs[0], sizeof log.frs[0], kFirmware);
  put(page, log);
}

// A table of 32-bit words.
void put_word(std::vector<std::byte>& page, std::size_t index, std::uint32_t word) {
  std::memcpy(page.data() + index * 4, &word, 4);
}

// Commands supported and effects (5.16.1.6): bit 0 supported, bit 1 changes blocks, bit 2 … namespaces' capabilities.
void effects(std::vector<std::byte>& page) {
  constexpr std::uint32_t kSupported = 1;
  constexpr std::uint32_t kChangesBlocks = 1 << 1;
  page.assign(4096, std::byte{});
  for (const std::uint8_t opcode :
       {nvme::kAdminDeleteIoSq, nvme::kAdminCreateIoSq, nvme::kAdminGetLogPage, nvme::kAdminDeleteIoCq,
        nvme::kAdminCreateIoCq, nvme::kAdminIdentify, nvme::kAdminAbort, nvme::kAdminSetFeatures,
        nvme::kAdminGetFeatures, nvme::kAdminAsyncEventRequest}) {
    put_word(page, opcode, kSupported);
  }
  for (const std::uint8_t opcode : {nvme::kNvmFlush, nvme::kNvmRead, nvme::kNvmCompare, nvme::kNvmVerify}) {
    put_word(page, 256u + opcode, kSupported);
  }
  for (const std::uint8_t opcode : {nvme::kNvmWrite, nvme::kNvmWriteZeroes, nvme::kNvmDatasetManagement}) {
    put_word(page, 256u + opcode, kSupported | kChangesBlocks);
  }
}

// Supported log pages (5.16.1.1): bit 0 supported.
void pages(std::vector<std::byte>& page) {
  page.assign(1024, std::byte{});
  for (const std::uint8_t log : {nvme::kLogSupportedPages, nvme::kLogError, nvme::kLogSmart, nvme::kLogFirmwareSlot,
                                 nvme::kLogCommandEffects, nvme::kLogFeatureEffects}) {
    put_word(page, log, 1);
  }
}

// Feature identifiers supported and effects (5.16.1.18): bit 0 supported, bits 31:20 scope: bit 20 a namespace's,
// bit 21 the controller's.
void features(const Device& device, std::vector<std::byte>& page) {
  page.assign(1024, std::byte{});
  for (const std::uint8_t feature :
       {nvme::kFeatureArbitration, nvme::kFeaturePowerManagement, nvme::kFeatureTemperatureThreshold,
        nvme::kFeatureNumberOfQueues, nvme::kFeatureInterruptCoalescing, nvme::kFeatureInterruptVector,
        nvme::kFeatureWriteAtomicity, nvme::kFeatureAsyncEvents, nvme::kFeatureCommandSetProfile}) {
    put_word(page, feature, 1 | 1 << 21);
  }
  put_word(page, nvme::kFeatureErrorRecovery, 1 | 1 << 20);
  if (device.options.vwc) put_word(page, nvme::kFeatureVolatileWriteCache, 1 | 1 << 21);
}

}  // namespace

std::uint16_t make_log_page(const Device& device, std::uint8_t log, std::uint32_t nsid, std::uint8_t csi,
                            std::vector<std::byte>& page) {
  switch (log) {
    case nvme::kLogSupportedPages:
      pages(page);
      return nvme::kStatusSuccess;
    case nvme::kLogError:
      errors(device, page);
      return nvme::kStatusSuccess;
    case nvme::kLogSmart:
      // Of the controller as a whole: LPA bit 0 is 0.
      if (nsid != 0 && nsid != nvme::kNsidAll) return refuse(nvme::kStatusInvalidField);
      smart(device, page);
      return nvme::kStatusSuccess;
    case nvme::kLogFirmwareSlot:
      firmware(page);
      return nvme::kStatusSuccess;
    case nvme::kLogCommandEffects:
      if (csi != nvme::kCsiNvm) return refuse(nvme::kStatusInvalidField);
      effects(page);
      return nvme::kStatusSuccess;
    case nvme::kLogFeatureEffects:
      features(device, page);
      return nvme::kStatusSuccess;
    default:
      return refuse(nvme::kStatusInvalidLogPage);
  }
}

}  // namespace gpunvme::soft
