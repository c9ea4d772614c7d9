"""In a guest, after `kmod`: dma-bufs. Memory of the kernel's udmabuf, and of tests/qemu/modules/exporter.c, stands for
another device's."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
from checking import check, refusal
from client import Client
from exporter import MAP_ODD, MAP_SHORT, REFUSE_ATTACH, REFUSE_MAP, REFUSE_PIN, Exporter
from kmod_device import BDF, DEBUG, LONG, MIB, URI, RawQueue, contents, opened, stats

from gpunvme import nvme
from gpunvme.errors import TransportError


class Udmabuf(ctypes.Structure):
    """struct udmabuf_create, include/uapi/linux/udmabuf.h."""

    _fields_ = (
        ("memfd", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


UDMABUF_CREATE = 1 << 30 | ctypes.sizeof(Udmabuf) << 16 | ord("u") << 8 | 0x42


def new_dmabuf(nbytes: int) -> tuple[int, mmap.mmap]:
    """A dma-buf, and its memory."""
    memfd = os.memfd_create("dmabuf", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(memfd, nbytes)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with open("/dev/udmabuf", "rb+", buffering=0) as device:
        fd = fcntl.ioctl(device, UDMABUF_CREATE, Udmabuf(memfd=memfd, offset=0, size=nbytes))
    memory = mmap.mmap(memfd, nbytes)
    os.close(memfd)
    return fd, memory


def has_udmabuf() -> bool:
    return os.path.exists("/dev/udmabuf")


@check(seconds=120)
def data_goes_into_a_dmabuf_and_out_of_it() -> dict[str, object]:
    if not has_udmabuf():
        return {"skipped": "this kernel has no udmabuf"}
    fd, memory = new_dmabuf(2 * MIB)
    with nvme.open(URI, queues=1) as controller:
        namespace = controller.namespace(1)
        transport = controller.transport
        queue = RawQueue(controller)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        held = transport.map_dmabuf(fd, 0, 2 * MIB, address)
        os.close(fd)
        lines = (DEBUG / BDF / "mappings").read_text()
        assert " dmabuf rw 2097152 " in lines, lines
        # Straight commands to the bus addresses: 4 KiB a command.
        for page in range(0, 2 * MIB, 4096):
            assert queue.command(2, (8 * MIB + page) // 512, held.iova(page)) == 0
        assert memory[:] == contents(1, 4 * MIB)[: 2 * MIB].tobytes()
        memory[:] = contents(3, 2 * MIB).tobytes()
        for page in range(0, 2 * MIB, 4096):
            assert queue.command(1, (24 * MIB + page) // 512, held.iova(page)) == 0
        into = np.zeros(2 * MIB, np.uint8)
        namespace.read_into(into, lba=24 * MIB // 512)
        assert np.array_equal(into, contents(3, 2 * MIB))
        refusal(TransportError, transport.map_dmabuf, 0, 0, 4096)
        part_fd, part = new_dmabuf(16 << 10)
        refusal(TransportError, transport.map_dmabuf, part_fd, 8 << 10, 16 << 10)
        half = transport.map_dmabuf(part_fd, 8 << 10, 8 << 10)
        assert queue.command(2, 8 * MIB // 512, half.iova(4096)) == 0
        assert part[12 << 10 :] == contents(1, 4 * MIB)[:4096].tobytes()
        queue.close()
        half.close()
        held.close()
    now = stats()
    assert (now["attached_bytes"], now["pinned_bytes"]) == (0, 0), now
    return {}


# --- exporters that behave badly


def is_bus_master() -> bool:
    """Bit 2 of the command register (PCI Local Bus Specification 3.0, 6.2.2)."""
    with Path(f"/sys/bus/pci/devices/{BDF}/config").open("rb") as config:
        return bool(config.read(6)[4] & 4)


@check()
def memory_that_is_taken_back_is_out_of_reach() -> None:
    revoked = stats()["revoked"]
    with Exporter() as exporter, opened() as transport:
        client = Client(transport)
        fd = exporter.export(4)
        memory = transport.map_dmabuf(fd, 0, 4 * 4096)
        assert client.command(6, prp1=memory.iova(4096), cdw10=1) == 0
        assert exporter.held() == {"buffers": 1, "attachments": 1, "pins": exporter.held()["pins"], "mappings": 1}
        assert is_bus_master()
        exporter.take_back(fd)
        assert exporter.held()["mappings"] == 0, "the exporter goes on while the memory is mapped"
        assert not is_bus_master(), "the controller can still write to memory that is another's now"
        assert (stats()["revoked"], stats()["attached_bytes"]) == (revoked + 1, 0)
        assert " revoked" in (DEBUG / BDF / "mappings").read_text()
        exporter.take_back(fd)  # for the second time: there is nothing left to take
        assert stats()["revoked"] == revoked + 1
        memory.close()
        os.close(fd)
        # The controller can be used again, once it is reset.
        transport.reset()
        again = Client(transport)
        assert again.identify(transport.allocate(4096))[4:9] == b"first"
        again.disable()


@check()
def memory_is_taken_back_before_its_addresses_are_told() -> None:
    """A map call that meets a revocation ends in an error or in a mapping, and holds nothing in either case."""
    with Exporter() as exporter:
        fd = exporter.export(64)
        taking, told, refused = True, 0, 0

        def take() -> None:
            while taking:
                exporter.take_back(fd)

        thread = threading.Thread(target=take)
        with opened() as transport:
            thread.start()
            try:
                end = time.monotonic() + (10 if LONG else 1)
                while time.monotonic() < end:
                    try:
                        transport.map_dmabuf(fd, 0, 64 * 4096).close()
                        told += 1
                    except TransportError:
                        refused += 1
            finally:
                taking = False
                thread.join()
        os.close(fd)
        assert told
    assert stats()["attached_bytes"] == 0


@check()
def exporters_that_refuse_are_believed() -> dict[str, object]:
    said = {}
    with Exporter() as exporter, opened() as transport:
        refusing = {"attach": REFUSE_ATTACH, "pin": REFUSE_PIN, "map": REFUSE_MAP, "odd": MAP_ODD, "short": MAP_SHORT}
        for name, flag in refusing.items():
            fd = exporter.export(3, flag)
            said[name] = refusal(TransportError, transport.map_dmabuf, fd, 0, 3 * 4096)
            os.close(fd)
            assert not any(exporter.held().values()), (name, exporter.held())
        # What is there of the short one can be mapped.
        fd = exporter.export(3, MAP_SHORT)
        transport.map_dmabuf(fd, 4096, 4096).close()
        os.close(fd)
    assert stats()["attached_bytes"] == 0
    return {"said": said}


@check()
def dmabufs_end_with_the_file() -> None:
    with Exporter() as exporter:
        with opened() as transport:
            fd = exporter.export(8)
            transport.map_dmabuf(fd, 0, 8 * 4096)
            os.close(fd)
            assert exporter.held()["attachments"] == 1
        assert not any(exporter.held().values()), exporter.held()
