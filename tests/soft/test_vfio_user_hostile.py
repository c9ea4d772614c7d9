"""The vfio-user client and servers that misbehave. If this failed, a broken server would hang or crash its clients."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import vfio_user_fakes as fakes
from vfio_user_fakes import PATIENCE, FakeController, eventually, open_fds, reply, scripted, serving, take

from gpunvme.errors import TransportError
from gpunvme.nvme.vfio_user import VfioUserTransport, messages, payloads
from gpunvme.nvme.vfio_user.channel import Channel, Message
from gpunvme.nvme.vfio_user.messages import Command

controller = pytest.fixture(fakes.make_controller)
path = pytest.fixture(fakes.make_path)
no_descriptor_stays_open = pytest.fixture(autouse=True)(fakes.no_descriptor_stays_open)
memfd = pytest.fixture(fakes.make_memfd)


def play(path: Path, script: Callable[[Channel], None], match: str, timeout: float = PATIENCE) -> None:
    """A script's client must fail to connect, and say why."""
    with scripted(path, script), pytest.raises(TransportError, match=match) as caught:
        VfioUserTransport(path, timeout=timeout).read_register(8, 4)
    assert f"vfio-user:{path}" in str(caught.value)


def answering(command: Command, wrong: Callable[[Channel, Message], None], **others: int) -> Callable[[Channel], None]:
    """A good server, but for one command."""

    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                if message.header.command == command:
                    wrong(connection, message)
                else:
                    reply(connection, message, fakes.good_answer(message, **others))

    return script


@pytest.mark.parametrize("version", [(1, 0), (0, 2), (0xFFFF, 0xFFFF)])
def test_a_server_of_another_version_is_said(path: Path, version: tuple[int, int]) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, messages.Version(*version).pack())

    play(
        path,
        answering(Command.VERSION, wrong),
        rf"speaks version {version[0]}\.{version[1]} of vfio-user, we speak 0\.1",
    )


def test_a_server_that_refuses_the_version_is_said(path: Path) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, flags=0x21, error=errno.EINVAL)

    play(path, answering(Command.VERSION, wrong), r"refuses version 0\.1 of vfio-user: Invalid argument")


def test_a_server_that_hangs_up_on_the_version_is_said(path: Path) -> None:
    def script(connection: Channel) -> None:
        take(connection).close()

    play(path, script, "closed the connection instead of answering VERSION")


@pytest.mark.parametrize("command", [Command.VERSION, Command.DEVICE_GET_INFO, Command.REGION_WRITE])
def test_a_server_that_hangs_is_given_up(path: Path, command: Command) -> None:
    play(path, answering(command, lambda *_: None), rf"no answer to {command.name} for 0\.2 s", timeout=0.2)


def test_a_server_that_trickles_is_given_up(path: Path) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        for byte in messages.Header(1, 4, 1000, 1).pack() + bytes(984):
            connection._socket.send(bytes([byte]))
            time.sleep(0.02)

    play(path, answering(Command.DEVICE_GET_INFO, wrong), r"no answer to DEVICE_GET_INFO for 0\.5 s", timeout=0.5)


def test_a_server_that_never_stops_asking_is_given_up(path: Path) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        while True:
            connection.send(messages.Header(1, Command.DMA_READ, 0, 0x10), bytes(16), deadline=time.monotonic() + 1)

    play(path, answering(Command.DEVICE_GET_INFO, wrong), r"no answer to DEVICE_GET_INFO for 0\.3 s", timeout=0.3)


def test_a_server_that_hangs_in_the_middle_of_a_question_is_given_up(path: Path) -> None:
    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                reply(connection, message, fakes.good_answer(message))
                if message.header.command == Command.REGION_WRITE:
                    connection._socket.send(messages.Header(1, Command.DMA_READ, 32).pack())  # and no more
                    sent.set()

    def is_being_taken() -> bool:
        # What came before may have had the lock for a moment: who has it now has also read what was sent.
        free = transport._connection._lock.acquire(blocking=False)
        if free:
            transport._connection._lock.release()
        return not free and sent.is_set() and not transport._connection._channel.readable(0)

    sent = threading.Event()

    with scripted(path, script), contextlib.closing(VfioUserTransport(path, timeout=0.2)) as transport:
        eventually(is_being_taken)
        with pytest.raises(TransportError, match=r"no answer to REGION_READ for 0\.2 s.*middle of a message"):
            transport.read_register(8, 4)


