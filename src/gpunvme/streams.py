"""CUDA streams and devices of whichever framework the caller uses; none is imported here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gpunvme.errors import SpanError

if TYPE_CHECKING:
    from gpunvme.memory import Device


def stream_handle(stream: Any, memory: Any, device: Device) -> int | None:
    """The ``CUstream`` that a transfer is ordered behind; None for host memory.

    ``stream`` is an int, an object with ``__cuda_stream__`` or one of torch's or CuPy's; None is the
    current stream of the framework that the memory belongs to, else of torch if it uses CUDA, else CUDA's
    default stream.

    Raises
    ------
    SpanError
        If the stream is known to be another GPU's: work there cannot be ordered behind it.
    TypeError
        If it is no stream.
    """
    if not device.is_gpu:
        return None
    if stream is not None and not isinstance(stream, int):
        index = device_of_stream(stream)
        if index is not None and index != device.index:
            raise SpanError(f"the stream is on cuda:{index}, the memory on {device}; use a stream of {device}")
    if stream is None:
        return _framework_stream(memory, device)
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, attribute, None)
        if value is not None:
            return int(value)
    raise TypeError(f"not a CUDA stream: {type(stream).__module__}.{type(stream).__qualname__}")


def device_of_stream(stream: Any) -> int | None:
    """The GPU of torch's, CuPy's and cuda.core's streams; None where a stream does not tell, or is any GPU's."""
    device = getattr(stream, "device_id", None)  # CuPy: -1 for the default streams
    if device is None:
        device = getattr(stream, "device", None)
        device = getattr(device, "index", getattr(device, "device_id", None))
    return device if isinstance(device, int) and device >= 0 else None


def _framework_stream(memory: Any, device: Device) -> int:
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(memory, cupy.ndarray):
        with cupy.cuda.Device(device.index):
            return int(cupy.cuda.get_current_stream().ptr)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_stream(device.index).cuda_stream)
    return 0


def current_gpu() -> int:
    """Tell which GPU ``"cuda"`` means: torch's current one where torch uses CUDA, else 0."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_device())
    return 0
