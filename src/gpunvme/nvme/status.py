"""How a command ended: what the status field of a completion says, in words.

A *status* is the 15-bit status field (NVM Express Base Specification 2.0, 3.3.3.2.1), what is left of a completion's
last 16 bits when the phase tag has been shifted out::

    14   13    12:11  10:8  7:0
    DNR  More  CRD    SCT   SC

The Status Code Type (SCT) says which table the Status Code (SC) is from. Do Not Retry (DNR) says that the same command
would fail again; without it, trying again may help, after the Command Retry Delay (CRD) if there is one. More says that
the error log has more about it. A *code* is SCT << 8 | SC, as in `Status`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

CODE_MASK = 0x7FF


class StatusFlag(IntFlag):
    """Bits of a status above its code."""

    MORE = 1 << 13
    DNR = 1 << 14


class StatusType(IntEnum):
    """Status Code Types (3.3.3.2.1)."""

    GENERIC = 0
    COMMAND_SPECIFIC = 1
    MEDIA = 2
    PATH = 3
    VENDOR = 7


class Status(IntEnum):
    """Codes, SCT << 8 | SC (Base 2.0, 3.3.3.2.1; NVM Command Set 1.0, 3.1). ``text`` says what they mean."""

    text: str

    def __new__(cls, code: int, text: str) -> Status:
        """Make a code with its text."""
        status = int.__new__(cls, code)
        status._value_ = code
        status.text = text
        return status

    SUCCESS = 0x000, "success"
    INVALID_OPCODE = 0x001, "the controller does not know this command"
    INVALID_FIELD = 0x002, "a field of the command has a value that is not allowed"
    COMMAND_ID_CONFLICT = 0x003, "the command identifier is already in use"
    DATA_TRANSFER_ERROR = 0x004, "data or metadata could not be transferred"
    ABORTED_POWER_LOSS = 0x005, "given up because power is about to be lost"
    INTERNAL_ERROR = 0x006, "an error inside the controller"
    ABORT_REQUESTED = 0x007, "aborted as an Abort command asked for"
    ABORTED_SQ_DELETION = 0x008, "given up because its submission queue was deleted"
    ABORTED_FAILED_FUSED = 0x009, "given up because the other half of the fused operation failed"
    ABORTED_MISSING_FUSED = 0x00A, "given up because the other half of the fused operation is missing"
    INVALID_NAMESPACE_OR_FORMAT = 0x00B, "there is no such namespace, or its format does not allow this"
    COMMAND_SEQUENCE_ERROR = 0x00C, "commands came in an order that is not allowed"
    INVALID_SGL_SEGMENT = 0x00D, "an SGL segment descriptor is wrong"
    INVALID_SGL_COUNT = 0x00E, "a wrong number of SGL descriptors"
    DATA_SGL_LENGTH_INVALID = 0x00F, "the data SGL is too short or too long"
    METADATA_SGL_LENGTH_INVALID = 0x010, "the metadata SGL is too short or too long"
    SGL_TYPE_INVALID = 0x011, "this type of SGL descriptor is not supported"
    INVALID_USE_OF_CMB = 0x012, "the controller memory buffer cannot be used like this"
    PRP_OFFSET_INVALID = 0x013, "a PRP entry does not start at a page, or not at a multiple of 4 bytes"
    ATOMIC_WRITE_UNIT_EXCEEDED = 0x014, "longer than what the controller writes atomically"
    OPERATION_DENIED = 0x015, "not allowed to this host"
    SGL_OFFSET_INVALID = 0x016, "an SGL descriptor has a wrong offset"
    HOST_ID_INCONSISTENT = 0x018, "hosts use host identifiers of different lengths"
    KEEP_ALIVE_EXPIRED = 0x019, "no Keep Alive came in time"
    KEEP_ALIVE_INVALID = 0x01A, "this Keep Alive timeout is not supported"
    ABORTED_PREEMPT = 0x01B, "given up because another host took the reservation"
    SANITIZE_FAILED = 0x01C, "the latest sanitize operation failed, and nothing was done about it"
    SANITIZE_IN_PROGRESS = 0x01D, "a sanitize operation is in progress"
    SGL_GRANULARITY_INVALID = 0x01E, "the SGL does not have the granularity that the controller needs"
    NOT_SUPPORTED_FOR_CMB_QUEUE = 0x01F, "not possible for queues in the controller memory buffer"
    NAMESPACE_WRITE_PROTECTED = 0x020, "the namespace is write protected"
    COMMAND_INTERRUPTED = 0x021, "interrupted by something else; can be tried again"
    TRANSIENT_TRANSPORT_ERROR = 0x022, "a passing error on the way to the controller"
    PROHIBITED_BY_LOCKDOWN = 0x023, "forbidden by a command and feature lockdown"
    ADMIN_MEDIA_NOT_READY = 0x024, "the media that this admin command needs is not ready yet"
    LBA_OUT_OF_RANGE = 0x080, "blocks lie behind the namespace's end"
    CAPACITY_EXCEEDED = 0x081, "the namespace has no capacity left for this"
    NAMESPACE_NOT_READY = 0x082, "the namespace is not ready yet"
    RESERVATION_CONFLICT = 0x083, "another host's reservation forbids it"
    FORMAT_IN_PROGRESS = 0x084, "the namespace is being formatted"

    COMPLETION_QUEUE_INVALID = 0x100, "there is no such completion queue"
    INVALID_QUEUE_ID = 0x101, "this queue identifier is in use, or is not one that can be used"
    INVALID_QUEUE_SIZE = 0x102, "the queue is smaller or larger than the controller allows"
    ABORT_LIMIT_EXCEEDED = 0x103, "more Abort commands at a time than the controller takes"
    AER_LIMIT_EXCEEDED = 0x105, "more Asynchronous Event Requests at a time than the controller takes"
    INVALID_FIRMWARE_SLOT = 0x106, "there is no such firmware slot, or it is read-only"
    INVALID_FIRMWARE_IMAGE = 0x107, "the firmware image is not valid"
    INVALID_INTERRUPT_VECTOR = 0x108, "there is no such interrupt vector"
    INVALID_LOG_PAGE = 0x109, "there is no such log page"
    INVALID_FORMAT = 0x10A, "this LBA format is not supported"
    FIRMWARE_NEEDS_CONVENTIONAL_RESET = 0x10B, "the firmware starts with the next conventional reset"
    INVALID_QUEUE_DELETION = 0x10C, "submission queues still use this completion queue"
    FEATURE_NOT_SAVEABLE = 0x10D, "this feature cannot be saved"
    FEATURE_NOT_CHANGEABLE = 0x10E, "this feature cannot be changed"
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F, "this feature is not one of single namespaces"
    FIRMWARE_NEEDS_SUBSYSTEM_RESET = 0x110, "the firmware starts with the next NVM subsystem reset"
    FIRMWARE_NEEDS_CONTROLLER_RESET = 0x111, "the firmware starts with the next controller reset"
    FIRMWARE_NEEDS_MAXIMUM_TIME = 0x112, "starting the firmware takes longer than the controller may pause"
    FIRMWARE_ACTIVATION_PROHIBITED = 0x113, "this firmware must not be started"
    OVERLAPPING_RANGE = 0x114, "ranges overlap"
    NAMESPACE_INSUFFICIENT_CAPACITY = 0x115, "not enough unallocated capacity for the namespace"
    NAMESPACE_ID_UNAVAILABLE = 0x116, "no namespace identifier is left"
    NAMESPACE_ALREADY_ATTACHED = 0x118, "the namespace is attached to this controller already"
    NAMESPACE_IS_PRIVATE = 0x119, "the namespace is private and attached to another controller"
    NAMESPACE_NOT_ATTACHED = 0x11A, "the namespace is not attached to this controller"
    THIN_PROVISIONING_NOT_SUPPORTED = 0x11B, "thin provisioning is not supported"
    CONTROLLER_LIST_INVALID = 0x11C, "the list of controllers is not valid"
    SELF_TEST_IN_PROGRESS = 0x11D, "a self-test is running"
    BOOT_PARTITION_WRITE_PROHIBITED = 0x11E, "the boot partition is locked"
    INVALID_CONTROLLER_ID = 0x11F, "there is no such controller"
    INVALID_SECONDARY_STATE = 0x120, "the secondary controller cannot change to this state now"
    INVALID_RESOURCE_COUNT = 0x121, "this number of resources is not possible"
    INVALID_RESOURCE_ID = 0x122, "there is no such resource"
    SANITIZE_PROHIBITED_BY_PMR = 0x123, "no sanitizing while the persistent memory region is enabled"
    ANA_GROUP_ID_INVALID = 0x124, "there is no such ANA group"
    ANA_ATTACH_FAILED = 0x125, "the controller cannot reach the namespace in its ANA group"
    INSUFFICIENT_CAPACITY = 0x126, "not enough capacity"
    ATTACHMENT_LIMIT_EXCEEDED = 0x127, "no more namespaces can be attached"
    LOCKDOWN_NOT_SUPPORTED = 0x128, "this command or feature cannot be locked down"
    COMMAND_SET_NOT_SUPPORTED = 0x129, "the command set is not supported"
    COMMAND_SET_NOT_ENABLED = 0x12A, "the command set is not enabled"
    COMMAND_SET_COMBINATION_REJECTED = 0x12B, "this combination of command sets is not possible now"
    INVALID_COMMAND_SET = 0x12C, "there is no such command set"
    ID_UNAVAILABLE = 0x12D, "no identifier is left"
    CONFLICTING_ATTRIBUTES = 0x180, "attributes of the command contradict each other"
    INVALID_PROTECTION_INFORMATION = 0x181, "the protection information does not fit the namespace's format"
    WRITE_TO_READ_ONLY_RANGE = 0x182, "the blocks are read-only"
    COMMAND_SIZE_LIMIT_EXCEEDED = 0x183, "more blocks or ranges than the controller takes in one command"

    WRITE_FAULT = 0x280, "the data could not be written to the media"
    UNRECOVERED_READ_ERROR = 0x281, "the data could not be read from the media"
    GUARD_CHECK_ERROR = 0x282, "the checksum that protects a block is wrong"
    APPLICATION_TAG_CHECK_ERROR = 0x283, "the application tag that protects a block is wrong"
    REFERENCE_TAG_CHECK_ERROR = 0x284, "the reference tag that protects a block is wrong"
    COMPARE_FAILURE = 0x285, "the data differs from what is stored"
    ACCESS_DENIED = 0x286, "access to these blocks is not allowed"
    DEALLOCATED_BLOCK = 0x287, "a block is deallocated or was never written"
    STORAGE_TAG_CHECK_ERROR = 0x288, "the storage tag that protects a block is wrong"

    INTERNAL_PATH_ERROR = 0x300, "an error between the controller and the namespace"
    ANA_PERSISTENT_LOSS = 0x301, "the namespace cannot be reached by this controller any more"
    ANA_INACCESSIBLE = 0x302, "the namespace cannot be reached by this controller now"
    ANA_TRANSITION = 0x303, "access to the namespace is changing"
    CONTROLLER_PATH_ERROR = 0x360, "the controller found an error on the path"
    HOST_PATH_ERROR = 0x370, "the host found an error on the path"
    ABORTED_BY_HOST = 0x371, "the host gave the command up"


_BY_CODE = {int(each): each for each in Status}
_FIRST_VENDOR_SPECIFIC = 0xC0


def sct(status: int) -> int:
    """Status Code Type."""
    return status >> 8 & 7


def sc(status: int) -> int:
    """Status Code."""
    return status & 0xFF


def code(status: int) -> int:
    """SCT << 8 | SC, to be compared with `Status`."""
    return status & CODE_MASK


def crd(status: int) -> int:
    """Command Retry Delay: 0 none, 1 to 3 which of Identify Controller's CRDT1 to CRDT3 to wait for."""
    return status >> 11 & 3


def more(status: int) -> bool:
    """Whether the error log has more about it."""
    return bool(status & StatusFlag.MORE)


def dnr(status: int) -> bool:
    """Do Not Retry: whether the same command would fail again."""
    return bool(status & StatusFlag.DNR)


def text(status: int) -> str:
    """What a status means, in a few words."""
    known = _BY_CODE.get(code(status))
    if known is not None:
        return known.text
    if sct(status) == StatusType.VENDOR or sc(status) >= _FIRST_VENDOR_SPECIFIC:
        return "vendor specific"
    return "reserved by the specification"


def name(status: int) -> str:
    """The name of a status, as in ``LBA_OUT_OF_RANGE``; empty if it has none."""
    known = _BY_CODE.get(code(status))
    return known.name if known is not None else ""


def describe(status: int) -> str:
    """Say all about a status, as in ``… (SCT 0h, SC 80h, DNR)``."""
    marks = [f"SCT {sct(status):X}h", f"SC {sc(status):02X}h"]
    marks += [f"CRD {crd(status)}"] if crd(status) else []
    marks += ["More"] if more(status) else []
    marks += ["DNR"] if dnr(status) else []
    return f"{text(status)} ({', '.join(marks)})"
