"""What callers give to kernels of the package, made plain; and how such a kernel is laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpunvme.arguments import offsets_array
from gpunvme.errors import SpanError
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Device, Span, check_gpu_span, span_of
from gpunvme.streams import device_of_stream, stream_handle

# Lanes of a warp that have commands of their own, and how many of them send theirs together: measured
# (docs/performance.md). Few slots are used best by many warps, which copy at once; many by larger batches, which share
# the way into the queue.
_SHAPE, _DEEP_SHAPE, _DEEP = (4, 4), (16, 8), 512

_LAST_DEFAULT_STREAM = 2  # CU_STREAM_PER_THREAD: these are of whichever context is current


def warp_shape(slots: int) -> tuple[int, int]:
    """Lanes of a warp that have commands, and how many send theirs together, on queues of so many slots."""
    return _DEEP_SHAPE if slots >= _DEEP else _SHAPE


def gpu_span(memory: Any, device: Device, owner: str, *, writable: bool) -> Span:
    """Memory of one GPU.

    Parameters
    ----------
    memory
        Anything that `span_of` takes.
    device
        The GPU that it must be on.
    owner
        How an error says whose GPU that is, such as ``"these queues are driven by"``.
    writable
        Whether it must be writable.

    Raises
    ------
    SpanError
        If it is elsewhere, or no memory that a kernel may use.
    """
    span = span_of(memory, writable=writable)
    if span.device != device:
        raise SpanError(f"memory is on {span.device}; {owner} {device}")
    check_gpu_span(span, memory)
    return span


def gpu_stream(stream: Any, memory: Any, gpu: Gpu) -> int:
    """Handle of the stream that a kernel is launched on; see `stream_handle`.

    Raises
    ------
    SpanError
        If it is another GPU's. What goes before a kernel would run there, on memory that it does not reach.
    """
    handle = stream_handle(stream, memory, Device("cuda", gpu.index)) or 0
    unknown = stream is not None and handle > _LAST_DEFAULT_STREAM and device_of_stream(stream) is None
    if unknown and not gpu.owns(handle):
        raise SpanError(f"stream {handle:#x} is not one of cuda:{gpu.index}; use one that was made there")
    return handle


def host_or_gpu_integers(values: Any, what: str, device: Device, owner: str) -> tuple[NDArray[np.int64] | int, int]:
    """Integers as an array of the host's, or their address on the GPU; and how many there are.

    Parameters
    ----------
    values
        A sequence or an array on the host, or a one-dimensional array of 64-bit integers on the GPU.
    what
        How an error calls them, such as ``"LBAs"``.
    device, owner
        As for `gpu_span`.

    Raises
    ------
    TypeError
        If they are no such integers.
    SpanError
        As `gpu_span`.
    """
    interface = getattr(values, "__cuda_array_interface__", None)
    if interface is None:
        places = offsets_array(values)
        return places, len(places)
    if interface["typestr"] not in {"<i8", "<u8"} or len(interface["shape"]) != 1:
        raise TypeError(
            f"{what} on the GPU are one-dimensional arrays of int64, not {interface['typestr']} of shape "
            f"{interface['shape']}"
        )
    span = gpu_span(values, device, owner, writable=False)
    return span.ptr, span.nbytes // 8
