"""Entries of queues: commands and completions (Base 2.0, 3.3.3)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

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
