// The layout of nvme_spec.h as a table for Python, so that a test can compare it with src/gpunvme/nvme.
#include <nanobind/nanobind.h>

#include <cctype>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "bindings.h"
#include "gpunvme/nvme_spec.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

using namespace nvme;

class Layout {
 public:
  // A field of a structure: offset and size in bytes.
  void field(const char* structure, const char* name, std::size_t offset, std::size_t nbytes) {
    table_[(std::string(structure) + "." + name).c_str()] = nb::make_tuple(offset, nbytes);
  }

  // A constant: its value, and 0. "InvalidField" becomes INVALID_FIELD.
  void constant(const char* group, const std::string& name, std::uint64_t value) {
    std::string key = std::string(group) + ".";
    for (std::size_t i = 0; i < name.size(); ++i) {
      const auto c = static_cast<unsigned char>(name[i]);
      if (i > 0 && std::isupper(c)) key += '_';
      key += static_cast<char>(std::toupper(c));
    }
    table_[key.c_str()] = nb::make_tuple(value, 0);
  }

  // A field of a register: lowest bit and number of bits, found by asking for one bit at a time.
  template <typename Register, typename Value>
  void bits(const char* group, const char* name, Value (*get)(Register)) {
    unsigned low = 64;
    unsigned width = 0;
    for (unsigned bit = 0; bit < 8 * sizeof(Register); ++bit) {
      if (get(Register{1} << bit) == Value{}) continue;
      if (low == 64) low = bit;
      ++width;
    }
    field(group, name, low, width);
  }

  nb::dict take() { return std::move(table_); }

 private:
  nb::dict table_;
};

// One call of `macro(a, b, each)` for each of the rest.
#define PARENS ()
#define EXPAND1(...) __VA_ARGS__
#define EXPAND2(...) EXPAND1(EXPAND1(EXPAND1(EXPAND1(__VA_ARGS__))))
#define EXPAND3(...) EXPAND2(EXPAND2(EXPAND2(EXPAND2(__VA_ARGS__))))
#define EXPAND4(...) EXPAND3(EXPAND3(EXPAND3(EXPAND3(__VA_ARGS__))))
#define EXPAND(...) EXPAND4(EXPAND4(EXPAND4(EXPAND4(__VA_ARGS__))))
#define NEXT(macro, a, b, each, ...) macro(a, b, each) __VA_OPT__(NEXT_AGAIN PARENS(macro, a, b, __VA_ARGS__))
#define NEXT_AGAIN() NEXT
#define FOR_EACH(macro, a, b, ...) EXPAND(NEXT(macro, a, b, __VA_ARGS__))

