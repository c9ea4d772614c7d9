"""What a controller says about itself and its namespaces: the data structures of the Identify command.

Attributes have the specifications' abbreviations, in lower case; properties resolve exponents and numbers that are
0's based (that mean one more than they say). References are to the NVM Express Base Specification 2.0 ("Base") and the
NVM Command Set Specification 1.0 ("NVM").
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from gpunvme.errors import ControllerError
from gpunvme.nvme.spec import Version
from gpunvme.nvme.spec.layout import Bytes, Structure, number, raw, structures, text

IDENTIFY_BYTES = 4096
"""Whatever Identify returns has this size."""


@dataclass(frozen=True, slots=True)
class PowerState(Structure, size=32, name="a power state descriptor"):
    """One of a controller's power states (Base, 5.17.2.1)."""

    mp: int = number(0, 2)
    """Maximum Power, 10 mW, or 0.1 mW where bit 0 of ``flags`` is set: see `watts`."""
    flags: int = number(3, 1)
    """Bit 0 MXPS, the scale of ``mp``; bit 1 NOPS, no I/O in this state."""
    enlat: int = number(4, 4)
    """Entry Latency, microseconds."""
    exlat: int = number(8, 4)
    """Exit Latency, microseconds."""
    rrt: int = number(12, 1)
    """Relative Read Throughput, 0 is best; then read latency and both for writes."""
    rrl: int = number(13, 1)
    rwt: int = number(14, 1)
    rwl: int = number(15, 1)
    idlp: int = number(16, 2)
    """Idle Power, in the scale of ``ips`` bits 7:6."""
    ips: int = number(18, 1)
    actp: int = number(20, 2)
    """Active Power, in the scale of ``apws`` bits 7:6."""
    apws: int = number(22, 1)

    @property
    def watts(self) -> float:
        """The most power used in this state; 0 where it is not given."""
        return self.mp / (10_000 if self.flags & 1 else 100)

    @property
    def operational(self) -> bool:
        """Whether I/O is done in this state."""
        return not self.flags & 2


class Oncs(IntFlag):
    """Optional NVM commands that there are: `IdentifyController.oncs`."""

    COMPARE = 1 << 0
    WRITE_UNCORRECTABLE = 1 << 1
    DATASET_MANAGEMENT = 1 << 2
    WRITE_ZEROES = 1 << 3
    SAVE_SELECT = 1 << 4
    """Save in Set Features and Select in Get Features."""
    RESERVATIONS = 1 << 5
    TIMESTAMP = 1 << 6
    VERIFY = 1 << 7
    COPY = 1 << 8