def test_a_server_that_asks_faster_than_we_answer_is_given_up(path: Path) -> None:
    question = messages.Header(1, Command.DMA_READ, 32, messages.HeaderFlag.NO_REPLY)
    script = answering(Command.DMA_READ, lambda *_: None)
    with scripted(path, script), contextlib.closing(VfioUserTransport(path, timeout=0.2)) as transport:
        asked = Message(question, bytes(16), [])
        asking = mock.patch.object(transport._connection._channel, "receive", return_value=asked)
        with asking, pytest.raises(TransportError, match=r"no answer to REGION_READ for 0\.2 s"):
            transport.read_register(8, 4)


@pytest.mark.parametrize("already", [0, 5, 16, 20])
def test_a_server_that_dies_in_the_middle_of_an_answer_is_said(path: Path, already: int) -> None:
    def script(connection: Channel) -> None:
        with take(connection) as message:
            whole = messages.Header(message.header.id, 1, 24, 1).pack() + messages.Version(0, 1).pack()[:8]
            connection._socket.send(whole[:already])

    play(path, script, "in the middle of a message" if already else "closed the connection instead of")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "has .* bytes"),
        (messages.Header(1, 1, 15, 1).pack(), "has 15 bytes"),
        (messages.Header(1, 1, 0xFFFFFFFF, 1).pack(), "has 4294967295 bytes"),
        (messages.Header(1, 1, 16, 2).pack(), "neither a command nor a reply"),
        (messages.Header(7, 1, 16, 1).pack(), "a reply to VERSION came where one to VERSION was due"),
        (messages.Header(1, 4, 16, 1).pack(), "a reply to DEVICE_GET_INFO came where one to VERSION was due"),
        (messages.Header(1, 1, 19, 1).pack() + b"\0\0\1", "at least 4 bytes"),
        (messages.Header(1, 1, 24, 1).pack() + b"\0\0\1\0{}}\0", "not JSON"),
        (messages.Header(1, 1, 24, 1).pack() + b"\0\0\1\0{}{}", "do not end with NUL"),
        (messages.Header(1, 1, 22, 1).pack() + b"\0\0\1\0\xff\0", "not JSON"),
        (messages.Header(1, 1, 23, 1).pack() + b"\0\0\1\0[]\0", "not an object"),
    ],
)
def test_garbage_for_an_answer_is_said(path: Path, answer: bytes, what: str) -> None:
    def script(connection: Channel) -> None:
        take(connection).close()
        connection._socket.send(answer)
        take(connection)

    play(path, script, f"does not keep to the protocol: .*{what}")


def test_capabilities_that_cannot_be_are_said(path: Path) -> None:
    for value in ('"many"', "-1", "true", "1e99", "18446744073709551616", "null", "[" * 2000):
        text = b'{"capabilities":{"max_msg_fds":%s}}\0' % value.encode()

        def wrong(connection: Channel, message: Message, text: bytes = text) -> None:
            reply(connection, message, b"\0\0\1\0" + text)

        play(path, answering(Command.VERSION, wrong), "does not keep to the protocol: VERSION's capabilit")


@pytest.mark.parametrize(
    ("info", "what"),
    [
        ((16, 1, 9, 5), "serves no PCI device"),
        ((16, 3, 7, 5), "has 7 regions"),
        ((16, 3, 0xFFFFFFFF, 5), "has 4294967295 regions"),
    ],
)
def test_devices_that_cannot_be_are_said(path: Path, info: tuple[int, int, int, int], what: str) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, payloads.DeviceInfo(*info).pack())

    play(path, answering(Command.DEVICE_GET_INFO, wrong), what)