#define FIELD(structure, unused, name) \
  layout.field(#structure, #name, offsetof(structure, name), sizeof(structure::name));
#define FIELDS(structure, ...) FOR_EACH(FIELD, structure, , __VA_ARGS__)
#define BIT_FIELD(group, prefix, name) layout.bits(group, #name, prefix##_##name);
#define BITS(group, prefix, ...) FOR_EACH(BIT_FIELD, group, prefix, __VA_ARGS__)
#define CONSTANT(group, prefix, name) layout.constant(group, #name, prefix##name);
#define CONSTANTS(group, prefix, ...) FOR_EACH(CONSTANT, group, prefix, __VA_ARGS__)

void add_queue_entries(Layout& layout) {
  FIELDS(Sqe, opcode, flags, cid, nsid, cdw2, cdw3, mptr, prp1, prp2, cdw10, cdw11, cdw12, cdw13, cdw14, cdw15)
  FIELDS(Cqe, dw0, dw1, sq_head, sq_id, cid, status)
}

void add_identify(Layout& layout) {
  FIELDS(PowerState, mp, flags, enlat, exlat, rrt, rrl, rwt, rwl, idlp, ips, actp, apws)
  FIELDS(IdentifyController, vid, ssvid, sn, mn, fr, rab, ieee, cmic, mdts, cntlid, ver, rtd3r, rtd3e, oaes, ctratt,
         rrls, cntrltype, fguid, crdt1, crdt2, crdt3, nvmsr, vwci, mec, oacs, acl, aerl, frmw, lpa, elpe, npss, avscc,
         apsta, wctemp, cctemp, mtfa, hmpre, hmmin, tnvmcap, unvmcap, rpmbs, edstt, dsto, fwug, kas, hctma, mntmt,
         mxtmt, sanicap, hmminds, hmmaxd, nsetidmax, endgidmax, anatt, anacap, anagrpmax, nanagrpid, pels, did, megcap,
         sqes, cqes, maxcmd, nn, oncs, fuses, fna, vwc, awun, awupf, icsvscc, nwpc, acwu, ocfs, sgls, mnan, maxdna,
         maxcna, subnqn, ioccsz, iorcsz, icdoff, fcatt, msdbd, ofcs, psd, vs)
  FIELDS(LbaFormat, ms, lbads, rp)
  FIELDS(IdentifyNamespace, nsze, ncap, nuse, nsfeat, nlbaf, flbas, mc, dpc, dps, nmic, rescap, fpi, dlfeat, nawun,
         nawupf, nacwu, nabsn, nabo, nabspf, noiob, nvmcap, npwg, npwa, npdg, npda, nows, mssrl, mcl, msrc, anagrpid,
         nsattr, nvmsetid, endgid, nguid, eui64, lbaf, vs)
  FIELDS(NamespaceDescriptor, nidt, nidl)
}

void add_data(Layout& layout) {
  FIELDS(SmartLog, critical_warning, composite_temperature, available_spare, available_spare_threshold, percentage_used,
         endurance_group_critical_warning, data_units_read, data_units_written, host_read_commands, host_write_commands,
         controller_busy_time, power_cycles, power_on_hours, unsafe_shutdowns, media_errors, error_log_entries,
         warning_temperature_time, critical_temperature_time, temperature_sensor, thermal_management_1_count,
         thermal_management_2_count, thermal_management_1_time, thermal_management_2_time)
  FIELDS(ErrorLogEntry, error_count, sqid, cid, status, parameter_error_location, lba, nsid, vendor_log_page, trtype,
         command_specific, transport_specific)
  FIELDS(FirmwareSlotLog, afi, frs)
  FIELDS(DsmRange, context_attributes, length, slba)
  // Their sizes, as constants of one group.
  layout.constant("size", "Sqe", sizeof(Sqe));
  layout.constant("size", "Cqe", sizeof(Cqe));
  layout.constant("size", "PowerState", sizeof(PowerState));
  layout.constant("size", "IdentifyController", sizeof(IdentifyController));
  layout.constant("size", "LbaFormat", sizeof(LbaFormat));
  layout.constant("size", "IdentifyNamespace", sizeof(IdentifyNamespace));
  layout.constant("size", "NamespaceDescriptor", sizeof(NamespaceDescriptor));
  layout.constant("size", "SmartLog", sizeof(SmartLog));
  layout.constant("size", "ErrorLogEntry", sizeof(ErrorLogEntry));
  layout.constant("size", "FirmwareSlotLog", sizeof(FirmwareSlotLog));
  layout.constant("size", "DsmRange", sizeof(DsmRange));
}

void add_registers(Layout& layout) {
  BITS("Cap", cap, mqes, cqr, ams, to, dstrd, nssrs, css, bps, cps, mpsmin, mpsmax, pmrs, cmbs, nsss, crms)
  BITS("Version", vs, mjr, mnr, ter)
  BITS("Cc", cc, en, css, mps, ams, shn, iosqes, iocqes, crime)
  BITS("Csts", csts, rdy, cfs, shst, nssro, pp, st)
  BITS("Aqa", aqa, asqs, acqs)
  BITS("AsyncEvent", event, type, information, log_page)
  layout.bits("status", "sc", status_sc);
  layout.bits("status", "sct", status_sct);
  layout.bits("status", "crd", status_crd);
  layout.bits("status", "more", status_more);
  layout.bits("status", "dnr", status_dnr);
  layout.bits("status", "code", status_code);
}

void add_constants(Layout& layout) {
  CONSTANTS("Register", kReg, Cap, Vs, Intms, Intmc, Cc, Csts, Nssr, Aqa, Asq, Acq, Cmbloc, Cmbsz, Bpinfo, Bprsel,
            Bpmbl, Cmbmsc, Cmbsts, Cmbebs, Cmbswtp, Nssd, Crto, Pmrcap, Pmrctl, Pmrsts, Pmrebs, Pmrswtp, Pmrmscl,
            Pmrmscu, Doorbells)
  CONSTANTS("AdminOpcode", kAdmin, DeleteIoSq, CreateIoSq, GetLogPage, DeleteIoCq, CreateIoCq, Identify, Abort,
            SetFeatures, GetFeatures, AsyncEventRequest, NamespaceManagement, FirmwareCommit, FirmwareDownload,
            SelfTest, NamespaceAttachment, KeepAlive, DirectiveSend, DirectiveReceive, Virtualization, MiSend,
            MiReceive, CapacityManagement, Lockdown, DoorbellBufferConfig, FormatNvm, SecuritySend, SecurityReceive,
            Sanitize, GetLbaStatus)
  CONSTANTS("NvmOpcode", kNvm, Flush, Write, Read, WriteUncorrectable, Compare, WriteZeroes, DatasetManagement, Verify,
            ReservationRegister, ReservationReport, ReservationAcquire, ReservationRelease, Copy)
  CONSTANTS("Cns", kCns, Namespace, Controller, ActiveNamespaces, NamespaceDescriptors, NvmSets, CommandSetNamespace,
            CommandSetController, CommandSetActiveNamespaces, IndependentNamespace, AllocatedNamespaces,
            AllocatedNamespace, AttachedControllers, Controllers, PrimaryController, SecondaryControllers,
            NamespaceGranularity, Uuids, Domains, EnduranceGroups, CommandSets)
  CONSTANTS("Csi", kCsi, Nvm, KeyValue, Zoned)
  CONSTANTS("Feature", kFeature, Arbitration, PowerManagement, LbaRangeType, TemperatureThreshold, ErrorRecovery,
            VolatileWriteCache, NumberOfQueues, InterruptCoalescing, InterruptVector, WriteAtomicity, AsyncEvents,
            AutonomousPowerState, HostMemoryBuffer, Timestamp, KeepAlive, ThermalManagement, NonOperationalPower,
            ReadRecovery, HostBehavior, Sanitize, CommandSetProfile, SoftwareProgress, HostId, ReservationMask,
            ReservationPersistence, WriteProtection)
  CONSTANTS("LogPage", kLog, SupportedPages, Error, Smart, FirmwareSlot, ChangedNamespaces, CommandEffects, SelfTest,
            TelemetryHost, TelemetryController, EnduranceGroup, Ana, PersistentEvents, LbaStatus, FeatureEffects,
            Reservations, Sanitize)
  CONSTANTS("EventType", kEvent, Error, Smart, Notice, CommandSet, Vendor)
  CONSTANTS("ErrorEvent", kEventError, InvalidDoorbellRegister, InvalidDoorbellValue, DiagnosticFailure,
            PersistentInternal, TransientInternal, FirmwareLoad)
  CONSTANTS("CcCss", kCcCss, Nvm, Io, Admin)
  CONSTANTS("Shutdown", kCcShn, None, Normal, Abrupt)
  CONSTANTS("ShutdownStatus", kShst, Normal, Occurring, Complete)
  CONSTANTS("Rw", kRw, Deac, Fua, Lr)
  CONSTANTS("Dsm", kDsm, Idr, Idw, Ad)
  CONSTANTS("Oncs", kOncs, Compare, WriteUncorrectable, DatasetManagement, WriteZeroes, SaveSelect, Reservations,
            Timestamp, Verify, Copy)
  CONSTANTS("SmartWarning", kSmart, SpareLow, Temperature, ReliabilityDegraded, ReadOnly, BackupFailed, PmrUnreliable)
  CONSTANTS("Nidt", kNidt, Eui64, Nguid, Uuid, Csi)
  layout.constant("CreateQueue", "Pc", kCreateQueuePc);
  layout.constant("CreateQueue", "Ien", kCreateCqIen);
  layout.constant("spec", "NsidAll", kNsidAll);
  layout.constant("spec", "CidNone", kCidNone);
  layout.constant("spec", "QueueEntriesMost", kQueueEntriesMost);
  layout.constant("spec", "AdminQueueEntriesMost", kAdminQueueEntriesMost);
  layout.constant("spec", "SqeExponent", kSqeExponent);
  layout.constant("spec", "CqeExponent", kCqeExponent);
  layout.constant("spec", "RwBlocksMost", kRwBlocksMost);
  layout.constant("spec", "DsmRangesMost", kDsmRangesMost);
  for (std::uint32_t dstrd = 0; dstrd < 16; ++dstrd) {
    layout.field("doorbells", std::to_string(dstrd).c_str(), sq_tail_doorbell(3, dstrd), cq_head_doorbell(3, dstrd));
  }
}

void add_status(Layout& layout) {
  CONSTANTS("StatusType", kSct, Generic, CommandSpecific, Media, Path, Vendor)
  CONSTANTS("StatusFlag", kStatus, More, Dnr)
  CONSTANTS(
      "Status", kStatus, Success, InvalidOpcode, InvalidField, CommandIdConflict, DataTransferError, AbortedPowerLoss,
      InternalError, AbortRequested, AbortedSqDeletion, AbortedFailedFused, AbortedMissingFused,
      InvalidNamespaceOrFormat, CommandSequenceError, InvalidSglSegment, InvalidSglCount, DataSglLengthInvalid,
      MetadataSglLengthInvalid, SglTypeInvalid, InvalidUseOfCmb, PrpOffsetInvalid, AtomicWriteUnitExceeded,
      OperationDenied, SglOffsetInvalid, HostIdInconsistent, KeepAliveExpired, KeepAliveInvalid, AbortedPreempt,
      SanitizeFailed, SanitizeInProgress, SglGranularityInvalid, NotSupportedForCmbQueue, NamespaceWriteProtected,
      CommandInterrupted, TransientTransportError, ProhibitedByLockdown, AdminMediaNotReady, LbaOutOfRange,
      CapacityExceeded, NamespaceNotReady, ReservationConflict, FormatInProgress, CompletionQueueInvalid,
      InvalidQueueId, InvalidQueueSize, AbortLimitExceeded, AerLimitExceeded, InvalidFirmwareSlot, InvalidFirmwareImage,
      InvalidInterruptVector, InvalidLogPage, InvalidFormat, FirmwareNeedsConventionalReset, InvalidQueueDeletion,
      FeatureNotSaveable, FeatureNotChangeable, FeatureNotNamespaceSpecific, FirmwareNeedsSubsystemReset,
      FirmwareNeedsControllerReset, FirmwareNeedsMaximumTime, FirmwareActivationProhibited, OverlappingRange,
      NamespaceInsufficientCapacity, NamespaceIdUnavailable, NamespaceAlreadyAttached, NamespaceIsPrivate,
      NamespaceNotAttached, ThinProvisioningNotSupported, ControllerListInvalid, SelfTestInProgress,
      BootPartitionWriteProhibited, InvalidControllerId, InvalidSecondaryState, InvalidResourceCount, InvalidResourceId,
      SanitizeProhibitedByPmr, AnaGroupIdInvalid, AnaAttachFailed, InsufficientCapacity, AttachmentLimitExceeded,
      LockdownNotSupported, CommandSetNotSupported, CommandSetNotEnabled, CommandSetCombinationRejected,
      InvalidCommandSet, IdUnavailable, ConflictingAttributes, InvalidProtectionInformation, WriteToReadOnlyRange,
      CommandSizeLimitExceeded, WriteFault, UnrecoveredReadError, GuardCheckError, ApplicationTagCheckError,
      ReferenceTagCheckError, CompareFailure, AccessDenied, DeallocatedBlock, StorageTagCheckError, InternalPathError,
      AnaPersistentLoss, AnaInaccessible, AnaTransition, ControllerPathError, HostPathError, AbortedByHost)
}

}  // namespace

void bind_nvme_layout(nb::module_& module) {
  module.def("nvme_layout", [] {
    Layout layout;
    add_queue_entries(layout);
    add_identify(layout);
    add_data(layout);
    add_registers(layout);
    add_constants(layout);
    add_status(layout);
    return layout.take();
  });
}

}  // namespace gpunvme
