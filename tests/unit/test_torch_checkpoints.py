"""State dicts saved and loaded: PyTorch reads what we write, we read what it writes, and nothing is half-written."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import gpunvme

if TYPE_CHECKING:
    import torch

    from gpunvme import torch as ours
    from gpunvme.torch import archive, loading, saving
else:
    torch = pytest.importorskip("torch")
    from gpunvme import torch as ours
    from gpunvme.torch import archive, loading, saving

pytestmark = pytest.mark.torch


def trained() -> Any:
    """A model and its optimizer, after a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.BatchNorm1d(400), torch.nn.Linear(400, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 300)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1, "note": "ünïcode"}


def of_every_dtype() -> Any:
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 uint16 uint32 uint64"
    )
    names += " float8_e4m3fn float8_e5m2"
    return {name: torch.arange(10).to(getattr(torch, name)).reshape(2, 5) for name in names.split()}


def of_views() -> Any:
    base = torch.arange(100_000.0)
    return {
        "base": base,
        "part": base[10:20],
        "every other": base[::2],
        "transposed": base.view(100, 1000).t(),
        "expanded": base[:1].expand(5),
        "scalar": base[3],
    }


def of_odd_things() -> Any:
    return [
        torch.empty(0),
        torch.empty(0, 3),
        torch.empty(3, 0, dtype=torch.int8),
        torch.nn.Parameter(torch.randn(3)),
        collections.OrderedDict(a=(1, None, 2.5, True, b"bytes", "text", {1, 2})),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cpu"),
        torch.quantize_per_tensor(torch.randn(5), 0.1, 3, torch.qint8),
        torch.quantize_per_channel(torch.randn(2, 5), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8),
        *(sparse(torch.eye(4)) for sparse in (torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc)),
        torch.eye(4).to_sparse_bsr((2, 2)),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.empty(3, 4, device="meta"),
    ]


