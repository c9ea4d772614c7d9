// What the NVMe specifications fix: registers, queue entries, opcodes, and the numbers that commands carry. Status
// codes are in nvme_status.h, data structures in nvme_data.h; whoever includes this has all of it.
//
// Names and offsets are those of the NVM Express Base Specification 2.0, the NVM Command Set Specification 1.0 and the
// NVMe over PCIe Transport Specification 1.0; src/gpunvme/nvme/spec says the same in Python, and a test compares the
// two. Everything is little-endian, as are all machines that this builds for. Usable from CUDA device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpunvme/nvme_data.h"
#include "gpunvme/nvme_status.h"

namespace gpunvme::nvme {

// ---- Registers: BAR0 of the PCI function (Base 2.0, 3.1.3)

inline constexpr std::uint32_t kRegCap = 0x00;     // 8 bytes: controller capabilities
inline constexpr std::uint32_t kRegVs = 0x08;      // version
inline constexpr std::uint32_t kRegIntms = 0x0C;   // interrupt mask set; not with MSI-X
inline constexpr std::uint32_t kRegIntmc = 0x10;   // interrupt mask clear; not with MSI-X
inline constexpr std::uint32_t kRegCc = 0x14;      // controller configuration
inline constexpr std::uint32_t kRegCsts = 0x1C;    // controller status
inline constexpr std::uint32_t kRegNssr = 0x20;    // NVM subsystem reset: writing "NVMe" resets
inline constexpr std::uint32_t kRegAqa = 0x24;     // admin queue attributes
inline constexpr std::uint32_t kRegAsq = 0x28;     // 8 bytes: admin submission queue's address
inline constexpr std::uint32_t kRegAcq = 0x30;     // 8 bytes: admin completion queue's address
inline constexpr std::uint32_t kRegCmbloc = 0x38;  // controller memory buffer
inline constexpr std::uint32_t kRegCmbsz = 0x3C;
inline constexpr std::uint32_t kRegBpinfo = 0x40;  // boot partition
inline constexpr std::uint32_t kRegBprsel = 0x44;
inline constexpr std::uint32_t kRegBpmbl = 0x48;   // 8 bytes
inline constexpr std::uint32_t kRegCmbmsc = 0x50;  // 8 bytes
inline constexpr std::uint32_t kRegCmbsts = 0x58;
inline constexpr std::uint32_t kRegCmbebs = 0x5C;
inline constexpr std::uint32_t kRegCmbswtp = 0x60;
inline constexpr std::uint32_t kRegNssd = 0x64;     // NVM subsystem shutdown
inline constexpr std::uint32_t kRegCrto = 0x68;     // controller ready timeouts
inline constexpr std::uint32_t kRegPmrcap = 0xE00;  // persistent memory region
inline constexpr std::uint32_t kRegPmrctl = 0xE04;
inline constexpr std::uint32_t kRegPmrsts = 0xE08;
inline constexpr std::uint32_t kRegPmrebs = 0xE0C;
inline constexpr std::uint32_t kRegPmrswtp = 0xE10;
inline constexpr std::uint32_t kRegPmrmscl = 0xE14;
inline constexpr std::uint32_t kRegPmrmscu = 0xE18;
inline constexpr std::uint32_t kRegDoorbells = 0x1000;

inline constexpr std::uint32_t kNssrReset = 0x4E564D65;  // "NVMe"

// Doorbells (NVMe over PCIe 1.0, 3.1.2): where queue `qid`'s are in BAR0. `dstrd` is CAP.DSTRD.
GPUNVME_HD constexpr std::uint64_t sq_tail_doorbell(std::uint32_t qid, std::uint32_t dstrd) {
  return kRegDoorbells + (std::uint64_t{2} * qid * 4 << dstrd);
}
GPUNVME_HD constexpr std::uint64_t cq_head_doorbell(std::uint32_t qid, std::uint32_t dstrd) {
  return kRegDoorbells + ((std::uint64_t{2} * qid + 1) * 4 << dstrd);
}

// Bits `high` to `low` of a register.
GPUNVME_HD constexpr std::uint32_t bits(std::uint64_t value, unsigned high, unsigned low) {
  return static_cast<std::uint32_t>(value >> low & ((std::uint64_t{1} << (high - low + 1)) - 1));
}

// CAP (3.1.3.1). As they stand in the register: exponents and 0's based numbers are not resolved, except by the
// functions whose names give a unit.
GPUNVME_HD constexpr std::uint32_t cap_mqes(std::uint64_t cap) { return bits(cap, 15, 0); }  // 0's based
GPUNVME_HD constexpr bool cap_cqr(std::uint64_t cap) { return bits(cap, 16, 16) != 0; }      // queues contiguous
GPUNVME_HD constexpr std::uint32_t cap_ams(std::uint64_t cap) { return bits(cap, 18, 17); }
GPUNVME_HD constexpr std::uint32_t cap_to(std::uint64_t cap) { return bits(cap, 31, 24); }  // 500 ms
GPUNVME_HD constexpr std::uint32_t cap_dstrd(std::uint64_t cap) { return bits(cap, 35, 32); }
GPUNVME_HD constexpr bool cap_nssrs(std::uint64_t cap) { return bits(cap, 36, 36) != 0; }
GPUNVME_HD constexpr std::uint32_t cap_css(std::uint64_t cap) { return bits(cap, 44, 37); }
GPUNVME_HD constexpr bool cap_bps(std::uint64_t cap) { return bits(cap, 45, 45) != 0; }
GPUNVME_HD constexpr std::uint32_t cap_cps(std::uint64_t cap) { return bits(cap, 47, 46); }
GPUNVME_HD constexpr std::uint32_t cap_mpsmin(std::uint64_t cap) { return bits(cap, 51, 48); }
GPUNVME_HD constexpr std::uint32_t cap_mpsmax(std::uint64_t cap) { return bits(cap, 55, 52); }
GPUNVME_HD constexpr bool cap_pmrs(std::uint64_t cap) { return bits(cap, 56, 56) != 0; }
GPUNVME_HD constexpr bool cap_cmbs(std::uint64_t cap) { return bits(cap, 57, 57) != 0; }
GPUNVME_HD constexpr bool cap_nsss(std::uint64_t cap) { return bits(cap, 58, 58) != 0; }
GPUNVME_HD constexpr std::uint32_t cap_crms(std::uint64_t cap) { return bits(cap, 60, 59); }
// The entries that a queue may have.
GPUNVME_HD constexpr std::uint32_t cap_queue_entries(std::uint64_t cap) { return cap_mqes(cap) + 1; }
// The smallest and the largest memory page, bytes.
GPUNVME_HD constexpr std::uint64_t cap_page_bytes_min(std::uint64_t cap) {
  return std::uint64_t{4096} << cap_mpsmin(cap);
}
GPUNVME_HD constexpr std::uint64_t cap_page_bytes_max(std::uint64_t cap) {
  return std::uint64_t{4096} << cap_mpsmax(cap);
}

// For those who make a CAP.
inline constexpr unsigned kCapCqrShift = 16;
inline constexpr unsigned kCapAmsShift = 17;
inline constexpr unsigned kCapToShift = 24;
inline constexpr unsigned kCapDstrdShift = 32;
inline constexpr unsigned kCapNssrsShift = 36;
inline constexpr unsigned kCapCssShift = 37;
inline constexpr unsigned kCapMpsminShift = 48;
inline constexpr unsigned kCapMpsmaxShift = 52;
inline constexpr unsigned kCapCrmsShift = 59;
inline constexpr std::uint32_t kCapCssNvm = 1u << 0;           // the NVM command set
inline constexpr std::uint32_t kCapCssIo = 1u << 6;            // one or more command sets, by Identify
inline constexpr std::uint32_t kCapCssNoIo = 1u << 7;          // admin commands only
inline constexpr std::uint32_t kCapCrmsWithMedia = 1u << 0;    // "ready" can wait for the media …
inline constexpr std::uint32_t kCapCrmsIndependent = 1u << 1;  // … or not

// VS (3.1.3.2).
GPUNVME_HD constexpr std::uint32_t vs_mjr(std::uint32_t vs) { return bits(vs, 31, 16); }
GPUNVME_HD constexpr std::uint32_t vs_mnr(std::uint32_t vs) { return bits(vs, 15, 8); }
GPUNVME_HD constexpr std::uint32_t vs_ter(std::uint32_t vs) { return bits(vs, 7, 0); }
inline constexpr std::uint32_t kVersion20 = 0x00020000;

// CC (3.1.3.5).
GPUNVME_HD constexpr bool cc_en(std::uint32_t cc) { return bits(cc, 0, 0) != 0; }
GPUNVME_HD constexpr std::uint32_t cc_css(std::uint32_t cc) { return bits(cc, 6, 4); }
GPUNVME_HD constexpr std::uint32_t cc_mps(std::uint32_t cc) { return bits(cc, 10, 7); }
GPUNVME_HD constexpr std::uint32_t cc_ams(std::uint32_t cc) { return bits(cc, 13, 11); }
GPUNVME_HD constexpr std::uint32_t cc_shn(std::uint32_t cc) { return bits(cc, 15, 14); }
GPUNVME_HD constexpr std::uint32_t cc_iosqes(std::uint32_t cc) { return bits(cc, 19, 16); }
GPUNVME_HD constexpr std::uint32_t cc_iocqes(std::uint32_t cc) { return bits(cc, 23, 20); }
GPUNVME_HD constexpr bool cc_crime(std::uint32_t cc) { return bits(cc, 24, 24) != 0; }
GPUNVME_HD constexpr std::uint64_t cc_page_bytes(std::uint32_t cc) { return std::uint64_t{4096} << cc_mps(cc); }
inline constexpr std::uint32_t kCcEn = 1u << 0;
inline constexpr unsigned kCcCssShift = 4;
inline constexpr unsigned kCcMpsShift = 7;
inline constexpr unsigned kCcAmsShift = 11;
inline constexpr unsigned kCcShnShift = 14;
inline constexpr unsigned kCcIosqesShift = 16;
inline constexpr unsigned kCcIocqesShift = 20;
inline constexpr std::uint32_t kCcCssNvm = 0;
inline constexpr std::uint32_t kCcCssIo = 6;
inline constexpr std::uint32_t kCcCssAdmin = 7;
inline constexpr std::uint32_t kCcAmsRoundRobin = 0;
inline constexpr std::uint32_t kCcShnNone = 0;
inline constexpr std::uint32_t kCcShnNormal = 1;
inline constexpr std::uint32_t kCcShnAbrupt = 2;
inline constexpr std::uint32_t kSqeExponent = 6;  // what CC.IOSQES and CC.IOCQES must say: 64 and 16 bytes
inline constexpr std::uint32_t kCqeExponent = 4;

// CSTS (3.1.3.6).
GPUNVME_HD constexpr bool csts_rdy(std::uint32_t csts) { return bits(csts, 0, 0) != 0; }
GPUNVME_HD constexpr bool csts_cfs(std::uint32_t csts) { return bits(csts, 1, 1) != 0; }
GPUNVME_HD constexpr std::uint32_t csts_shst(std::uint32_t csts) { return bits(csts, 3, 2); }
GPUNVME_HD constexpr bool csts_nssro(std::uint32_t csts) { return bits(csts, 4, 4) != 0; }
GPUNVME_HD constexpr bool csts_pp(std::uint32_t csts) { return bits(csts, 5, 5) != 0; }
GPUNVME_HD constexpr bool csts_st(std::uint32_t csts) { return bits(csts, 6, 6) != 0; }
inline constexpr std::uint32_t kCstsRdy = 1u << 0;
inline constexpr std::uint32_t kCstsCfs = 1u << 1;  // controller fatal status
inline constexpr unsigned kCstsShstShift = 2;
inline constexpr std::uint32_t kCstsNssro = 1u << 4;
inline constexpr std::uint32_t kCstsPp = 1u << 5;
inline constexpr std::uint32_t kShstNormal = 0;
inline constexpr std::uint32_t kShstOccurring = 1;
inline constexpr std::uint32_t kShstComplete = 2;

// AQA (3.1.3.8): entries of the admin queues, both 0's based; ASQ and ACQ (3.1.3.9, 3.1.3.10): bits 11:0 are 0.
GPUNVME_HD constexpr std::uint32_t aqa_asqs(std::uint32_t aqa) { return bits(aqa, 11, 0); }
GPUNVME_HD constexpr std::uint32_t aqa_acqs(std::uint32_t aqa) { return bits(aqa, 27, 16); }
inline constexpr unsigned kAqaAcqsShift = 16;
inline constexpr std::uint32_t kAdminQueueEntriesMost = 4096;

// ---- Queue entries

// Submission queue entry (Base 2.0, 3.3.3.1), with PRPs as data pointer.
struct Sqe {
  std::uint8_t opcode;
  std::uint8_t flags;  // bits 1:0 FUSE, 7:6 PSDT
  std::uint16_t cid;
  std::uint32_t nsid;
  std::uint32_t cdw2;
  std::uint32_t cdw3;
  std::uint64_t mptr;
  std::uint64_t prp1;
  std::uint64_t prp2;
  std::uint32_t cdw10;
  std::uint32_t cdw11;
  std::uint32_t cdw12;
  std::uint32_t cdw13;
  std::uint32_t cdw14;
  std::uint32_t cdw15;
};
static_assert(sizeof(Sqe) == 64 && offsetof(Sqe, prp1) == 24 && offsetof(Sqe, cdw10) == 40);

inline constexpr std::uint8_t kSqeFuseMask = 0x03;
inline constexpr std::uint8_t kSqePsdtMask = 0xC0;  // 0: PRPs

// Completion queue entry (Base 2.0, 3.3.3.2).
struct Cqe {
  std::uint32_t dw0;  // command specific result
  std::uint32_t dw1;
  std::uint16_t sq_head;
  std::uint16_t sq_id;
  std::uint16_t cid;
  std::uint16_t status;  // bit 0 phase tag, 15:1 status field (SC 8:1, SCT 11:9, CRD 13:12, M 14, DNR 15)
};
static_assert(sizeof(Cqe) == 16 && offsetof(Cqe, sq_head) == 8 && offsetof(Cqe, status) == 14);

GPUNVME_HD constexpr bool cqe_phase(std::uint16_t status_word) { return (status_word & 1) != 0; }
// The 15-bit status that nvme_status.h is about.
GPUNVME_HD constexpr std::uint16_t cqe_status(std::uint16_t status_word) {
  return static_cast<std::uint16_t>(status_word >> 1);
}

inline constexpr std::uint32_t kNsidAll = 0xFFFFFFFF;
inline constexpr std::uint16_t kCidNone = 0xFFFF;  // stands for "no command" in the error log: never given to one
inline constexpr std::uint32_t kQueueEntriesMost = 65536;

// ---- Admin commands (Base 2.0, 5)

inline constexpr std::uint8_t kAdminDeleteIoSq = 0x00;
inline constexpr std::uint8_t kAdminCreateIoSq = 0x01;
inline constexpr std::uint8_t kAdminGetLogPage = 0x02;
inline constexpr std::uint8_t kAdminDeleteIoCq = 0x04;
inline constexpr std::uint8_t kAdminCreateIoCq = 0x05;
inline constexpr std::uint8_t kAdminIdentify = 0x06;
inline constexpr std::uint8_t kAdminAbort = 0x08;
inline constexpr std::uint8_t kAdminSetFeatures = 0x09;
inline constexpr std::uint8_t kAdminGetFeatures = 0x0A;
inline constexpr std::uint8_t kAdminAsyncEventRequest = 0x0C;
inline constexpr std::uint8_t kAdminNamespaceManagement = 0x0D;
inline constexpr std::uint8_t kAdminFirmwareCommit = 0x10;
inline constexpr std::uint8_t kAdminFirmwareDownload = 0x11;
inline constexpr std::uint8_t kAdminSelfTest = 0x14;
inline constexpr std::uint8_t kAdminNamespaceAttachment = 0x15;
inline constexpr std::uint8_t kAdminKeepAlive = 0x18;
inline constexpr std::uint8_t kAdminDirectiveSend = 0x19;
inline constexpr std::uint8_t kAdminDirectiveReceive = 0x1A;
inline constexpr std::uint8_t kAdminVirtualization = 0x1C;
inline constexpr std::uint8_t kAdminMiSend = 0x1D;
inline constexpr std::uint8_t kAdminMiReceive = 0x1E;
inline constexpr std::uint8_t kAdminCapacityManagement = 0x20;
inline constexpr std::uint8_t kAdminLockdown = 0x24;
inline constexpr std::uint8_t kAdminDoorbellBufferConfig = 0x7C;
inline constexpr std::uint8_t kAdminFormatNvm = 0x80;
inline constexpr std::uint8_t kAdminSecuritySend = 0x81;
inline constexpr std::uint8_t kAdminSecurityReceive = 0x82;
inline constexpr std::uint8_t kAdminSanitize = 0x84;
inline constexpr std::uint8_t kAdminGetLbaStatus = 0x86;

// Create I/O Completion Queue, Create I/O Submission Queue (5.4, 5.5): CDW10 is QSIZE (0's based) << 16 | QID.
inline constexpr std::uint32_t kCreateQueuePc = 1u << 0;    // CDW11: physically contiguous
inline constexpr std::uint32_t kCreateCqIen = 1u << 1;      // CDW11: interrupts enabled
inline constexpr unsigned kCreateCqIvShift = 16;            // CDW11: interrupt vector
inline constexpr unsigned kCreateSqCqidShift = 16;          // CDW11: the completion queue to use
inline constexpr unsigned kCreateQueueQsizeShift = 16;      // CDW10
inline constexpr std::uint32_t kAbortNotAborted = 1u << 0;  // Abort's DW0 (5.1)

// Identify's CNS, CDW10 bits 7:0 (5.17.1).
inline constexpr std::uint8_t kCnsNamespace = 0x00;
inline constexpr std::uint8_t kCnsController = 0x01;
inline constexpr std::uint8_t kCnsActiveNamespaces = 0x02;
inline constexpr std::uint8_t kCnsNamespaceDescriptors = 0x03;
inline constexpr std::uint8_t kCnsNvmSets = 0x04;
inline constexpr std::uint8_t kCnsCommandSetNamespace = 0x05;
inline constexpr std::uint8_t kCnsCommandSetController = 0x06;
inline constexpr std::uint8_t kCnsCommandSetActiveNamespaces = 0x07;
inline constexpr std::uint8_t kCnsIndependentNamespace = 0x08;
inline constexpr std::uint8_t kCnsAllocatedNamespaces = 0x10;
inline constexpr std::uint8_t kCnsAllocatedNamespace = 0x11;
inline constexpr std::uint8_t kCnsAttachedControllers = 0x12;
inline constexpr std::uint8_t kCnsControllers = 0x13;
inline constexpr std::uint8_t kCnsPrimaryController = 0x14;
inline constexpr std::uint8_t kCnsSecondaryControllers = 0x15;
inline constexpr std::uint8_t kCnsNamespaceGranularity = 0x16;
inline constexpr std::uint8_t kCnsUuids = 0x17;
inline constexpr std::uint8_t kCnsDomains = 0x18;
inline constexpr std::uint8_t kCnsEnduranceGroups = 0x19;
inline constexpr std::uint8_t kCnsCommandSets = 0x1C;

// Command set identifiers, Identify's CDW11 bits 31:24.
inline constexpr std::uint8_t kCsiNvm = 0x00;
inline constexpr std::uint8_t kCsiKeyValue = 0x01;
inline constexpr std::uint8_t kCsiZoned = 0x02;

// Feature identifiers, CDW10 bits 7:0 of Set and Get Features (5.27.1; NVM Command Set 1.0, 4.1.3).
inline constexpr std::uint8_t kFeatureArbitration = 0x01;
inline constexpr std::uint8_t kFeaturePowerManagement = 0x02;
inline constexpr std::uint8_t kFeatureLbaRangeType = 0x03;
inline constexpr std::uint8_t kFeatureTemperatureThreshold = 0x04;
inline constexpr std::uint8_t kFeatureErrorRecovery = 0x05;
inline constexpr std::uint8_t kFeatureVolatileWriteCache = 0x06;
inline constexpr std::uint8_t kFeatureNumberOfQueues = 0x07;
inline constexpr std::uint8_t kFeatureInterruptCoalescing = 0x08;
inline constexpr std::uint8_t kFeatureInterruptVector = 0x09;
inline constexpr std::uint8_t kFeatureWriteAtomicity = 0x0A;
inline constexpr std::uint8_t kFeatureAsyncEvents = 0x0B;
inline constexpr std::uint8_t kFeatureAutonomousPowerState = 0x0C;
inline constexpr std::uint8_t kFeatureHostMemoryBuffer = 0x0D;
inline constexpr std::uint8_t kFeatureTimestamp = 0x0E;
inline constexpr std::uint8_t kFeatureKeepAlive = 0x0F;
inline constexpr std::uint8_t kFeatureThermalManagement = 0x10;
inline constexpr std::uint8_t kFeatureNonOperationalPower = 0x11;
inline constexpr std::uint8_t kFeatureReadRecovery = 0x12;
inline constexpr std::uint8_t kFeatureHostBehavior = 0x16;
inline constexpr std::uint8_t kFeatureSanitize = 0x17;
inline constexpr std::uint8_t kFeatureCommandSetProfile = 0x19;
inline constexpr std::uint8_t kFeatureSoftwareProgress = 0x80;
inline constexpr std::uint8_t kFeatureHostId = 0x81;
inline constexpr std::uint8_t kFeatureReservationMask = 0x82;
inline constexpr std::uint8_t kFeatureReservationPersistence = 0x83;
inline constexpr std::uint8_t kFeatureWriteProtection = 0x84;
inline constexpr std::uint32_t kSetFeaturesSave = 1u << 31;  // CDW10
inline constexpr unsigned kGetFeaturesSelectShift = 8;       // CDW10: 0 current, 1 default, 2 saved, 3 capabilities

// Log page identifiers, CDW10 bits 7:0 of Get Log Page (5.16.1).
inline constexpr std::uint8_t kLogSupportedPages = 0x00;
inline constexpr std::uint8_t kLogError = 0x01;
inline constexpr std::uint8_t kLogSmart = 0x02;
inline constexpr std::uint8_t kLogFirmwareSlot = 0x03;
inline constexpr std::uint8_t kLogChangedNamespaces = 0x04;
inline constexpr std::uint8_t kLogCommandEffects = 0x05;
inline constexpr std::uint8_t kLogSelfTest = 0x06;
inline constexpr std::uint8_t kLogTelemetryHost = 0x07;
inline constexpr std::uint8_t kLogTelemetryController = 0x08;
inline constexpr std::uint8_t kLogEnduranceGroup = 0x09;
inline constexpr std::uint8_t kLogAna = 0x0C;
inline constexpr std::uint8_t kLogPersistentEvents = 0x0D;
inline constexpr std::uint8_t kLogLbaStatus = 0x0E;
inline constexpr std::uint8_t kLogFeatureEffects = 0x12;
inline constexpr std::uint8_t kLogReservations = 0x80;
inline constexpr std::uint8_t kLogSanitize = 0x81;
inline constexpr unsigned kLogNumdlShift = 16;  // CDW10: dwords, 0's based, low half; CDW11 has the high one
inline constexpr std::uint32_t kLogRetainEvent = 1u << 15;  // CDW10, RAE: the event is not cleared

// Asynchronous events: DW0 of the completion is log page << 16 | information << 8 | type (5.2).
inline constexpr std::uint8_t kEventError = 0;
inline constexpr std::uint8_t kEventSmart = 1;
inline constexpr std::uint8_t kEventNotice = 2;
inline constexpr std::uint8_t kEventCommandSet = 6;
inline constexpr std::uint8_t kEventVendor = 7;
// Information of an error event.
inline constexpr std::uint8_t kEventErrorInvalidDoorbellRegister = 0;  // of a queue that does not exist
inline constexpr std::uint8_t kEventErrorInvalidDoorbellValue = 1;     // outside the queue, or the same as before
inline constexpr std::uint8_t kEventErrorDiagnosticFailure = 2;
inline constexpr std::uint8_t kEventErrorPersistentInternal = 3;
inline constexpr std::uint8_t kEventErrorTransientInternal = 4;
inline constexpr std::uint8_t kEventErrorFirmwareLoad = 5;
GPUNVME_HD constexpr std::uint32_t event_type(std::uint32_t dw0) { return bits(dw0, 2, 0); }
GPUNVME_HD constexpr std::uint32_t event_information(std::uint32_t dw0) { return bits(dw0, 15, 8); }
GPUNVME_HD constexpr std::uint32_t event_log_page(std::uint32_t dw0) { return bits(dw0, 23, 16); }

// ---- NVM commands (NVM Command Set 1.0, 3.2; Flush: Base 2.0, 7.1)

inline constexpr std::uint8_t kNvmFlush = 0x00;
inline constexpr std::uint8_t kNvmWrite = 0x01;
inline constexpr std::uint8_t kNvmRead = 0x02;
inline constexpr std::uint8_t kNvmWriteUncorrectable = 0x04;
inline constexpr std::uint8_t kNvmCompare = 0x05;
inline constexpr std::uint8_t kNvmWriteZeroes = 0x08;
inline constexpr std::uint8_t kNvmDatasetManagement = 0x09;
inline constexpr std::uint8_t kNvmVerify = 0x0C;
inline constexpr std::uint8_t kNvmReservationRegister = 0x0D;
inline constexpr std::uint8_t kNvmReservationReport = 0x0E;
inline constexpr std::uint8_t kNvmReservationAcquire = 0x11;
inline constexpr std::uint8_t kNvmReservationRelease = 0x15;
inline constexpr std::uint8_t kNvmCopy = 0x19;

// CDW10 and 11 are SLBA (low, high); CDW12:
inline constexpr std::uint32_t kRwNlbMask = 0xFFFF;         // number of blocks, 0's based
inline constexpr std::uint32_t kRwDeac = 1u << 25;          // Write Zeroes: deallocate
inline constexpr std::uint32_t kRwPrinfoMask = 0xFu << 26;  // protection information
inline constexpr std::uint32_t kRwFua = 1u << 30;           // force unit access: on the media before it completes
inline constexpr std::uint32_t kRwLr = 1u << 31;            // limited retry
inline constexpr std::uint32_t kRwBlocksMost = 65536;
// Dataset Management: CDW10 bits 7:0 number of ranges, 0's based; CDW11:
inline constexpr std::uint32_t kDsmIdr = 1u << 0;  // integral dataset for read
inline constexpr std::uint32_t kDsmIdw = 1u << 1;  // integral dataset for write
inline constexpr std::uint32_t kDsmAd = 1u << 2;   // deallocate ("trim")

}  // namespace gpunvme::nvme
