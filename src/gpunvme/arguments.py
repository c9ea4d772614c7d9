"""What callers pass, checked and made plain before anything moves."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpunvme.errors import RangeError, SpanError
from gpunvme.memory import Device, Span, check_gpu_span, span_of


def checked_span(memory: Any, offset: int, nbytes: int | None, *, writable: bool) -> Span:
    """Turn a destination or source into a span of ``nbytes`` bytes, or of its whole size."""
    if offset < 0:
        raise RangeError(f"offset {offset} is negative")
    span = span_of(memory, writable=writable)
    if nbytes is None:
        return span
    nbytes = operator.index(nbytes)
    if nbytes < 0 or nbytes > span.nbytes:
        what = "destination" if writable else "source"
        raise SpanError(f"the {what} has {span.nbytes} bytes; {nbytes} were asked for")
    return span.part(0, nbytes)


def gathered_span(out: Any, device: Any, total: int, reads: str) -> Span:
    """Turn the destination of a gather into a span of ``total`` bytes; ``reads`` says in words what needs them."""
    span = span_of(out, writable=True)
    if device is not None and span.device != Device.parse(device):
        raise SpanError(f"out is on {span.device}, not on {Device.parse(device)}")
    if span.nbytes < total:
        raise SpanError(f"out has {span.nbytes} bytes; {reads} need {total}")
    span = span.part(0, total)
    if span.device.is_gpu:
        check_gpu_span(span, out)
    return span


def offsets_array(offsets: Any) -> NDArray[np.int64]:
    """Turn the offsets of a gather into an array of our own."""
    if hasattr(offsets, "detach"):  # torch, on any device
        offsets = offsets.detach().cpu().numpy()
    elif hasattr(offsets, "__cuda_array_interface__"):  # CuPy and its like
        offsets = offsets.get()
    array = np.asarray(offsets)
    if array.ndim != 1:
        raise TypeError(f"offsets must have one dimension, not shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"offsets must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise RangeError(f"offset {array.max()} is beyond the end of any file")
    # A copy: nothing may change them while they are used.
    return np.array(array, np.int64, order="C")
