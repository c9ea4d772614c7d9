"""The messages of vfio-user, and both sides under random ones. If this failed, one byte from a broken or hostile peer
could end this process, hang it, or use its descriptors up."""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_user_fakes import PATIENCE, FakeController, open_fds, scripted, settle

from gpunvme.errors import TransportError
from gpunvme.nvme.pci_config import PciConfig
from gpunvme.nvme.vfio_user import VfioUserTransport, client, messages, payloads
from gpunvme.nvme.vfio_user.channel import Channel, ClosedByPeer, TooLate
from gpunvme.nvme.vfio_user.messages import Command, Header, ProtocolError, Version
from gpunvme.nvme.vfio_user.session import Session

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
FORMS: dict[type[Any], st.SearchStrategy[Any]] = {
    payloads.DmaMap: st.builds(payloads.DmaMap, U32, U32, U64, U64, U64),
    payloads.DmaUnmap: st.builds(payloads.DmaUnmap, U32, U32, U64, U64),
    payloads.DmaAccess: st.builds(payloads.DmaAccess, U64, U64, st.binary(max_size=64)),
    payloads.DeviceInfo: st.builds(payloads.DeviceInfo, U32, U32, U32, U32),
    payloads.IrqInfo: st.builds(payloads.IrqInfo, U32, U32, U32, U32),
    payloads.IrqSet: st.builds(payloads.IrqSet, U32, U32, U32, U32, U32, st.binary(max_size=64)),
    payloads.RegionAccess: st.builds(payloads.RegionAccess, U64, U32, U32, st.binary(max_size=64)),
}
AREAS = st.lists(st.builds(payloads.Area, U64, U64), max_size=5).map(tuple)


# ---- Parsers


@given(st.one_of(st.tuples(st.just(kind), values) for kind, values in FORMS.items()))
def test_payloads_survive_a_round_trip(case: tuple[type[Any], Any]) -> None:
    kind, value = case
    assert kind.unpack(value.pack()) == value


@given(st.builds(payloads.RegionInfo, U32, st.integers(0, 7), U32, st.just(0), U64, U64, st.none()), AREAS)
def test_regions_survive_a_round_trip(info: payloads.RegionInfo, areas: tuple[payloads.Area, ...]) -> None:
    assert payloads.RegionInfo.unpack(info.pack()) == info
    packed = info._replace(areas=areas).pack_with_areas(4096)
    found = payloads.RegionInfo.unpack(packed)
    assert found.areas == areas
    assert found.argsz == len(packed)
    assert (found.region, found.size, found.offset) == (info.region, info.size, info.offset)


@given(st.builds(Header, U16, U16, st.integers(16, messages.MAX_MESSAGE), st.sampled_from([0, 1, 0x10, 0x21]), U32))
def test_headers_survive_a_round_trip(header: Header) -> None:
    assert Header.unpack(header.pack()) == header


@given(st.builds(messages.Capabilities, U64, U64, U64, U64), st.sets(st.sampled_from(messages.Capabilities._fields)))
def test_versions_survive_a_round_trip(capabilities: messages.Capabilities, named: set[str]) -> None:
    version = Version.unpack(Version(0, 1, capabilities, frozenset(named)).pack())
    assert version.named == named
    for name in messages.Capabilities._fields:
        whose = capabilities if name in named else messages.Capabilities()
        assert getattr(version.capabilities, name) == getattr(whose, name)


