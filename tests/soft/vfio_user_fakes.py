"""A controller that notes what is done to it, servers in threads and in processes, and servers that misbehave."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpunvme.nvme.vfio_user import channel, messages, payloads, server
from gpunvme.nvme.vfio_user.channel import Channel, Message
from gpunvme.nvme.vfio_user.messages import Command, Header

PATIENCE = 30.0  # for what must happen, however busy the machine is


class FakeController:
    """Registers that remember, doorbells in a memfd, and DMA on request. Stands in for `_native.SoftController`."""

    def __init__(self, doorbells_nbytes: int = 4096, file_offset: int = 0x1000) -> None:
        self.bar_nbytes = 0x4000
        self.doorbells_nbytes = doorbells_nbytes
        self.doorbells_fd = os.memfd_create("doorbells", os.MFD_CLOEXEC)
        os.ftruncate(self.doorbells_fd, file_offset + doorbells_nbytes)
        self._file_offset = file_offset
        self._registers = bytearray(0x1000)
        self._registers[:12] = bytes.fromhex("ff03010f 20000000 00000200")  # CAP, VS
        self.log: list[tuple[object, ...]] = []
        self.maps: dict[int, tuple[int, int, bool, bool]] = {}
        self.interrupts: dict[int, int] = {}
        self.resets = 0
        self.fails_at = -1  # a vector whose interrupt cannot be set

    def value(self, offset: int, nbytes: int) -> int:
        """What a register holds."""
        return int.from_bytes(self._registers[offset : offset + nbytes], "little")

    def read(self, offset: int, nbytes: int) -> int:
        self.log.append(("read", offset, nbytes))
        if offset >= 0x1000:
            return int.from_bytes(os.pread(self.doorbells_fd, nbytes, self._file_offset + offset - 0x1000), "little")
        return self.value(offset, nbytes)

    def write(self, offset: int, nbytes: int, value: int) -> None:
        self.log.append(("write", offset, nbytes, value))
        if offset >= 0x1000:
            os.pwrite(self.doorbells_fd, value.to_bytes(nbytes, "little"), self._file_offset + offset - 0x1000)
        else:
            self._registers[offset : offset + nbytes] = value.to_bytes(nbytes, "little")

    def map(self, iova: int, nbytes: int, address: int, readable: bool = True, writable: bool = True) -> None:
        self.maps[iova] = (nbytes, address, readable, writable)

    def unmap(self, iova: int, nbytes: int) -> None:
        assert self.maps.pop(iova)[0] == nbytes

    def set_interrupt(self, vector: int, eventfd: int) -> None:
        if vector == self.fails_at:
            raise RuntimeError("this vector cannot be set")
        if vector in self.interrupts:
            os.close(self.interrupts.pop(vector))
        if eventfd >= 0:
            self.interrupts[vector] = os.dup(eventfd)

    def reset(self) -> None:
        self.resets += 1

    def dma(self, iova: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """The client's memory, as the controller sees it."""
        for start, (size, address, _, _) in self.maps.items():
            if start <= iova and iova + nbytes <= start + size:
                return (ctypes.c_char * nbytes).from_address(address + iova - start)
        raise AssertionError(f"{iova:#x} is not mapped")

    def close(self) -> None:
        os.close(self.doorbells_fd)
        for fd in self.interrupts.values():
            os.close(fd)


@contextlib.contextmanager
def serving(path: Path, controller: object, **options: object) -> Iterator[threading.Event]:
    """The real server in a thread of this process."""
    stop, ready = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.serve(path, controller, stop=stop, ready=ready.set, **options)
        except BaseException as error:  # noqa: BLE001  # a thread's failure is the test's
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    if failed:
        thread.join(PATIENCE)
        raise failed[0]
    try:
        yield stop
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"
        if failed:
            raise failed[0]


@contextlib.contextmanager
def scripted(path: Path, script: Callable[[Channel], None]) -> Iterator[None]:
    """A server that takes one connection and does what a script says, until the script or the client ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen(1)
    listener.settimeout(PATIENCE)

    def run() -> None:
        with contextlib.suppress(OSError, channel.ClosedByPeer, channel.TooLate, messages.ProtocolError):
            connection, _ = listener.accept()
            opened = Channel(connection)
            try:
                script(opened)
            finally:
                opened.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Wakes a script that never got a client.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        path.unlink()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the script does not end"


def take(connection: Channel) -> Message:
    """The next message of a client, for scripts."""
    return connection.receive(time.monotonic() + PATIENCE)


def reply(connection: Channel, to: Message, payload: bytes = b"", fds: tuple[int, ...] = (), **header: int) -> None:
    """Answer a message, for scripts."""
    fields = {"id": to.header.id, "command": to.header.command, "size": 0, "flags": 1} | header
    connection.send(Header(**fields), payload, fds, deadline=time.monotonic() + PATIENCE)


def good_answer(message: Message, *, class_code: int = 0x010802) -> bytes:
    """What a server without mmap-able doorbells and without interrupts answers."""
    command = message.header.command
    if command == Command.VERSION:
        return messages.Version(0, 1).pack()
    if command == Command.DEVICE_GET_INFO:
        return payloads.DeviceInfo(16, 3, 9, 0).pack()
    if command == Command.DEVICE_GET_REGION_INFO:
        return payloads.RegionInfo(32, 3, 0, size=0x4000).pack()
    if command == Command.REGION_READ:
        asked = payloads.RegionAccess.unpack(message.payload)
        data = (
            (class_code << 8).to_bytes(4, "little") if (asked.region, asked.offset) == (7, 8) else bytes(asked.nbytes)
        )
        return asked._replace(data=data).pack()
    if command == Command.REGION_WRITE:
        return payloads.RegionAccess.unpack(message.payload)._replace(data=b"").pack()
    return b""


def open_fds() -> set[str]:
    """The descriptors of this process, by what they are."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {each for each in found if not each.endswith("/fd")}


def settle(before: set[str]) -> None:
    """Wait for threads that end; then no descriptor may be there that was not there before."""
    give_up = time.monotonic() + PATIENCE
    pause = 0.005
    while open_fds() - before and time.monotonic() < give_up:
        time.sleep(pause)
        if pause > 0.1:
            gc.collect()
        pause = min(2 * pause, 0.5)
    assert open_fds() - before == set()


# ---- Fixtures, for modules to take by name


def make_controller() -> Iterator[FakeController]:
    made = FakeController()
    yield made
    made.close()


def make_path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def make_memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def no_descriptor_stays_open() -> Iterator[None]:
    before = open_fds()
    yield
    settle(before)


def eventually(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it does not happen"
        time.sleep(0.005)
