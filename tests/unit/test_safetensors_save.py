"""save_file writes the library's bytes, and never leaves half a file where a whole one was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpunvme import many as movements
from gpunvme.errors import FileError, FormatError, SpanError
from gpunvme.models import load_file, save_file, saving

DTYPES = ["bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "c8", "f8", "i8", "u8", ">f4", ">i8"]


def arrays() -> st.SearchStrategy[dict[str, Any]]:
    array = st.builds(
        lambda dtype, shape: np.arange(int(np.prod(shape))).reshape(shape).astype(dtype),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 5), max_size=3),
    )
    names = st.text(st.characters(codec="utf-8")).filter(lambda name: name != "__metadata__")
    return st.dictionaries(names, array, max_size=6)


@given(arrays(), st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(), max_size=1))
def test_the_file_is_the_librarys_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    library = pytest.importorskip("safetensors.numpy")
    assume(tensors or metadata != {})  # of which the library makes '{}"__metadata__":{}}', which it cannot read
    directory = tmp_path_factory.mktemp("save")
    save_file(tensors, directory / "ours", metadata)
    library.save_file(tensors, directory / "theirs", metadata)
    assert (directory / "ours").read_bytes() == (directory / "theirs").read_bytes()


@pytest.mark.torch
def test_torch_tensors_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    names = "bool uint8 int8 int16 float16 bfloat16 int32 float32 float64 int64 complex64 float8_e4m3fn float8_e5m2"
    tensors = {f"z.{name}": torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names.split()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "large": torch.rand(1 << 20)}
    tensors["parameter"] = torch.nn.Parameter(torch.rand(3))
    save_file(tensors, tmp_path / "ours", {"format": "pt"})
    library.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    back = load_file(tmp_path / "ours")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.torch
def test_f4_is_written_in_elements(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    tensors = {"a": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)}
    save_file(tensors, tmp_path / "ours")
    library.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.torch
def test_lazy_conjugates_are_saved_as_they_look(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    save_file({"conjugate": tensor.conj(), "negative": tensor.conj().imag.contiguous()}, tmp_path / "file")
    back = load_file(tmp_path / "file")
    assert back["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert back["negative"].tolist() == [-2, 4]


@pytest.mark.torch
def test_torch_tensors_that_would_come_back_as_others_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    for tensors, says in (
        ({"a": base.t()}, "'a' is not contiguous"),
        ({"a": base, "b": base}, "'a' and 'b' share memory"),
        ({"a": base, "b": base[1]}, "share memory"),
        ({"a": base[:2], "b": base[1:3], "c": base[3]}, "'a' and 'b' share memory"),
        ({"a": base.to_sparse()}, "sparse"),
        ({"a": torch.empty(3, device="meta")}, "meta"),
    ):
        with pytest.raises(SpanError, match=says):
            save_file(tensors, tmp_path / "file")
    # Parts of one tensor that do not overlap are saved, as the library does.
    save_file({"a": base[:2], "b": base[2:], "c": base[1:1]}, tmp_path / "file")
    assert load_file(tmp_path / "file")["b"].tolist() == base[2:].tolist()
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("limit", [0, 64 << 20])
def test_arrays_are_saved_as_they_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(saving, "_COPIES", limit)
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    odd = {
        "t": base.T,
        "step": base[::2, ::3],
        "back": base[::-1],
        "f": np.asfortranarray(base),
        "big": base.astype(">i4"),
    }
    odd["frozen"] = base.copy()
    odd["frozen"].setflags(write=False)
    save_file(odd, tmp_path / "file")
    back = load_file(tmp_path / "file", framework="np")
    for name, array in odd.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "says"),
    [
        ({"a": np.zeros(2, np.complex128)}, None, FormatError, "complex128"),
        ({"a": np.array(["x"])}, None, FormatError, "<U1"),
        ({"a": np.array([object()])}, None, FormatError, "object"),
        ({"a": [1, 2]}, None, SpanError, "'a' is neither"),
        ({1: np.zeros(2)}, None, FormatError, "names are strings"),
        ({"__metadata__": np.zeros(2)}, None, FormatError, "__metadata__"),
        ({"\ud800": np.zeros(2)}, None, FormatError, "Unicode"),
        ({}, {"a": 1}, FormatError, "not text"),
        ({}, {1: "a"}, FormatError, "not text"),
        ({}, {"a": "\udfff"}, FormatError, "Unicode"),
        ({}, {"a": "x" * 100_000_001}, FormatError, "limit"),
    ],
)
def test_what_the_format_cannot_hold(
    tmp_path: Path, tensors: Any, metadata: Any, error: type[Exception], says: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error, match=says):
        save_file(tensors, path, metadata)
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_metadata_is_kept_in_order(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors")
    metadata = {"z": "1", "a": '"\\\n\x01\u00e9', "": ""}
    save_file({}, tmp_path / "file", metadata)
    with library.safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == metadata
    assert list(load_file(tmp_path / "file", framework="np")) == []


def test_an_error_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(3)}, path)
    old = path.read_bytes()

    def full(parts: Any) -> Any:
        raise FileError(28, "No space left on device", str(path))

    monkeypatch.setattr(movements, "write_parts", full)
    with pytest.raises(FileError, match="No space"):
        save_file({"a": np.zeros(1 << 20)}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(FileError):
        save_file({"a": np.zeros(3)}, tmp_path / "none" / "file")


def test_arrays_of_a_file_that_is_replaced_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(1 << 20)}, path)
    array = load_file(path, framework="np")["a"]
    save_file({"a": array[::-1]}, path)
    np.testing.assert_array_equal(array, np.arange(1 << 20))
    np.testing.assert_array_equal(load_file(path, framework="np")["a"], array[::-1])


def test_many_and_large_arrays(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sizes = [*range(200), 1_000_003, 3_000_001, *range(4090, 4100), 5_000_000]
    tensors = {str(number): generator.integers(0, 256, size, np.uint8) for number, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "file")
    back = load_file(tmp_path / "file", framework="np")
    assert all(np.array_equal(back[name], array) for name, array in tensors.items())
