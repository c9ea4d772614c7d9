// How a command ended: the status field of a completion, and the codes that it may hold.
//
// A *status* here is the 15-bit status field (Base 2.0, 3.3.3.2.1): what is left of the last 16 bits of a completion
// queue entry when the phase tag has been shifted out. A *code* is SCT<<8 | SC, as `kStatus…` below.
// src/gpunvme/nvme/status.py has the same codes with a sentence on each.
#pragma once

#include <cstdint>

#include "gpunvme/target.h"

namespace gpunvme::nvme {

inline constexpr std::uint16_t kStatusMore = 1u << 13;  // M: the error log has more about this
inline constexpr std::uint16_t kStatusDnr = 1u << 14;   // Do Not Retry: the same command would fail again

GPUNVME_HD constexpr std::uint32_t status_sc(std::uint16_t status) { return status & 0xFF; }
GPUNVME_HD constexpr std::uint32_t status_sct(std::uint16_t status) { return status >> 8 & 0x7; }
// Command Retry Delay: 0 none, 1 to 3 which of Identify Controller's CRDT1 to CRDT3.
GPUNVME_HD constexpr std::uint32_t status_crd(std::uint16_t status) { return status >> 11 & 0x3; }
GPUNVME_HD constexpr bool status_more(std::uint16_t status) { return (status & kStatusMore) != 0; }
GPUNVME_HD constexpr bool status_dnr(std::uint16_t status) { return (status & kStatusDnr) != 0; }
// SCT<<8 | SC, to be compared with the codes below.
GPUNVME_HD constexpr std::uint16_t status_code(std::uint16_t status) { return status & 0x7FF; }

// Status Code Types.
inline constexpr std::uint8_t kSctGeneric = 0;
inline constexpr std::uint8_t kSctCommandSpecific = 1;
inline constexpr std::uint8_t kSctMedia = 2;
inline constexpr std::uint8_t kSctPath = 3;
inline constexpr std::uint8_t kSctVendor = 7;

// Generic (Base 2.0, 3.3.3.2.1.1; from 0x80 on NVM Command Set 1.0, 3.1).
inline constexpr std::uint16_t kStatusSuccess = 0x000;
inline constexpr std::uint16_t kStatusInvalidOpcode = 0x001;
inline constexpr std::uint16_t kStatusInvalidField = 0x002;
inline constexpr std::uint16_t kStatusCommandIdConflict = 0x003;
inline constexpr std::uint16_t kStatusDataTransferError = 0x004;
inline constexpr std::uint16_t kStatusAbortedPowerLoss = 0x005;
inline constexpr std::uint16_t kStatusInternalError = 0x006;
inline constexpr std::uint16_t kStatusAbortRequested = 0x007;
inline constexpr std::uint16_t kStatusAbortedSqDeletion = 0x008;
inline constexpr std::uint16_t kStatusAbortedFailedFused = 0x009;
inline constexpr std::uint16_t kStatusAbortedMissingFused = 0x00A;
inline constexpr std::uint16_t kStatusInvalidNamespaceOrFormat = 0x00B;
inline constexpr std::uint16_t kStatusCommandSequenceError = 0x00C;
inline constexpr std::uint16_t kStatusInvalidSglSegment = 0x00D;
inline constexpr std::uint16_t kStatusInvalidSglCount = 0x00E;
inline constexpr std::uint16_t kStatusDataSglLengthInvalid = 0x00F;
inline constexpr std::uint16_t kStatusMetadataSglLengthInvalid = 0x010;
inline constexpr std::uint16_t kStatusSglTypeInvalid = 0x011;
inline constexpr std::uint16_t kStatusInvalidUseOfCmb = 0x012;
inline constexpr std::uint16_t kStatusPrpOffsetInvalid = 0x013;
inline constexpr std::uint16_t kStatusAtomicWriteUnitExceeded = 0x014;
inline constexpr std::uint16_t kStatusOperationDenied = 0x015;
inline constexpr std::uint16_t kStatusSglOffsetInvalid = 0x016;
inline constexpr std::uint16_t kStatusHostIdInconsistent = 0x018;
inline constexpr std::uint16_t kStatusKeepAliveExpired = 0x019;
inline constexpr std::uint16_t kStatusKeepAliveInvalid = 0x01A;
inline constexpr std::uint16_t kStatusAbortedPreempt = 0x01B;
inline constexpr std::uint16_t kStatusSanitizeFailed = 0x01C;
inline constexpr std::uint16_t kStatusSanitizeInProgress = 0x01D;
inline constexpr std::uint16_t kStatusSglGranularityInvalid = 0x01E;
inline constexpr std::uint16_t kStatusNotSupportedForCmbQueue = 0x01F;
inline constexpr std::uint16_t kStatusNamespaceWriteProtected = 0x020;
inline constexpr std::uint16_t kStatusCommandInterrupted = 0x021;
inline constexpr std::uint16_t kStatusTransientTransportError = 0x022;
inline constexpr std::uint16_t kStatusProhibitedByLockdown = 0x023;
inline constexpr std::uint16_t kStatusAdminMediaNotReady = 0x024;
inline constexpr std::uint16_t kStatusLbaOutOfRange = 0x080;
inline constexpr std::uint16_t kStatusCapacityExceeded = 0x081;
inline constexpr std::uint16_t kStatusNamespaceNotReady = 0x082;
inline constexpr std::uint16_t kStatusReservationConflict = 0x083;
inline constexpr std::uint16_t kStatusFormatInProgress = 0x084;

// Command specific (Base 2.0, 3.3.3.2.1.2; from 0x180 on NVM Command Set 1.0, 3.1).
inline constexpr std::uint16_t kStatusCompletionQueueInvalid = 0x100;
inline constexpr std::uint16_t kStatusInvalidQueueId = 0x101;
inline constexpr std::uint16_t kStatusInvalidQueueSize = 0x102;
inline constexpr std::uint16_t kStatusAbortLimitExceeded = 0x103;
inline constexpr std::uint16_t kStatusAerLimitExceeded = 0x105;
inline constexpr std::uint16_t kStatusInvalidFirmwareSlot = 0x106;
inline constexpr std::uint16_t kStatusInvalidFirmwareImage = 0x107;
inline constexpr std::uint16_t kStatusInvalidInterruptVector = 0x108;
inline constexpr std::uint16_t kStatusInvalidLogPage = 0x109;
inline constexpr std::uint16_t kStatusInvalidFormat = 0x10A;
inline constexpr std::uint16_t kStatusFirmwareNeedsConventionalReset = 0x10B;
inline constexpr std::uint16_t kStatusInvalidQueueDeletion = 0x10C;
inline constexpr std::uint16_t kStatusFeatureNotSaveable = 0x10D;
inline constexpr std::uint16_t kStatusFeatureNotChangeable = 0x10E;
inline constexpr std::uint16_t kStatusFeatureNotNamespaceSpecific = 0x10F;
inline constexpr std::uint16_t kStatusFirmwareNeedsSubsystemReset = 0x110;
inline constexpr std::uint16_t kStatusFirmwareNeedsControllerReset = 0x111;
inline constexpr std::uint16_t kStatusFirmwareNeedsMaximumTime = 0x112;
inline constexpr std::uint16_t kStatusFirmwareActivationProhibited = 0x113;
inline constexpr std::uint16_t kStatusOverlappingRange = 0x114;
inline constexpr std::uint16_t kStatusNamespaceInsufficientCapacity = 0x115;
inline constexpr std::uint16_t kStatusNamespaceIdUnavailable = 0x116;
inline constexpr std::uint16_t kStatusNamespaceAlreadyAttached = 0x118;
inline constexpr std::uint16_t kStatusNamespaceIsPrivate = 0x119;
inline constexpr std::uint16_t kStatusNamespaceNotAttached = 0x11A;
inline constexpr std::uint16_t kStatusThinProvisioningNotSupported = 0x11B;
inline constexpr std::uint16_t kStatusControllerListInvalid = 0x11C;
inline constexpr std::uint16_t kStatusSelfTestInProgress = 0x11D;
inline constexpr std::uint16_t kStatusBootPartitionWriteProhibited = 0x11E;
inline constexpr std::uint16_t kStatusInvalidControllerId = 0x11F;
inline constexpr std::uint16_t kStatusInvalidSecondaryState = 0x120;
inline constexpr std::uint16_t kStatusInvalidResourceCount = 0x121;
inline constexpr std::uint16_t kStatusInvalidResourceId = 0x122;
inline constexpr std::uint16_t kStatusSanitizeProhibitedByPmr = 0x123;
inline constexpr std::uint16_t kStatusAnaGroupIdInvalid = 0x124;
inline constexpr std::uint16_t kStatusAnaAttachFailed = 0x125;
inline constexpr std::uint16_t kStatusInsufficientCapacity = 0x126;
inline constexpr std::uint16_t kStatusAttachmentLimitExceeded = 0x127;
inline constexpr std::uint16_t kStatusLockdownNotSupported = 0x128;
inline constexpr std::uint16_t kStatusCommandSetNotSupported = 0x129;
inline constexpr std::uint16_t kStatusCommandSetNotEnabled = 0x12A;
inline constexpr std::uint16_t kStatusCommandSetCombinationRejected = 0x12B;
inline constexpr std::uint16_t kStatusInvalidCommandSet = 0x12C;
inline constexpr std::uint16_t kStatusIdUnavailable = 0x12D;
inline constexpr std::uint16_t kStatusConflictingAttributes = 0x180;
inline constexpr std::uint16_t kStatusInvalidProtectionInformation = 0x181;
inline constexpr std::uint16_t kStatusWriteToReadOnlyRange = 0x182;
inline constexpr std::uint16_t kStatusCommandSizeLimitExceeded = 0x183;

// Media and data integrity (Base 2.0, 3.3.3.2.1.3; NVM Command Set 1.0, 3.1).
inline constexpr std::uint16_t kStatusWriteFault = 0x280;
inline constexpr std::uint16_t kStatusUnrecoveredReadError = 0x281;
inline constexpr std::uint16_t kStatusGuardCheckError = 0x282;
inline constexpr std::uint16_t kStatusApplicationTagCheckError = 0x283;
inline constexpr std::uint16_t kStatusReferenceTagCheckError = 0x284;
inline constexpr std::uint16_t kStatusCompareFailure = 0x285;
inline constexpr std::uint16_t kStatusAccessDenied = 0x286;
inline constexpr std::uint16_t kStatusDeallocatedBlock = 0x287;
inline constexpr std::uint16_t kStatusStorageTagCheckError = 0x288;

// Path related (Base 2.0, 3.3.3.2.1.4).
inline constexpr std::uint16_t kStatusInternalPathError = 0x300;
inline constexpr std::uint16_t kStatusAnaPersistentLoss = 0x301;
inline constexpr std::uint16_t kStatusAnaInaccessible = 0x302;
inline constexpr std::uint16_t kStatusAnaTransition = 0x303;
inline constexpr std::uint16_t kStatusControllerPathError = 0x360;
inline constexpr std::uint16_t kStatusHostPathError = 0x370;
inline constexpr std::uint16_t kStatusAbortedByHost = 0x371;

}  // namespace gpunvme::nvme
