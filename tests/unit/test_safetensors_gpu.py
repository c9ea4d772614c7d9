"""On a GPU, a model has to fit once, not twice, and to be right on whichever stream it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import safetensors_cases as cases
from gpunvme.errors import FormatError
from gpunvme.models import load_file, patch_safetensors, safe_open, safetensors, save_file

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

MIB = 1 << 20


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    module.cuda.init()
    module.cuda.empty_cache()
    module.cuda.reset_peak_memory_stats()
    return module


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    tensors = {f"layer.{number}.weight": generator.standard_normal((1024, 1111), np.float32) for number in range(60)}
    tensors |= {f"layer.{number}.bias": generator.standard_normal(1111, np.float32) for number in range(60)}
    tensors |= {"ids": np.arange(1000), "scalar": np.float32([2.5]).reshape(()), "empty": np.zeros((0, 3), np.float32)}
    tensors["embedding"] = generator.standard_normal((50_000, 512), np.float32)
    for number in range(2):
        part = {name: array for at, (name, array) in enumerate(tensors.items()) if at % 2 == number}
        save_file(part, tmp_path / f"model-{number + 1:05}-of-00002.safetensors")
    return {"path": tmp_path, "arrays": tensors, "bytes": sum(array.nbytes for array in tensors.values())}


def test_a_sharded_model_arrives_once(torch: Any, model: dict[str, Any]) -> None:
    before = torch.cuda.memory_allocated()
    seen: list[Any] = []
    found = load_file(model["path"], "cuda", report=seen.append)
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * model["bytes"]
    assert len(seen) == 1
    assert seen[0].nbytes == model["bytes"]
    assert found.keys() == model["arrays"].keys()
    for name, tensor in found.items():
        assert tensor.is_cuda
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        np.testing.assert_array_equal(tensor.cpu().numpy(), model["arrays"][name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_conversion_needs_little_beside_the_model(torch: Any, model: dict[str, Any], dtype: str) -> None:
    before = torch.cuda.memory_allocated()
    found = load_file(model["path"], "cuda", dtype=dtype)
    size = sum(tensor.nbytes for tensor in found.values())
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * size + 2 * safetensors._STAGE_MAX
    for name, tensor in found.items():
        expected = torch.from_numpy(np.ascontiguousarray(model["arrays"][name])).reshape(tensor.shape)
        expected = expected.to(getattr(torch, dtype)) if expected.is_floating_point() else expected
        assert torch.equal(tensor.cpu(), expected)


def test_memory_that_kernels_still_use_is_not_written_into_too_early(torch: Any, model: dict[str, Any]) -> None:
    # The allocator hands out memory that was freed in stream order: a kernel may not be done with it yet.
    want = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in model["arrays"].items()}
    for dtype in (None, torch.bfloat16):
        held = [torch.full((1024, 1111), 7.0, device="cuda") for _ in range(60)]
        torch.cuda._sleep(500_000_000)
        total = torch.stack([tensor.sum() for tensor in held])
        del held
        found = load_file(model["path"], "cuda", dtype=dtype)
        assert (total == 7.0 * 1024 * 1111).all() or torch.allclose(total, torch.full_like(total, 7.0 * 1024 * 1111))
        for name, tensor in found.items():
            expected = want[name].reshape(tensor.shape)
            assert torch.equal(tensor, expected.to(tensor.dtype))


def test_another_stream_may_be_current(torch: Any, model: dict[str, Any]) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = load_file(model["path"], "cuda:0", dtype="bfloat16")
        sums = {name: tensor.double().sum() for name, tensor in found.items()}
    stream.synchronize()
    for name, total in sums.items():
        array = torch.from_numpy(np.ascontiguousarray(model["arrays"][name])).reshape(found[name].shape)
        expected = (array.bfloat16() if array.is_floating_point() else array).double().sum()
        torch.testing.assert_close(total.cpu(), expected)


def test_slices_and_tensors_one_at_a_time(torch: Any, model: dict[str, Any]) -> None:
    for path in sorted(model["path"].iterdir()):
        with safe_open(path, "pt", "cuda:0") as file:
            for name in file:
                array = model["arrays"][name]
                assert np.array_equal(file.get_tensor(name).cpu().numpy(), array)
                if array.ndim == 2 and array.size:
                    for index in (slice(5, 9), (slice(None), slice(3, 40)), (..., 0), (slice(None, None, 7), 1)):
                        part = file.get_slice(name)[index]
                        assert part.is_cuda
                        assert np.array_equal(part.cpu().numpy(), array[index])


def test_small_floats_and_packed_types(torch: Any, tmp_path: Path) -> None:
    header: dict[str, Any] = {}
    begin = 0
    for dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "BOOL", "C64", "U16", "F4"):
        if dtype == "F4" and not hasattr(torch, "float4_e2m1fn_x2"):
            continue
        header[dtype] = cases.tensor(dtype, (33, 62), begin)
        begin = header[dtype]["data_offsets"][1]
    body = bytes(number % 2 for number in range(begin))
    path = tmp_path / "model.safetensors"
    path.write_bytes(cases.pack(json.dumps(header), body))
    for name, tensor in load_file(path, "cuda").items():
        first, last = header[name]["data_offsets"]
        assert bytes(tensor.reshape(-1).view(torch.uint8).cpu().numpy()) == body[first:last]
    on_host = load_file(path, "cpu", dtype="bfloat16")
    for name, tensor in load_file(path, "cuda", dtype="bfloat16").items():
        assert torch.equal(tensor.cpu().view(torch.uint8), on_host[name].view(torch.uint8))


def test_tensors_that_are_allocations_of_their_own(torch: Any, tmp_path: Path) -> None:
    # torch takes tensors of this size from the driver one by one, at addresses that often adjoin: neighbours in the
    # file and in memory, and yet nothing may be copied across the border between them.
    arrays = {f"t{number}": np.full((32 * MIB,), number, np.uint8) for number in range(24)}
    save_file(arrays, tmp_path / "model.safetensors")
    for _ in range(3):
        found = load_file(tmp_path / "model.safetensors", "cuda")
        for name, tensor in found.items():
            assert bool((tensor == int(name[1:])).all())
        del found, tensor
        torch.cuda.empty_cache()


def test_saving_from_the_gpu(torch: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors = {f"t{size}": torch.rand(size, device="cuda") for size in (0, 1, 3, 1000, MIB + 1, 5 * MIB)}
    tensors["host"] = torch.rand(77)
    save_file(tensors, tmp_path / "ours")
    library.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_patched_library_loads_to_the_gpu(torch: Any, model: dict[str, Any]) -> None:
    library = pytest.importorskip("safetensors.torch")
    path = min(model["path"].iterdir())
    expected = library.load_file(path, device="cuda:0")
    with patch_safetensors():
        for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0)):
            found = library.load_file(path, device=device)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        path.write_bytes(b"\xff" * 9)
        with pytest.raises(FormatError):
            library.load_file(path, device="cuda")
