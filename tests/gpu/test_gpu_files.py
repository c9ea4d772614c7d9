"""Files and the memory of a real GPU, through torch: the bytes, their order with kernels, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme
from files import HEATS, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.torch]
torch = pytest.importorskip("torch")

SIZE = 24 * MIB + 1234


@pytest.fixture(scope="module", autouse=True)
def _torch_sees_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")


@pytest.fixture
def file(place: Path, data: bytes) -> Iterator[gpunvme.File]:
    with gpunvme.open(place) as opened:
        yield opened


def raw(tensor: Any) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def on_gpu(nbytes: int, device: str = "cuda:0") -> Any:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


DTYPES = ["uint8", "int8", "bool", "int16", "float16", "bfloat16", "float32", "int64", "float64", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(data: bytes, file: gpunvme.File, dtype: str) -> None:
    tensor = torch.empty(7, 1001, dtype=getattr(torch, dtype), device="cuda")
    transfer = file.read_into(tensor, 13)
    assert transfer.nbytes == tensor.nbytes
    assert raw(tensor) == data[13 : 13 + tensor.nbytes]


@pytest.mark.parametrize("heat", HEATS)
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, SIZE), (0, 0), (SIZE, 0), (1, 1), (511, 513), (4096, 65536), (7, 65537), (4095, 4 * MIB + 2), (5, SIZE - 9)],
)
def test_the_bytes_arrive_and_nothing_else_is_written(
    place: Path, data: bytes, file: gpunvme.File, heat: str, offset: int, nbytes: int
) -> None:
    files.heat(place, heat)
    room = on_gpu(nbytes + 128)
    room.fill_(0xA5)
    transfer = file.read_into(room[64 : 64 + nbytes], offset)
    guard = bytes([0xA5]) * 64
    assert raw(room) == guard + data[offset : offset + nbytes] + guard
    assert transfer.nbytes == nbytes == transfer.direct_bytes + transfer.cached_bytes + transfer.buffered_bytes
    if heat == "hot":
        assert transfer.cached_bytes == nbytes
    if heat == "cold":
        assert transfer.cached_bytes == 0
    if nbytes > MIB:
        assert "through page-locked memory" in transfer.reason


def busy(milliseconds: float = 50) -> None:
    """A kernel on the current stream that takes about so long, at 2 GHz or less."""
    torch.cuda._sleep(int(milliseconds * 2_000_000))


@pytest.mark.parametrize("nbytes", [100, 65536, 8 * MIB])
@pytest.mark.parametrize("wait", [True, False])
def test_a_read_waits_for_the_current_stream(data: bytes, file: gpunvme.File, nbytes: int, wait: bool) -> None:
    """A kernel that still writes the destination must not have the last word."""
    side = torch.cuda.Stream()
    tensor = on_gpu(nbytes)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        tensor.fill_(7)
        file.read_into(tensor, 5, wait=wait).wait()
        copy = tensor.clone()
    side.synchronize()
    assert raw(copy) == data[5 : 5 + nbytes]
    assert raw(tensor) == data[5 : 5 + nbytes]


@pytest.mark.parametrize("nbytes", [100, 8 * MIB])
def test_a_read_waits_for_the_stream_that_is_named(data: bytes, file: gpunvme.File, nbytes: int) -> None:
    side = torch.cuda.Stream()
    tensor = on_gpu(nbytes)
    torch.cuda.synchronize()
    for stream in (side, side.cuda_stream):
        with torch.cuda.stream(side):
            busy()
            tensor.fill_(7)
        file.read_into(tensor, 5, stream=stream)
        assert raw(tensor) == data[5 : 5 + nbytes]


def test_what_was_read_is_there_for_every_stream(data: bytes, file: gpunvme.File) -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    tensor = on_gpu(SIZE)
    for stream in streams:
        tensor.zero_()
        file.read_into(tensor)
        with torch.cuda.stream(stream):
            copy = tensor.clone()
        stream.synchronize()
        assert raw(copy) == data


@pytest.mark.parametrize("nbytes", [100, 8 * MIB + 3])
def test_a_write_waits_for_the_current_stream(tmp_path: Path, nbytes: int) -> None:
    side = torch.cuda.Stream()
    tensor = on_gpu(nbytes)
    tensor.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), gpunvme.open(tmp_path / "file", "w") as file:
        busy()
        tensor.fill_(7)
        file.write_from(tensor)
    assert (tmp_path / "file").read_bytes() == bytes([7]) * nbytes


@pytest.mark.parametrize("offset", [0, 5, 4096, 3 * MIB])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5 * MIB + 77])
@pytest.mark.parametrize("options", [{}, {"fsync": True}, {"atomic": True}])
def test_writing(tmp_path: Path, offset: int, nbytes: int, options: dict[str, bool]) -> None:
    path = tmp_path / "file"
    expected = bytearray(files.make(path, MIB))
    tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    with gpunvme.open(path, "r+") as file:
        if "atomic" in options and offset:
            with pytest.raises(ValueError, match="offset must be 0"):
                file.write_from(tensor, offset, **options)
            return
        file.write_from(tensor, offset, **options)
    if "atomic" in options:
        expected.clear()
    if nbytes:
        expected.extend(bytes(max(0, offset + nbytes - len(expected))))
        expected[offset : offset + nbytes] = raw(tensor)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("heat", HEATS)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("nbytes", [1, 512, 5000, 700_000])
def test_gathering(place: Path, data: bytes, heat: str, where: str, nbytes: int) -> None:
    """With offsets that a kernel made, as an index of embeddings does."""
    files.heat(place, heat)
    count = min(2000, 12 * MIB // nbytes)
    offsets = torch.randint(0, SIZE - nbytes, (count,), device=where)
    expected = b"".join(data[offset : offset + nbytes] for offset in offsets.tolist())
    with gpunvme.open(place) as file:
        out = torch.empty(count, nbytes, dtype=torch.uint8, device="cuda")
        assert file.gather(offsets, nbytes, out=out) is out
        assert raw(out) == expected
        assert file.gather(offsets, nbytes, device="cuda").numpy().tobytes() == expected


def test_many_parts_as_one(data: bytes, file: gpunvme.File) -> None:
    rng = np.random.default_rng(1)
    offsets = sorted(int(offset) for offset in rng.integers(0, SIZE - 100_000, 300))
    tensors: list[Any] = []

    def parts() -> Iterator[tuple[gpunvme.File, int, Any]]:
        for offset in offsets:
            tensors.append(on_gpu(int(rng.integers(0, 100_000))))
            yield file, offset, tensors[-1]

    transfer = gpunvme.read_many(parts())
    assert transfer.nbytes == sum(tensor.nbytes for tensor in tensors)
    for offset, tensor in zip(offsets, tensors, strict=True):
        assert raw(tensor) == data[offset : offset + tensor.nbytes]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4, 4, device="cuda").T,
        lambda: torch.zeros(8, device="cuda")[::2],
        lambda: torch.zeros(1, device="cuda").expand(8),
        lambda: torch.zeros(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last),
    ],
)
def test_tensors_with_gaps(file: gpunvme.File, make: Any) -> None:
    tensor = make()
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        file.read_into(tensor)
    assert not tensor.any()


def test_addresses_that_are_not_what_is_said_of_them(file: gpunvme.File) -> None:
    torch.cuda.empty_cache()
    tensor = on_gpu(64 * MIB)  # too large to share an allocation of torch's
    host = np.empty(1000, np.uint8)
    for ptr, nbytes, message in (
        (host.ctypes.data, 1000, "not GPU memory"),
        (1 << 20, 1000, "not GPU memory"),
        (tensor.data_ptr() + 64 * MIB - 10, SIZE, "past the end"),
    ):
        for use in (
            file.read_into,
            lambda span: gpunvme.read_many([(file, 0, span)]),
            lambda span: file.gather([0], span.nbytes, out=span),
        ):
            with pytest.raises(gpunvme.SpanError, match=message):
                use(gpunvme.Span(ptr, nbytes, "cuda:0"))
    file.read_into(tensor[:SIZE])  # the context is as good as before


def test_buffers_and_torch_share_memory(data: bytes, file: gpunvme.File) -> None:
    buffer = file.read(9, MIB, "cuda")
    assert buffer.numpy().tobytes() == data[9 : 9 + MIB]
    for tensor in (torch.from_dlpack(buffer), torch.as_tensor(buffer, device="cuda")):
        assert tensor.data_ptr() == buffer.ptr
        assert (tuple(tensor.shape), tensor.dtype) == ((MIB,), torch.uint8)
        assert raw(tensor) == data[9 : 9 + MIB]
    tensor = torch.from_dlpack(buffer)
    tensor.fill_(3)
    assert set(buffer.numpy().tobytes()) == {3}
    del buffer
    gc.collect()
    file.read_into(tensor, 1)  # still alive, through the tensor
    assert raw(tensor) == data[1 : 1 + MIB]


def test_what_knows_dlpack_only(data: bytes, file: gpunvme.File) -> None:
    class Wrapped:
        def __init__(self, tensor: Any) -> None:
            self._tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self._tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self._tensor.__dlpack_device__()

    tensor = torch.empty(1000, dtype=torch.float16, device="cuda")
    file.read_into(Wrapped(tensor), 3)
    assert raw(tensor) == data[3:2003]
    pinned = torch.empty(1000, dtype=torch.uint8).pin_memory()
    file.read_into(Wrapped(pinned), 3)
    assert raw(pinned) == data[3:1003]


def test_cupy(tmp_path: Path, data: bytes, file: gpunvme.File) -> None:
    cupy = pytest.importorskip("cupy")
    array = cupy.empty((3, 1000), cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array.fill(1)
        file.read_into(array, 5)
    assert array.get().tobytes() == data[5:12005]
    file.read_into(array, 9, stream=stream)
    assert array.get().tobytes() == data[9:12009]
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        file.read_into(array.T)
    offsets = cupy.asarray([5, 50, 500])
    expected = data[5:15] + data[50:60] + data[500:510]
    assert file.gather(offsets, 10, device="cuda").numpy().tobytes() == expected
    assert cupy.from_dlpack(file.read(3, 100, "cuda")).get().tobytes() == data[3:103]
    assert cupy.asarray(file.read(3, 100, "cuda")).get().tobytes() == data[3:103]
    with gpunvme.open(tmp_path / "new", "w") as new:
        new.write_from(array)
    assert (tmp_path / "new").read_bytes() == data[9:12009]


def test_what_is_explained(file: gpunvme.File) -> None:
    explanation = file.explain("cuda")
    assert explanation.chosen == "host"
    assert "page-locked" in explanation.verdicts[0].reason
    missing = f"cuda:{torch.cuda.device_count()}"
    assert file.explain(missing).chosen is None
    assert f"there is no {missing}" in str(file.explain(missing))
    with pytest.raises(gpunvme.CudaError, match=missing):
        gpunvme.Buffer.empty(1, missing)


def test_a_second_gpu(data: bytes, file: gpunvme.File) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    first, second = on_gpu(SIZE, "cuda:0"), on_gpu(SIZE, "cuda:1")
    transfers = [file.read_into(tensor, wait=False) for tensor in (first, second)]
    for transfer in transfers:
        transfer.wait()
    assert raw(first) == raw(second) == data
    with pytest.raises(gpunvme.SpanError, match="on one device"):
        gpunvme.read_many([(file, 0, first), (file, 0, second)])
    with pytest.raises(gpunvme.SpanError, match="is on cuda:1"):
        file.read_into(gpunvme.Span(second.data_ptr(), 100, "cuda:0"))
    with torch.cuda.device(1):
        assert file.read(0, 10, "cuda").device == "cuda:1"


def test_the_current_device_stays_what_it_is(file: gpunvme.File) -> None:
    """A library that leaves another context current makes the next kernel run on another GPU."""
    before = torch.cuda.current_device()
    for device in range(torch.cuda.device_count()):
        file.read_into(on_gpu(1000, f"cuda:{device}"))
        gpunvme.Buffer.empty(100, device)
    assert torch.cuda.current_device() == before
    assert torch.zeros(1, device="cuda").device.index == before


def test_transfers_that_are_dropped_do_no_harm(place: Path, file: gpunvme.File) -> None:
    """torch gives freed memory to the next tensor at once."""
    for _ in range(10):
        file.read_into(on_gpu(SIZE), wait=False)
        others = [on_gpu(SIZE) for _ in range(3)]
        for other in others:
            other.fill_(7)
        file.read_into(on_gpu(MIB), wait=False).wait()
        torch.cuda.synchronize()
        assert all(bool((other == 7).all()) for other in others)


def test_cancelling(file: gpunvme.File) -> None:
    tensor = on_gpu(SIZE)
    for _ in range(10):
        transfer = file.read_into(tensor, wait=False)
        transfer.cancel()
        try:
            transfer.wait()
        except gpunvme.Cancelled:
            pass
        assert transfer.done


def _read_in_child(path: str, expected: bytes, queue: Any) -> None:
    with gpunvme.open(path) as file:
        try:
            file.read(0, 10, "cuda")
            queue.put("read")
        except gpunvme.CudaError as error:
            queue.put(str(error))
        queue.put(file.read(5, 100_000).numpy().tobytes() == expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_children_are_refused_clearly(place: Path, data: bytes, file: gpunvme.File) -> None:
    file.read_into(on_gpu(1000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(os.fspath(place), data[5:100_005], queue))
    child.start()
    said, host_is_fine = queue.get(timeout=30), queue.get(timeout=30)
    child.join()
    assert "forked" in said
    assert host_is_fine
    assert child.exitcode == 0
