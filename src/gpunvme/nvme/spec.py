"""What the NVMe specifications fix: registers, queue entries, opcodes, and the numbers that commands carry.

Names are those of the NVM Express Base Specification 2.0, the NVM Command Set Specification 1.0 and the NVMe over PCIe
Transport Specification 1.0, whose sections are given. ``native/include/gpunvme/nvme_spec.h`` says the same in C++, and
a test compares the two.

A controller is a PCI function with one memory range, BAR0. It begins with the *registers*, by which the controller is
described (CAP, VS), configured and started (AQA, ASQ, ACQ, CC) and watched (CSTS). From 1000h on come the *doorbells*.
Everything else is said by *commands* of 64 bytes in submission queues, which lie in the host's memory, and answered by
*completions* of 16 bytes in completion queues beside them. Queue 0 takes admin commands: who are you, make a queue.
The other queues take I/O commands: read, write, flush. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

# What reads of a PCI device that is not there any more return.
ALL_ONES_32 = 0xFFFF_FFFF
ALL_ONES_64 = 0xFFFF_FFFF_FFFF_FFFF

NSID_ALL = 0xFFFF_FFFF
"""The namespace id that means all namespaces."""
CID_NONE = 0xFFFF
"""The command id that stands for "no command" in the error log, so never given to one."""
QUEUE_ENTRIES_MOST = 65536
ADMIN_QUEUE_ENTRIES_MOST = 4096
SQE_EXPONENT = 6
"""A submission queue entry has 2^6 bytes: what CC.IOSQES must say."""
CQE_EXPONENT = 4
"""A completion queue entry has 2^4 bytes: what CC.IOCQES must say."""


class Register(IntEnum):
    """Offsets in BAR0 (Base 2.0, 3.1.3). CAP, ASQ, ACQ, BPMBL and CMBMSC have 8 bytes, the others 4."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CMBLOC = 0x38
    CMBSZ = 0x3C
    BPINFO = 0x40
    BPRSEL = 0x44
    BPMBL = 0x48
    CMBMSC = 0x50
    CMBSTS = 0x58
    CMBEBS = 0x5C
    CMBSWTP = 0x60
    NSSD = 0x64
    CRTO = 0x68
    PMRCAP = 0xE00
    PMRCTL = 0xE04
    PMRSTS = 0xE08
    PMREBS = 0xE0C
    PMRSWTP = 0xE10
    PMRMSCL = 0xE14
    PMRMSCU = 0xE18
    DOORBELLS = 0x1000


def sq_tail_doorbell(qid: int, dstrd: int) -> int:
    """Offset in BAR0 of a submission queue's tail doorbell; ``dstrd`` is CAP.DSTRD (NVMe over PCIe 1.0, 3.1.2)."""
    return Register.DOORBELLS + 2 * qid * (4 << dstrd)


def cq_head_doorbell(qid: int, dstrd: int) -> int:
    """Offset in BAR0 of a completion queue's head doorbell; ``dstrd`` is CAP.DSTRD (NVMe over PCIe 1.0, 3.1.2)."""
    return Register.DOORBELLS + (2 * qid + 1) * (4 << dstrd)


# ---- Fields of registers. A field of one bit is 0 or 1; exponents and 0's based numbers stay as they stand in the
# register, properties resolve them.

_Bits = Mapping[str, tuple[int, int]]  # name: (lowest bit, number of bits)


def _take_apart(value: int, fields: _Bits) -> dict[str, int]:
    return {name: value >> low & (1 << width) - 1 for name, (low, width) in fields.items()}


def _put_together(source: object, fields: _Bits) -> int:
    value = 0
    for name, (low, width) in fields.items():
        part: int = getattr(source, name)
        if not 0 <= part < 1 << width:
            raise ValueError(f"{type(source).__name__}.{name} has {width} bits: {part} does not fit")
        value |= part << low
    return value