@dataclass(frozen=True, slots=True)
class IdentifyController(Structure, size=IDENTIFY_BYTES, name="Identify Controller"):
    """CNS 01h (Base, 5.17.2.1; fields of the NVM command set: NVM, 4.1.5.2)."""

    vid: int = number(0, 2)
    """PCI Vendor ID."""
    ssvid: int = number(2, 2)
    """PCI Subsystem Vendor ID."""
    sn: str = text(4, 20)
    """Serial Number."""
    mn: str = text(24, 40)
    """Model Number."""
    fr: str = text(64, 8)
    """Firmware Revision."""
    rab: int = number(72, 1)
    """Recommended Arbitration Burst, an exponent: commands."""
    ieee: int = number(73, 3)
    """The vendor's Organizationally Unique Identifier."""
    cmic: int = number(76, 1)
    """Multi-path I/O and namespace sharing: bit 0 several ports, 1 several controllers, 2 virtual function, 3 ANA."""
    mdts: int = number(77, 1)
    """Maximum Data Transfer Size, an exponent over CAP.MPSMIN's page; 0: no limit. See `max_transfer_bytes`."""
    cntlid: int = number(78, 2)
    """Controller ID."""
    ver: int = number(80, 4)
    """Version, as in VS: see `version`."""
    rtd3r: int = number(84, 4)
    """Resume from D3, microseconds."""
    rtd3e: int = number(88, 4)
    """Entry to D3, microseconds: how long a shutdown takes."""
    oaes: int = number(92, 4)
    """Optional Asynchronous Events Supported."""
    ctratt: int = number(96, 4)
    """Controller Attributes."""
    rrls: int = number(100, 2)
    """Read Recovery Levels Supported."""
    cntrltype: int = number(111, 1)
    """Controller Type: 1 I/O, 2 discovery, 3 administrative; 0 not reported."""
    fguid: bytes = raw(112, 16)
    """FRU Globally Unique Identifier."""
    crdt1: int = number(128, 2)
    """Command Retry Delay Time 1, 100 ms: what status field CRD = 1 means; then 2 and 3."""
    crdt2: int = number(130, 2)
    crdt3: int = number(132, 2)
    nvmsr: int = number(253, 1)
    """NVM Subsystem Report."""
    vwci: int = number(254, 1)
    """Vital Product Data Write Cycle Information."""
    mec: int = number(255, 1)
    """Management Endpoint Capabilities."""
    oacs: int = number(256, 2)
    """Optional Admin Commands: bit 0 security, 1 Format NVM, 2 firmware, 3 namespace management, 4 self-test, …"""
    acl: int = number(258, 1)
    """Abort Command Limit, 0's based: Aborts that may be outstanding."""
    aerl: int = number(259, 1)
    """Asynchronous Event Request Limit, 0's based."""
    frmw: int = number(260, 1)
    """Firmware Updates: bit 0 slot 1 read-only, 3:1 number of slots, 4 activation without reset."""
    lpa: int = number(261, 1)
    """Log Page Attributes: bit 0 SMART a namespace, 2 extended Get Log Page (offsets, long lengths)."""
    elpe: int = number(262, 1)
    """Error Log Page Entries, 0's based."""
    npss: int = number(263, 1)
    """Number of Power States, 0's based."""
    avscc: int = number(264, 1)
    """Admin Vendor Specific Command Configuration."""
    apsta: int = number(265, 1)
    """Autonomous Power State Transition Attributes."""
    wctemp: int = number(266, 2)
    """Warning Composite Temperature, kelvin; 0: not reported."""
    cctemp: int = number(268, 2)
    """Critical Composite Temperature, kelvin; 0: not reported."""
    mtfa: int = number(270, 2)
    """Maximum Time for Firmware Activation, 100 ms."""
    hmpre: int = number(272, 4)
    """Host Memory Buffer Preferred Size, 4 KiB."""
    hmmin: int = number(276, 4)
    """Host Memory Buffer Minimum Size, 4 KiB."""
    tnvmcap: int = number(280, 16)
    """Total NVM Capacity, bytes; 0: not reported."""
    unvmcap: int = number(296, 16)
    """Unallocated NVM Capacity, bytes."""
    rpmbs: int = number(312, 4)
    """Replay Protected Memory Block Support."""
    edstt: int = number(316, 2)
    """Extended Device Self-test Time, minutes."""
    dsto: int = number(318, 1)
    """Device Self-test Options."""
    fwug: int = number(319, 1)
    """Firmware Update Granularity, 4 KiB."""
    kas: int = number(320, 2)
    """Keep Alive Support: granularity, 100 ms; 0: no Keep Alive."""
    hctma: int = number(322, 2)
    """Host Controlled Thermal Management Attributes."""
    mntmt: int = number(324, 2)
    """Minimum Thermal Management Temperature, kelvin."""
    mxtmt: int = number(326, 2)
    """Maximum Thermal Management Temperature, kelvin."""
    sanicap: int = number(328, 4)
    """Sanitize Capabilities."""
    hmminds: int = number(332, 4)
    """Host Memory Buffer Minimum Descriptor Entry Size, 4 KiB."""
    hmmaxd: int = number(336, 2)
    """Host Memory Buffer Maximum Descriptor Entries."""
    nsetidmax: int = number(338, 2)
    """NVM Set Identifier Maximum."""
    endgidmax: int = number(340, 2)
    """Endurance Group Identifier Maximum."""
    anatt: int = number(342, 1)
    """ANA Transition Time, seconds."""
    anacap: int = number(343, 1)
    """Asymmetric Namespace Access Capabilities."""
    anagrpmax: int = number(344, 4)
    """ANA Group Identifier Maximum."""
    nanagrpid: int = number(348, 4)
    """Number of ANA Groups."""
    pels: int = number(352, 4)
    """Persistent Event Log Size, 64 KiB."""
    did: int = number(356, 2)
    """Domain Identifier."""
    megcap: int = number(368, 16)
    """Maximum Endurance Group Capacity, bytes."""
    sqes: int = number(512, 1)
    """Submission Queue Entry Size, exponents: bits 3:0 required, 7:4 maximum."""
    cqes: int = number(513, 1)
    """Completion Queue Entry Size, exponents: bits 3:0 required, 7:4 maximum."""
    maxcmd: int = number(514, 2)
    """Maximum Outstanding Commands of a queue; 0: not reported."""
    nn: int = number(516, 4)
    """Number of Namespaces: the largest namespace id."""
    oncs: int = number(520, 2)
    """Optional NVM Commands, `Oncs`."""
    fuses: int = number(522, 2)
    """Fused Operation Support."""
    fna: int = number(524, 1)
    """Format NVM Attributes."""
    vwc: int = number(525, 1)
    """Volatile Write Cache: bit 0 present, 2:1 whether Flush takes namespace id FFFFFFFFh."""
    awun: int = number(526, 2)
    """Atomic Write Unit Normal, blocks, 0's based."""
    awupf: int = number(528, 2)
    """Atomic Write Unit Power Fail, blocks, 0's based."""
    icsvscc: int = number(530, 1)
    """I/O Command Set Vendor Specific Command Configuration."""
    nwpc: int = number(531, 1)
    """Namespace Write Protection Capabilities."""
    acwu: int = number(532, 2)
    """Atomic Compare & Write Unit, blocks, 0's based."""
    ocfs: int = number(534, 2)
    """Optional Copy Formats Supported."""
    sgls: int = number(536, 4)
    """SGL Support."""
    mnan: int = number(540, 4)
    """Maximum Number of Allowed Namespaces; 0: NN."""
    maxdna: int = number(544, 16)
    """Maximum Domain Namespace Attachments."""
    maxcna: int = number(560, 4)
    """Maximum I/O Controller Namespace Attachments."""
    subnqn: str = text(768, 256)
    """NVM Subsystem NVMe Qualified Name."""
    ioccsz: int = number(1792, 4)
    """Fabrics: I/O Queue Command Capsule Supported Size, 16 bytes."""
    iorcsz: int = number(1796, 4)
    """Fabrics: I/O Queue Response Capsule Supported Size, 16 bytes."""
    icdoff: int = number(1800, 2)
    """Fabrics: In Capsule Data Offset, 16 bytes."""
    fcatt: int = number(1802, 1)
    """Fabrics Controller Attributes."""
    msdbd: int = number(1803, 1)
    """Fabrics: Maximum SGL Data Block Descriptors."""
    ofcs: int = number(1804, 2)
    """Optional Fabrics Commands Support."""
    psd: tuple[PowerState, ...] = structures(PowerState, 2048, 32)
    """Power State Descriptors; the first NPSS + 1 count."""
    vs: bytes = raw(3072, 1024)
    """Vendor Specific."""

    @property
    def version(self) -> Version:
        """The version of the specification that the controller follows."""
        return Version.decode(self.ver)

    def max_transfer_bytes(self, page_bytes_min: int) -> int | None:
        """The most bytes of one command, None if there is no limit. ``page_bytes_min`` is `Cap.page_bytes_min`."""
        return page_bytes_min << self.mdts if self.mdts else None

    @property
    def power_states(self) -> tuple[PowerState, ...]:
        """The power states that there are."""
        return self.psd[: min(self.npss + 1, 32)]

    @property
    def volatile_write_cache(self) -> bool:
        """Whether writes may be in a cache that loses them; Flush and FUA are for these."""
        return bool(self.vwc & 1)

    @property
    def flush_all_namespaces(self) -> bool:
        """Whether Flush takes namespace id FFFFFFFFh."""
        return self.vwc >> 1 & 3 == 3


