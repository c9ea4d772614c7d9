"""PyTorch on a real GPU: operators on streams, state dicts straight from and to GPU memory, tables of features."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

import files
import gpunvme
from files import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
torch = pytest.importorskip("torch")
ours = pytest.importorskip("gpunvme.torch")

SIZE = 64 * MIB


@pytest.fixture(scope="module", autouse=True)
def _torch_sees_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")


def busy(stream: Any) -> None:
    """Queue some work, so that what is not ordered behind it comes too early."""
    with torch.cuda.stream(stream):
        large = torch.ones(4000, 4000, device="cuda")
        for _ in range(20):
            large = large @ large / 4000


def test_operators_are_ordered_behind_the_current_stream(place: Path, data: bytes, tmp_path: Path) -> None:
    expected = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    stream = torch.cuda.Stream()
    with gpunvme.open(place) as file, torch.cuda.stream(stream):
        tensor = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
        busy(stream)
        tensor.fill_(7)
        ours.read_into_tensor(tensor, file)
        assert torch.equal(tensor.cpu(), expected)
        busy(stream)
        tensor.add_(1)
        with gpunvme.open(tmp_path / "new", "w") as target:
            ours.write_from_tensor(tensor, target, fsync=True)
        tensor.zero_()
    written = torch.frombuffer(bytearray((tmp_path / "new").read_bytes()), dtype=torch.uint8)
    assert torch.equal(written, expected + 1)


@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_compiled(place: Path, data: bytes, tmp_path: Path) -> None:
    file = gpunvme.open(place)
    files.make(tmp_path / "target", 400)
    target = gpunvme.open(tmp_path / "target", "r+")
    for source in (file, target):
        ours.register(source)

    def step(offset: int) -> Any:
        tensor = torch.empty(100, dtype=torch.int32, device="cuda")
        ours.read_into_tensor(tensor, file, offset)
        doubled = tensor * 2
        ours.write_from_tensor(doubled, target)
        doubled.add_(1)
        return doubled

    doubled = torch.compile(step, backend="aot_eager", fullgraph=True)(8)
    expected = torch.frombuffer(bytearray(data[8:408]), dtype=torch.int32) * 2
    assert torch.equal(doubled.cpu(), expected + 1)
    assert (tmp_path / "target").read_bytes() == expected.numpy().tobytes()
    torch.library.opcheck(
        torch.ops.gpunvme.read_into_tensor, (torch.zeros(10, device="cuda"), ours.register(file), 8, False)
    )
    file.close()
    target.close()


def state() -> dict[str, Any]:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(2000, 2000) for _ in range(4)]
    model = torch.nn.Sequential(*layers).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 2000, device="cuda", dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    base = torch.randn(1000, 1000, device="cuda")
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "base": base,
        "view": base[3:7].t(),
        "cpu": torch.arange(1000),
        "empty": torch.empty(0, 3, device="cuda"),
        "step": 7,
    }


def same(one: Any, other: Any, device: bool = True) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert not device or one.device == other.device
        assert torch.equal(one.cpu(), other.cpu())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key], device)
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            same(left, right, device)
    else:
        assert one == other


def test_state_dicts_both_ways(tmp_path: Path) -> None:
    saved = state()
    ours.save(saved, tmp_path / "ours", crc32=True)
    torch.save(saved, tmp_path / "theirs")
    with zipfile.ZipFile(tmp_path / "ours") as archive:
        assert archive.testzip() is None
    same(torch.load(tmp_path / "ours", weights_only=True), saved)
    same(ours.load(tmp_path / "ours"), saved)
    same(ours.load(tmp_path / "theirs"), saved)
    back = ours.load(tmp_path / "ours", "cpu")
    same(back, saved, device=False)
    assert {tensor.device.type for tensor in back["model"].values()} == {"cpu"}
    same(ours.load(tmp_path / "ours", {"cuda:0": "cpu"}), back)
    assert ours.load(tmp_path / "ours", "cuda")["cpu"].device.type == "cuda"
    loaded = ours.load(tmp_path / "ours")
    assert loaded["view"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()


def test_saving_waits_for_the_work_that_makes_the_tensors(tmp_path: Path) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(10_000_000, device="cuda")
        busy(stream)
        tensor.add_(3)
        ours.save(tensor, tmp_path / "ours", crc32=True)
        tensor.zero_()
    assert bool((torch.load(tmp_path / "ours") == 3).all())
    with zipfile.ZipFile(tmp_path / "ours") as archive:
        assert archive.testzip() is None


def test_no_second_copy_in_gpu_memory(tmp_path: Path) -> None:
    tensor = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours.save({"tensor": tensor}, tmp_path / "ours")
    assert torch.cuda.max_memory_allocated() - before < 16 * MIB
    del tensor
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    back = ours.load(tmp_path / "ours")
    assert torch.cuda.max_memory_allocated() - before < 272 * MIB
    assert bool((back["tensor"] == 1).all())


def test_tables(tmp_path: Path) -> None:
    table = torch.randn(10_000, 64)
    (tmp_path / "table").write_bytes(table.numpy().tobytes())
    features = ours.FeatureTable(tmp_path / "table", 64, device="cuda")
    order = torch.randperm(10_000)
    loader = torch.utils.data.DataLoader(features, 1000, sampler=order.tolist(), collate_fn=features.collate)
    batches = torch.cat(list(loader))
    assert batches.device.type == "cuda"
    assert torch.equal(batches.cpu(), table[order])
    assert torch.equal(features.gather(order.cuda()).cpu(), table[order])


def test_threads_with_streams_of_their_own(place: Path, data: bytes) -> None:
    expected = torch.frombuffer(bytearray(data[: 8 * MIB]), dtype=torch.uint8).cuda()
    wrong: list[object] = []

    def read() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), gpunvme.open(place) as file:
                for _ in range(5):
                    tensor = torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda")
                    ours.read_into_tensor(tensor, file)
                    if not torch.equal(tensor, expected):
                        wrong.append("other bytes")
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