@dataclass(frozen=True, slots=True)
class Cap:
    """CAP, Controller Capabilities (Base 2.0, 3.1.3.1)."""

    mqes: int
    """Maximum Queue Entries Supported, 0's based: see `queue_entries`."""
    cqr: int = 0
    """Contiguous Queues Required: I/O queues must be physically contiguous."""
    ams: int = 0
    """Arbitration Mechanisms Supported beside round robin."""
    to: int = 0
    """Timeout for changes of CSTS.RDY, 500 ms: see `ready_timeout`."""
    dstrd: int = 0
    """Doorbell Stride: doorbells are 4 << DSTRD bytes apart."""
    nssrs: int = 0
    """NVM Subsystem Reset Supported."""
    css: int = 1
    """Command Sets Supported: bit 0 NVM, bit 6 those that Identify lists, bit 7 none (admin commands only)."""
    bps: int = 0
    """Boot Partition Support."""
    cps: int = 0
    """Controller Power Scope."""
    mpsmin: int = 0
    """Memory Page Size Minimum, an exponent over 4 KiB: see `page_bytes_min`. Also the unit of MDTS."""
    mpsmax: int = 0
    """Memory Page Size Maximum, an exponent over 4 KiB."""
    pmrs: int = 0
    """Persistent Memory Region Supported."""
    cmbs: int = 0
    """Controller Memory Buffer Supported."""
    nsss: int = 0
    """NVM Subsystem Shutdown Supported."""
    crms: int = 0
    """Controller Ready Modes Supported."""

    BITS: ClassVar[_Bits] = {
        "mqes": (0, 16),
        "cqr": (16, 1),
        "ams": (17, 2),
        "to": (24, 8),
        "dstrd": (32, 4),
        "nssrs": (36, 1),
        "css": (37, 8),
        "bps": (45, 1),
        "cps": (46, 2),
        "mpsmin": (48, 4),
        "mpsmax": (52, 4),
        "pmrs": (56, 1),
        "cmbs": (57, 1),
        "nsss": (58, 1),
        "crms": (59, 2),
    }

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take the register's 64 bits apart."""
        return cls(**_take_apart(value, cls.BITS))

    def encode(self) -> int:
        """Put the register's 64 bits together."""
        return _put_together(self, self.BITS)

    @property
    def queue_entries(self) -> int:
        """The most entries that an I/O queue may have."""
        return self.mqes + 1

    @property
    def page_bytes_min(self) -> int:
        """The smallest memory page that CC.MPS may choose, bytes."""
        return 4096 << self.mpsmin

    @property
    def page_bytes_max(self) -> int:
        """The largest memory page that CC.MPS may choose, bytes."""
        return 4096 << self.mpsmax

    @property
    def ready_timeout(self) -> float:
        """The longest that CSTS.RDY may take to follow CC.EN, seconds."""
        return self.to * 0.5


@dataclass(frozen=True, slots=True)
class Version:
    """VS, Version (Base 2.0, 3.1.3.2)."""

    mjr: int
    mnr: int
    ter: int = 0

    BITS: ClassVar[_Bits] = {"mjr": (16, 16), "mnr": (8, 8), "ter": (0, 8)}

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take the register's 32 bits apart."""
        return cls(**_take_apart(value, cls.BITS))

    def encode(self) -> int:
        """Put the register's 32 bits together."""
        return _put_together(self, self.BITS)

    def __str__(self) -> str:
        return f"{self.mjr}.{self.mnr}" + (f".{self.ter}" if self.ter else "")


class CcCss(IntEnum):
    """CC.CSS, the command sets selected."""

    NVM = 0
    IO = 6
    ADMIN = 7


class Shutdown(IntEnum):
    """CC.SHN, the shutdown that is asked for."""

    NONE = 0
    NORMAL = 1
    ABRUPT = 2


class ShutdownStatus(IntEnum):
    """CSTS.SHST, how far it is."""

    NORMAL = 0
    OCCURRING = 1
    COMPLETE = 2


@dataclass(frozen=True, slots=True)
class Cc:
    """CC, Controller Configuration (Base 2.0, 3.1.3.5)."""

    en: int = 0
    """Enable: 0 to 1 starts the controller, 1 to 0 resets it."""
    css: int = 0
    """Command Set Selected, `CcCss`."""
    mps: int = 0
    """Memory Page Size, an exponent over 4 KiB: see `page_bytes`."""
    ams: int = 0
    """Arbitration Mechanism Selected: 0 round robin."""
    shn: int = 0
    """Shutdown Notification, `Shutdown`."""
    iosqes: int = 0
    """I/O Submission Queue Entry Size, an exponent: `SQE_EXPONENT`."""
    iocqes: int = 0
    """I/O Completion Queue Entry Size, an exponent: `CQE_EXPONENT`."""
    crime: int = 0
    """Controller Ready Independent of Media Enable."""

    BITS: ClassVar[_Bits] = {
        "en": (0, 1),
        "css": (4, 3),
        "mps": (7, 4),
        "ams": (11, 3),
        "shn": (14, 2),
        "iosqes": (16, 4),
        "iocqes": (20, 4),
        "crime": (24, 1),
    }

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take the register's 32 bits apart."""
        return cls(**_take_apart(value, cls.BITS))

    def encode(self) -> int:
        """Put the register's 32 bits together."""
        return _put_together(self, self.BITS)

    @property
    def page_bytes(self) -> int:
        """The memory page that PRPs are cut by, bytes."""
        return 4096 << self.mps


