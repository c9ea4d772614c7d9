"""The smallest NVMe driver that can identify and read: its own, so that a transport is tested without our driver.

Admin queue only, one command at a time. Registers and commands: NVM Express Base Specification 2.0, section 3.
"""

from __future__ import annotations

import struct
import time
from typing import Any

CAP, VS, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30
ENTRIES = 8


class Client:
    """A controller, enabled with an admin queue over any transport."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.cap = transport.read_register(CAP, 8)
        self.memory = transport.allocate(2 * 4096)
        self.queues = self.memory.view()
        self._tail = self._head = 0
        self._phase = 1
        self.disable()
        transport.write_register(AQA, 4, (ENTRIES - 1) << 16 | (ENTRIES - 1))
        transport.write_register(ASQ, 8, self.memory.iova())
        transport.write_register(ACQ, 8, self.memory.iova(4096))
        transport.write_register(CC, 4, 4 << 20 | 6 << 16 | 1)
        self._wait_ready(1)

    def _wait_ready(self, ready: int) -> None:
        give_up = time.monotonic() + 10
        while self.transport.read_register(CSTS, 4) & 1 != ready:
            assert time.monotonic() < give_up, "CSTS.RDY does not change"
            time.sleep(0.001)

    def disable(self) -> None:
        cc = self.transport.read_register(CC, 4)
        self.transport.write_register(CC, 4, cc & ~1)
        self._wait_ready(0)

    def command(self, opcode: int, nsid: int = 0, prp1: int = 0, cdw10: int = 0, cdw11: int = 0) -> int:
        """Send an admin command; return its status."""
        entry = struct.pack("<HHIQQQQII16x", opcode, self._tail, nsid, 0, 0, prp1, 0, cdw10, cdw11)
        self.queues[self._tail * 64 : self._tail * 64 + 64] = entry
        self._tail = (self._tail + 1) % ENTRIES
        self.transport.write_register(0x1000, 4, self._tail)
        place = 4096 + 16 * self._head
        give_up = time.monotonic() + 10
        while True:
            (word,) = struct.unpack_from("<H", self.queues, place + 14)
            if word & 1 == self._phase:
                break
            assert time.monotonic() < give_up, "no completion"
        self._head = (self._head + 1) % ENTRIES
        self._phase ^= self._head == 0
        stride = 4 << (self.cap >> 32 & 15)
        self.transport.write_register(0x1000 + stride, 4, self._head)
        return word >> 1

    def identify(self, memory: Any, offset: int = 0, cns: int = 1, nsid: int = 0) -> bytes:
        assert self.command(6, nsid=nsid, prp1=memory.iova(offset), cdw10=cns) == 0
        return bytes(memory.view(offset, 4096))

    def close(self) -> None:
        self.disable()
        self.transport.close()
        self.memory.close()
