"""Torch tensors on the host as destinations and sources: every dtype, and none that is not what it seems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import files
import gpunvme
from gpunvme.memory import Device, span_of

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SIZE = 300_000


def raw(tensor: Any) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())


DTYPES = ["uint8", "int8", "bool", "int16", "float16", "bfloat16", "float32", "int32", "float64", "int64"]
DTYPES += ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heat", ["hot", "cold"])
def test_every_dtype(place: Path, data: bytes, file: gpunvme.File, dtype: str, heat: str) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    files.heat(place, heat)
    tensor = torch.empty(7, 1001, dtype=getattr(torch, dtype))
    transfer = file.read_into(tensor, 13)
    assert transfer.nbytes == tensor.nbytes
    assert raw(tensor) == data[13 : 13 + tensor.nbytes]


def test_tensors_that_learn(data: bytes, file: gpunvme.File) -> None:
    """Weights are Parameters; reading into them is no operation of autograd."""
    parameter = torch.nn.Parameter(torch.empty(100))
    file.read_into(parameter, 0)
    assert raw(parameter) == data[:400]
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    model = torch.nn.Linear(10, 3, dtype=torch.bfloat16)
    gpunvme.read_many([(file, 5, model.weight), (file, 1, model.bias)])
    assert raw(model.weight) == data[5:65]
    assert raw(model.bias) == data[1:7]
    with torch.inference_mode():
        inference = torch.empty(10)
    file.read_into(inference)
    assert raw(inference) == data[:40]


def test_parts_of_tensors(data: bytes, file: gpunvme.File) -> None:
    tensor = torch.zeros(10, 10, dtype=torch.uint8)
    file.read_into(tensor[2:5], 7)
    assert raw(tensor) == bytes(20) + data[7:37] + bytes(50)
    tensor = torch.zeros(5)
    file.read_into(tensor[3], 9)  # no dimensions
    assert raw(tensor) == bytes(12) + data[9:13] + bytes(4)
    file.read_into(torch.empty(0))
    file.read_into(torch.empty(3, 0, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 4).T,
        lambda: torch.zeros(4, 4)[:, 1],
        lambda: torch.zeros(8)[::2],
        lambda: torch.zeros(1).expand(8),
        lambda: torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
)
def test_tensors_with_gaps(data: bytes, file: gpunvme.File, make: Any) -> None:
    tensor = make()
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        file.read_into(tensor)
    assert not tensor.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 4).to_sparse(),
        lambda: torch.empty(4, device="meta"),
        lambda: torch.zeros(4, dtype=torch.complex64).conj(),
        lambda: torch.zeros(4, dtype=torch.complex64).conj().imag,
    ],
)
def test_tensors_that_are_not_what_their_memory_says(file: gpunvme.File, make: Any) -> None:
    with pytest.raises(gpunvme.SpanError):
        file.read_into(make())


def test_offsets_and_writes(tmp_path: Path, data: bytes, file: gpunvme.File) -> None:
    offsets = torch.tensor([5, 1000, 0, 299_990])
    expected = b"".join(data[offset : offset + 10] for offset in offsets.tolist())
    out = torch.empty(4, 10, dtype=torch.uint8)
    assert file.gather(offsets, 10, out=out) is out
    assert raw(out) == expected
    assert file.gather(offsets.to(torch.int32), 10).numpy().tobytes() == expected
    with pytest.raises(TypeError, match="integers"):
        file.gather(offsets.float(), 10)
    with pytest.raises(TypeError, match="one dimension"):
        file.gather(offsets.reshape(2, 2), 10)
    tensor = torch.arange(1000, dtype=torch.bfloat16)
    with gpunvme.open(tmp_path / "new", "w") as new:
        new.write_from(tensor.requires_grad_(), 3)
    assert (tmp_path / "new").read_bytes() == bytes(3) + raw(tensor)


def test_buffers_and_tensors_share_memory(data: bytes, file: gpunvme.File) -> None:
    buffer = file.read(0, 1000)
    for tensor in (torch.from_dlpack(buffer), torch.as_tensor(buffer)):
        assert tensor.data_ptr() == buffer.ptr
        assert raw(tensor) == data[:1000]
    torch.from_dlpack(buffer)[0] = 1
    assert buffer.numpy()[0] == 1


def test_devices_of_torch() -> None:
    assert Device.parse(torch.device("cpu")) == Device("cpu", 0)
    assert Device.parse(torch.device("cuda:1")) == Device("cuda", 1)
    with pytest.raises(ValueError, match="unknown device"):
        Device.parse(torch.device("meta"))
    assert str(span_of(torch.empty(1), writable=True).device) == "cpu"
