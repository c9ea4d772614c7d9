"""safe_open reads what is asked for and gives what the safetensors library gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme import file as files
from gpunvme import many as movements
from gpunvme.errors import FileError, FormatError, SpanError
from gpunvme.models import safe_open, save_file, slicing

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(60, dtype=np.int16).reshape(3, 4, 5),
    "s": np.array(3.5),
    "z": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(ARRAYS, tmp_path / "model.safetensors", {"format": "np"})
    return tmp_path / "model.safetensors"


def test_what_the_file_says_of_itself(path: Path) -> None:
    library = pytest.importorskip("safetensors")
    with safe_open(path, "np") as ours, library.safe_open(path, "np") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.metadata() == theirs.metadata()
        assert ours.offset_keys() == theirs.offset_keys()
        for name in theirs.keys():  # noqa: SIM118 - the library's has no __iter__
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
            expected, found = theirs.get_tensor(name), ours.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(found, expected)
        assert list(ours) == ours.keys()
        assert len(ours) == 4
        assert "a" in ours
        assert "q" not in ours
        for name, array in ours.get_tensors().items():
            np.testing.assert_array_equal(array, ARRAYS[name])


@pytest.mark.torch
def test_the_librarys_documented_examples(path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {}
    with safe_open(path, framework="pt", device="cpu") as f:
        for k in f.keys():  # noqa: SIM118
            tensors[k] = f.get_tensor(k)
    assert torch.equal(tensors["a"], torch.arange(24.0).reshape(4, 6))
    with safe_open(path, framework="pt", device="cpu") as f:
        tensor_slice = f.get_slice("a")
        _, hidden_dim = tensor_slice.get_shape()
        tensor = tensor_slice[:, : hidden_dim // 2]
    assert torch.equal(tensor, tensors["a"][:, :3])


def test_only_the_header_is_read_to_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.File, "read_into", None)
    monkeypatch.setattr(movements, "read_many", None)
    with safe_open(path, "np") as file:
        assert file.get_slice("a").get_shape() == [4, 6]


def test_what_is_not_there(path: Path) -> None:
    with safe_open(path, "np") as file:
        for ask in (file.get_tensor, file.get_slice):
            with pytest.raises(FormatError, match="does not contain") as caught:
                ask("lm_head")
            assert (caught.value.tensor, caught.value.filename) == ("lm_head", str(path))
    with pytest.raises(FileError):
        safe_open(path.parent / "none", "np")
    with pytest.raises(SpanError):
        safe_open(path, "np", "cuda")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(FormatError):
        safe_open(path, "np")


def test_closed_means_closed_but_slices_live_on(path: Path) -> None:
    with safe_open(path, "np") as file:
        part = file.get_slice("a")
    for ask in (file.keys, file.metadata, file.get_tensors, lambda: file.get_tensor("a"), lambda: "a" in file):
        with pytest.raises(FormatError, match="closed"):
            ask()
    np.testing.assert_array_equal(part[1], ARRAYS["a"][1])


def basic_index(dimensions: int) -> st.SearchStrategy[Any]:
    bound = st.none() | st.integers(-9, 9)
    item = st.integers(-7, 7) | st.builds(slice, bound, bound, st.none() | st.integers(-1, 4))
    extra = st.sampled_from([..., None])
    return st.lists(item | extra, max_size=dimensions + 2).map(tuple) | item | extra


def outcome(tensor: Any, index: Any) -> Any:
    try:
        return tensor[index]
    except (IndexError, ValueError) as error:
        return type(error)


@pytest.mark.torch
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    index=basic_index(4),
    dtype=st.sampled_from(["uint8", "int16", "bfloat16", "float64"]),
    gap=st.sampled_from([0, 10, 32 << 10]),
    piece=st.sampled_from([1, 64, 32 << 20]),
)
def test_a_slice_is_what_the_library_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], index: Any, dtype: str, gap: int, piece: int
) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("slice") / "model.safetensors"
    elements = torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, dtype))
    save_file({"a": elements, "pad": torch.zeros(3, dtype=torch.uint8)}, path)
    with (
        pytest.MonkeyPatch.context() as patched,
        safe_open(path, "pt") as ours,
        library.safe_open(path, "pt") as theirs,
    ):
        # Small limits, so that small tensors take every way of reading.
        patched.setattr(slicing, "_GAP", gap)
        patched.setattr(slicing, "_PIECE", piece)
        expected, found = outcome(theirs.get_slice("a"), index), outcome(ours.get_slice("a"), index)
    if isinstance(expected, type):
        assert found in (IndexError, ValueError)  # of an index with two faults, either may be found first
    else:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
        # Of two ellipses torch makes something of its own.
        assert found.is_contiguous() or (isinstance(index, tuple) and index.count(...) > 1)


@given(index=basic_index(3))
def test_a_slice_of_numpy_is_numpys(tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    path = tmp_path_factory.mktemp("slice") / "model.safetensors"
    save_file(ARRAYS, path)
    with safe_open(path, "np") as file:
        found = outcome(file.get_slice("b"), index)
    steps = [item.step for item in (index if isinstance(index, tuple) else (index,)) if isinstance(item, slice)]
    if any(step is not None and step <= 0 for step in steps):
        assert found in (ValueError, IndexError)
        return
    expected = outcome(ARRAYS["b"], index)
    if isinstance(expected, type):
        assert found is expected
    else:
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.torch
@pytest.mark.parametrize("index", [[0, 2], [], ([1], [0]), (slice(None), [1, 3]), True, np.array([1, 0])])
def test_other_indices_are_the_frameworks_own(path: Path, index: Any) -> None:
    torch = pytest.importorskip("torch")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_slice("a")[index], torch.from_numpy(ARRAYS["a"])[index])
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_slice("a")[index], ARRAYS["a"][index])


def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record (offset, bytes) of everything that is read."""
    seen: list[tuple[int, int]] = []
    one, many = files.File.read_into, movements.read_many

    def read_into(self: Any, destination: Any, offset: int = 0, *args: Any, **options: Any) -> Any:
        seen.append((offset, destination.nbytes))
        return one(self, destination, offset, *args, **options)

    def read_many(parts: Any, **options: Any) -> Any:
        parts = list(parts)
        seen.extend((offset, destination.nbytes) for _, offset, destination in parts)
        return many(parts, **options)

    monkeypatch.setattr(files.File, "read_into", read_into)
    monkeypatch.setattr(movements, "read_many", read_many)
    return seen


