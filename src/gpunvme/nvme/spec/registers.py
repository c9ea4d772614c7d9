"""The registers: where they are in BAR0, and what their bits mean (Base 2.0, 3.1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from gpunvme.nvme.spec.layout import BitFields, bits

# What reads of a PCI device that is not there any more return.
ALL_ONES_32 = 0xFFFF_FFFF
ALL_ONES_64 = 0xFFFF_FFFF_FFFF_FFFF


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


@dataclass(frozen=True, slots=True)
class Cap(BitFields):
    """CAP, Controller Capabilities (Base 2.0, 3.1.3.1)."""

    mqes: int = bits(0, 16, required=True)
    """Maximum Queue Entries Supported, 0's based: see `queue_entries`."""
    cqr: int = bits(16, 1)
    """Contiguous Queues Required: I/O queues must be physically contiguous."""
    ams: int = bits(17, 2)
    """Arbitration Mechanisms Supported beside round robin."""
    to: int = bits(24, 8)
    """Timeout for changes of CSTS.RDY, 500 ms: see `ready_timeout`."""
    dstrd: int = bits(32, 4)
    """Doorbell Stride: doorbells are 4 << DSTRD bytes apart."""
    nssrs: int = bits(36, 1)
    """NVM Subsystem Reset Supported."""
    css: int = bits(37, 8, default=1)
    """Command Sets Supported: bit 0 NVM, bit 6 those that Identify lists, bit 7 none (admin commands only)."""
    bps: int = bits(45, 1)
    """Boot Partition Support."""
    cps: int = bits(46, 2)
    """Controller Power Scope."""
    mpsmin: int = bits(48, 4)
    """Memory Page Size Minimum, an exponent over 4 KiB: see `page_bytes_min`. Also the unit of MDTS."""
    mpsmax: int = bits(52, 4)
    """Memory Page Size Maximum, an exponent over 4 KiB."""
    pmrs: int = bits(56, 1)
    """Persistent Memory Region Supported."""
    cmbs: int = bits(57, 1)
    """Controller Memory Buffer Supported."""
    nsss: int = bits(58, 1)
    """NVM Subsystem Shutdown Supported."""
    crms: int = bits(59, 2)
    """Controller Ready Modes Supported."""

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
class Version(BitFields):
    """VS, Version (Base 2.0, 3.1.3.2)."""

    mjr: int = bits(16, 16, required=True)
    mnr: int = bits(8, 8, required=True)
    ter: int = bits(0, 8)

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
class Cc(BitFields):
    """CC, Controller Configuration (Base 2.0, 3.1.3.5)."""

    en: int = bits(0, 1)
    """Enable: 0 to 1 starts the controller, 1 to 0 resets it."""
    css: int = bits(4, 3)
    """Command Set Selected, `CcCss`."""
    mps: int = bits(7, 4)
    """Memory Page Size, an exponent over 4 KiB: see `page_bytes`."""
    ams: int = bits(11, 3)
    """Arbitration Mechanism Selected: 0 round robin."""
    shn: int = bits(14, 2)
    """Shutdown Notification, `Shutdown`."""
    iosqes: int = bits(16, 4)
    """I/O Submission Queue Entry Size, an exponent: `SQE_EXPONENT`."""
    iocqes: int = bits(20, 4)
    """I/O Completion Queue Entry Size, an exponent: `CQE_EXPONENT`."""
    crime: int = bits(24, 1)
    """Controller Ready Independent of Media Enable."""

    @property
    def page_bytes(self) -> int:
        """The memory page that PRPs are cut by, bytes."""
        return 4096 << self.mps


@dataclass(frozen=True, slots=True)
class Csts(BitFields):
    """CSTS, Controller Status (Base 2.0, 3.1.3.6)."""

    rdy: int = bits(0, 1)
    """Ready: follows CC.EN."""
    cfs: int = bits(1, 1)
    """Controller Fatal Status: nothing but a reset helps."""
    shst: int = bits(2, 2)
    """Shutdown Status, `ShutdownStatus`."""
    nssro: int = bits(4, 1)
    """NVM Subsystem Reset Occurred."""
    pp: int = bits(5, 1)
    """Processing Paused."""
    st: int = bits(6, 1)
    """Shutdown Type: of the whole NVM subsystem."""


@dataclass(frozen=True, slots=True)
class Aqa(BitFields):
    """AQA, Admin Queue Attributes (Base 2.0, 3.1.3.8): entries of the admin queues, 0's based."""

    asqs: int = bits(0, 12, required=True)
    acqs: int = bits(16, 12, required=True)