@pytest.mark.parametrize("kind", [Header, Version, payloads.RegionInfo, *FORMS])
@given(data=st.binary(max_size=200))
def test_any_bytes_are_taken_apart_or_refused(kind: type[Any], data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        kind.unpack(data[:16].ljust(16, b"\0") if kind is Header else data)


@given(st.binary(max_size=100), st.integers(32, 200), U32)
def test_any_lists_of_areas_are_taken_apart_or_refused(tail: bytes, cap_offset: int, count: int) -> None:
    head = payloads.RegionInfo(32 + 16 + len(tail), 15, 0, cap_offset, 0x4000, 0).pack()
    with contextlib.suppress(ProtocolError):
        payloads.RegionInfo.unpack(head + struct.pack("<HHIII", 1, 1, 0, count, 0) + tail)
    with contextlib.suppress(ProtocolError):
        payloads.RegionInfo.unpack(head + tail)


def test_a_ring_of_capabilities_ends() -> None:
    head = payloads.RegionInfo(48, 15, 0, 32, 0x4000, 0).pack()
    for following in (32, 33, 16, 0xFFFFFFFF):
        with pytest.raises(ProtocolError, match="where it cannot be"):
            payloads.RegionInfo.unpack(head + struct.pack("<HHI", 9, 1, following) + bytes(8))
    assert payloads.RegionInfo.unpack(head + struct.pack("<HHI", 9, 1, 0) + bytes(8)).areas is None


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
SAID = st.dictionaries(st.sampled_from([*messages.Capabilities._fields, "twin_socket"]), JSON)


@given(JSON | st.fixed_dictionaries({"capabilities": SAID}))
def test_any_json_is_taken_apart_or_refused(value: object) -> None:
    with contextlib.suppress(ProtocolError):
        version = Version.unpack(b"\0\0\1\0" + json.dumps(value).encode() + b"\0")
        assert all(type(each) is int and each >= 0 for each in version.capabilities)


@pytest.mark.parametrize("text", [b"[" * 4000, b"9" * 4000, b" " * 5000])
def test_json_that_is_too_much_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="VERSION's capabilities"):
        Version.unpack(b"\0\0\1\0" + text + b"\0")


def test_a_deadline_counts_whatever_the_kernel_says() -> None:
    # As with a peer whose bytes always come one by one, just in time.
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel._wait = lambda event, deadline: True  # type: ignore[method-assign]
    with pytest.raises(TooLate):
        channel.receive(time.monotonic() + 0.05)
    channel.close()
    theirs.close()


# ---- The server under random clients

GOOD: list[tuple[int, bytes]] = [
    (Command.DMA_MAP, payloads.DmaMap(32, 3, 0, 0x100000, 0x1000).pack()),
    (Command.DMA_MAP, payloads.DmaMap(32, 1, 0x1000, 0x200000, 0x2000).pack()),
    (Command.DMA_UNMAP, payloads.DmaUnmap(24, 0, 0x100000, 0x1000).pack()),
    (Command.DMA_UNMAP, payloads.DmaUnmap(24, 2, 0, 0).pack()),
    (Command.DEVICE_GET_INFO, payloads.DeviceInfo(16).pack()),
    (Command.DEVICE_GET_REGION_INFO, payloads.RegionInfo(4096).pack()),
    (Command.DEVICE_GET_REGION_INFO, payloads.RegionInfo(32, region=7).pack()),
    (Command.DEVICE_GET_IRQ_INFO, payloads.IrqInfo(16, kind=2).pack()),
    (Command.DEVICE_SET_IRQS, payloads.IrqSet(20, 0x24, 2, 0, 1).pack()),
    (Command.DEVICE_SET_IRQS, payloads.IrqSet(22, 0x22, 2, 0, 2, b"\1\1").pack()),
    (Command.DEVICE_SET_IRQS, payloads.IrqSet(20, 0x21, 2, 0, 0).pack()),
    (Command.REGION_READ, payloads.RegionAccess(0, 0, 8).pack()),
    (Command.REGION_READ, payloads.RegionAccess(0, 7, 4096).pack()),
    (Command.REGION_READ, payloads.RegionAccess(0x8000, 4, 0x8000).pack()),
    (Command.REGION_WRITE, payloads.RegionAccess(0x14, 0, 4, b"\1\0\0\0").pack()),
    (Command.REGION_WRITE, payloads.RegionAccess(0x68, 7, 2, b"\0\x80").pack()),
    (Command.DEVICE_RESET, b""),
    (Command.VERSION, Version(0, 1).pack()),
]


