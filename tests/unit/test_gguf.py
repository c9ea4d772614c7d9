"""GGUF files: what the gguf package wrote is read as it reads it, and what is hostile is refused with its place."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import files
import gguf_cases as cases
import gpunvme
from gpunvme.errors import FormatError
from gpunvme.models import gguf_header
from gpunvme.models.gguf_types import GGUF_TYPES

if TYPE_CHECKING:
    from pathlib import Path

gguf = pytest.importorskip("gguf")
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

PLAIN = ["float16", "float32", "float64", "int8", "int16", "int32", "int64"]


def test_types_are_those_of_the_gguf_package() -> None:
    """A block of another size puts every tensor behind it in the wrong place."""
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: (kind.name, kind.elements, kind.nbytes) for number, kind in GGUF_TYPES.items()} == theirs


values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(min_size=1, max_size=50)  # its writer leaves empty ones out
    | st.lists(st.text(max_size=8), min_size=1, max_size=5)
    | st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5)
    | st.lists(st.booleans(), min_size=1, max_size=5)
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@st.composite
def tensors(draw: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.lists(names, max_size=5, unique=True)):
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        seed = draw(st.integers(0, 1000))
        kind = draw(st.sampled_from([*PLAIN, *gguf.GGML_QUANT_SIZES]))
        if isinstance(kind, str):
            found[name] = np.random.default_rng(seed).integers(-100, 100, shape).astype(kind)
        else:
            nbytes = gguf.GGML_QUANT_SIZES[kind][1]
            shape = (*shape[:-1], shape[-1] * nbytes)
            found[name] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8), kind
    return found


@relaxed
@given(
    pairs=st.dictionaries(names.filter(lambda name: not name.startswith("general.")), values, max_size=5),
    tensors=tensors(),
    version=st.sampled_from([2, 3]),
    alignment=st.sampled_from([None, 8, 64, 4096]),
)
def test_what_the_gguf_package_writes_is_read_as_it_reads_it(
    tmp_path: Path, pairs: dict[str, Any], tensors: dict[str, Any], version: int, alignment: int | None
) -> None:
    path = tmp_path / "file.gguf"
    cases.written(path, pairs, tensors, alignment)
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", version))
    found = gpunvme.GgufFile(path)
    assert (found.version, found.alignment) == (version, alignment or 32)
    for key, value in pairs.items():
        got = found.metadata[key]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value
    assert len(found.metadata) == len(pairs) + (2 if alignment else 1)
    reader = gguf.GGUFReader(path)
    assert list(found.tensors) == [each.name for each in reader.tensors]
    loaded = gpunvme.load_file(path, framework="np", filter=lambda name: found.tensors[name].type.name != "BF16")
    for each in reader.tensors:
        about = found.tensors[each.name]
        assert (about.type.number, about.offset, about.nbytes) == (each.tensor_type, each.data_offset, each.n_bytes)
        assert about.shape == tuple(reversed(each.shape.tolist()))
        if about.type.name == "BF16":
            assert about.stored_shape == about.shape
            continue
        assert loaded[each.name].shape == each.data.shape == about.stored_shape
        assert loaded[each.name].dtype == each.data.dtype
        assert loaded[each.name].tobytes() == each.data.tobytes()


@pytest.mark.torch
def test_as_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(0, 0x4000, 0x100, np.uint16)
    blocks = gguf.quants.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0
    )
    path = tmp_path / "model.gguf"
    cases.written(
        path,
        {},
        {
            "b": (bits.view(np.uint8).reshape(8, 16), gguf.GGMLQuantizationType.BF16),
            "q": (blocks, gguf.GGMLQuantizationType.Q8_0),
        },
    )
    found = gpunvme.load_file(path, dtype="float32")
    assert torch.equal(found["b"], torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().reshape(8, 8))
    assert found["q"].dtype == torch.uint8
    assert torch.equal(found["q"], torch.from_numpy(blocks))


def test_by_its_content_in_a_directory_and_in_parts(tmp_path: Path) -> None:
    first, second = np.arange(5, dtype=np.float32), np.arange(7, dtype=np.int32)
    for number, array in ((1, first), (2, second)):
        cases.written(tmp_path / f"m-0000{number}-of-00002.gguf", {}, {f"t{number}": array})
    found = gpunvme.load_file(tmp_path, framework="np")
    assert np.array_equal(found["t1"], first)
    assert np.array_equal(found["t2"], second)
    other = tmp_path / "without a suffix"
    (tmp_path / "m-00001-of-00002.gguf").rename(other)
    assert list(gpunvme.load_file(other, framework="np")) == ["t1"]
    with pytest.raises(FormatError, match="1 of the 2 shards"):
        gpunvme.load_file(tmp_path, framework="np")


def test_metadata_is_decoded_when_it_is_asked_for(tmp_path: Path) -> None:
    """A bad string in a vocabulary must not keep anybody from the weights."""
    nested = cases.array(9, cases.array(5, struct.pack("<i", -7)), cases.array(8, cases.string("a")))
    pairs = (
        cases.pair("bad", 8, cases.string(b"\xff")),
        cases.pair("flag", 7, b"\2"),
        cases.pair("flags", 9, cases.array(7, b"\1", b"\3")),
        cases.pair("nested", 9, nested),
        cases.pair("good", 6, struct.pack("<f", 0.5)),
    )
    data = cases.pack(pairs)
    metadata = gguf_header.parse(data, len(data)).metadata
    assert list(metadata) == ["bad", "flag", "flags", "nested", "good"]
    assert metadata["good"] == 0.5
    assert [list(each) for each in metadata["nested"]] == [[-7], ["a"]]
    for key, message in (("bad", "not UTF-8"), ("flag", "neither 0 nor 1"), ("flags", "neither 0 nor 1")):
        with pytest.raises(FormatError, match=message):
            metadata[key]
    with pytest.raises(KeyError):
        metadata["none"]


@pytest.mark.parametrize("what", cases.REFUSED)
def test_refused_with_the_place(tmp_path: Path, what: str) -> None:
    data, message = cases.REFUSED[what]
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    for load in (gpunvme.GgufFile, gpunvme.load_file):
        with pytest.raises(FormatError, match=message) as caught:
            load(path)
        assert caught.value.filename == str(path)
        assert caught.value.offset is not None
        assert 0 <= caught.value.offset <= len(data)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is all header costs no more than the limits say, however large it is."""
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "file.gguf"
    path.write_bytes(cases.pack((cases.pair("a", 9, cases.array(0, bytes(2000), count=2000)),)))
    with pytest.raises(FormatError, match="1000 bytes at most"):
        gpunvme.GgufFile(path)
    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 1)
    two = cases.pack((), (cases.tensor("v", (1,), 0, 0), cases.tensor("w", (1,), 0, 32)), bytes(64))
    with pytest.raises(FormatError, match="or than 1"):
        gguf_header.parse(two, len(two))


