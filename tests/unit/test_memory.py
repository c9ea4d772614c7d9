"""What counts as memory, where it is, and how long it lives.

An address taken wrongly is a crash or somebody else's bytes; memory let go too early is both, some time later.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpunvme
from gpunvme.memory import Device, Span, span_of
from gpunvme.streams import stream_handle


def test_a_span_says_where_memory_is() -> None:
    memory = np.arange(100, dtype=np.uint8)
    span = span_of(memory, writable=True)
    assert (span.ptr, span.nbytes, str(span.device), span.writable) == (memory.ctypes.data, 100, "cpu", True)
    part = span.part(10, 20)
    assert (part.ptr, part.nbytes, part.owner) == (span.ptr + 10, 20, span.owner)
    assert gpunvme.Span(1000, 5, "cuda:3").device == Device("cuda", 3)


@pytest.mark.parametrize(("ptr", "nbytes"), [(0, 1), (5, -1), (-5, 1), (-1, 0)])
def test_spans_of_nothing(ptr: int, nbytes: int) -> None:
    with pytest.raises(gpunvme.SpanError, match="no range of memory"):
        Span(ptr, nbytes)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 11), (10, 1), (5, -1)])
def test_parts_outside_of_a_span(offset: int, nbytes: int) -> None:
    with pytest.raises(gpunvme.SpanError, match="outside"):
        Span(4096, 10).part(offset, nbytes)


@pytest.mark.parametrize(
    ("given_as", "expected"),
    [
        ("cpu", Device("cpu", 0)),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:15", Device("cuda", 15)),
        (0, Device("cuda", 0)),
        (3, Device("cuda", 3)),
        (Device("cuda", 2), Device("cuda", 2)),
    ],
)
def test_names_of_devices(given_as: Any, expected: Device) -> None:
    assert Device.parse(given_as) == expected
    assert Device.parse(str(expected)) == expected


def test_a_gpu_without_a_number_is_the_first() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        pytest.skip("torch says which")
    assert Device.parse("cuda") == Device("cuda", 0)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    order=st.sampled_from("CF"),
    step=st.sampled_from([1, 1, 2, -1]),
    dtype=st.sampled_from(["u1", "i2", "f4", "c16", "M8[s]", "U3", "V5", "?", "f2"]),
)
def test_contiguous_means_what_numpy_means_by_it(shape: list[int], order: Any, step: int, dtype: str) -> None:
    array = np.zeros(shape, dtype, order=order)
    if array.ndim:
        array = array[::step]
    if array.flags.c_contiguous:
        span = span_of(array, writable=True)
        assert span.nbytes == array.nbytes
        assert span.ptr == array.__array_interface__["data"][0]
    else:
        with pytest.raises(gpunvme.SpanError, match="not contiguous"):
            span_of(array, writable=True)


class Exporter:
    """Hands out another array's memory by DLPack, as it is told to."""

    def __init__(self, array: Any, error: Exception | None = None, device: tuple[int, int] | None = None) -> None:
        self.array, self.error, self.device = array, error, device

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.device or self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "c16", "f2", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (1, 5, 1)])
def test_dlpack_says_the_same(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    span = span_of(Exporter(array), writable=True)
    assert (span.nbytes, str(span.device)) == (array.nbytes, "cpu")
    if array.nbytes:
        assert span.ptr == array.ctypes.data


def test_what_dlpack_refuses() -> None:
    array = np.zeros((4, 4), np.uint8)
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        span_of(Exporter(array.T), writable=True)
    with pytest.raises(gpunvme.SpanError, match="not contiguous"):
        span_of(Exporter(array[:, 1:3]), writable=True)
    with pytest.raises(gpunvme.SpanError, match="requires grad"):
        span_of(Exporter(array, BufferError("cannot export: requires grad")), writable=True)
    array.flags.writeable = False
    with pytest.raises(gpunvme.SpanError, match="read"):
        span_of(Exporter(array), writable=True)
    with pytest.raises(ValueError, match="mine"):
        span_of(Exporter(array, ValueError("mine")), writable=True)


def test_memory_is_kept_alive_by_its_span() -> None:
    class Owner(bytearray):
        pass

    for wrap in (lambda owner: owner, memoryview, lambda owner: Exporter(np.frombuffer(owner, np.uint8))):
        owner = Owner(1000)
        alive = weakref.ref(owner)
        span = span_of(wrap(owner), writable=True)
        del owner
        gc.collect()
        assert alive() is not None
        ctypes.memset(span.ptr, 7, span.nbytes)
        del span
        gc.collect()
        assert alive() is None


def test_memory_that_is_pinned_by_a_span_cannot_be_resized() -> None:
    memory = bytearray(100)
    span = span_of(memory, writable=True)
    with pytest.raises(BufferError):
        memory.extend(b"x" * 10_000)
    del span
    gc.collect()
    memory.extend(b"x")


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_000])
@pytest.mark.parametrize("congruent_to", [0, 1, 511, 4096, 10_000])
def test_buffers_on_the_host(nbytes: int, congruent_to: int) -> None:
    buffer = gpunvme.Buffer.empty(nbytes, congruent_to=congruent_to)
    assert (buffer.nbytes, buffer.shape, buffer.device, len(buffer)) == (nbytes, (nbytes,), "cpu", nbytes)
    assert buffer.ptr % 4096 == congruent_to % 4096
    view = np.asarray(buffer)
    view[:] = 5
    assert (buffer.numpy() == 5).all()
    if nbytes:
        assert view.ctypes.data == buffer.ptr
    assert str(nbytes) in repr(buffer)
    assert np.from_dlpack(buffer).tobytes() == view.tobytes()
    assert span_of(buffer, writable=True) == buffer.span


def test_a_buffer_outlives_nobody_who_uses_it() -> None:
    buffer = gpunvme.Buffer.empty(100_000)
    views = [np.asarray(buffer), np.from_dlpack(buffer), buffer.numpy()]
    views[0][:] = 9
    del buffer
    gc.collect()
    other = [gpunvme.Buffer.empty(100_000).numpy() for _ in range(10)]
    for array in other:
        array[:] = 1
    assert all((view == 9).all() for view in views)


def test_buffers_that_cannot_be() -> None:
    with pytest.raises((gpunvme.SpanError, ValueError)):
        gpunvme.Buffer.empty(-1)
    with pytest.raises(TypeError):
        gpunvme.Buffer.empty(1.5)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        gpunvme.Buffer.empty(1 << 60)


def test_a_host_buffer_is_no_gpu_array() -> None:
    """CuPy and Numba look for the attribute, and would take a host address for a GPU's."""
    assert not hasattr(gpunvme.Buffer.empty(1), "__cuda_array_interface__")


def test_streams_as_frameworks_have_them() -> None:
    gpu = Device("cuda", 0)

    class New:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 77)

    class Torch:
        cuda_stream = 78

    class Cupy:
        ptr = 79

    for stream, handle in ((5, 5), (0, 0), (New(), 77), (Torch(), 78), (Cupy(), 79)):
        assert stream_handle(stream, None, gpu) == handle
        assert stream_handle(stream, None, Device("cpu", 0)) is None
    with pytest.raises(TypeError, match="not a CUDA stream"):
        stream_handle("stream", None, gpu)
