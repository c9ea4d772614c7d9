"""The vfio-user server and its clients' wrong requests. If this failed, one client could harm the server, or the next
one."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vfio_user_fakes as fakes
from vfio_user_fakes import PATIENCE, FakeController, serving

from gpunvme.nvme.vfio_user import VfioUserTransport, messages, payloads
from gpunvme.nvme.vfio_user.channel import Message
from gpunvme.nvme.vfio_user.connection import Connection, Refused
from gpunvme.nvme.vfio_user.messages import Command

controller = pytest.fixture(fakes.make_controller)
path = pytest.fixture(fakes.make_path)
no_descriptor_stays_open = pytest.fixture(autouse=True)(fakes.no_descriptor_stays_open)
memfd = pytest.fixture(fakes.make_memfd)


@contextlib.contextmanager
def speaking(path: Path) -> Iterator[Connection]:
    connection = Connection(str(path), PATIENCE)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.errno == number


BOTH = payloads.DmaFlag.READ | payloads.DmaFlag.WRITE


def dma_map(connection: Connection, fds: list[int], *args: int, flags: int = BOTH, argsz: int = 32) -> None:
    offset, address, size = args
    connection.request(Command.DMA_MAP, payloads.DmaMap(argsz, flags, offset, address, size).pack(), fds).close()


def test_wrong_mappings_are_refused(path: Path, controller: FakeController, memfd: int) -> None:
    with serving(path, controller), speaking(path) as connection:
        dma_map(connection, [memfd], 4096, 0x10000, 0x2000, flags=payloads.DmaFlag.READ)
        assert controller.maps[0x10000][2:] == (True, False)
        with refused(errno.EEXIST):
            dma_map(connection, [memfd], 0, 0x11000, 0x1000)
        with refused(errno.EOPNOTSUPP):
            dma_map(connection, [], 0, 0x40000, 0x1000)
        for case in [(0, 0x40001, 0x1000), (0, 0x40000, 0), (1, 0x40000, 0x1000), (0, (1 << 64) - 0x1000, 0x2000)]:
            with refused(errno.EINVAL):
                dma_map(connection, [memfd], *case)
        with refused(errno.EINVAL):  # behind the file's end: touching it would kill the server
            dma_map(connection, [memfd], 1 << 20, 0x40000, 0x1000)
        with refused(errno.EINVAL):
            dma_map(connection, [memfd], (1 << 64) - 0x1000, 0x40000, 0x1000)
        with refused(errno.EINVAL):
            dma_map(connection, [memfd, memfd], 0, 0x40000, 0x1000)
        with refused(errno.EINVAL):
            dma_map(connection, [memfd], 0, 0x40000, 0x1000, flags=0)
        with refused(errno.EINVAL):
            dma_map(connection, [memfd], 0, 0x40000, 0x1000, argsz=31)
        eventfd = os.eventfd(0)
        with refused(errno.ENODEV):
            dma_map(connection, [eventfd], 0, 0x40000, 0x1000)
        os.close(eventfd)
        read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
        with refused(errno.EACCES):
            dma_map(connection, [read_only], 0, 0x40000, 0x1000)
        dma_map(connection, [read_only], 0, 0x40000, 0x1000, flags=payloads.DmaFlag.READ)
        os.close(read_only)
        assert sorted(controller.maps) == [0x10000, 0x40000]


def test_mappings_are_taken_back_as_they_were_given(path: Path, controller: FakeController, memfd: int) -> None:
    def unmap(address: int, size: int, flags: int = 0) -> bytes:
        request = payloads.DmaUnmap(24, flags, address, size).pack()
        with connection.request(Command.DMA_UNMAP, request) as answer:
            assert answer.payload == request
            return answer.payload

    with serving(path, controller), speaking(path) as connection:
        for address in (0, 0x100000, (1 << 64) - 0x1000):
            dma_map(connection, [memfd], 0, address, 0x1000)
        for address, size in [(0, 0x2000), (0x1000, 0x1000), (0, 0)]:
            with refused(errno.ENOENT):
                unmap(address, size)
        with refused(errno.EOPNOTSUPP):
            unmap(0, 0x1000, payloads.UnmapFlag.GET_DIRTY_BITMAP)
        unmap(0, 0x1000)
        assert 0 not in controller.maps
        unmap(0, 0, payloads.UnmapFlag.ALL)
        assert not controller.maps


def test_interrupts_are_signalled_and_taken_back(path: Path, controller: FakeController, memfd: int) -> None:
    def set_irqs(
        flags: int, start: int, number: int, *, fds: list[int] | None = None, data: bytes = b"", kind: int = 2
    ) -> None:
        request = payloads.IrqSet(20 + len(data), flags, kind, start, number, data)
        connection.request(Command.DEVICE_SET_IRQS, request.pack(), fds or []).close()

    flag = payloads.IrqSetFlag
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    with serving(path, controller, vectors=5), speaking(path) as connection:
        with connection.request(Command.DEVICE_GET_IRQ_INFO, payloads.IrqInfo(16, kind=2).pack()) as answer:
            assert payloads.IrqInfo.unpack(answer.payload) == (16, 1, 2, 5)
        with connection.request(Command.DEVICE_GET_IRQ_INFO, payloads.IrqInfo(16, kind=0).pack()) as answer:
            assert payloads.IrqInfo.unpack(answer.payload) == (16, 0, 0, 0)
        set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 1, 3, fds=eventfds)
        assert sorted(controller.interrupts) == [1, 2, 3]
        os.eventfd_write(controller.interrupts[2], 1)  # as the controller does
        assert os.eventfd_read(eventfds[1]) == 1
        set_irqs(flag.DATA_BOOL | flag.ACTION_TRIGGER, 1, 3, data=b"\0\1\1")
        assert [os.eventfd_read(fd) for fd in eventfds[1:]] == [1, 1]
        set_irqs(flag.DATA_NONE | flag.ACTION_TRIGGER, 1, 1)
        assert os.eventfd_read(eventfds[0]) == 1
        set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 2, 1)  # without a descriptor: none any more
        assert sorted(controller.interrupts) == [1, 3]
        set_irqs(flag.DATA_NONE | flag.ACTION_TRIGGER, 0, 0)  # all of them
        assert not controller.interrupts
        for wrong in [(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 4, 2), (flag.DATA_NONE | flag.ACTION_MASK, 0, 1)]:
            with refused(errno.EINVAL):
                set_irqs(*wrong)
        with refused(errno.EINVAL):
            set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 0, 2, fds=eventfds)
        with refused(errno.EINVAL):
            set_irqs(flag.DATA_BOOL | flag.ACTION_TRIGGER, 0, 2, data=b"\1")
        with refused(errno.EINVAL):
            set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 0, 1, fds=eventfds[:1], kind=0)
        with refused(errno.EINVAL):
            connection.request(Command.DEVICE_GET_IRQ_INFO, payloads.IrqInfo(16, kind=3).pack())
        with refused(errno.EINVAL):  # writing to it might never end
            set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 0, 1, fds=[memfd])
        assert not controller.interrupts
        # A counter that is full takes no more, and nobody waits for it.
        full = os.eventfd(0)
        os.eventfd_write(full, (1 << 64) - 2)
        set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 0, 1, fds=[full])
        set_irqs(flag.DATA_NONE | flag.ACTION_TRIGGER, 0, 1)
        os.close(full)
        # A controller that fails half way keeps what it took, and no descriptor is lost.
        controller.fails_at = 3
        with refused(errno.EIO):
            set_irqs(flag.DATA_EVENTFD | flag.ACTION_TRIGGER, 2, 3, fds=eventfds)
        assert sorted(controller.interrupts) == [0, 2]
        controller.fails_at = -1
    for fd in eventfds:
        os.close(fd)


def region_read(connection: Connection, region: int, offset: int, nbytes: int) -> bytes:
    with connection.request(Command.REGION_READ, payloads.RegionAccess(offset, region, nbytes).pack()) as answer:
        return payloads.RegionAccess.unpack(answer.payload).data


def region_write(connection: Connection, region: int, offset: int, data: bytes) -> None:
    request = payloads.RegionAccess(offset, region, len(data), data)
    connection.request(Command.REGION_WRITE, request.pack()).close()


def test_registers_of_any_size_can_be_read_and_dwords_written(path: Path, controller: FakeController) -> None:
    with serving(path, controller), speaking(path) as connection:
        cap = controller.value(0, 8).to_bytes(8, "little")
        assert region_read(connection, 0, 0, 8) == cap
        assert region_read(connection, 0, 1, 2) == cap[1:3]
        assert region_read(connection, 0, 3, 3) == cap[3:6]
        assert region_read(connection, 0, 0, 16)[:8] == cap
        region_write(connection, 0, 0x1000, b"\1\0\0\0\2\0\0\0")  # two doorbells, not one of 8 bytes
        assert controller.log[-2:] == [("write", 0x1000, 4, 1), ("write", 0x1004, 4, 2)]
        for region, offset, data in [(0, 0x14, b"\1"), (0, 0x16, b"\1\0\0\0"), (0, 0x4000, bytes(4)), (1, 0, bytes(4))]:
            with refused(errno.EINVAL):
                region_write(connection, region, offset, data)
        with refused(errno.EINVAL):
            region_read(connection, 0, (1 << 64) - 4, 8)
        with refused(errno.EINVAL):
            region_read(connection, 0, 0, 0)
        with refused(errno.E2BIG):
            region_read(connection, 7, 0, (1 << 20) + 1)
        with refused(errno.EINVAL):
            connection.request(Command.REGION_WRITE, payloads.RegionAccess(0, 7, 8, b"short").pack())
        with refused(errno.EOPNOTSUPP):
            connection.request(Command.DEVICE_GET_REGION_IO_FDS, bytes(16))
        with refused(errno.EOPNOTSUPP):
            connection.request(Command.VERSION, messages.Version(0, 1).pack())


def test_what_the_controller_cannot_do_ends_one_command_only(path: Path, controller: FakeController) -> None:
    lines: list[str] = []
    controller.bar_nbytes = 0x10000
    with serving(path, controller, report=lines.append), speaking(path) as connection:
        controller.read = lambda offset, nbytes: 1 // 0  # type: ignore[method-assign]
        with refused(errno.EIO):
            region_read(connection, 0, 0, 4)
        del controller.read
        assert region_read(connection, 0, 8, 4) == b"\0\0\2\0"
    assert "REGION_READ failed: integer division or modulo by zero" in lines


def test_config_space_and_msix_table_are_served(path: Path, controller: FakeController) -> None:
    with serving(path, controller), speaking(path) as connection:
        config = region_read(connection, 7, 0, 4096)
        assert config[9:12] == b"\x02\x08\x01"
        region_write(connection, 7, 0x10, b"\xff" * 8)
        assert region_read(connection, 7, 0x10, 8) == (0xFFFF_FFFF_FFFF_C004).to_bytes(8, "little")
        region_write(connection, 4, 16, b"entry of vector1")
        assert region_read(connection, 4, 16, 16) == b"entry of vector1"


def test_region_info_fits_into_the_room_that_there_is(path: Path, controller: FakeController) -> None:
    def ask(argsz: int, region: int = 0) -> Message:
        return connection.request(Command.DEVICE_GET_REGION_INFO, payloads.RegionInfo(argsz, region=region).pack())

    with serving(path, controller), speaking(path) as connection:
        with ask(32) as answer:
            info = payloads.RegionInfo.unpack(answer.payload)
            assert (len(answer.payload), info.argsz, info.areas, answer.fd_count) == (32, 64, (), 0)
            assert 32 <= info.cap_offset <= 64  # QEMU asks for that, before it asks again
        with ask(64) as answer:
            info = payloads.RegionInfo.unpack(answer.payload)
            assert (len(answer.payload), info.areas, answer.fd_count) == (64, ((0x1000, 4096),), 1)
            (fd,) = answer.take_fds()
            assert os.get_inheritable(fd) is False
            os.close(fd)
        for region in (1, 2, 3, 5, 6, 8):
            with ask(64, region) as answer:
                assert payloads.RegionInfo.unpack(answer.payload)[1:5] == (0, region, 0, 0)
        with refused(errno.EINVAL):
            ask(64, 9)
        with refused(errno.EINVAL):
            ask(31)


def test_a_command_that_wants_no_reply_gets_none(path: Path, controller: FakeController) -> None:
    with serving(path, controller), speaking(path) as connection:
        request = payloads.RegionAccess(0x400, 0, 4, b"\7\0\0\0").pack()
        header = messages.Header(9, Command.REGION_WRITE, 0, messages.HeaderFlag.NO_REPLY)
        connection._channel.send(header, request, deadline=time.monotonic() + PATIENCE)
        assert region_read(connection, 0, 0x400, 4) == b"\7\0\0\0"  # the next answer is this one's


def test_capabilities_are_those_that_the_client_named(path: Path, controller: FakeController) -> None:
    # QEMU gives up on an answer that is longer than its question.
    asked = b'{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "max_msg_fds": 16, '
    asked += b'"max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}\0'
    for said, known in [(asked, 4), (b"", 0), (b"\0", 0), (b'{"capabilities":{}}\0', 0)]:
        with serving(path, controller), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.settimeout(PATIENCE)
            sock.sendall(messages.Header(1, 1, 20 + len(said)).pack() + b"\0\0\1\0" + said)
            answer = sock.recv(4096)
            version = messages.Version.unpack(answer[16:])
            assert (version.major, version.minor, len(version.named)) == (0, 1, known)
            assert "migration" not in str(answer)
            if said == asked:
                assert len(answer) <= 20 + len(said)
                assert version.capabilities.max_dma_maps == 4096


@pytest.mark.parametrize("first", ["version 1.0", "not VERSION", "garbage", "nothing"])
def test_a_client_that_is_none_is_dropped(path: Path, controller: FakeController, first: str) -> None:
    said = {
        "version 1.0": messages.Header(1, 1, 20).pack() + b"\1\0\0\0",
        "not VERSION": messages.Header(1, 4, 32).pack() + payloads.DeviceInfo(16).pack(),
        "garbage": b"GET / HTTP/1.1\r\n\r\n",
        "nothing": b"",
    }
    with serving(path, controller):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(said[first])
            if first == "nothing":
                sock.shutdown(socket.SHUT_WR)
            sock.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):  # where the server did not even read all of it
                assert sock.recv(100) == b""
        with contextlib.closing(VfioUserTransport(path)) as transport:
            assert transport.read_register(8, 4) == 0x00020000