def test_a_device_of_another_class_is_said(path: Path) -> None:
    script = answering(Command.DMA_READ, lambda *_: None, class_code=0x020000)
    play(path, script, r"of class 020000h, which is no NVMe controller \(010802h\)")


def test_answers_to_other_reads_are_said(path: Path) -> None:
    for change in ({"offset": 12}, {"region": 0}, {"nbytes": 8}, {"data": b""}, {"data": bytes(8)}):

        def wrong(connection: Channel, message: Message, change: dict[str, object] = change) -> None:
            asked = payloads.RegionAccess.unpack(message.payload)._replace(data=bytes(4))
            reply(connection, message, asked._replace(**change).pack())

        play(path, answering(Command.REGION_READ, wrong), r"asked for 4 bytes at 0x8 of region 7, the server answered")


def test_a_bar_without_room_for_registers_is_said(path: Path) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, payloads.RegionInfo(32, 3, 0, size=0x800).pack())

    play(path, answering(Command.DEVICE_GET_REGION_INFO, wrong), "BAR0 has 2048 bytes")


AREAS: list[tuple[tuple[tuple[int, int], ...] | None, bool]] = [
    (None, True),  # the whole BAR
    (((0x1000, 0x1000),), True),
    (((0, 0x1000), (0x1000, 0x2000)), True),
    (((0, 0x4000),), True),
    ((), False),
    (((0x2000, 0x1000),), False),  # not the doorbells
    (((0x1800, 0x1000),), False),  # no whole pages
    (((0x1000, 0x10000),), False),  # past the BAR's end
    (((0x1000, (1 << 64) - 0x1000),), False),
]


@pytest.mark.parametrize(("areas", "found"), AREAS)
def test_doorbells_are_mapped_where_they_can_be(
    path: Path, memfd: int, areas: tuple[tuple[int, int], ...] | None, found: bool
) -> None:
    os.pwrite(memfd, b"\x2a\0\0\0", 0x5000 + 0x1000)

    def wrong(connection: Channel, message: Message) -> None:
        info = payloads.RegionInfo(32, 7, 0, size=0x4000, offset=0x5000)
        if areas is None:
            reply(connection, message, info.pack(), (memfd,))
        else:
            sparse = info._replace(areas=tuple(payloads.Area(*area) for area in areas))
            reply(connection, message, sparse.pack_with_areas(4096), (memfd,))

    script = answering(Command.DEVICE_GET_REGION_INFO, wrong)
    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        assert (transport.doorbells is not None) == found
        if transport.doorbells is not None:
            assert ctypes.c_uint32.from_address(transport.doorbells).value == 42
            ctypes.c_uint32.from_address(transport.doorbells + transport.doorbells_nbytes - 4).value = 1


def test_doorbells_that_cannot_be_mapped_are_said(path: Path, memfd: int) -> None:
    readable, writable = os.pipe()
    for fd, offset in [(readable, 0), (memfd, 1 << 30), (memfd, (1 << 63) - 0x1000), (memfd, 123)]:

        def wrong(connection: Channel, message: Message, fd: int = fd, offset: int = offset) -> None:
            info = payloads.RegionInfo(32, 7, 0, size=0x4000, offset=offset, areas=(payloads.Area(0x1000, 0x1000),))
            reply(connection, message, info.pack_with_areas(4096), (fd, fd))

        play(path, answering(Command.DEVICE_GET_REGION_INFO, wrong), "cannot be mapped")
    os.close(readable)
    os.close(writable)


def test_descriptors_that_nobody_asked_for_are_closed(path: Path, memfd: int) -> None:
    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                reply(connection, message, fakes.good_answer(message), (memfd,) * 16)

    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        for _ in range(20):
            assert transport.read_register(8, 4) == 0
        assert len([fd for fd in open_fds() if "memfd:test" in fd]) <= 1 + 16  # and those of the script's own messages


def test_more_descriptors_than_fit_are_an_error(path: Path, memfd: int) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, messages.Version(0, 1).pack(), (memfd,) * 100)

    play(path, answering(Command.VERSION, wrong), "more than 16 descriptors")