@dataclass(frozen=True, slots=True)
class Csts:
    """CSTS, Controller Status (Base 2.0, 3.1.3.6)."""

    rdy: int = 0
    """Ready: follows CC.EN."""
    cfs: int = 0
    """Controller Fatal Status: nothing but a reset helps."""
    shst: int = 0
    """Shutdown Status, `ShutdownStatus`."""
    nssro: int = 0
    """NVM Subsystem Reset Occurred."""
    pp: int = 0
    """Processing Paused."""
    st: int = 0
    """Shutdown Type: of the whole NVM subsystem."""

    BITS: ClassVar[_Bits] = {"rdy": (0, 1), "cfs": (1, 1), "shst": (2, 2), "nssro": (4, 1), "pp": (5, 1), "st": (6, 1)}

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take the register's 32 bits apart."""
        return cls(**_take_apart(value, cls.BITS))

    def encode(self) -> int:
        """Put the register's 32 bits together."""
        return _put_together(self, self.BITS)


@dataclass(frozen=True, slots=True)
class Aqa:
    """AQA, Admin Queue Attributes (Base 2.0, 3.1.3.8): entries of the admin queues, 0's based."""

    asqs: int
    acqs: int

    BITS: ClassVar[_Bits] = {"asqs": (0, 12), "acqs": (16, 12)}

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take the register's 32 bits apart."""
        return cls(**_take_apart(value, cls.BITS))

    def encode(self) -> int:
        """Put the register's 32 bits together."""
        return _put_together(self, self.BITS)


# ---- Queue entries


@dataclass(frozen=True, slots=True)
class Sqe:
    """Submission queue entry, a command (Base 2.0, 3.3.3.1), with PRPs as data pointer."""

    opcode: int
    flags: int = 0
    """Bits 1:0 FUSE, 7:6 PSDT (0: PRPs)."""
    cid: int = 0
    """Command Identifier: what the completion will be recognised by."""
    nsid: int = 0
    """Namespace Identifier; 0 where a command is not about a namespace."""
    cdw2: int = 0
    cdw3: int = 0
    mptr: int = 0
    """Metadata Pointer."""
    prp1: int = 0
    """IOVA of the data's first byte, or what is left of its first page."""
    prp2: int = 0
    """IOVA of the second page, or of the list of all further pages where there are more than two."""
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<BBHIIIQQQ6I")
    SIZE: ClassVar[int] = 64

    def pack(self) -> bytes:
        """The 64 bytes as they stand in a submission queue."""
        return self.FORMAT.pack(*(getattr(self, name) for name in self.__slots__))

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Take 64 bytes apart."""
        return cls(*cls.FORMAT.unpack_from(data, offset))


@dataclass(frozen=True, slots=True)
class Cqe:
    """Completion queue entry, the answer to a command (Base 2.0, 3.3.3.2)."""

    dw0: int
    """The result of commands that have one."""
    dw1: int
    sq_head: int
    """Where the controller is in the submission queue: the entries before it may be used again."""
    sq_id: int
    cid: int
    phase: int
    """Phase tag: inverted each time the controller begins the completion queue anew."""
    status: int
    """The 15-bit status field; `gpunvme.nvme.status` is about it."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("<IIHHHH")
    SIZE: ClassVar[int] = 16

    def pack(self) -> bytes:
        """The 16 bytes as they stand in a completion queue."""
        word = self.status << 1 | self.phase
        return self.FORMAT.pack(self.dw0, self.dw1, self.sq_head, self.sq_id, self.cid, word)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Take 16 bytes apart."""
        dw0, dw1, sq_head, sq_id, cid, word = cls.FORMAT.unpack_from(data, offset)
        return cls(dw0, dw1, sq_head, sq_id, cid, word & 1, word >> 1)


# ---- Commands


class AdminOpcode(IntEnum):
    """Admin commands (Base 2.0, 5)."""

    DELETE_IO_SQ = 0x00
    CREATE_IO_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_IO_CQ = 0x04
    CREATE_IO_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    NAMESPACE_MANAGEMENT = 0x0D
    FIRMWARE_COMMIT = 0x10
    FIRMWARE_DOWNLOAD = 0x11
    SELF_TEST = 0x14
    NAMESPACE_ATTACHMENT = 0x15
    KEEP_ALIVE = 0x18
    DIRECTIVE_SEND = 0x19
    DIRECTIVE_RECEIVE = 0x1A
    VIRTUALIZATION = 0x1C
    MI_SEND = 0x1D
    MI_RECEIVE = 0x1E
    CAPACITY_MANAGEMENT = 0x20
    LOCKDOWN = 0x24
    DOORBELL_BUFFER_CONFIG = 0x7C
    FORMAT_NVM = 0x80
    SECURITY_SEND = 0x81
    SECURITY_RECEIVE = 0x82
    SANITIZE = 0x84
    GET_LBA_STATUS = 0x86


class NvmOpcode(IntEnum):
    """Commands of the NVM command set (NVM Command Set 1.0, 3.2; Flush: Base 2.0, 7.1)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_UNCORRECTABLE = 0x04
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    RESERVATION_REGISTER = 0x0D
    RESERVATION_REPORT = 0x0E
    RESERVATION_ACQUIRE = 0x11
    RESERVATION_RELEASE = 0x15
    COPY = 0x19


