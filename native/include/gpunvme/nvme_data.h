// The data structures that NVMe commands return or take: Identify, log pages, Dataset Management ranges.
//
// Field names are the specifications' abbreviations in lower case; numbers marked "0's based" mean one more than they
// say. Every field lies at its natural alignment, so the structures need no packing; what the specifications define as
// 128-bit numbers are arrays of 16 bytes, and strings are ASCII, padded with spaces, without a terminating NUL.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpunvme/nvme_status.h"

namespace gpunvme::nvme {

using Uint128 = std::uint8_t[16];  // little-endian

// What a data structure of Identify is long, and the entries of a list of namespaces.
inline constexpr std::uint32_t kIdentifyBytes = 4096;
inline constexpr std::uint32_t kNamespaceListEntries = kIdentifyBytes / 4;

// One of Identify Controller's 32 power states (Base 2.0, 5.17.2.1).
struct PowerState {
  std::uint16_t mp;  // maximum power: 0.01 W, or 0.0001 W where flags bit 0 (MXPS) is set
  std::uint8_t reserved2;
  std::uint8_t flags;   // bit 0 MXPS, bit 1 NOPS: does no I/O in this state
  std::uint32_t enlat;  // entry latency, microseconds
  std::uint32_t exlat;  // exit latency, microseconds
  std::uint8_t rrt;     // relative read throughput, 0 is best; then the same for read latency and writes
  std::uint8_t rrl;
  std::uint8_t rwt;
  std::uint8_t rwl;
  std::uint16_t idlp;  // idle power
  std::uint8_t ips;    // bits 7:6 idle power's scale
  std::uint8_t reserved19;
  std::uint16_t actp;  // active power
  std::uint8_t apws;   // bits 7:6 active power's scale, 2:0 its workload
  std::uint8_t reserved23[9];
};
static_assert(sizeof(PowerState) == 32 && offsetof(PowerState, idlp) == 16 && offsetof(PowerState, apws) == 22);

// Identify Controller, CNS 01h (Base 2.0, 5.17.2.1; the NVM command set's own fields: NVM Command Set 1.0, 4.1.5.2).
struct IdentifyController {
  // Controller capabilities and features
  std::uint16_t vid;    // PCI vendor
  std::uint16_t ssvid;  // PCI subsystem vendor
  char sn[20];          // serial number
  char mn[40];          // model number
  char fr[8];           // firmware revision
  std::uint8_t rab;     // recommended arbitration burst, 2^n commands
  std::uint8_t ieee[3];
  std::uint8_t cmic;
  std::uint8_t mdts;  // maximum data transfer size: 2^n pages of CAP.MPSMIN's size; 0: no limit
  std::uint16_t cntlid;
  std::uint32_t ver;     // as VS
  std::uint32_t rtd3r;   // microseconds
  std::uint32_t rtd3e;   // microseconds
  std::uint32_t oaes;    // optional asynchronous events
  std::uint32_t ctratt;  // controller attributes
  std::uint16_t rrls;
  std::uint8_t reserved102[9];
  std::uint8_t cntrltype;  // 1: I/O controller
  std::uint8_t fguid[16];
  std::uint16_t crdt1;  // command retry delays, 100 ms
  std::uint16_t crdt2;
  std::uint16_t crdt3;
  std::uint8_t reserved134[119];
  std::uint8_t nvmsr;
  std::uint8_t vwci;
  std::uint8_t mec;
  // Admin command set attributes
  std::uint16_t oacs;  // optional admin commands
  std::uint8_t acl;    // abort command limit, 0's based
  std::uint8_t aerl;   // asynchronous event request limit, 0's based
  std::uint8_t frmw;
  std::uint8_t lpa;
  std::uint8_t elpe;  // error log page entries, 0's based
  std::uint8_t npss;  // number of power states, 0's based
  std::uint8_t avscc;
  std::uint8_t apsta;
  std::uint16_t wctemp;  // kelvin
  std::uint16_t cctemp;  // kelvin
  std::uint16_t mtfa;    // 100 ms
  std::uint32_t hmpre;   // 4 KiB
  std::uint32_t hmmin;   // 4 KiB
  Uint128 tnvmcap;       // bytes
  Uint128 unvmcap;       // bytes
  std::uint32_t rpmbs;
  std::uint16_t edstt;  // minutes
  std::uint8_t dsto;
  std::uint8_t fwug;  // 4 KiB
  std::uint16_t kas;  // 100 ms
  std::uint16_t hctma;
  std::uint16_t mntmt;  // kelvin
  std::uint16_t mxtmt;  // kelvin
  std::uint32_t sanicap;
  std::uint32_t hmminds;  // 4 KiB
  std::uint16_t hmmaxd;
  std::uint16_t nsetidmax;
  std::uint16_t endgidmax;
  std::uint8_t anatt;  // seconds
  std::uint8_t anacap;
  std::uint32_t anagrpmax;
  std::uint32_t nanagrpid;
  std::uint32_t pels;  // 64 KiB
  std::uint16_t did;   // domain identifier
  std::uint8_t reserved358[10];
  Uint128 megcap;
  std::uint8_t reserved384[128];
  // NVM command set attributes
  std::uint8_t sqes;     // submission queue entry size as exponents: bits 3:0 required, 7:4 maximum
  std::uint8_t cqes;     // the same for completion queue entries
  std::uint16_t maxcmd;  // fabrics: outstanding commands of a queue
  std::uint32_t nn;      // number of namespaces: the largest namespace identifier
  std::uint16_t oncs;    // optional NVM commands
  std::uint16_t fuses;
  std::uint8_t fna;
  std::uint8_t vwc;     // bit 0: there is a volatile write cache; bits 2:1: Flush with NSID FFFFFFFFh
  std::uint16_t awun;   // atomic write unit, blocks, 0's based
  std::uint16_t awupf;  // the same in a power failure
  std::uint8_t icsvscc;
  std::uint8_t nwpc;
  std::uint16_t acwu;
  std::uint16_t ocfs;
  std::uint32_t sgls;
  std::uint32_t mnan;
  Uint128 maxdna;
  std::uint32_t maxcna;
  std::uint8_t reserved564[204];
  char subnqn[256];  // UTF-8, NUL-terminated
  std::uint8_t reserved1024[768];
  // Fabrics
  std::uint32_t ioccsz;
  std::uint32_t iorcsz;
  std::uint16_t icdoff;
  std::uint8_t fcatt;
  std::uint8_t msdbd;
  std::uint16_t ofcs;
  std::uint8_t reserved1806[242];
  PowerState psd[32];
  std::uint8_t vs[1024];
};
static_assert(sizeof(IdentifyController) == kIdentifyBytes);
static_assert(offsetof(IdentifyController, mdts) == 77 && offsetof(IdentifyController, crdt1) == 128);
static_assert(offsetof(IdentifyController, oacs) == 256 && offsetof(IdentifyController, tnvmcap) == 280);
static_assert(offsetof(IdentifyController, megcap) == 368 && offsetof(IdentifyController, sqes) == 512);
static_assert(offsetof(IdentifyController, nn) == 516 && offsetof(IdentifyController, sgls) == 536);
static_assert(offsetof(IdentifyController, subnqn) == 768 && offsetof(IdentifyController, ioccsz) == 1792);
static_assert(offsetof(IdentifyController, psd) == 2048 && offsetof(IdentifyController, vs) == 3072);

// Bits of IdentifyController.oncs: which optional commands there are.
inline constexpr std::uint16_t kOncsCompare = 1u << 0;
inline constexpr std::uint16_t kOncsWriteUncorrectable = 1u << 1;
inline constexpr std::uint16_t kOncsDatasetManagement = 1u << 2;
inline constexpr std::uint16_t kOncsWriteZeroes = 1u << 3;
inline constexpr std::uint16_t kOncsSaveSelect = 1u << 4;  // Save of Set Features, Select of Get Features
inline constexpr std::uint16_t kOncsReservations = 1u << 5;
inline constexpr std::uint16_t kOncsTimestamp = 1u << 6;
inline constexpr std::uint16_t kOncsVerify = 1u << 7;
inline constexpr std::uint16_t kOncsCopy = 1u << 8;

// A format of a namespace's blocks (NVM Command Set 1.0, 4.1.5.1).
struct LbaFormat {
  std::uint16_t ms;    // bytes of metadata a block
  std::uint8_t lbads;  // data bytes of a block as exponent, at least 9
  std::uint8_t rp;     // bits 1:0 relative performance, 0 is best
};
static_assert(sizeof(LbaFormat) == 4);

// Identify Namespace, CNS 00h, NVM command set (NVM Command Set 1.0, 4.1.5.1).
struct IdentifyNamespace {
  std::uint64_t nsze;  // size, blocks: LBAs run from 0 to NSZE - 1
  std::uint64_t ncap;  // capacity, blocks
  std::uint64_t nuse;  // utilisation, blocks
  std::uint8_t nsfeat;
  std::uint8_t nlbaf;  // number of LBA formats, 0's based
  std::uint8_t flbas;  // format in use: bits 6:5 and 3:0 its index (high and low), bit 4 metadata interleaved
  std::uint8_t mc;
  std::uint8_t dpc;
  std::uint8_t dps;  // end-to-end protection: bits 2:0 type, 0 none
  std::uint8_t nmic;
  std::uint8_t rescap;
  std::uint8_t fpi;
  std::uint8_t dlfeat;  // bits 2:0: what deallocated blocks read as: 1 all zeroes
  std::uint16_t nawun;  // atomic writes and their boundaries, blocks, 0's based where not said otherwise
  std::uint16_t nawupf;
  std::uint16_t nacwu;
  std::uint16_t nabsn;
  std::uint16_t nabo;  // not 0's based
  std::uint16_t nabspf;
  std::uint16_t noiob;  // optimal I/O boundary, blocks
  Uint128 nvmcap;       // bytes
  std::uint16_t npwg;   // preferred granularities and alignments of writes and deallocations, blocks, 0's based
  std::uint16_t npwa;
  std::uint16_t npdg;
  std::uint16_t npda;
  std::uint16_t nows;
  std::uint16_t mssrl;  // Copy: longest range, blocks
  std::uint32_t mcl;    // Copy: blocks in total
  std::uint8_t msrc;    // Copy: ranges, 0's based
  std::uint8_t reserved81[11];
  std::uint32_t anagrpid;
  std::uint8_t reserved96[3];
  std::uint8_t nsattr;  // bit 0: write protected
  std::uint16_t nvmsetid;
  std::uint16_t endgid;
  std::uint8_t nguid[16];  // big-endian; all zeroes: none
  std::uint8_t eui64[8];   // big-endian; all zeroes: none
  LbaFormat lbaf[64];
  std::uint8_t vs[3712];
};
static_assert(sizeof(IdentifyNamespace) == kIdentifyBytes);
static_assert(offsetof(IdentifyNamespace, flbas) == 26 && offsetof(IdentifyNamespace, nvmcap) == 48);
static_assert(offsetof(IdentifyNamespace, mcl) == 76 && offsetof(IdentifyNamespace, anagrpid) == 92);
static_assert(offsetof(IdentifyNamespace, nguid) == 104 && offsetof(IdentifyNamespace, lbaf) == 128);
static_assert(offsetof(IdentifyNamespace, vs) == 384);

// Which LBA format a namespace has, from its FLBAS and NLBAF: bits 6:5 count only where there are more than 16 formats.
GPUNVME_HD constexpr std::uint8_t flbas_index(std::uint8_t flbas, std::uint8_t nlbaf) {
  return static_cast<std::uint8_t>((flbas & 0xF) | (nlbaf > 15 ? (flbas >> 5 & 0x3) << 4 : 0));
}

// One entry of the namespace identification descriptor list, CNS 03h (Base 2.0, 5.17.2.3); `nidl` bytes follow.
struct NamespaceDescriptor {
  std::uint8_t nidt;  // kNidt…; 0 ends the list
  std::uint8_t nidl;  // bytes that follow
  std::uint8_t reserved2[2];
};
static_assert(sizeof(NamespaceDescriptor) == 4);

inline constexpr std::uint8_t kNidtEui64 = 1;  // 8 bytes, big-endian
inline constexpr std::uint8_t kNidtNguid = 2;  // 16 bytes, big-endian
inline constexpr std::uint8_t kNidtUuid = 3;   // 16 bytes, RFC 4122
inline constexpr std::uint8_t kNidtCsi = 4;    // 1 byte: command set identifier

// SMART / Health Information, log page 02h (Base 2.0, 5.16.1.3).
struct SmartLog {
  std::uint8_t critical_warning;          // kSmart…
  std::uint8_t composite_temperature[2];  // kelvin; not aligned
  std::uint8_t available_spare;           // percent
  std::uint8_t available_spare_threshold;
  std::uint8_t percentage_used;  // may exceed 100; 255: that or more
  std::uint8_t endurance_group_critical_warning;
  std::uint8_t reserved7[25];
  Uint128 data_units_read;  // thousands of 512-byte units, rounded up
  Uint128 data_units_written;
  Uint128 host_read_commands;
  Uint128 host_write_commands;
  Uint128 controller_busy_time;  // minutes
  Uint128 power_cycles;
  Uint128 power_on_hours;
  Uint128 unsafe_shutdowns;
  Uint128 media_errors;
  Uint128 error_log_entries;
  std::uint32_t warning_temperature_time;   // minutes
  std::uint32_t critical_temperature_time;  // minutes
  std::uint16_t temperature_sensor[8];      // kelvin; 0: no such sensor
  std::uint32_t thermal_management_1_count;
  std::uint32_t thermal_management_2_count;
  std::uint32_t thermal_management_1_time;  // seconds
  std::uint32_t thermal_management_2_time;  // seconds
  std::uint8_t reserved232[280];
};
static_assert(sizeof(SmartLog) == 512 && offsetof(SmartLog, composite_temperature) == 1);
static_assert(offsetof(SmartLog, data_units_read) == 32 && offsetof(SmartLog, warning_temperature_time) == 192);
static_assert(offsetof(SmartLog, thermal_management_1_count) == 216);

inline constexpr std::uint8_t kSmartSpareLow = 1u << 0;
inline constexpr std::uint8_t kSmartTemperature = 1u << 1;
inline constexpr std::uint8_t kSmartReliabilityDegraded = 1u << 2;
inline constexpr std::uint8_t kSmartReadOnly = 1u << 3;
inline constexpr std::uint8_t kSmartBackupFailed = 1u << 4;
inline constexpr std::uint8_t kSmartPmrUnreliable = 1u << 5;

// One entry of Error Information, log page 01h, the newest first (Base 2.0, 5.16.1.2).
struct ErrorLogEntry {
  std::uint64_t error_count;  // 0: no entry
  std::uint16_t sqid;         // FFFFh: not of one command
  std::uint16_t cid;
  std::uint16_t status;                    // as in a completion: bit 0 phase tag, 15:1 status field
  std::uint16_t parameter_error_location;  // bits 7:0 byte of the command, 10:8 its bit; FFFFh: not of one parameter
  std::uint64_t lba;
  std::uint32_t nsid;
  std::uint8_t vendor_log_page;
  std::uint8_t trtype;
  std::uint8_t reserved30[2];
  std::uint64_t command_specific;
  std::uint16_t transport_specific;
  std::uint8_t reserved42[22];
};
static_assert(sizeof(ErrorLogEntry) == 64 && offsetof(ErrorLogEntry, lba) == 16);
static_assert(offsetof(ErrorLogEntry, command_specific) == 32);

// Firmware Slot Information, log page 03h (Base 2.0, 5.16.1.4).
struct FirmwareSlotLog {
  std::uint8_t afi;  // bits 2:0 active slot, 6:4 the one after the next reset (0: not known)
  std::uint8_t reserved1[7];
  char frs[7][8];  // revision in slots 1 to 7; all zeroes: empty
  std::uint8_t reserved64[448];
};
static_assert(sizeof(FirmwareSlotLog) == 512 && offsetof(FirmwareSlotLog, frs) == 8);

// One range of a Dataset Management command, which takes up to 256 (NVM Command Set 1.0, 3.2.3).
struct DsmRange {
  std::uint32_t context_attributes;
  std::uint32_t length;  // blocks, not 0's based
  std::uint64_t slba;
};
static_assert(sizeof(DsmRange) == 16 && offsetof(DsmRange, slba) == 8);

inline constexpr std::uint32_t kDsmRangesMost = 256;

}  // namespace gpunvme::nvme