def test_a_server_that_knows_4_bytes_only_gets_64_bit_registers_in_halves(path: Path) -> None:
    written: list[tuple[int, bytes]] = []

    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                if message.header.command in (Command.REGION_READ, Command.REGION_WRITE):
                    asked = payloads.RegionAccess.unpack(message.payload)
                    if asked.nbytes == 8:
                        reply(connection, message, flags=0x21, error=errno.EINVAL)
                        continue
                    if message.header.command == Command.REGION_WRITE and asked.region == 0:
                        written.append((asked.offset, asked.data))
                    elif asked.region == 0:
                        reply(connection, message, asked._replace(data=asked.offset.to_bytes(4, "little")).pack())
                        continue
                reply(connection, message, fakes.good_answer(message))

    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        assert transport.read_register(0x28, 8) == 0x28 | 0x2C << 32
        transport.write_register(0x28, 8, 0x1122334455667000)
        assert written == [(0x28, b"\x00\x70\x66\x55"), (0x2C, b"\x44\x33\x22\x11")]


def test_a_register_that_is_refused_is_said(path: Path) -> None:
    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                if message.header.command in (9, 10) and payloads.RegionAccess.unpack(message.payload).region == 0:
                    reply(connection, message, flags=0x21, error=errno.EPERM)
                else:
                    reply(connection, message, fakes.good_answer(message))

    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        with pytest.raises(TransportError, match="refuses a read of 4 bytes at 0x8 of BAR0: Operation not permitted"):
            transport.read_register(8, 4)
        with pytest.raises(TransportError, match="refuses a read of 4 bytes at 0x0 of BAR0"):
            transport.read_register(0, 8)
        with pytest.raises(TransportError, match="refuses a write of 4 bytes at 0x14 of BAR0"):
            transport.write_register(0x14, 4, 1)
        transport.allocate(4096).view()[0] = 1  # the rest goes on


def test_a_mapping_that_is_refused_is_said_and_tried_anew(path: Path) -> None:
    refusals = [errno.ENOSPC]

    def wrong(connection: Channel, message: Message) -> None:
        if refusals:
            reply(connection, message, flags=0x21, error=refusals.pop())
        else:
            reply(connection, message)

    with scripted(path, answering(Command.DMA_MAP, wrong)), contextlib.closing(VfioUserTransport(path)) as transport:
        with pytest.raises(TransportError, match="refuses DMA_MAP: No space left"):
            transport.allocate(4096)
        assert transport.allocate(4096).iova() == 1 << 32


def test_a_server_that_cannot_reset_is_said(path: Path) -> None:
    def wrong(connection: Channel, message: Message) -> None:
        reply(connection, message, payloads.DeviceInfo(16, payloads.DeviceFlag.PCI, 9, 0).pack())

    with (
        scripted(path, answering(Command.DEVICE_GET_INFO, wrong)),
        contextlib.closing(VfioUserTransport(path)) as transport,
        pytest.raises(TransportError, match="cannot reset its device"),
    ):
        transport.reset()


def test_servers_that_refuse_interrupts_are_good_enough(path: Path) -> None:
    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                command = message.header.command
                if command == Command.DEVICE_GET_INFO:
                    reply(connection, message, payloads.DeviceInfo(16, 3, 9, 5).pack())
                elif command == Command.DEVICE_GET_IRQ_INFO:
                    reply(connection, message, payloads.IrqInfo(16, 1, 2, 0xFFFFFFFF).pack())
                elif command == Command.DEVICE_SET_IRQS:
                    assert message.fd_count == 1  # what a server that says nothing takes
                    reply(connection, message, flags=0x21)
                else:
                    reply(connection, message, fakes.good_answer(message))

    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        assert transport.read_register(8, 4) == 0


# ---- Servers that read and write by messages