def admin_opcode_name(opcode: int) -> str:
    """What an admin command is called in messages."""
    return AdminOpcode(opcode).name if opcode in AdminOpcode.__members__.values() else f"admin command {opcode:02X}h"


def nvm_opcode_name(opcode: int) -> str:
    """What an I/O command is called in messages."""
    return NvmOpcode(opcode).name if opcode in NvmOpcode.__members__.values() else f"I/O command {opcode:02X}h"


class Rw(IntFlag):
    """CDW12 of Read, Write and their like; bits 15:0 (NLB) are the number of blocks, 0's based."""

    DEAC = 1 << 25
    """Write Zeroes: deallocate."""
    FUA = 1 << 30
    """Force Unit Access: on the media before it completes."""
    LR = 1 << 31
    """Limited Retry."""


RW_BLOCKS_MOST = 65536
"""The most blocks of one command, whatever MDTS says."""


class Dsm(IntFlag):
    """CDW11 of Dataset Management; CDW10 bits 7:0 are the number of ranges, 0's based."""

    IDR = 1 << 0
    """Integral Dataset for Read."""
    IDW = 1 << 1
    """Integral Dataset for Write."""
    AD = 1 << 2
    """Attribute Deallocate ("trim")."""


DSM_RANGES_MOST = 256
_DSM_RANGE = struct.Struct("<IIQ")


