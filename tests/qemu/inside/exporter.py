"""In a guest: dma-bufs of tests/qemu/modules/exporter.c, whose exporter can be told to behave badly."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

import kmod_device
from checking import shell

NODE = "/dev/exporter"
REFUSE_ATTACH, REFUSE_PIN, REFUSE_MAP, MAP_ODD, MAP_SHORT = (1 << bit for bit in range(5))


class Request(ctypes.Structure):
    """struct request in exporter.c."""

    _fields_ = (("pages", ctypes.c_uint32), ("flags", ctypes.c_uint32))


EXPORT = 1 << 30 | ctypes.sizeof(Request) << 16 | ord("x") << 8
TAKE_BACK = ord("x") << 8 | 1


class Exporter:
    """The exporter, while it is loaded; a context manager that checks that nothing of it is held in the end."""

    def __enter__(self) -> Exporter:
        kmod_device.load(module="exporter")
        self._device = os.open(NODE, os.O_RDWR)
        return self

    def export(self, pages: int, flags: int = 0) -> int:
        """A dma-buf of so many pages."""
        return fcntl.ioctl(self._device, EXPORT, Request(pages, flags))

    def take_back(self, fd: int) -> None:
        """Do what a driver does that needs its memory for something else."""
        fcntl.ioctl(self._device, TAKE_BACK, fd)

    def held(self) -> dict[str, int]:
        """What importers and processes hold."""
        numbers = map(int, Path(NODE).read_text().split())
        return dict(zip(("buffers", "attachments", "pins", "mappings"), numbers, strict=True))

    def __exit__(self, kind: object, *_: object) -> None:
        held = self.held()
        os.close(self._device)
        if kind is None:
            assert not any(held.values()), held
            shell("rmmod exporter")