def test_a_header_that_comes_in_pieces(tmp_path: Path) -> None:
    """Headers have no length: real ones, with a vocabulary, are longer than the first read."""
    words = [f"word{number}" for number in range(60_000)]
    path = tmp_path / "file.gguf"
    cases.written(path, {"words": words, "last": 3}, {"w": np.arange(9, dtype=np.float32)})
    found = gpunvme.GgufFile(path)
    assert found.data_offset > gguf_header._FIRST_PIECE
    assert found.metadata["words"] == words
    assert np.array_equal(gpunvme.load_file(path, framework="np")["w"], np.arange(9))
    path.write_bytes(path.read_bytes()[: found.data_offset - 100])
    with pytest.raises(FormatError, match="truncated"):
        gpunvme.GgufFile(path)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=400)
def test_spoiled_headers_are_refused_or_read_as_the_gguf_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Whoever loads a hostile file gets an error, not a crash, no endless allocation, and no bytes outside the file."""
    data = cases.spoiled(random.Random(seed))
    tracemalloc.start()
    header = None
    offset: int | None = 0
    try:
        header = gguf_header.parse(data, len(data))
    except FormatError as error:
        offset = error.offset
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * len(data) + 100_000
    assert offset is not None
    if header is None:
        return
    for about in header.described.values():
        assert 0 <= about.offset <= about.offset + about.nbytes <= len(data)
    for key in header.metadata:
        try:
            header.metadata[key]
        except FormatError:
            pass
    path = tmp_path_factory.getbasetemp() / "spoiled.gguf"
    path.write_bytes(data)
    try:
        reader = gguf.GGUFReader(path)
    except Exception:  # noqa: BLE001 - it knows no error of its own; nested arrays of nothing, for one, are beyond it
        return
    theirs = {each.name: (int(each.tensor_type), each.data_offset, each.n_bytes) for each in reader.tensors}
    assert {name: (each.type.number, each.offset, each.nbytes) for name, each in header.described.items()} == theirs


def test_a_fuzzed_file_is_found_right_at_times() -> None:
    """Else the test above tests only refusals."""
    accepted = 0
    for seed in range(200):
        data = cases.spoiled(random.Random(seed))
        try:
            gguf_header.parse(data, len(data))
            accepted += 1
        except FormatError:
            pass
    assert 20 < accepted < 180


def test_a_real_checkpoint_as_gguf(tmp_path: Path) -> None:
    """As others convert it: written from a checkpoint that is made as real ones are, read back, compared."""
    arrays = {
        f"blk.{layer}.{part}": np.random.default_rng(layer).random((32, 64), np.float32)
        for layer in range(3)
        for part in ("q", "k")
    }
    gpunvme.save_file(arrays, tmp_path / "model.safetensors")
    loaded = gpunvme.load_file(tmp_path / "model.safetensors", framework="np")
    cases.written(tmp_path / "model.gguf", {"general.name": "model"}, loaded)
    again = gpunvme.load_file(tmp_path / "model.gguf", framework="np")
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    data = cases.pack((), (cases.tensor("w", (1024,), 0, 0),), files.contents(4096))
    path.write_bytes(data[:10])
    with path.open("rb") as file, pytest.raises(gpunvme.TruncatedError, match="became shorter"):
        gguf_header.read(file.fileno(), len(data), str(path))
