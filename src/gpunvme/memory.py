"""Memory: what a destination or source is, and memory of our own.

A `Span` is a plain range of memory: address, size, device. Everything that a transfer can read into or
write from is turned into one here, and refused here if it cannot be: torch tensors, NumPy and CuPy arrays,
whatever speaks DLPack, ``__cuda_array_interface__`` or the buffer protocol, and spans for raw addresses.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gpunvme import _native
from gpunvme.errors import CudaError, SpanError
from gpunvme.freeing import free_gpu, free_what_waits
from gpunvme.streams import current_gpu

_PAGE = 4096
_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_CUDA_HOST, _DLPACK_CUDA_MANAGED = 1, 2, 3, 13


class Device(NamedTuple):
    """Where memory is: ``Device("cpu", 0)`` or ``Device("cuda", N)``; `str` gives ``"cpu"`` or ``"cuda:N"``."""

    kind: str
    index: int  # type: ignore[assignment]  # in place of tuple.index

    @classmethod
    def parse(cls, device: Any) -> Device:
        """Normalise ``"cpu"``, ``"cuda"``, ``"cuda:N"``, an int N (a GPU) or a ``torch.device``.

        ``"cuda"`` without a number is torch's current device where torch uses CUDA already, else GPU 0.

        Raises
        ------
        ValueError
            If it is none of these.
        """
        if isinstance(device, Device):
            return device
        if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
            return cls("cuda", device)
        text = str(device)
        if text == "cpu":
            return CPU
        if text == "cuda":
            return cls("cuda", current_gpu())
        kind, _, number = text.partition(":")
        if kind == "cuda" and number.isdecimal():
            return cls("cuda", int(number))
        raise ValueError(f"unknown device {device!r}: use 'cpu', 'cuda', 'cuda:N', N or a torch.device")

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    @property
    def native(self) -> int:
        """The engine's number for it: -1 is host memory."""
        return self.index if self.is_gpu else -1

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.is_gpu else "cpu"


CPU = Device("cpu", 0)


@dataclass(slots=True)  # not frozen: that costs two microseconds for each of thousands of tensors
class Span:
    """A contiguous range of memory.

    Parameters
    ----------
    ptr
        Address of the first byte.
    nbytes
        Size in bytes.
    device
        Where it is, in any form that `Device.parse` takes.
    writable
        Whether it may be read into.
    owner
        Kept alive as long as a transfer uses the memory.
    """

    ptr: int
    nbytes: int
    device: Device = CPU
    writable: bool = True
    owner: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.device) is not Device:
            self.device = Device.parse(self.device)
        if self.nbytes < 0 or self.ptr < 0 or (self.ptr == 0 and self.nbytes > 0):
            raise SpanError(f"{self.nbytes} bytes at address {self.ptr:#x} is no range of memory")

    def part(self, offset: int, nbytes: int) -> Span:
        """``nbytes`` bytes of it from ``offset`` on."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise SpanError(f"bytes {offset} to {offset + nbytes} are outside of a span of {self.nbytes} bytes")
        return Span(self.ptr + offset, nbytes, self.device, self.writable, self.owner)


class Buffer:
    """Memory that gpunvme allocated, as an array of bytes.

    NumPy, torch, CuPy and others take it without a copy: it has ``__array_interface__`` (host) or
    ``__cuda_array_interface__`` (GPU), and DLPack.
    """

    def __init__(self, span: Span, shape: tuple[int, ...]) -> None:
        self._span = span
        self._shape = shape

    @classmethod
    def empty(
        cls, nbytes: int, device: Any = "cpu", *, shape: tuple[int, ...] | None = None, congruent_to: int = 0
    ) -> Self:
        """Allocate ``nbytes`` bytes, not initialised.

        Parameters
        ----------
        nbytes
            Size in bytes.
        device
            Where; see `Device.parse`.
        shape
            Shape of the array of bytes; ``(nbytes,)`` if None.
        congruent_to
            Host memory starts at an address equal to this modulo 4096. With the file offset that will be
            read, O_DIRECT can read straight into the buffer.

        Raises
        ------
        CudaError
            If CUDA cannot be used or has no memory left.
        """
        where = Device.parse(device)
        shape = (nbytes,) if shape is None else shape
        if not where.is_gpu:
            memory = np.empty(nbytes + _PAGE, np.uint8)
            address = address_of(memory)
            start = (congruent_to - address) % _PAGE
            return cls(Span(address + start, nbytes, where, True, memory), shape)
        free_what_waits()
        try:
            pointer = _native.gpu_allocate(where.index, max(nbytes, 1))
        except _native.Failure as failure:
            raise CudaError(f"cannot allocate {nbytes} bytes on {where}: {failure.args[1]}") from None
        owner = _GpuMemory()
        weakref.finalize(owner, free_gpu, where.index, pointer).atexit = False
        return cls(Span(pointer, nbytes, where, True, owner), shape)

    @property
    def ptr(self) -> int:
        """Address of the first byte."""
        return self._span.ptr

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._span.nbytes

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return str(self._span.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array of bytes."""
        return self._shape

    @property
    def span(self) -> Span:
        """The memory as a `Span` that keeps it alive."""
        return self._span

    def numpy(self) -> NDArray[np.uint8]:
        """The bytes as a NumPy array: a view of host memory, a copy of GPU memory."""
        if not self._span.device.is_gpu:
            return np.asarray(self)
        host = np.empty(self._shape, np.uint8)
        if self.nbytes:
            _native.gpu_copy(self._span.device.index, self.ptr, address_of(host), self.nbytes, False)
        return host

    def _interface(self) -> dict[str, Any]:
        return {"shape": self._shape, "typestr": "|u1", "data": (self.ptr, False), "strides": None, "version": 3}

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self._span.device.is_gpu:
            raise AttributeError("GPU memory has no __array_interface__; use numpy() for a copy")
        return self._interface()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if not self._span.device.is_gpu:
            raise AttributeError("host memory has no __cuda_array_interface__")
        return self._interface()

    def __dlpack_device__(self) -> tuple[int, int]:
        device = self._span.device
        return (_DLPACK_CUDA, device.index) if device.is_gpu else (_DLPACK_CPU, 0)

    def __dlpack__(self, **options: Any) -> Any:
        if not self._span.device.is_gpu:
            return np.asarray(self).__dlpack__(**options)
        elsewhere = options.get("dl_device") not in (None, self.__dlpack_device__())
        if elsewhere or options.get("copy"):
            raise BufferError(f"{self!r} hands out its own memory only, no copy of it")
        # Whatever filled it was waited for: nothing is left to be ordered behind a stream.
        return _native.gpu_array(self.ptr, list(self._shape), self._span.device.index, self)

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        return f"<gpunvme.Buffer of {self.nbytes} bytes on {self.device}>"