class Scaled(torch.Tensor):
    """A tensor made of two others, as libraries for quantisation make them: it has a shape and no memory of its own."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)
        made.values, made.scale = values, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(function)


STATES = [trained, of_every_dtype, of_views, of_odd_things, lambda: torch.arange(3), dict, lambda: 5]


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.layout, one.requires_grad) == (
            other.dtype,
            other.shape,
            other.layout,
            other.requires_grad,
        )
        if one.layout == torch.strided:
            assert one.stride() == other.stride()
            if one.is_meta or other.is_meta:
                assert one.is_meta
                assert other.is_meta
                return
            one, other = (each.detach().resolve_conj().resolve_neg() for each in (one, other))
            if one.is_quantized:
                assert torch.equal(one.dequantize(), other.dequantize())
                one, other = one.int_repr(), other.int_repr()
            assert bytes(one.contiguous().reshape(-1).view(torch.uint8).tolist()) == bytes(
                other.contiguous().reshape(-1).view(torch.uint8).tolist()
            )
        else:
            assert torch.equal(one.to_dense(), other.to_dense())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("state", STATES)
@pytest.mark.filterwarnings("default")  # PyTorch's, of quantized tensors
def test_both_ways(state: Any, tmp_path: Path) -> None:
    saved = state()
    ours.save(saved, tmp_path / "ours")
    torch.save(saved, tmp_path / "theirs")
    same(torch.load(tmp_path / "ours", weights_only=True), saved)
    same(torch.load(tmp_path / "ours", weights_only=True, mmap=True), saved)
    same(ours.load(tmp_path / "ours"), saved)
    same(ours.load(tmp_path / "theirs"), saved)
    same(ours.load(tmp_path / "theirs", "cpu"), saved)
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


def test_an_empty_storage_that_is_shared(tmp_path: Path) -> None:
    """PyTorch asks for it once for each tensor, for any other storage once in all."""
    empty = torch.empty(0)
    state = [empty, torch.arange(4), empty.reshape(0, 3), torch.arange(9)]
    torch.save(state, tmp_path / "theirs")
    same(ours.load(tmp_path / "theirs"), state)


def test_tensors_share_what_they_shared(tmp_path: Path) -> None:
    ours.save(of_views(), tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_size < 500_000  # one storage, once
    for back in (ours.load(tmp_path / "ours"), torch.load(tmp_path / "ours")):
        assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == 1
        back["base"][10] = -1
        assert back["part"][0] == -1


def test_whole_models(tmp_path: Path) -> None:
    model = torch.nn.Linear(30, 40)
    ours.save(model, tmp_path / "model")
    back = ours.load(tmp_path / "model", weights_only=False)
    assert torch.equal(back.weight, model.weight)
    with pytest.raises(pickle.UnpicklingError):
        ours.load(tmp_path / "model")


def test_tensors_that_are_made_of_others(tmp_path: Path) -> None:
    """Quantised weights come so, and have a device of their own that map_location must reach."""
    state = {"plain": torch.arange(5), "scaled": Scaled(torch.arange(6, dtype=torch.int8), torch.tensor([0.5]))}
    ours.save(state, tmp_path / "ours")
    torch.save(state, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        for where in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}):
            with torch.serialization.safe_globals([Scaled]):
                back = ours.load(path, where)
            assert type(back["scaled"]) is Scaled
            assert (back["scaled"].device, back["scaled"].shape) == (torch.device("cpu"), (6,))
            same(
                [back["plain"], back["scaled"].values, back["scaled"].scale],
                [state["plain"], state["scaled"].values, state["scaled"].scale],
            )
        with pytest.raises(pickle.UnpicklingError, match="Scaled"):
            ours.load(path)


def test_where_tensors_that_are_made_of_others_go(tmp_path: Path) -> None:
    """As storages do; and whatever else PyTorch loads goes where it went before."""
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    for mapped, where in ((None, gpu), ({"cuda:1": "cuda:0"}, "cuda:0"), ({"cuda:0": "cpu"}, gpu), (cpu, cpu)):
        assert loading._Places([], {}, mapped, "").get(gpu, gpu) == where
    torch.save(torch.arange(3), tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="don't know how to restore"):
        torch.load(tmp_path / "theirs", map_location="nowhere")


class Packed:
    """An object that loads a checkpoint of its own while it is unpickled."""

    def __init__(self, data: bytes) -> None:
        self.tensor = torch.load(io.BytesIO(data))

    def __reduce__(self) -> Any:
        inner = io.BytesIO()
        torch.save(self.tensor, inner)
        return Packed, (inner.getvalue(),)


def test_checkpoints_inside_of_checkpoints(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(torch.arange(7), inner)
    ours.save([torch.arange(3), Packed(inner.getvalue()), torch.arange(4)], tmp_path / "ours")
    first, packed, last = ours.load(tmp_path / "ours", weights_only=False)
    same([first, packed.tensor, last], [torch.arange(3), torch.arange(7), torch.arange(4)])


tensors = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype).random_(0, 2),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.float16]),
)
states = st.recursive(
    tensors | st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=20,
)


@given(state=states)
def test_any_nested_state(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    ours.save(state, path, fsync=False)
    same(torch.load(path, weights_only=True), state)
    same(ours.load(path), state)
    torch.save(state, path)
    same(ours.load(path), state)


# The archive.


def test_the_archive_is_a_sound_zip_file(tmp_path: Path) -> None:
    ours.save(trained(), tmp_path / "ours", crc32=True)
    with zipfile.ZipFile(tmp_path / "ours") as archived:
        assert archived.testzip() is None
    first = (tmp_path / "ours").read_bytes()
    ours.save(trained(), tmp_path / "ours", crc32=True)
    assert (tmp_path / "ours").read_bytes() == first
    ours.save(trained(), tmp_path / "without", crc32=False)
    same(torch.load(tmp_path / "without"), trained())
    with zipfile.ZipFile(tmp_path / "without") as archived, pytest.raises(zipfile.BadZipFile, match="CRC-32"):
        archived.read("archive/data/0")


def test_storages_are_aligned(tmp_path: Path) -> None:
    ours.save([torch.zeros(3), torch.zeros(100_000), torch.zeros(1), torch.zeros(50_000)], tmp_path / "ours")
    with (tmp_path / "ours").open("rb") as file:
        records = archive.find_records(file.fileno(), "ours")
    for name, record in records.items():
        assert record.at % (4096 if record.nbytes >= archive.LARGE else 64) == 0, name


def test_sizes_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a record were beyond 4 GiB: PyTorch, Python and we must find it."""
    monkeypatch.setattr(archive, "FROM_64", 5000)
    state = [torch.arange(10), torch.arange(10_000), torch.arange(1000), torch.arange(20)]
    ours.save(state, tmp_path / "ours", crc32=True)
    same(torch.load(tmp_path / "ours"), state)
    same(torch.load(tmp_path / "ours", mmap=True), state)
    same(ours.load(tmp_path / "ours"), state)
    with zipfile.ZipFile(tmp_path / "ours") as archived:
        assert archived.testzip() is None