def pack_dsm_ranges(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Data of a Dataset Management command for ``(first block, blocks)`` (NVM Command Set 1.0, 3.2.3)."""
    return b"".join(_DSM_RANGE.pack(0, blocks, lba) for lba, blocks in ranges)


class CreateQueue(IntFlag):
    """CDW11 of Create I/O Completion Queue and Create I/O Submission Queue (Base 2.0, 5.4 and 5.5).

    CDW10 of both is QSIZE (0's based) << 16 | QID. CDW11 bits 31:16 are the interrupt vector (completion queue) or the
    completion queue to use (submission queue).
    """

    PC = 1 << 0
    """Physically Contiguous."""
    IEN = 1 << 1
    """Interrupts Enabled; completion queues only."""


class Cns(IntEnum):
    """What Identify returns: CDW10 bits 7:0 (Base 2.0, 5.17.1)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03
    NVM_SETS = 0x04
    COMMAND_SET_NAMESPACE = 0x05
    COMMAND_SET_CONTROLLER = 0x06
    COMMAND_SET_ACTIVE_NAMESPACES = 0x07
    INDEPENDENT_NAMESPACE = 0x08
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11
    ATTACHED_CONTROLLERS = 0x12
    CONTROLLERS = 0x13
    PRIMARY_CONTROLLER = 0x14
    SECONDARY_CONTROLLERS = 0x15
    NAMESPACE_GRANULARITY = 0x16
    UUIDS = 0x17
    DOMAINS = 0x18
    ENDURANCE_GROUPS = 0x19
    COMMAND_SETS = 0x1C


class Csi(IntEnum):
    """Command Set Identifiers: Identify's CDW11 bits 31:24."""

    NVM = 0x00
    KEY_VALUE = 0x01
    ZONED = 0x02


class Feature(IntEnum):
    """Feature Identifiers: CDW10 bits 7:0 of Set and Get Features (Base 2.0, 5.27.1; NVM Command Set 1.0, 4.1.3)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    LBA_RANGE_TYPE = 0x03
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B
    AUTONOMOUS_POWER_STATE = 0x0C
    HOST_MEMORY_BUFFER = 0x0D
    TIMESTAMP = 0x0E
    KEEP_ALIVE = 0x0F
    THERMAL_MANAGEMENT = 0x10
    NON_OPERATIONAL_POWER = 0x11
    READ_RECOVERY = 0x12
    HOST_BEHAVIOR = 0x16
    SANITIZE = 0x17
    COMMAND_SET_PROFILE = 0x19
    SOFTWARE_PROGRESS = 0x80
    HOST_ID = 0x81
    RESERVATION_MASK = 0x82
    RESERVATION_PERSISTENCE = 0x83
    WRITE_PROTECTION = 0x84


class LogPage(IntEnum):
    """Log Page Identifiers: CDW10 bits 7:0 of Get Log Page (Base 2.0, 5.16.1)."""

    SUPPORTED_PAGES = 0x00
    ERROR = 0x01
    SMART = 0x02
    FIRMWARE_SLOT = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMAND_EFFECTS = 0x05
    SELF_TEST = 0x06
    TELEMETRY_HOST = 0x07
    TELEMETRY_CONTROLLER = 0x08
    ENDURANCE_GROUP = 0x09
    ANA = 0x0C
    PERSISTENT_EVENTS = 0x0D
    LBA_STATUS = 0x0E
    FEATURE_EFFECTS = 0x12
    RESERVATIONS = 0x80
    SANITIZE = 0x81


# ---- Asynchronous events (Base 2.0, 5.2)


class EventType(IntEnum):
    """What an asynchronous event is about."""

    ERROR = 0
    SMART = 1
    NOTICE = 2
    COMMAND_SET = 6
    VENDOR = 7


class ErrorEvent(IntEnum):
    """Information of an event of type ERROR."""

    INVALID_DOORBELL_REGISTER = 0
    """A doorbell of a queue that does not exist was written."""
    INVALID_DOORBELL_VALUE = 1
    """A value outside of the queue, or the one that the doorbell had, was written."""
    DIAGNOSTIC_FAILURE = 2
    PERSISTENT_INTERNAL = 3
    TRANSIENT_INTERNAL = 4
    FIRMWARE_LOAD = 5


_SMART_EVENTS = ("the subsystem's reliability is compromised", "a temperature crossed its threshold", "spare is low")
_NOTICES = {
    0: "namespaces changed",
    1: "new firmware is being activated",
    2: "telemetry is available",
    3: "asymmetric namespace access changed",
}


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """DW0 of an Asynchronous Event Request's completion."""

    type: int
    information: int
    log_page: int
    """The log page to read; reading it makes room for the next event of this type."""

    BITS: ClassVar[_Bits] = {"type": (0, 3), "information": (8, 8), "log_page": (16, 8)}

    @classmethod
    def decode(cls, dw0: int) -> Self:
        """Take the dword apart."""
        return cls(**_take_apart(dw0, cls.BITS))

    def encode(self) -> int:
        """Put the dword together."""
        return _put_together(self, self.BITS)

    def __str__(self) -> str:
        text: str | None = None
        if self.type == EventType.ERROR and self.information in ErrorEvent.__members__.values():
            text = ErrorEvent(self.information).name.lower().replace("_", " ")
        elif self.type == EventType.SMART and self.information < len(_SMART_EVENTS):
            text = _SMART_EVENTS[self.information]
        elif self.type == EventType.NOTICE:
            text = _NOTICES.get(self.information)
        return text or f"event of type {self.type}, information {self.information:#x}"
