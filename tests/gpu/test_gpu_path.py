"""Files on namespaces carried by kernels on a real GPU: the gpu-nvme path, and the demo that shows it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import gpunvme
from files import contents
from gpunvme import nvme
from gpunvme.cli import main
from gpunvme.cli.exits import Exit
from gpunvme.memory import Buffer

pytestmark = pytest.mark.gpu

SIZE = 16 << 20
GPU = "cuda:0"


@pytest.fixture(scope="module", params=["lba=512", "lba=4096&mdts=3"])
def written(request: pytest.FixtureRequest) -> Iterator[tuple[nvme.Namespace, bytes]]:
    with nvme.open(f"soft:ram?size={SIZE}&threads=2&queues=12&{request.param}", queues=2) as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        yield namespace, data


def test_any_range_and_row_is_carried_by_kernels(written: tuple[nvme.Namespace, bytes]) -> None:
    namespace, data = written
    with gpunvme.open(namespace, path="gpu-nvme") as file:
        for offset, nbytes in ((0, SIZE), (1, SIZE - 1), (4095, 2), (12_345, 5_000_001), (SIZE - 1, 1), (9, 0)):
            assert file.read(offset, nbytes, GPU).numpy().tobytes() == data[offset : offset + nbytes]
            assert file.last_transfer is not None
            assert file.last_transfer.path == "gpu-nvme"
        for nbytes, step in ((4096, 4096), (700, 1), (100_000, 3)):
            offsets = (
                np.random.default_rng(1).integers(0, (SIZE - nbytes) // step + 1, 3000 if nbytes < 5000 else 99) * step
            )
            rows = file.gather(offsets, nbytes, device=GPU).numpy()
            assert [row.tobytes() for row in rows] == [data[at : at + nbytes] for at in offsets]
        parts = [(file, 7 + 5001 * at, Buffer.empty(5001, GPU)) for at in range(500)]
        assert gpunvme.read_many(parts).path == "gpu-nvme"
        assert b"".join(buffer.numpy().tobytes() for _, _, buffer in parts) == data[7 : 7 + 500 * 5001]


def test_what_is_written_is_read() -> None:
    with nvme.open("soft:ram?size=8MiB&queues=12", queues=2) as controller:
        with gpunvme.open(controller.namespace(), "r+", path="gpu-nvme") as file:
            data = contents(4 << 20, 5)
            with nvme.open("soft:ram?size=4MiB") as other:
                other.namespace().write_from(data)
                on_gpu = other.namespace().read(device=GPU)
            assert file.write_from(on_gpu, 1 << 20, fsync=True).path == "gpu-nvme"
        assert controller.namespace().read(2048, 8192).numpy().tobytes() == data


@pytest.mark.parametrize("wait", [True, False])
def test_lost_completions_do_not_lose_bytes(wait: bool) -> None:
    with nvme.open(f"soft:ram?size={SIZE}&queues=12", queues=2, timeout=0.3) as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        with gpunvme.open(namespace, path="gpu-nvme") as file:
            file.read(0, 512, GPU)
            controller.transport.controller.inject("drop@0.02", 3)
            buffer = Buffer.empty(SIZE - 5, GPU)
            file.read_into(buffer, 3, wait=wait).wait(60)
            assert buffer.numpy().tobytes() == data[3:-2]


@pytest.mark.torch
def test_a_read_comes_after_the_streams_work(written: tuple[nvme.Namespace, bytes]) -> None:
    torch = pytest.importorskip("torch")
    namespace, data = written
    stream = torch.cuda.Stream()
    destination = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with gpunvme.open(namespace, path="gpu-nvme") as file:
        file.read(0, 512, GPU)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            destination.fill_(7)  # were the read not behind this, its bytes would be lost
            file.read_into(destination)
        assert destination.cpu().numpy().tobytes() == data[: 1 << 20]


def test_the_demo_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--gpu"]) == Exit.OK
    assert "bit by bit" in capsys.readouterr().out