@dataclass(frozen=True, slots=True)
class LbaFormat(Structure, size=4, name="an LBA format"):
    """A format that a namespace's blocks may have (NVM, 4.1.5.1)."""

    ms: int = number(0, 2)
    """Metadata Size, bytes a block."""
    lbads: int = number(2, 1)
    """LBA Data Size, an exponent; 0: this format is not available."""
    rp: int = number(3, 1)
    """Relative Performance in bits 1:0, 0 is best."""


# Blocks of less than 512 bytes do not exist by specification, of more than 1 MiB in no device.
_LBADS = range(9, 21)


@dataclass(frozen=True, slots=True)
class IdentifyNamespace(Structure, size=IDENTIFY_BYTES, name="Identify Namespace"):
    """CNS 00h, for namespaces of the NVM command set (NVM, 4.1.5.1)."""

    nsze: int = number(0, 8)
    """Namespace Size, blocks: LBAs are 0 to NSZE - 1. 0: there is no such namespace."""
    ncap: int = number(8, 8)
    """Namespace Capacity, blocks that may be allocated at a time."""
    nuse: int = number(16, 8)
    """Namespace Utilization, blocks allocated."""
    nsfeat: int = number(24, 1)
    """Features: bit 0 thin provisioning, 2 deallocated blocks can be an error, 4 NPWG to NOWS are given."""
    nlbaf: int = number(25, 1)
    """Number of LBA Formats, 0's based."""
    flbas: int = number(26, 1)
    """Formatted LBA Size: bits 6:5 and 3:0 which format, 4 metadata follows each block's data."""
    mc: int = number(27, 1)
    """Metadata Capabilities."""
    dpc: int = number(28, 1)
    """End-to-end Data Protection Capabilities."""
    dps: int = number(29, 1)
    """End-to-end Data Protection Type Settings: bits 2:0, 0 none."""
    nmic: int = number(30, 1)
    """Multi-path I/O and Sharing: bit 0 shared between controllers."""
    rescap: int = number(31, 1)
    """Reservation Capabilities."""
    fpi: int = number(32, 1)
    """Format Progress Indicator."""
    dlfeat: int = number(33, 1)
    """Deallocate Logical Block Features: bits 2:0 what they read as (1: zeroes), 3 Write Zeroes may deallocate."""
    nawun: int = number(34, 2)
    """Atomic Write Unit Normal, blocks, 0's based; then in a power failure, and for Compare & Write."""
    nawupf: int = number(36, 2)
    nacwu: int = number(38, 2)
    nabsn: int = number(40, 2)
    """Atomic Boundary Size Normal, blocks, 0's based."""
    nabo: int = number(42, 2)
    """Atomic Boundary Offset, blocks."""
    nabspf: int = number(44, 2)
    """Atomic Boundary Size Power Fail, blocks, 0's based."""
    noiob: int = number(46, 2)
    """Optimal I/O Boundary, blocks: commands should not cross its multiples. 0: not reported."""
    nvmcap: int = number(48, 16)
    """NVM Capacity, bytes."""
    npwg: int = number(64, 2)
    """Preferred Write Granularity, blocks, 0's based; then its alignment, and both for deallocation."""
    npwa: int = number(66, 2)
    npdg: int = number(68, 2)
    npda: int = number(70, 2)
    nows: int = number(72, 2)
    """Optimal Write Size, blocks, 0's based."""
    mssrl: int = number(74, 2)
    """Copy: Maximum Single Source Range Length, blocks."""
    mcl: int = number(76, 4)
    """Copy: Maximum Copy Length, blocks."""
    msrc: int = number(80, 1)
    """Copy: Maximum Source Range Count, 0's based."""
    anagrpid: int = number(92, 4)
    """ANA Group Identifier."""
    nsattr: int = number(99, 1)
    """Attributes: bit 0 write protected."""
    nvmsetid: int = number(100, 2)
    """NVM Set Identifier."""
    endgid: int = number(102, 2)
    """Endurance Group Identifier."""
    nguid: bytes = raw(104, 16)
    """Globally Unique Identifier, big-endian; all zeroes: none."""
    eui64: bytes = raw(120, 8)
    """IEEE Extended Unique Identifier, big-endian; all zeroes: none."""
    lbaf: tuple[LbaFormat, ...] = structures(LbaFormat, 128, 64)
    """LBA Formats; the first NLBAF + 1 count."""
    vs: bytes = raw(384, 3712)
    """Vendor Specific."""

    @property
    def lba_format(self) -> LbaFormat:
        """The format that the blocks have."""
        # Bits 6:5 are the format's high bits only where there are more than 16 formats.
        high = self.flbas >> 5 & 3 if self.nlbaf > 15 else 0
        return self.lbaf[high << 4 | self.flbas & 0xF]

    @property
    def lba_bytes(self) -> int:
        """Data bytes of a block.

        Raises
        ------
        ControllerError
            If the controller names a size that no block has.
        """
        exponent = self.lba_format.lbads
        if exponent not in _LBADS:
            raise ControllerError(
                f"Identify Namespace says that blocks have 2^{exponent} bytes; between 2^9 and 2^20 is usable. "
                "Format the namespace with another LBA format, or report it to the controller's vendor"
            )
        return 1 << exponent

    @property
    def metadata_bytes(self) -> int:
        """Metadata bytes of a block."""
        return self.lba_format.ms

    @property
    def metadata_interleaved(self) -> bool:
        """Whether metadata follows each block's data in memory, rather than having a buffer of its own."""
        return bool(self.flbas >> 4 & 1) and self.metadata_bytes > 0

    @property
    def protected(self) -> bool:
        """Whether blocks carry end-to-end protection information."""
        return self.dps & 7 != 0

    @property
    def write_protected(self) -> bool:
        """Whether the controller refuses writes to it."""
        return bool(self.nsattr & 1)