def ask(connection: Channel, command: int, payload: bytes, *, number: int = 900, flags: int = 0) -> Message:
    header = messages.Header(number, command, 0, flags)
    connection.send(header, payload, deadline=time.monotonic() + PATIENCE)
    answer = take(connection)
    assert (answer.header.id, answer.header.command, answer.is_reply) == (number, command, True)
    return answer


@pytest.mark.parametrize("when", ["between commands", "before an answer"])
def test_a_server_may_read_and_write_what_was_mapped(path: Path, when: str) -> None:
    results: list[object] = []
    mapped: list[payloads.DmaMap] = []

    def look(connection: Channel) -> None:
        start = mapped[0].address
        with ask(connection, Command.DMA_READ, payloads.DmaAccess(start, 5).pack()) as answer:
            results.append(payloads.DmaAccess.unpack(answer.payload).data)
        with ask(connection, Command.DMA_WRITE, payloads.DmaAccess(start + 8192, 3, b"new").pack()) as answer:
            results.append(payloads.DmaAccess.unpack(answer.payload))
        wrong = [
            (Command.DMA_READ, payloads.DmaAccess(start - 1, 5)),
            (Command.DMA_READ, payloads.DmaAccess(start + mapped[0].size - 4, 5)),
            (Command.DMA_READ, payloads.DmaAccess(start, (1 << 20) + 1)),
            (Command.DMA_READ, payloads.DmaAccess((1 << 64) - 1, 1)),
            (Command.DMA_WRITE, payloads.DmaAccess(0, 3, b"bad")),
            (Command.DMA_WRITE, payloads.DmaAccess(start, 3, b"too long")),
        ]
        for command, access in wrong:
            with ask(connection, command, access.pack()) as answer:
                results.append(answer.header.error)
        with ask(connection, Command.DMA_READ, b"short") as answer:
            results.append(answer.header.error)
        with ask(connection, 99, b"") as answer:
            results.append(answer.header.error)
        done.set()

    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                if message.header.command == Command.DMA_MAP:
                    mapped.append(payloads.DmaMap.unpack(message.payload))
                asked_now = message.header.command == Command.REGION_READ and mapped and not done.is_set()
                if asked_now and when == "before an answer":
                    look(connection)
                reply(connection, message, fakes.good_answer(message))
                if asked_now and when == "between commands":
                    look(connection)

    done = threading.Event()
    with scripted(path, script), contextlib.closing(VfioUserTransport(path)) as transport:
        memory = transport.allocate(3 * 4096)
        memory.view()[:5] = b"hello"
        assert transport.read_register(8, 4) == 0
        assert done.wait(PATIENCE)
        assert bytes(memory.view(8192, 3)) == b"new"
        assert transport.read_register(8, 4) == 0
    assert results[:2] == [b"hello", (mapped[0].address + 8192, 3, b"")]
    refusals = [errno.EFAULT, errno.EFAULT, errno.E2BIG, errno.EFAULT, errno.EFAULT, errno.EINVAL]
    assert results[2:] == [*refusals, errno.EINVAL, errno.EOPNOTSUPP]


def test_a_reply_that_nobody_waits_for_ends_the_connection(path: Path) -> None:
    def script(connection: Channel) -> None:
        while True:
            with take(connection) as message:
                reply(connection, message, fakes.good_answer(message))
                if message.header.command == Command.REGION_WRITE:
                    reply(connection, message)  # once more

    with scripted(path, script):
        transport = VfioUserTransport(path)
        eventually(lambda: transport._connection._broken)
        with pytest.raises(TransportError, match="a reply came where none was due"):
            transport.read_register(8, 4)
        transport.close()


def test_closing_ends_everything_at_once(path: Path, controller: FakeController) -> None:
    with serving(path, controller):
        transport = VfioUserTransport(path)
        memory = transport.allocate(4096)
        transport.close()
        transport.close()
        assert transport.doorbells is None
        assert not controller.maps
        with pytest.raises(TransportError, match="closed"):
            transport.read_register(8, 4)
        with pytest.raises(TransportError, match="closed"):
            transport.allocate(4096)
        memory.view()[0] = 1
        memory.close()