@pytest.mark.slow
def test_a_record_beyond_4_gib(tmp_path: Path) -> None:
    large = torch.zeros((4 << 30) + 100, dtype=torch.uint8)
    large[-1] = 7
    ours.save({"large": large, "after": torch.arange(10)}, tmp_path / "ours", fsync=False)
    del large
    back = torch.load(tmp_path / "ours", mmap=True)
    assert back["large"][-1] == 7
    assert back["after"][9] == 9
    assert ours.load(tmp_path / "ours")["large"][-1] == 7


# As a whole or not at all.


class Trouble(Exception):
    pass


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    shared = torch.zeros(10)
    for bad, error, word in (
        ([shared, shared.view(torch.int32)], gpunvme.SpanError, "share memory"),
        (torch.zeros(3, device="meta").untyped_storage(), gpunvme.SpanError, "on meta"),
        (lambda: 0, (pickle.PicklingError, AttributeError), "lambda"),
    ):
        with pytest.raises(error, match=word):
            ours.save(bad, path)
    with pytest.raises(gpunvme.FileError):
        ours.save(shared, tmp_path / "missing" / "state")

    def fail(*_: Any) -> None:
        raise Trouble

    monkeypatch.setattr(saving, "_crc32_of", fail)
    with pytest.raises(Trouble):
        ours.save(shared, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


# Bad files.


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"a": torch.zeros(3), "b": Hostile()}, tmp_path / "hostile")
    with pytest.raises(pickle.UnpicklingError):
        ours.load(tmp_path / "hostile")
    assert os.listdir(tmp_path) == ["hostile"]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    for data in (b"", b"PK\3\4", b"text" * 1000):
        path.write_bytes(data)
        with pytest.raises(gpunvme.FormatError, match="no archive"):
            ours.load(path)
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(gpunvme.FormatError, match="old format"):
        ours.load(path)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("some/file", "x")
    with pytest.raises(gpunvme.FormatError, match=r"no record 'data.pkl'"):
        ours.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
        other.writestr("archive/data.pkl", "x" * 100)
    with pytest.raises(gpunvme.FormatError, match="compressed"):
        ours.load(path)
    with pytest.raises(gpunvme.MissingFileError):
        ours.load(tmp_path / "missing")