# ---- Lists


def namespace_list(data: Bytes, after: int = 0) -> list[int]:
    """Namespace ids of a list, CNS 02h or 10h (Base, 5.17.2.2): at most 1024, ascending, ended by 0.

    Parameters
    ----------
    data
        What Identify returned.
    after
        The namespace id that the command was given: all ids in the list are larger.

    Raises
    ------
    ControllerError
        If they do not ascend. Asking for the rest of such a list might never end.
    """
    words = memoryview(bytes(data[:IDENTIFY_BYTES]))
    ids: list[int] = []
    for i in range(0, len(words) - 3, 4):
        nsid = int.from_bytes(words[i : i + 4], "little")
        if nsid == 0:
            break
        if nsid <= after:
            raise ControllerError(f"the list of namespaces does not ascend: {nsid} comes behind {after}")
        ids.append(nsid)
        after = nsid
    return ids


def controller_list(data: Bytes) -> list[int]:
    """Controller ids of a list, CNS 12h or 13h (Base, 5.17.2.11): a count, then at most 2047 ids."""
    words = memoryview(bytes(data[:IDENTIFY_BYTES]))
    count = min(int.from_bytes(words[:2], "little"), max(len(words) // 2 - 1, 0))
    return [int.from_bytes(words[2 + 2 * i : 4 + 2 * i], "little") for i in range(count)]


class Nidt(IntEnum):
    """Namespace Identifier Types."""

    EUI64 = 1
    NGUID = 2
    UUID = 3
    CSI = 4


_NID_BYTES = {Nidt.EUI64: 8, Nidt.NGUID: 16, Nidt.UUID: 16, Nidt.CSI: 1}


@dataclass(frozen=True, slots=True)
class NamespaceDescriptors:
    """What a namespace is known by, wherever it is: CNS 03h (Base, 5.17.2.3). What is not given is None."""

    eui64: bytes | None = None
    nguid: bytes | None = None
    uuid: uuid.UUID | None = None
    csi: int | None = None
    """Command Set Identifier, `Csi`: only NVM namespaces (0) can be read and written by block."""

    @classmethod
    def decode(cls, data: Bytes) -> NamespaceDescriptors:
        """Take the list apart. Types that are not known are passed over.

        Raises
        ------
        ControllerError
            If a descriptor has a wrong length or reaches past the end.
        """
        data = bytes(data[:IDENTIFY_BYTES])
        found: dict[Nidt, bytes] = {}
        at = 0
        while at + 4 <= len(data) and data[at] != 0:
            kind, length = data[at], data[at + 1]
            nid = data[at + 4 : at + 4 + length]
            known = kind in _NID_BYTES
            if len(nid) < length or length == 0 or (known and length != _NID_BYTES[Nidt(kind)]):
                raise ControllerError(
                    f"the descriptor at byte {at} of a namespace's identification (type {kind}) has {length} bytes, "
                    "which it cannot have"
                )
            if known:
                found.setdefault(Nidt(kind), nid)
            at += 4 + length
        identifier = found.get(Nidt.UUID)
        csi = found.get(Nidt.CSI)
        return cls(
            eui64=found.get(Nidt.EUI64),
            nguid=found.get(Nidt.NGUID),
            uuid=uuid.UUID(bytes=identifier) if identifier is not None else None,
            csi=csi[0] if csi is not None else None,
        )
