"""The driver and the software controller with vfio-user between them. If this failed, a controller served by another
process could not be used, or would lose data when a client dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import vfio_user_fakes as fakes
from vfio_user_fakes import PATIENCE, eventually, serving

import gpunvme.nvme
from gpunvme import _native
from gpunvme.errors import NvmeError, TransportError
from gpunvme.nvme.spec import Cqe, Sqe
from gpunvme.nvme.vfio_user import VfioUserTransport

path = pytest.fixture(fakes.make_path)
no_descriptor_stays_open = pytest.fixture(autouse=True)(fakes.no_descriptor_stays_open)

SIZE = 16 << 20
SHAPES = [{}, {"lba": 4096, "mdts": 1, "dstrd": 3}, {"mqes": 4, "queues": 1, "mpsmin": 1, "mpsmax": 2}]


@contextlib.contextmanager
def soft(**options: object) -> Iterator[_native.SoftController]:
    controller = _native.SoftController({"size": SIZE, **options})
    try:
        yield controller
    finally:
        controller.stop()


def noise(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("mmap_doorbells", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"lba": 4096, "mdts": 1, "dstrd": 3}, {"mqes": 4, "queues": 1, "mpsmin": 1, "mpsmax": 2}]
)
def test_what_is_written_is_read(path: Path, mmap_doorbells: bool, options: dict[str, int]) -> None:
    with soft(**options) as controller, serving(path, controller, mmap_doorbells=mmap_doorbells):
        with gpunvme.nvme.open(f"vfio-user:{path}") as opened:
            namespace = opened.namespace(1)
            data, back = noise(3 << 20), np.zeros(3 << 20, np.uint8)
            namespace.write_from(data, lba=8)
            namespace.read_into(back, lba=8)
            assert (back == data).all()
            lbas = np.random.default_rng(2).permutation(500)[:200] + 8
            rows = np.zeros((200, namespace.block_size), np.uint8)
            namespace.gather(lbas, 1, out=rows)
            assert (rows == data.reshape(-1, namespace.block_size)[lbas - 8]).all()
        assert controller.dma_faults() == []


def test_many_clients_come_and_go(path: Path) -> None:
    with soft() as controller, serving(path, controller):
        for number in range(5):
            with gpunvme.nvme.open(f"vfio-user:{path}") as opened:
                back = np.zeros(4096, np.uint8)
                opened.namespace(1).read_into(back, lba=0)
                assert (back == number).all()
                opened.namespace(1).write_from(np.full(4096, number + 1, np.uint8), lba=0)
        assert controller.dma_faults() == []


SERVER = """
import os, sys
from gpunvme import _native
from gpunvme.nvme.vfio_user.server import serve
controller = _native.SoftController({"path": os.fsencode(sys.argv[2])})
serve(sys.argv[1], controller, ready=lambda: print("ready", flush=True))
controller.stop()
print("stopped", flush=True)
"""


@contextlib.contextmanager
def serving_process(path: Path, image: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(path), str(image)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        try:
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image"
    made.touch()
    os.truncate(made, SIZE)
    return made


def test_a_server_process_keeps_what_was_flushed(path: Path, image: Path) -> None:
    data = noise(1 << 20)
    with serving_process(path, image) as child:
        with gpunvme.nvme.open(f"vfio-user:{path}") as opened:
            opened.namespace(1).write_from(data, lba=100)
            opened.namespace(1).flush()
        child.kill()
        child.wait(PATIENCE)
    assert image.read_bytes()[100 * 512 : 100 * 512 + len(data)] == data.tobytes()
    with serving_process(path, image) as child, gpunvme.nvme.open(f"vfio-user:{path}") as opened:
        back = np.zeros_like(data)
        opened.namespace(1).read_into(back, lba=100)
        assert (back == data).all()


CLIENT = """
import sys
import numpy as np
import gpunvme.nvme
namespace = gpunvme.nvme.open("vfio-user:" + sys.argv[1]).namespace(1)
data = np.full(4 << 20, int(sys.argv[2]), np.uint8)
print("writing", flush=True)
while True:
    namespace.write_from(data, lba=0)
"""


def test_clients_that_are_killed_under_load_leave_a_controller_that_works(path: Path) -> None:
    lines: list[str] = []
    with soft(threads=2) as controller, serving(path, controller, report=lines.append):
        for number in range(1, 4):
            child = subprocess.Popen(
                [sys.executable, "-c", CLIENT, str(path), str(number)], stdout=subprocess.PIPE, text=True
            )
            assert child.stdout is not None
            with child, child.stdout:
                assert child.stdout.readline() == "writing\n"
                before = controller.stats()["writes"]
                eventually(lambda before=before: controller.stats()["writes"] > before + 20)
                child.kill()
            eventually(lambda number=number: sum("the client is gone" in line for line in lines) == number)
        with gpunvme.nvme.open(f"vfio-user:{path}") as opened:
            back = np.zeros(4 << 20, np.uint8)
            opened.namespace(1).read_into(back, lba=0)
            assert set(np.unique(back.reshape(-1, 512), axis=0).ravel()) <= {0, 1, 2, 3}
            assert (back.reshape(-1, 512) == back.reshape(-1, 512)[:, :1]).all()  # no block was torn
        assert controller.dma_faults() == []  # memory was taken away only when nobody used it


def test_a_server_that_is_killed_under_load_is_an_error_and_no_hang(path: Path, image: Path) -> None:
    with serving_process(path, image) as child:
        opened = gpunvme.nvme.open(f"vfio-user:{path}", timeout=1.0, admin_timeout=1.0)
        data = noise(4 << 20)
        threading.Timer(0.3, child.kill).start()
        give_up = time.monotonic() + PATIENCE
        with pytest.raises(NvmeError, match="vfio-user"):  # noqa: PT012
            while time.monotonic() < give_up:
                opened.namespace(1).write_from(data, lba=0)
        with contextlib.suppress(TransportError):
            opened.close()


def test_unmapped_memory_is_out_of_reach(path: Path) -> None:
    """A command that names an IOVA which was never shared fails; nothing else happens."""
    with soft() as controller, serving(path, controller), contextlib.closing(VfioUserTransport(path)) as transport:
        memory = transport.allocate(3 * 4096)
        transport.write_register(0x24, 4, 7 << 16 | 7)
        transport.write_register(0x28, 8, memory.iova())
        transport.write_register(0x30, 8, memory.iova(4096))
        transport.write_register(0x14, 4, 0x00460001)
        eventually(lambda: transport.read_register(0x1C, 4) & 1)
        memory.view(0, 64)[:] = Sqe(6, cid=1, prp1=1 << 46, cdw10=1).pack()
        transport.write_register(0x1000, 4, 1)
        eventually(lambda: Cqe.unpack(memory.view(4096, 16)).phase)
        assert Cqe.unpack(memory.view(4096, 16)).status != 0
        assert controller.dma_faults() == [(1 << 46, 4096, True)]