BYTES = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes, most often with something changed, cut off or added."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 2))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(
                st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
            )
    if draw(st.integers(0, 7)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    if draw(st.integers(0, 7)) == 0:
        changed += draw(st.binary(max_size=40))
    return bytes(changed)


@st.composite
def said(draw: st.DrawFn) -> list[tuple[bytes, int]]:
    """What a client says: bytes, and how many descriptors with them."""
    version = Header(1, Command.VERSION, 20).pack() + b"\0\0\1\0"
    parts = [(version if draw(st.integers(0, 9)) else draw(mutated(version)), 0)]
    for command, payload in draw(st.lists(st.sampled_from(GOOD), max_size=12)):
        payload = draw(mutated(payload))  # noqa: PLW2901
        header = Header(draw(U16), command, 16 + len(payload), draw(st.sampled_from([0, 0, 0, 0x10]))).pack()
        parts.append(
            ((header if draw(st.integers(0, 9)) else draw(mutated(header))) + payload, draw(st.integers(0, 2)))
        )
    return parts


def send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    if data:
        sent = sock.sendmsg([data], beside)
        sock.sendall(data[sent:])


@given(said())
def test_the_server_survives_any_client(parts: list[tuple[bytes, int]]) -> None:
    before = open_fds()
    memfd = os.memfd_create("fuzz")
    os.ftruncate(memfd, 1 << 20)
    controller = FakeController()
    ours, theirs = socket.socketpair()
    session = Session(
        Channel(ours), controller, PciConfig(0x4000, 8, controller.reset), mmap_doorbells=True, report=str
    )
    for data, count in parts:
        send(theirs, data, [memfd] * count)
    theirs.shutdown(socket.SHUT_WR)
    theirs.setblocking(False)
    try:
        while True:
            session.take_message()
            with contextlib.suppress(BlockingIOError):
                while theirs.recv(1 << 20):
                    pass
    except (ProtocolError, ClosedByPeer):
        pass
    except TooLate:
        pytest.fail("the server waits for what cannot come")
    finally:
        session.close()
    assert not controller.maps
    assert not controller.interrupts
    assert controller.resets >= 1
    controller.close()
    theirs.close()
    os.close(memfd)
    settle(before)


# ---- The client under a server that changes one of its messages

Change = Callable[[bytes], list[bytes]]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """What becomes of a message: the parts that are sent in its place. An empty one ends the connection."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "drop", "twice", "garbage", "more", "header"]))
    at, value = draw(st.integers(0, 1 << 16)), draw(BYTES)
    noise = draw(st.binary(min_size=1, max_size=100))

    def change(data: bytes) -> list[bytes]:
        place = at % len(data)
        return {
            "flip": [data[:place] + bytes([value]) + data[place + 1 :]],
            "cut": [data[:place], b""],
            "drop": [],
            "twice": [data, data],
            "garbage": [noise],
            "more": [data, noise],
            "header": [data[: place % 16] + bytes([value]) + data[place % 16 + 1 :]],
        }[kind]

    return change


class ChangedChannel(Channel):
    """A channel that changes one message that is sent."""

    def __init__(self, sock: socket.socket, number: int, change: Change) -> None:
        super().__init__(sock)
        self._left = number
        self._change = change

    def send(self, header: Header, payload: bytes = b"", fds: Sequence[int] = (), *, deadline: float) -> None:
        self._left -= 1
        if self._left != 0:
            super().send(header, payload, fds, deadline=deadline)
            return
        for part in self._change(header._replace(size=16 + len(payload)).pack() + payload):
            if not part:
                raise ClosedByPeer
            self._socket.setblocking(True)
            send(self._socket, part, fds)
            self._socket.setblocking(False)


def use(path: Path) -> None:
    """What drivers do with a transport."""
    transport = VfioUserTransport(path, timeout=0.2)
    try:
        transport.read_register(0, 8)
        transport.write_register(0x28, 8, 0x1000)
        if transport.doorbells is not None:
            for at in (0, transport.doorbells_nbytes - 4):
                ctypes.c_uint32.from_address(transport.doorbells + at).value = 1
        with transport.allocate(8192) as memory:
            memory.view()[:] = bytes(8192)
        transport.allocate(20 << 20).close()
        transport.reset()
        transport.read_register(0x1C, 4)
    finally:
        transport.close()


@settings(max_examples=min(settings.default.max_examples, 200))
@given(st.integers(1, 20), changes())
def test_the_client_survives_any_change(number: int, change: Change) -> None:
    before = open_fds()
    controller = FakeController()

    def script(connection: Channel) -> None:
        changed = ChangedChannel(connection._socket.dup(), number, change)
        config = PciConfig(0x4000, 4, controller.reset)
        session = Session(changed, controller, config, mmap_doorbells=True, report=str)
        try:
            while True:
                if not changed.readable(PATIENCE):
                    raise TooLate
                session.take_message()
        finally:
            session.close()

    with tempfile.TemporaryDirectory() as folder:
        patient = mock.patch.object(client, "_RESET_SECONDS", 0.2)
        with scripted(Path(folder) / "s", script), patient, contextlib.suppress(TransportError):
            use(Path(folder) / "s")
    controller.close()
    settle(before)
