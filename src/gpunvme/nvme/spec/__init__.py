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

from gpunvme.nvme.spec.commands import (
    DSM_RANGES_MOST,
    RW_BLOCKS_MOST,
    AdminOpcode,
    Cns,
    CreateQueue,
    Csi,
    Dsm,
    Feature,
    LogPage,
    NvmOpcode,
    Rw,
    admin_opcode_name,
    nvm_opcode_name,
    pack_dsm_ranges,
)
from gpunvme.nvme.spec.entries import (
    ADMIN_QUEUE_ENTRIES_MOST,
    CID_NONE,
    CQE_EXPONENT,
    NSID_ALL,
    QUEUE_ENTRIES_MOST,
    SQE_EXPONENT,
    Cqe,
    Sqe,
)
from gpunvme.nvme.spec.events import (
    AsyncEvent,
    ErrorEvent,
    EventType,
)
from gpunvme.nvme.spec.registers import (
    ALL_ONES_32,
    ALL_ONES_64,
    Aqa,
    Bpinfo,
    Cap,
    Cc,
    CcCss,
    Cmbloc,
    Cmbmsc,
    Cmbsts,
    Cmbsz,
    Crto,
    Csts,
    Pmrcap,
    Pmrsts,
    Register,
    Shutdown,
    ShutdownStatus,
    Version,
    cq_head_doorbell,
    sq_tail_doorbell,
)

__all__ = [
    "ADMIN_QUEUE_ENTRIES_MOST",
    "ALL_ONES_32",
    "ALL_ONES_64",
    "CID_NONE",
    "CQE_EXPONENT",
    "DSM_RANGES_MOST",
    "NSID_ALL",
    "QUEUE_ENTRIES_MOST",
    "RW_BLOCKS_MOST",
    "SQE_EXPONENT",
    "AdminOpcode",
    "Aqa",
    "AsyncEvent",
    "Bpinfo",
    "Cap",
    "Cc",
    "CcCss",
    "Cmbloc",
    "Cmbmsc",
    "Cmbsts",
    "Cmbsz",
    "Cns",
    "Cqe",
    "CreateQueue",
    "Crto",
    "Csi",
    "Csts",
    "Dsm",
    "ErrorEvent",
    "EventType",
    "Feature",
    "LogPage",
    "NvmOpcode",
    "Pmrcap",
    "Pmrsts",
    "Register",
    "Rw",
    "Shutdown",
    "ShutdownStatus",
    "Sqe",
    "Version",
    "admin_opcode_name",
    "cq_head_doorbell",
    "nvm_opcode_name",
    "pack_dsm_ranges",
    "sq_tail_doorbell",
]