class HasDLPack(Protocol):
    """Whatever hands out its memory by DLPack."""

    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


def span_of(memory: Any, *, writable: bool) -> Span:
    """Turn a tensor, an array, a buffer or a span into a `Span` that keeps it alive.

    Parameters
    ----------
    memory
        A torch tensor, a NumPy or CuPy array, anything with ``__cuda_array_interface__``, DLPack or the buffer
        protocol, a `Buffer` or a `Span`.
    writable
        Whether it will be read into.

    Raises
    ------
    SpanError
        If it is not contiguous, is read-only although it will be written, or is no memory at all.
    """
    span = _span(memory)
    if writable and not span.writable:
        raise SpanError(f"the destination is read-only: {_name(memory)}")
    return span


def check_gpu_span(span: Span, memory: Any) -> None:
    """Check with the CUDA driver that a span lies in one allocation on the GPU that it names.

    Parameters
    ----------
    span
        The span.
    memory
        What it was made of. A torch tensor is taken at its word: checking thousands of them costs milliseconds.

    Raises
    ------
    CudaError
        If CUDA cannot be used here.
    SpanError
        If the memory is elsewhere or ends sooner.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(memory, torch.Tensor):
        return
    reason = _native.cuda_unavailable_reason()
    if reason:
        raise CudaError(f"{span.device} cannot be used: {reason}")
    if span.nbytes == 0:
        return
    actual = _native.cuda_device_of(span.ptr)
    if actual != span.device.index:
        found = f"on cuda:{actual}" if actual >= 0 else "not GPU memory"
        raise SpanError(f"address {span.ptr:#x} was said to be on {span.device}, and is {found}")
    after = _native.gpu_bytes_after(span.device.index, span.ptr)
    if after < span.nbytes:
        raise SpanError(f"{span.nbytes} bytes at {span.ptr:#x} reach past the end of their allocation ({after} bytes)")


def address_of(array: NDArray[Any]) -> int:
    """Address of an array's first byte."""
    return int(array.__array_interface__["data"][0])