def rewritten(source: Path, target: Path, change: Any) -> None:
    """The same archive with some records changed, or left out where that says None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = change(entry.filename.split("/", 1)[1], old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)


@pytest.mark.parametrize(
    ("record", "change", "word"),
    [
        ("data/0", lambda data: data[:-1], "its record"),
        ("data/0", lambda data: None, "no record 'data/0'"),
        ("byteorder", lambda data: b"big", "order"),
        ("data.pkl", lambda data: data[:-3], "cannot be understood"),
        ("data.pkl", lambda data: data.replace(b"FloatStorage", b"ReLUStorages"), "cannot be understood"),
        ("version", lambda data: None, "no record 'version'"),
    ],
)
def test_records_that_contradict_each_other(tmp_path: Path, record: str, change: Any, word: str) -> None:
    ours.save({"a": torch.arange(1000.0)}, tmp_path / "good")
    rewritten(tmp_path / "good", tmp_path / "bad", lambda name, data: change(data) if name == record else data)
    with pytest.raises(gpunvme.FormatError, match=word):
        ours.load(tmp_path / "bad")


@pytest.mark.parametrize("nbytes", [0, 8000])
def test_a_tensor_that_is_larger_than_its_storage(tmp_path: Path, nbytes: int) -> None:
    """What lies behind the storage in memory is nobody's weights; PyTorch refuses it, too."""
    tensor = torch.zeros(2000)[:1000]
    tensor.untyped_storage().resize_(nbytes)
    ours.save({"before": torch.arange(9), "a": tensor}, tmp_path / "good")
    size = b"M\xe8\x03"  # 1000 in the pickle
    rewritten(
        tmp_path / "good", tmp_path / "bad", lambda name, data: data.replace(size, b"M`\xea") if "pkl" in name else data
    )
    with pytest.raises(RuntimeError, match="resiz"):
        torch.load(tmp_path / "bad")
    with pytest.raises(gpunvme.FormatError, match=f"reaches beyond its storage, record 'data/1' of {nbytes} bytes"):
        ours.load(tmp_path / "bad")


def test_any_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    ours.save(trained()["model"], tmp_path / "good")
    data, chance = (tmp_path / "good").read_bytes(), random.Random(3)
    interesting = [*range(3000), *range(len(data) - 2000, len(data))]
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(chance.choice([1, 3, 20])):
            broken[chance.choice(interesting)] = chance.randrange(256)
        (tmp_path / "bad").write_bytes(broken[: chance.choice([len(data), len(data), chance.randrange(len(data))])])
        try:
            ours.load(tmp_path / "bad")
        except (gpunvme.Error, pickle.UnpicklingError):
            refused += 1
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError, IndexError):
            refused += 1  # PyTorch's own, of a pickle that still is one
    assert refused > 30


def test_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = saving._Pickler.persistent_id

    def elsewhere(self: Any, obj: Any) -> Any:
        known = original(self, obj)
        return known and (*known[:3], "cuda:9", known[4])

    monkeypatch.setattr(saving._Pickler, "persistent_id", elsewhere)
    ours.save([torch.arange(5)], tmp_path / "gpu")
    with pytest.raises(gpunvme.PathError, match="use map_location"):
        ours.load(tmp_path / "gpu")
    for where in ("cpu", torch.device("cpu"), {"cuda:9": "cpu"}):
        same(ours.load(tmp_path / "gpu", where), [torch.arange(5)])
    with pytest.raises(gpunvme.PathError, match="meta"):
        ours.load(tmp_path / "gpu", "meta")
    with pytest.raises(TypeError, match="map_location"):
        ours.load(tmp_path / "gpu", 5)  # type: ignore[arg-type]


def test_nothing_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all tensors come as one transfer, and only those that are asked for."""
    ours.save(trained(), tmp_path / "ours")
    moved = []
    read_many = loading.read_many
    monkeypatch.setattr(loading, "read_many", lambda parts, **k: moved.append(read_many(parts, **k)))
    ours.load(tmp_path / "ours")
    (transfer,) = moved
    storages = [tensor.untyped_storage() for tensor in tensors_in(trained())]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert transfer.nbytes == sum(sizes.values())


def tensors_in(state: Any) -> list[Any]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in values for tensor in tensors_in(value)]
