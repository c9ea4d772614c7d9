"""vfio-user, client against server: if this failed, controllers in other processes could not be driven, or a server
that misbehaves would take its clients down."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import vfio_user_fakes as fakes
from vfio_user_fakes import PATIENCE, FakeController, eventually, serving

from gpunvme.errors import TransportError
from gpunvme.nvme import pci_config
from gpunvme.nvme.vfio_user import VfioUserTransport, arenas

controller = pytest.fixture(fakes.make_controller)
path = pytest.fixture(fakes.make_path)
# Children here do nothing that a lock of another thread could stop; Python 3.12 warns all the same.
FORKS = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
no_descriptor_stays_open = pytest.fixture(autouse=True)(fakes.no_descriptor_stays_open)

# ---- One client and one server


@pytest.mark.parametrize("file_offset", [0, 0x1000])
def test_registers_and_doorbells_are_reached(path: Path, file_offset: int) -> None:
    controller = FakeController(8192, file_offset)
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        assert transport.uri == f"vfio-user:{path}"
        assert transport.read_register(0, 8) == controller.value(0, 8)
        assert transport.read_register(8, 4) == 0x00020000
        transport.write_register(0x14, 4, 0x00460001)
        transport.write_register(0x28, 8, 0x1234_5678_9ABC_D000)
        assert controller.value(0x14, 4) == 0x00460001
        assert controller.value(0x28, 8) == 0x1234_5678_9ABC_D000
        assert transport.doorbells is not None
        assert transport.doorbells_nbytes == 8192
        # Stored by the client, seen by the controller, without a message.
        ctypes.c_uint32.from_address(transport.doorbells + 8184).value = 77
        assert controller.read(0x1000 + 8184, 4) == 77
    controller.close()


def test_a_server_without_mappable_doorbells_gets_them_as_writes(path: Path, controller: FakeController) -> None:
    with serving(path, controller, mmap_doorbells=False), contextlib.closing(VfioUserTransport(path)) as transport:
        assert transport.doorbells is None
        transport.write_register(0x1008, 4, 5)
        assert ("write", 0x1008, 4, 5) in controller.log
        assert transport.read_register(0x1008, 4) == 5


def test_memory_is_shared_both_ways(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        assert not transport.maps_any_memory
        one, two = transport.allocate(4096), transport.allocate(10_000)
        assert one.address % 4096 == two.address % 4096 == one.iova() % 4096 == two.iova() % 4096 == 0
        assert one.view().nbytes >= 4096
        assert bytes(two.view()) == bytes(two.nbytes)  # zeroed
        one.view()[:5] = b"hello"
        assert controller.dma(one.iova(), 5).raw == b"hello"
        controller.dma(two.iova(4096), 3).raw = b"abc"
        assert bytes(two.view(4096, 3)) == b"abc"
        ((start, (nbytes, _, readable, writable)),) = controller.maps.items()
        assert start % (2 << 20) == nbytes % (2 << 20) == 0
        assert readable
        assert writable
        with pytest.raises(TransportError, match="shared"):
            transport.map(one.address, 4096)
        with pytest.raises(ValueError, match="0 bytes"):
            transport.allocate(0)


def test_memory_is_used_again_and_zeroed(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        kept = transport.allocate(4096)
        first = transport.allocate(64 << 10)
        where = first.iova()
        first.view()[:4] = b"old!"
        first.close()
        first.close()  # twice is once
        second = transport.allocate(64 << 10)
        assert second.iova() == where
        assert bytes(second.view()) == bytes(64 << 10)
        assert len(controller.maps) == 1
        kept.close()


def test_large_memory_has_an_arena_that_goes_with_it(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        small = transport.allocate(4096)
        large = transport.allocate(40 << 20)
        assert len(controller.maps) == 2
        controller.dma(large.iova((40 << 20) - 4), 4).raw = b"last"
        view = large.view((40 << 20) - 4, 4)
        large.close()
        assert len(controller.maps) == 1
        assert bytes(view) in (b"last", bytes(4))  # gone for the server, not for who still looks at it
        small.close()


def test_no_more_regions_than_the_server_takes(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        transport._arenas.most = 3
        held = [transport.allocate(16 << 20) for _ in range(3)]
        with pytest.raises(TransportError, match="all 3 regions"):
            transport.allocate(4096)
        held.pop().close()
        transport.allocate(4096)


def test_64_regions_hold_any_amount(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        held = [transport.allocate(8 << 20) for _ in range(400)]
        assert len(controller.maps) <= arenas.MOST_ARENAS
        assert len({memory.iova() for memory in held}) == 400


def test_the_device_is_made_ready(path: Path, controller: FakeController) -> None:
    with serving(path, controller, vectors=20), contextlib.closing(VfioUserTransport(path)) as transport:
        assert sorted(controller.interrupts) == list(range(20))  # in two messages: 16 descriptors fit into one
        command = transport._config(pci_config.Offset.COMMAND, 2)
        assert command & 0x6 == 0x6  # memory, bus master


def test_a_reset_reaches_the_controller(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        memory = transport.allocate(4096)
        transport.reset()
        assert controller.resets == 1
        assert transport._config(pci_config.Offset.COMMAND, 2) & 0x6 == 0x6
        assert controller.dma(memory.iova(), 4096)  # mappings outlive a reset


def test_a_function_level_reset_reaches_the_controller(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        transport._write(7, pci_config.Offset.EXPRESS + 8, b"\x00\x80")
        assert controller.resets == 1
        assert transport._config(pci_config.Offset.COMMAND, 2) == 0


def test_many_threads_may_use_one_transport(path: Path, controller: FakeController) -> None:
    failed: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for i in range(30):
                offset = 0x400 + 4 * number
                transport.write_register(offset, 4, i)
                assert transport.read_register(offset, 4) == i
                with transport.allocate(4096 * (number + 1)) as memory:
                    memory.view()[:1] = bytes([number])
                    assert controller.dma(memory.iova(), 1).raw == bytes([number])
        except BaseException as error:  # noqa: BLE001  # a thread's failure is the test's
            failed.append(error)

    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert failed == []


# ---- Several clients, one after another


def test_each_client_finds_a_controller_that_was_reset(path: Path, controller: FakeController) -> None:
    lines: list[str] = []
    with serving(path, controller, report=lines.append):
        for number in range(1, 4):
            with contextlib.closing(VfioUserTransport(path)) as transport:
                transport.allocate(4096)
                assert controller.maps
                assert controller.interrupts
                transport._write(7, pci_config.Offset.INTERRUPT_LINE, b"\x0b")
            eventually(lambda number=number: controller.resets == number)
            eventually(lambda: not controller.maps and not controller.interrupts)
        with contextlib.closing(VfioUserTransport(path)) as transport:
            assert transport._config(pci_config.Offset.INTERRUPT_LINE, 1) == 0
    assert lines.count("a client has connected") == 4


def test_a_second_client_waits_for_its_turn(path: Path, controller: FakeController) -> None:
    with serving(path, controller):
        first = VfioUserTransport(path)
        with pytest.raises(TransportError, match=r"no answer to VERSION for 0\.3 s.*another client"):
            VfioUserTransport(path, timeout=0.3)
        threading.Timer(0.3, first.close).start()
        with contextlib.closing(VfioUserTransport(path, timeout=PATIENCE)) as second:
            assert second.read_register(8, 4) == 0x00020000


def test_a_client_that_drops_its_transport_is_gone(path: Path, controller: FakeController) -> None:
    with serving(path, controller):
        transport = VfioUserTransport(path)
        transport.allocate(4096)
        del transport
        eventually(lambda: controller.resets == 1 and not controller.maps)


CLIENT = """
import sys, time
from gpunvme.nvme.vfio_user.client import VfioUserTransport
transport = VfioUserTransport(sys.argv[1])
memory = transport.allocate(4 << 20)
memory.view()[:4] = b"mine"
print(memory.iova(), flush=True)
time.sleep(1000)
"""


def test_a_client_that_is_killed_leaves_nothing(path: Path, controller: FakeController) -> None:
    with serving(path, controller):
        child = subprocess.Popen([sys.executable, "-c", CLIENT, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child, child.stdout:
            iova = int(child.stdout.readline())
            assert controller.dma(iova, 4).raw == b"mine"
            child.kill()
        eventually(lambda: controller.resets == 1 and not controller.maps and not controller.interrupts)
        with contextlib.closing(VfioUserTransport(path)) as transport:
            transport.allocate(4096)


# ---- The server in a process of its own

SERVER = """
import sys
sys.path.insert(0, sys.argv[2])
from vfio_user_fakes import FakeController
from gpunvme.nvme.vfio_user.server import serve
serve(sys.argv[1], FakeController(), ready=lambda: print("ready", flush=True))
print("stopped", flush=True)
"""


@contextlib.contextmanager
def serving_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(path), str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        try:
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_stops_in_order_when_asked(path: Path, number: signal.Signals) -> None:
    with serving_process(path) as child:
        with contextlib.closing(VfioUserTransport(path)) as transport:
            assert transport.read_register(8, 4) == 0x00020000
            transport.allocate(4096)
            child.send_signal(number)
            assert child.stdout is not None
            assert child.stdout.readline() == "stopped\n"
            assert child.wait(PATIENCE) == 0
            with pytest.raises(TransportError, match="closed the connection; start it again"):
                transport.read_register(8, 4)
        assert not path.exists()


def test_a_server_that_dies_is_noticed_and_can_be_replaced(path: Path) -> None:
    with serving_process(path) as child:
        transport = VfioUserTransport(path)
        memory = transport.allocate(4096)
        child.kill()
        child.wait(PATIENCE)
        eventually(lambda: transport._connection._broken)
        with pytest.raises(TransportError, match="start it again"):
            transport.read_register(0x1C, 4)
        with pytest.raises(TransportError):
            transport.allocate(32 << 20)
        memory.view()[:] = bytes(4096)  # ours, whatever happens to the server
        memory.close()
        transport.close()
    assert path.exists()  # left behind
    with pytest.raises(TransportError, match=r"no server listens on it \(any more\); start it again"):
        VfioUserTransport(path)
    controller = FakeController()
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        assert transport.read_register(8, 4) == 0x00020000
    controller.close()


@FORKS
def test_a_forked_child_does_not_disturb_its_parent(path: Path, controller: FakeController) -> None:
    with serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        memory = transport.allocate(4096)
        memory.view()[:4] = b"mine"
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                with pytest.raises(TransportError, match="after a fork"):
                    transport.read_register(8, 4)
                memory.close()
                transport.close()
                failed = 0
            finally:
                os._exit(failed)
        assert os.waitpid(child, 0)[1] == 0
        assert bytes(memory.view(0, 4)) == b"mine"
        assert transport.read_register(8, 4) == 0x00020000


# ---- Where sockets are


def test_what_is_no_server_is_said(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=re.escape(f"vfio-user:{tmp_path}/none: there is no such socket; start")):
        VfioUserTransport(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransportError, match=r"(not a socket|no server listens)"):
        VfioUserTransport(tmp_path / "file")
    with pytest.raises(TransportError, match="at most 107 bytes"):
        VfioUserTransport(tmp_path / ("x" * 200))
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(tmp_path / "d"))
    with pytest.raises(TransportError, match="of another kind"):
        VfioUserTransport(tmp_path / "d")
    datagrams.close()


@FORKS
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_socket_of_somebody_else_is_said(controller: FakeController) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        Path(folder).chmod(0o755)
        with serving(path, controller):
            child = os.fork()
            if child == 0:
                failed = 1
                try:
                    os.setuid(65534)
                    with pytest.raises(TransportError, match="no permission"):
                        VfioUserTransport(path)
                    failed = 0
                finally:
                    os._exit(failed)
            assert os.waitpid(child, 0)[1] == 0


def test_a_socket_in_use_is_not_taken_over(path: Path, controller: FakeController) -> None:
    with serving(path, controller):
        with pytest.raises(TransportError, match="another server is listening there"), serving(path, controller):
            pass
        with contextlib.closing(VfioUserTransport(path)) as transport:
            assert transport.read_register(8, 4) == 0x00020000


def test_sockets_that_cannot_be_made_are_said(tmp_path: Path, controller: FakeController) -> None:
    (tmp_path / "file").write_text("precious")
    for where, what in [("file", "something else"), ("no/s", "no such directory"), ("x" * 200, "107 bytes")]:
        with pytest.raises(TransportError, match=what), serving(tmp_path / where, controller):
            pass
    assert (tmp_path / "file").read_text() == "precious"
