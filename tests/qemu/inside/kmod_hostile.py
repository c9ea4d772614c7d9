"""In a guest, after `kmod`: callers that mean no good, and the end of the module."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from collections import Counter

from checking import check, shell
from client import Client
from exporter import Exporter
from kmod_device import BDF, LONG, opened, page_of, stats

from gpunvme.nvme import kmod_uapi as uapi
from gpunvme.nvme import sysfs
from gpunvme.nvme.bind import unbind

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
NUMBERS = (uapi.GET_INFO, uapi.MAP, uapi.UNMAP, uapi.SET_VECTOR)
SIZES = (0, 1, 7, 4096, 4097, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 2**63, 2**64 - 4096, 2**64 - 1)


def call_at_random(fd: int, fds: list[int], address: int, dice: random.Random) -> str:
    """One call, mostly wrong; return how it ended."""
    interesting = [*SIZES, address, address + 4096, address + 1]
    # A reset takes 0.1 s.
    number = dice.choice(NUMBERS) if dice.random() > 0.002 else uapi.RESET
    if dice.random() < 0.1:
        number = dice.getrandbits(32)
    if dice.random() < 0.2:
        argument = bytearray(dice.randbytes(dice.choice([1, 8, 48, 4096])))
    else:
        argument = bytearray(4096)
        request = uapi.Map.new(
            flags=dice.choice([0, 1, 1, 2, 2**32 - 1]),
            address=dice.choice(interesting),
            nbytes=dice.choice(interesting),
            addresses=dice.choice([address, *interesting]),
            fd=dice.choice(fds),
            handle=dice.choice([0, 0, 1]),
        )
        if number == uapi.UNMAP:
            request.flags = dice.choice([1, 2, 3, 1000, 2**32 - 1, 0])  # where the handle is
        ctypes.memmove((ctypes.c_char * 48).from_buffer(argument), ctypes.byref(request), 48)
        if number == uapi.SET_VECTOR:
            argument[:16] = struct.pack("<IIiI", 16, dice.choice([0, 0, 1, 2**32 - 1]), dice.choice(fds), 0)
        if dice.random() < 0.3:
            argument[0:4] = dice.choice([0, 4, 8, 48, 56, 4096, 4097, 2**31]).to_bytes(4, "little")
        if dice.random() < 0.1:
            argument[dice.randrange(48, 4096)] = 1
    pointer = (ctypes.c_char * len(argument)).from_buffer(argument)
    where = ctypes.addressof(pointer)
    if dice.random() < 0.1:
        where = dice.choice([0, 1, 2**47, address + (1 << 20) - 8])
    result = LIBC.ioctl(fd, ctypes.c_ulong(number), ctypes.c_void_p(where))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def unmap_everything(fd: int) -> None:
    for handle in range(1, 200):
        with contextlib.suppress(OSError):
            uapi.call(fd, uapi.UNMAP, uapi.Unmap.new(handle=handle))


def is_in_order() -> None:
    """Nothing is left of whoever had the controller, and it can be driven."""
    assert stats()["pinned_bytes"] == 0, stats()
    assert stats()["attached_bytes"] == 0, stats()
    with opened() as transport:
        client = Client(transport)
        assert client.identify(transport.allocate(4096))[4:9] == b"first", "the controller is not usable any more"
        client.disable()


@check(seconds=150)
def hostile_calls_do_no_harm() -> dict[str, object]:
    dice = random.Random(7)
    seen: Counter[str] = Counter()
    with Exporter() as exporter:
        with opened() as transport:
            memory, address = page_of(1 << 20)
            event, dmabuf = os.eventfd(0), exporter.export(2)
            fds = [-1, -1, 0, 1, transport._fd, event, dmabuf, 99, 2**31 - 1]
            end = time.monotonic() + (60 if LONG else 3)
            while time.monotonic() < end:
                seen[call_at_random(transport._fd, fds, address, dice)] += 1
                if dice.random() < 0.01:
                    unmap_everything(transport._fd)
            del memory
        os.close(event)
        os.close(dmabuf)
        assert not any(exporter.held().values()), exporter.held()
    is_in_order()
    assert {"ok", "EINVAL", "EFAULT", "ENOTTY"} <= set(seen), seen
    return {"answers": seen}


@check(seconds=150)
def hostile_threads_do_no_harm() -> dict[str, object]:
    """The same from three threads, while memory goes, dma-bufs are taken back, and BAR0 is mapped and unmapped."""
    seen: Counter[str] = Counter()
    with Exporter() as exporter:
        with opened() as transport:
            region = LIBC.mmap(None, ctypes.c_size_t(1 << 20), 3, 0x22, -1, ctypes.c_long(0))
            event, dmabuf = os.eventfd(0), exporter.export(2)
            fds = [-1, -1, event, dmabuf, dmabuf, 99]
            end = time.monotonic() + (60 if LONG else 2)

            def call(seed: int) -> None:
                dice = random.Random(seed)
                while time.monotonic() < end:
                    seen[call_at_random(transport._fd, fds, region, dice)] += 1

            def disturb() -> None:
                # Half of it goes, and comes back at its place: never unmapped, or another thread might be given it.
                half, nowhere = ctypes.c_size_t(1 << 19), ctypes.c_long(0)
                while time.monotonic() < end:
                    LIBC.mmap(ctypes.c_void_p(region), half, 0, 0x32, -1, nowhere)
                    exporter.take_back(dmabuf)
                    mmap.mmap(transport._fd, 4096).close()
                    LIBC.mmap(ctypes.c_void_p(region), half, 3, 0x32, -1, nowhere)
                    unmap_everything(transport._fd)

            threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
            threads.append(threading.Thread(target=disturb))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        os.close(event)
        os.close(dmabuf)
        assert not any(exporter.held().values()), exporter.held()
        LIBC.munmap(region, 1 << 20)
    is_in_order()
    assert "ok" in seen, seen
    return {"answers": seen}


@check()
def unloading_waits_for_nobody() -> None:
    with opened():
        assert subprocess.run(["rmmod", "gpunvme"], check=False, capture_output=True).returncode != 0
    unbind(BDF)
    shell("rmmod gpunvme")
    assert sysfs.find_function(BDF).driver == "nvme"
