"""Reads and writes as PyTorch operators: what a compiled model reads must be what an eager one reads."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme
from gpunvme import nvme

if TYPE_CHECKING:
    import torch

    from gpunvme import torch as ops
else:
    torch = pytest.importorskip("torch")
    from gpunvme import torch as ops

pytestmark = pytest.mark.torch
SIZE = 100_000


def test_read_and_write(place: Path, data: bytes, tmp_path: Path) -> None:
    tensor = torch.zeros(1000, dtype=torch.int16)
    assert ops.read_into_tensor(tensor, place, 37) is tensor
    assert tensor.numpy().tobytes() == data[37:2037]
    with gpunvme.open(tmp_path / "new", "w") as target:
        ops.write_from_tensor(tensor, target, 5, fsync=True)
        ops.write_from_tensor(tensor[:2], target)
        back = torch.zeros(2005, dtype=torch.uint8)
        ops.read_into_tensor(back, target)
    assert back.numpy().tobytes() == data[37:41] + b"\0" + data[37:2037]
    ops.write_from_tensor(tensor[:1], tmp_path / "new", 2005)
    assert (tmp_path / "new").stat().st_size == 2007


def test_parameters_are_filled_in_place(file: gpunvme.File, data: bytes) -> None:
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    before = weight.data_ptr()
    ops.read_into_tensor(weight, file, 400)
    assert weight.detach().numpy().tobytes() == data[400:800]
    assert weight.data_ptr() == before
    assert weight.requires_grad
    assert weight.is_leaf


def test_namespaces_by_block_or_byte() -> None:
    with nvme.open("soft:ram?size=1MiB&lba=512") as controller:
        namespace = controller.namespace(1)
        written = torch.arange(256, dtype=torch.int32)
        ops.write_from_tensor(written, namespace, lba=3, fsync=True)
        for where in ({"lba": 3}, {"offset": 3 * 512}):
            assert torch.equal(ops.read_into_tensor(torch.zeros(256, dtype=torch.int32), namespace, **where), written)
        with pytest.raises(gpunvme.SpanError, match="not at a block"):
            ops.read_into_tensor(written, namespace, 100)


@pytest.mark.parametrize("lba", [512, 4096])
def test_blocks_of_a_namespace_by_whatever_it_was_opened(tmp_path: Path, lba: int) -> None:
    """A number that was taken for bytes would fill a model with its neighbour's weights."""
    files.make(tmp_path / "disk", 1 << 20)
    uri = f"nvme+soft:{tmp_path}/disk?lba={lba}"
    written = torch.arange(1024, dtype=torch.int32)
    ops.write_from_tensor(written, uri, lba=5, fsync=True)
    assert (tmp_path / "disk").read_bytes()[5 * lba :][:4096] == written.numpy().tobytes()
    back = torch.zeros_like(written)
    assert torch.equal(ops.read_into_tensor(back.zero_(), uri, lba=5), written)
    with gpunvme.open(uri) as opened:
        assert torch.equal(ops.read_into_tensor(back.zero_(), opened, lba=5), written)
        assert torch.equal(ops.read_into_tensor(back[1:].zero_(), opened, 5 * lba + 4), written[1:])
        with pytest.raises(gpunvme.RangeError):
            ops.read_into_tensor(back, opened, lba=(1 << 20) // lba)


def test_a_file_that_is_called_like_a_registered_one(
    file: gpunvme.File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ops.register(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"its own")
    assert ops.read_into_tensor(torch.zeros(7, dtype=torch.uint8), name).numpy().tobytes() == b"its own"


def test_what_is_refused(file: gpunvme.File, tmp_path: Path) -> None:
    tensor = torch.zeros(100)
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        ops.read_into_tensor(torch.zeros(10, 10).t(), file)
    with pytest.raises(gpunvme.RangeError):
        ops.read_into_tensor(tensor, file, SIZE - 399)
    with pytest.raises(gpunvme.RangeError):
        ops.read_into_tensor(tensor, file, -1)
    with pytest.raises(gpunvme.SpanError, match="no blocks"):
        ops.read_into_tensor(tensor, file, lba=0)
    with pytest.raises(ValueError, match="give one"):
        ops.read_into_tensor(tensor, file, 4, lba=0)
    with pytest.raises(gpunvme.MissingFileError):
        ops.read_into_tensor(tensor, tmp_path / "missing")
    with pytest.raises(gpunvme.FileError, match="reading only"):
        ops.write_from_tensor(tensor, file)
    with pytest.raises(TypeError, match="not a dict"):
        ops.read_into_tensor(tensor, {})  # type: ignore[arg-type]


def test_a_name_dies_with_its_file(place: Path) -> None:
    file = gpunvme.open(place)
    name = ops.register(file)
    assert ops.register(file) == name
    torch.ops.gpunvme.read_into_tensor(torch.zeros(1), name, 0, False)
    del file
    gc.collect()
    with pytest.raises(gpunvme.FileError, match="gone"):
        torch.ops.gpunvme.read_into_tensor(torch.zeros(1), name, 0, False)


def test_pytorchs_own_checks_of_operators(file: gpunvme.File, tmp_path: Path) -> None:
    """Schema, autograd, fake tensors, AOT dispatch: `torch.library.opcheck`."""
    torch.library.opcheck(torch.ops.gpunvme.read_into_tensor, (torch.zeros(10), ops.register(file), 8, False))
    files.make(tmp_path / "target", 100)
    arguments = (torch.ones(10), str(tmp_path / "target"), 8, False, False)
    torch.library.opcheck(torch.ops.gpunvme.write_from_tensor, arguments)


@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_compiled_functions_read_and_write_in_order(file: gpunvme.File, data: bytes, tmp_path: Path) -> None:
    expected = np.frombuffer(data[:400], np.int32)
    files.make(tmp_path / "target", 400)
    target = gpunvme.open(tmp_path / "target", "r+")
    ops.register(file)
    ops.register(target)

    def step(offset: int) -> Any:
        tensor = torch.empty(100, dtype=torch.int32)
        ops.read_into_tensor(tensor, file, offset)
        doubled = tensor * 2
        ops.write_from_tensor(doubled, target)  # nobody uses what it returns: it must not be dropped
        doubled.add_(1)  # nor come too late
        return tensor, doubled

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    tensor, doubled = compiled(0)
    assert np.array_equal(tensor.numpy(), expected)
    assert np.array_equal(doubled.numpy(), expected * 2 + 1)
    assert (tmp_path / "target").read_bytes() == (expected * 2).tobytes()
    tensor, _ = compiled(4)
    assert tensor.numpy().tobytes() == data[4:404]
    target.close()