def test_a_slice_reads_little_more_than_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model that is split over machines reads its share, not the whole of it.
    path = tmp_path / "model.safetensors"
    array = np.arange(1024 * 4096, dtype=np.int32).reshape(1024, 4096)
    save_file({"a": array, "cube": array.reshape(64, 16, 4096)}, path)
    seen = reads(monkeypatch)
    with safe_open(path, "np") as file:
        for name, index, most in (
            ("a", slice(128, 256), 1),  # rows: one read
            ("a", (slice(None, None, 512), slice(None)), 1),  # a row here and there
            ("a", 7, 1),
            ("a", (7, slice(10, 20)), 1),
            ("a", (slice(None), slice(0, 2048)), 2),  # half of each row: all of it, in pieces
            ("a", (slice(100, 200), slice(0, 16)), 4096 // 16),
            ("cube", (slice(0, 64, 32), slice(4, 8)), 1),
            ("cube", (slice(None), 3), 1),
        ):
            seen.clear()
            whole = array if name == "a" else array.reshape(64, 16, 4096)
            found = file.get_slice(name)[index]
            np.testing.assert_array_equal(found, whole[index])
            assert sum(nbytes for _, nbytes in seen) <= most * found.nbytes
            assert max(nbytes for _, nbytes in seen) <= max(32 << 20, found.nbytes)


@pytest.mark.torch
def test_packed_types_are_read_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)}, path)
    with safe_open(path, "pt") as file:
        part = file.get_slice("a")
        assert part.get_shape() == [2, 6]
        for index in (..., slice(None), (slice(None), slice(0, 6))):
            assert torch.equal(part[index].view(torch.uint8).reshape(-1), torch.arange(6, dtype=torch.uint8))
        with pytest.raises(FormatError, match="as a whole"):
            part[0]