@dataclass(frozen=True, slots=True)
class Bpinfo(BitFields):
    """BPINFO, Boot Partition Information (Base 2.0, 3.1.3.13)."""

    bpsz: int = bits(0, 15)
    """Boot Partition Size, 128 KiB."""
    brs: int = bits(24, 2)
    """Boot Read Status."""
    abpid: int = bits(31, 1)
    """Active Boot Partition ID."""


@dataclass(frozen=True, slots=True)
class Cmbloc(BitFields):
    """CMBLOC, Controller Memory Buffer Location (Base 2.0, 3.1.3.11)."""

    bir: int = bits(0, 3)
    """Base Indicator Register: the BAR that it lies in."""
    cqmms: int = bits(3, 1)
    """Queues may lie in host memory and in the buffer."""
    cqpds: int = bits(4, 1)
    """Queues need not be physically contiguous there."""
    cdpmls: int = bits(5, 1)
    """PRP lists and data of a command may lie in different places."""
    cdpcils: int = bits(6, 1)
    """PRP lists and their command may lie in different places."""
    cdmmms: int = bits(7, 1)
    """Data of a command may lie in both places."""
    cqda: int = bits(8, 1)
    """Queue Dword Alignment."""
    ofst: int = bits(12, 20)
    """Offset in that BAR, in units of `Cmbsz.unit_bytes`."""


@dataclass(frozen=True, slots=True)
class Cmbsz(BitFields):
    """CMBSZ, Controller Memory Buffer Size (Base 2.0, 3.1.3.12)."""

    sqs: int = bits(0, 1)
    """Submission Queue Support."""
    cqs: int = bits(1, 1)
    """Completion Queue Support."""
    lists: int = bits(2, 1)
    """PRP SGL List Support."""
    rds: int = bits(3, 1)
    """Read Data Support: what the controller writes."""
    wds: int = bits(4, 1)
    """Write Data Support: what it reads."""
    szu: int = bits(8, 4)
    """Size Units: see `unit_bytes`."""
    sz: int = bits(12, 20)
    """Size, in these units: see `nbytes`."""

    @property
    def unit_bytes(self) -> int:
        """What SZ and CMBLOC.OFST count, bytes."""
        return 4096 << 4 * self.szu

    @property
    def nbytes(self) -> int:
        """Size of the buffer, bytes."""
        return self.sz * self.unit_bytes


@dataclass(frozen=True, slots=True)
class Cmbmsc(BitFields):
    """CMBMSC, Controller Memory Buffer Memory Space Control (Base 2.0, 3.1.3.16)."""

    cre: int = bits(0, 1)
    """Capabilities Registers Enabled: CMBLOC and CMBSZ read as zero before."""
    cmse: int = bits(1, 1)
    """Controller Memory Space Enable."""
    cba: int = bits(12, 52)
    """Controller Base Address, 4 KiB."""


@dataclass(frozen=True, slots=True)
class Cmbsts(BitFields):
    """CMBSTS, Controller Memory Buffer Status (Base 2.0, 3.1.3.17)."""

    cbai: int = bits(0, 1)
    """Controller Base Address Invalid."""


@dataclass(frozen=True, slots=True)
class Crto(BitFields):
    """CRTO, Controller Ready Timeouts (Base 2.0, 3.1.3.21), in 500 ms."""

    crwmt: int = bits(0, 16)
    """Controller Ready With Media Timeout."""
    crimt: int = bits(16, 16)
    """Controller Ready Independent of Media Timeout."""


@dataclass(frozen=True, slots=True)
class Pmrcap(BitFields):
    """PMRCAP, Persistent Memory Region Capabilities (Base 2.0, 3.1.3.22)."""

    rds: int = bits(3, 1)
    """Read Data Support."""
    wds: int = bits(4, 1)
    """Write Data Support."""
    bir: int = bits(5, 3)
    """Base Indicator Register: the BAR that it lies in."""
    pmrtu: int = bits(8, 2)
    """Time Units of PMRTO: 500 ms or minutes."""
    pmrwbm: int = bits(10, 4)
    """Write Barrier Mechanisms."""
    pmrto: int = bits(16, 8)
    """Timeout."""
    cmss: int = bits(24, 1)
    """Controller Memory Space Supported."""


@dataclass(frozen=True, slots=True)
class Pmrsts(BitFields):
    """PMRSTS, Persistent Memory Region Status (Base 2.0, 3.1.3.24)."""

    err: int = bits(0, 8)
    """Error."""
    nrdy: int = bits(8, 1)
    """Not Ready."""
    hsts: int = bits(9, 3)
    """Health Status."""
    cbai: int = bits(12, 1)
    """Controller Base Address Invalid."""
