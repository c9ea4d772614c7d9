"""Checkpoints on a real GPU: the values of the safetensors library, in no more memory than the model needs."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import pytest

import files
import gpunvme
from files import MIB

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module", autouse=True)
def _torch_sees_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")


def tensors(seed: int, layers: int, width: int) -> dict[str, Any]:
    """A small model: matrices, vectors, scalars, empty ones, several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for layer in range(layers):
        name = f"shard{seed}.layers.{layer}"
        found[f"{name}.weight"] = torch.randn(width, width, generator=generator).to(torch.bfloat16)
        found[f"{name}.norm"] = torch.randn(width, generator=generator)
        found[f"{name}.half"] = torch.randn(width, 3, generator=generator).to(torch.float16)
        found[f"{name}.scale"] = torch.randn((), generator=generator)
        found[f"{name}.ids"] = torch.randint(0, 1000, (width,), generator=generator)
        found[f"{name}.mask"] = torch.rand(width + 1, generator=generator) > 0.5
        found[f"{name}.empty"] = torch.empty(0, 4)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards and their index, about 40 MB."""
    directory = tmp_path_factory.mktemp("checkpoint")
    weight_map: dict[str, str] = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        shard = tensors(number, 3, 1500)
        library.save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        # Copies: the library's tensors map the file, whose pages could then not leave the cache.
        found |= {name: tensor.clone() for name, tensor in library.load_file(shard).items()}
    gc.collect()
    return found


def cool_some(checkpoint: Path) -> None:
    """The first shard is cold, the second hot, the third half, where files can leave memory."""
    if files.stays_in_memory(checkpoint):
        return
    for shard, heat in zip(sorted(checkpoint.glob("*.safetensors")), ["cold", "hot", "half"], strict=True):
        files.heat(shard, heat)


def assert_same(found: dict[str, Any], expected: dict[str, Any], device: str = "cuda:0") -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert str(tensor.device) == device
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_a_checkpoint_of_several_shards(checkpoint: Path, expected: dict[str, Any], device: Any) -> None:
    cool_some(checkpoint)
    reports: list[gpunvme.Transfer] = []
    assert_same(gpunvme.load_file(checkpoint, device, report=reports.append), expected)
    assert sum(report.nbytes for report in reports) == sum(tensor.nbytes for tensor in expected.values())
    assert all("page-locked" in report.reason for report in reports)


def test_one_shard(checkpoint: Path, expected: dict[str, Any]) -> None:
    shard = min(checkpoint.glob("*.safetensors"))
    found = gpunvme.load_file(shard, torch.device("cuda", 0))
    assert_same(found, {name: expected[name] for name in found})
    assert len(found) == 21


def test_a_second_gpu(checkpoint: Path, expected: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    assert_same(gpunvme.load_file(checkpoint, "cuda:1"), expected, "cuda:1")


def test_memory_of_the_gpu_holds_the_model_once(tmp_path: Path) -> None:
    """Large models fit a GPU by a few per cent, or not at all."""
    shard = {f"layer.{number}": torch.randn(4096, 1024).to(torch.bfloat16) for number in range(64)}  # 512 MiB
    library.save_file(shard, tmp_path / "model.safetensors")
    nbytes = sum(tensor.nbytes for tensor in shard.values())
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = gpunvme.load_file(tmp_path / "model.safetensors", "cuda")
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * nbytes
    assert torch.cuda.memory_allocated() - before <= 1.05 * nbytes
    # Every tensor owns its memory: half of them let go is half of it back.
    for name in list(found)[::2]:
        del found[name]
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 0.55 * nbytes
    assert all(torch.equal(tensor.cpu(), shard[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "float16"])
def test_another_dtype(checkpoint: Path, expected: dict[str, Any], dtype: Any) -> None:
    """Rounded as torch rounds on that device; what is no number of that kind stays as it is."""
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    cool_some(checkpoint)
    found = gpunvme.load_file(checkpoint, "cuda", dtype=dtype)
    converted = {
        name: (tensor.cuda().to(target).cpu() if tensor.is_floating_point() else tensor)
        for name, tensor in expected.items()
    }
    assert_same(found, converted)


def test_another_dtype_takes_little_memory(tmp_path: Path) -> None:
    shard = {f"layer.{number}": torch.randn(4096, 1024) for number in range(32)}  # 512 MiB, 256 MiB as bfloat16
    library.save_file(shard, tmp_path / "model.safetensors")
    nbytes = sum(tensor.nbytes for tensor in shard.values()) // 2
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gpunvme.load_file(tmp_path / "model.safetensors", "cuda", dtype=torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * nbytes + 128 * MIB


def test_some_of_the_tensors(checkpoint: Path, expected: dict[str, Any]) -> None:
    names = [name for name in expected if name.endswith("norm")]
    assert_same(gpunvme.load_file(checkpoint, "cuda", keys=names), {name: expected[name] for name in names})
    found = gpunvme.load_file(checkpoint, "cuda", filter=lambda name: name.startswith("shard1."))
    assert_same(found, {name: tensor for name, tensor in expected.items() if name.startswith("shard1.")})


def test_opened_for_single_tensors_and_slices(checkpoint: Path, expected: dict[str, Any]) -> None:
    with gpunvme.safe_open(min(checkpoint.glob("*.safetensors")), "pt", "cuda") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is a method of the library's
            assert torch.equal(opened.get_tensor(name).cpu(), expected[name])
        part = opened.get_slice("shard0.layers.1.weight")[100:200, 7:9]
        assert part.device.type == "cuda"
        assert torch.equal(part.cpu(), expected["shard0.layers.1.weight"][100:200, 7:9])


def test_the_library_itself_patched(checkpoint: Path, expected: dict[str, Any]) -> None:
    import safetensors

    shard = min(checkpoint.glob("*.safetensors"))
    original = library.load_file
    with gpunvme.patch_safetensors():
        assert library.load_file is not original
        found = library.load_file(shard, device="cuda:0")
        with safetensors.safe_open(shard, framework="pt", device="cuda:0") as opened:
            name = "shard0.layers.0.weight"
            assert torch.equal(opened.get_tensor(name), found[name])
            assert opened.get_tensor(name).device.type == "cuda"
    assert library.load_file is original
    assert_same(found, {name: expected[name] for name in found})


def test_saved_from_the_gpu(tmp_path: Path) -> None:
    shard = {name: tensor.cuda() for name, tensor in tensors(9, 2, 1100).items()}
    gpunvme.save_file(shard, tmp_path / "ours", metadata={"format": "pt"})
    library.save_file(shard, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_same(gpunvme.load_file([tmp_path / "ours"], "cuda"), {name: tensor.cpu() for name, tensor in shard.items()})


def test_a_model_takes_what_was_loaded(tmp_path: Path) -> None:
    """Assigned rather than copied, and used by kernels at once."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    library.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    empty.load_state_dict(gpunvme.load_file(tmp_path / "model.safetensors", "cuda"), assign=True)
    batch = torch.randn(5, 300)
    torch.testing.assert_close(empty(batch.cuda()).cpu(), model(batch), rtol=1e-3, atol=1e-3)
