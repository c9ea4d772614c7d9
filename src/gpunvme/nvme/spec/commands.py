"""Commands: their opcodes, and the numbers that they carry."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum, IntFlag


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
