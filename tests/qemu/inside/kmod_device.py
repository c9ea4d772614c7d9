"""In a guest: what the checks of the kernel module have in common. 0000:00:08.0 is /dev/gpunvme0 once it is bound."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpunvme import nvme
from gpunvme.nvme.kmod import KmodTransport
from gpunvme.nvme.queues import QueuePair

BDF, SLOW = "0000:00:08.0", "0000:00:0c.0"
NODE, SLOW_NODE = "/dev/gpunvme0", "/dev/gpunvme1"
URI = f"kmod:{NODE}"
MODULES = Path(os.environ["GUEST_MODULES"])
LONG = os.environ.get("GPUNVME_TEST_LEVEL") == "long"
MIB = 1 << 20
DEBUG = Path("/sys/kernel/debug/gpunvme")


def contents(seed: int, nbytes: int) -> np.ndarray:
    """Bytes of which no two ranges are alike, another for each seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def page_of(nbytes: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, nbytes)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def stats(address: str = BDF) -> dict[str, int]:
    lines = (DEBUG / address / "stats").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


@contextlib.contextmanager
def opened() -> Iterator[KmodTransport]:
    transport = KmodTransport(NODE)
    try:
        yield transport
    finally:
        transport.close()


def load(*options: str, module: str = "gpunvme") -> None:
    subprocess.run(["insmod", MODULES / f"{module}.ko", *options], check=True, timeout=60)


class RawQueue:
    """An I/O queue pair with one command at a time, which is told bus addresses and nothing else."""

    ENTRIES = 8

    def __init__(self, controller: nvme.Controller) -> None:
        self.controller = controller
        (queue_id,) = controller.take_queue_ids(1)
        self.pair = QueuePair(queue_id, self.ENTRIES, controller.transport, controller.command, 4096)
        self.pair.create()
        self.tail = self.head = 0
        self.phase = 1

    def close(self) -> None:
        self.pair.remove()
        self.pair.free()
        self.controller.give_queue_ids([self.pair.queue_id])

    def command(self, opcode: int, lba: int, prp1: int) -> int:
        entry = struct.pack("<HHIQQQQQI12x", opcode, self.tail, 1, 0, 0, prp1, 0, lba, 7)
        self.pair.submissions.view(self.tail * 64, 64)[:] = entry
        self.tail = (self.tail + 1) % self.ENTRIES
        stride = 4 << self.controller.registers.cap.dstrd
        self.controller.transport.write_register(0x1000 + 2 * self.pair.queue_id * stride, 4, self.tail)
        give_up = time.monotonic() + 10
        while True:
            (word,) = struct.unpack("<H", self.pair.completions.view(16 * self.head + 14, 2))
            if word & 1 == self.phase:
                break
            assert time.monotonic() < give_up, "no completion"
        self.head = (self.head + 1) % self.ENTRIES
        self.phase ^= self.head == 0
        self.controller.transport.write_register(0x1000 + (2 * self.pair.queue_id + 1) * stride, 4, self.head)
        return word >> 1
