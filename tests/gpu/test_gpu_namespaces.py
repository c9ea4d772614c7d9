"""Blocks of a namespace into a GPU's memory and back: through page-locked memory, ordered with the caller's stream."""

import numpy as np
import pytest

import gpunvme
from files import contents
from gpunvme import nvme

pytestmark = pytest.mark.gpu

SIZE = 16 << 20


@pytest.fixture(scope="module")
def written():
    with nvme.open(f"soft:ram?size={SIZE}&threads=2") as controller:
        namespace = controller.namespace()
        data = contents(SIZE)
        namespace.write_from(data)
        yield namespace, data


@pytest.mark.parametrize(("lba", "blocks"), [(0, SIZE // 512), (3, 1), (17, 4001)])
def test_blocks_reach_the_gpu(written, lba, blocks):
    namespace, data = written
    buffer = namespace.read(lba, blocks, "cuda:0")
    assert buffer.device == "cuda:0"
    assert buffer.numpy().tobytes() == data[lba * 512 : (lba + blocks) * 512]


def test_the_report_says_how(written):
    namespace, _ = written
    buffer = gpunvme.Buffer.empty(SIZE, "cuda:0")
    done = namespace.read_into(buffer)
    assert (done.path, done.bounced_bytes) == ("nvme", SIZE)
    assert "through page-locked memory" in done.reason


def test_a_gather_reaches_the_gpu_in_order(written):
    namespace, data = written
    lbas = np.random.default_rng(1).integers(0, namespace.blocks - 8, 3000)
    rows = namespace.gather(lbas, 8, device="cuda:0").numpy()
    assert [row.tobytes() for row in rows] == [data[lba * 512 : (lba + 8) * 512] for lba in lbas]


def test_pieces_of_gpu_memory_are_filled(written):
    namespace, data = written
    pieces = [gpunvme.Buffer.empty(size, "cuda:0") for size in (1, 4095, 70000, 5264)]
    namespace.read_pieces(pieces, 9)
    found = b"".join(piece.numpy().tobytes() for piece in pieces)
    assert found == data[9 * 512 : 9 * 512 + len(found)]


def test_gpu_memory_is_written_to_blocks():
    with nvme.open("soft:ram?size=2MiB") as controller:
        namespace = controller.namespace()
        data = contents(1 << 20, 7)
        with nvme.open("soft:ram?size=1MiB") as other:
            source = other.namespace()
            source.write_from(data)
            on_gpu = source.read(device="cuda:0")
        namespace.write_from(on_gpu, 100)
        assert namespace.read(100, 2048).numpy().tobytes() == data


def test_bytes_of_a_namespace_reach_the_gpu_as_a_file(written):
    namespace, data = written
    with gpunvme.open(namespace) as file:
        assert file.read(1001, 70001, "cuda:0").numpy().tobytes() == data[1001 : 1001 + 70001]


def test_lost_completions_do_not_lose_bytes_on_the_gpu(written):
    namespace, data = written
    controller = namespace.controller
    controller.timeout = 0.3
    controller.transport.controller.inject("drop@0.02", 3)
    try:
        buffer = namespace.read(device="cuda:0")
    finally:
        controller.transport.controller.inject("", 0)
        controller.timeout = 10
    assert buffer.numpy().tobytes() == data


@pytest.mark.torch
def test_a_read_comes_after_the_streams_work(written):
    torch = pytest.importorskip("torch")
    namespace, data = written
    stream = torch.cuda.Stream()
    destination = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        destination.fill_(7)  # were the read not behind this, its bytes would be lost
        namespace.read_into(destination)
    assert destination.cpu().numpy().tobytes() == data[: 1 << 20]