def _span(memory: Any) -> Span:
    if isinstance(memory, Span):
        return memory
    if isinstance(memory, Buffer):
        return memory.span
    if isinstance(memory, np.ndarray):
        return _span_of_numpy(memory)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(memory, torch.Tensor):
        return _span_of_torch(memory, torch)
    interface = getattr(memory, "__cuda_array_interface__", None)
    if interface is not None:
        return _span_of_cuda_array(memory, interface)
    if hasattr(memory, "__dlpack__"):
        return _span_of_dlpack(memory)
    try:
        view = memoryview(memory)
    except TypeError:
        raise SpanError(f"not memory: {_name(memory)} is no tensor, array, buffer or gpunvme.Span") from None
    if not view.c_contiguous:
        raise SpanError(f"not contiguous: {_name(memory)}; use a contiguous copy")
    if view.nbytes == 0:
        return Span(0, 0, CPU, not view.readonly, memory)
    array = np.frombuffer(view.cast("B"), np.uint8)
    return Span(address_of(array), view.nbytes, CPU, not view.readonly, array)


def _span_of_numpy(array: NDArray[Any]) -> Span:
    if array.dtype.hasobject:
        raise SpanError(f"an array of Python objects ({array.dtype}) has no bytes of its own to move")
    if not array.flags.c_contiguous:
        raise SpanError(f"not contiguous: array of shape {array.shape}, strides {array.strides}; use a contiguous copy")
    return Span(address_of(array), array.nbytes, CPU, bool(array.flags.writeable), array)


def _span_of_torch(tensor: Any, torch: Any) -> Span:
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise SpanError(f"not plain memory on a CPU or GPU: a {tensor.layout} tensor on {tensor.device}")
    if not tensor.is_contiguous():
        raise SpanError(f"not contiguous: tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    if tensor.is_conj() or tensor.is_neg():
        raise SpanError("the tensor is a lazy conjugate or negative view; resolve it first")
    device = Device("cuda", tensor.device.index) if tensor.device.type == "cuda" else CPU
    return Span(tensor.data_ptr(), tensor.numel() * tensor.element_size(), device, True, tensor)


def _span_of_cuda_array(memory: Any, interface: dict[str, Any]) -> Span:
    itemsize = np.dtype(interface["typestr"]).itemsize
    shape: Sequence[int] = interface["shape"]
    strides = interface.get("strides")
    nbytes = prod(shape) * itemsize
    if strides is not None and nbytes:
        expected = itemsize
        for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
            if extent != 1 and stride != expected:
                raise SpanError(f"not contiguous: array of shape {tuple(shape)}, strides {tuple(strides)}")
            expected *= extent
    pointer, read_only = interface["data"]
    if nbytes == 0:
        return Span(0, 0, Device("cuda", current_gpu()), not read_only, memory)
    reason = _native.cuda_unavailable_reason()
    if reason:
        raise CudaError(f"a GPU array cannot be used: {reason}")
    index = _native.cuda_device_of(pointer)
    if index < 0:
        raise SpanError(f"address {pointer:#x} of {_name(memory)} is not GPU memory")
    return Span(pointer, nbytes, Device("cuda", index), not read_only, memory)


def _span_of_dlpack(memory: HasDLPack) -> Span:
    kind, index = memory.__dlpack_device__()
    # -1: no synchronisation by the exporter; the transfer orders itself behind the stream.
    options: dict[str, Any] = {"stream": -1} if kind == _DLPACK_CUDA else {}
    try:
        capsule = memory.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # an exporter from before DLPack 1.0
        capsule = memory.__dlpack__(**options)
    except BufferError as error:
        raise SpanError(f"{_name(memory)} does not hand out its memory: {error}") from None
    address, nbytes, kind, index, contiguous, read_only = _native.inspect_dlpack(capsule)
    if not contiguous:
        raise SpanError(f"not contiguous: {_name(memory)}; use a contiguous copy")
    if kind in (_DLPACK_CPU, _DLPACK_CUDA_HOST):
        return Span(address if nbytes else 0, nbytes, CPU, not read_only, (memory, capsule))
    if kind == _DLPACK_CUDA:
        return Span(address if nbytes else 0, nbytes, Device("cuda", index), not read_only, (memory, capsule))
    raise SpanError(f"DLPack device type {kind} is neither host nor CUDA memory")


class _GpuMemory:
    """Frees its allocation when nobody uses it any more."""

    __slots__ = ("__weakref__",)


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
