"""Where tensors come from: torch and numpy behind one face. Neither is imported before it is needed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import mmap
from collections.abc import Callable
from typing import Any, Protocol

from gpunvme import _native
from gpunvme.errors import CudaError, FormatError, SpanError
from gpunvme.memory import CPU, Device, address_of
from gpunvme.models.dtypes import BY_FRAMEWORK_NAME, DTYPES, Dtype
from gpunvme.models.header import TensorInfo

_PAGE = 4096
# Below this, a mapping of its own costs more than reading through a page-locked slot.
_OWN_MAPPING = 1 << 20
# From here on the kernel is asked for huge pages: first touch is then not bound by page faults.
_HUGE = 4 << 20


class Framework(Protocol):
    """What loading needs of torch or numpy, for one device."""

    name: str
    device: Device

    def dtype(self, info: TensorInfo, filename: str) -> Any:
        """Return the framework's dtype for a tensor, or raise `FormatError` naming both."""

    def convertible(self, dtype: Any) -> Any:
        """Return the framework's dtype for a caller's ``dtype=``, which has to be a floating one."""

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the shape of the tensor that holds ``info``."""

    def empty(self, shape: tuple[int, ...], dtype: Any, nbytes: int, offset: int = 0) -> Any:
        """Allocate a tensor that owns its memory, to be filled from file offset ``offset``."""

    def address(self, tensor: Any) -> int:
        """Return where a contiguous tensor's bytes are."""

    def scratch(self, nbytes: int) -> Any:
        """Allocate page-aligned uint8 staging memory."""

    def view(self, memory: Any, at: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """Return bytes ``at`` to ``at + nbytes`` of `scratch` memory as a tensor."""

    def convert(self, destination: Any, first: int, source: Any, dtype: Any) -> None:
        """Convert staged bytes ``source`` of ``dtype`` into ``destination``, from its element ``first`` on."""

    def finish(self) -> None:
        """Wait until every `convert` has been carried out."""


def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def choose(framework: str | None, device: Any) -> Framework:
    """Return the framework adapter for a caller's ``framework=`` and ``device=``.

    Raises
    ------
    ValueError
        The framework is unknown.
    SpanError
        numpy cannot hold tensors on that device.
    CudaError
        torch cannot use that GPU.
    """
    if framework is None:
        framework = "pt" if has_torch() else "np"
    where = Device.parse("cpu" if device is None else device)
    if framework in ("pt", "torch", "pytorch"):
        return _Torch(where)
    if framework in ("np", "numpy"):
        if str(where) != "cpu":
            raise SpanError(f'framework="np" holds tensors in host memory, not on {where}; use framework="pt"')
        return _Numpy()
    raise ValueError(f'framework is "pt" or "np", not {framework!r}')


def _host_memory(nbytes: int, offset: int) -> tuple[mmap.mmap, int]:
    """Map private memory for ``nbytes`` and say where in it to start, so that O_DIRECT can read ``offset`` into it.

    O_DIRECT reads straight into memory whose address has the same remainder by the page size as the file offset.
    """
    skip = offset % _PAGE
    mapping = mmap.mmap(-1, nbytes + skip, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages; small ones work as well
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, skip


def _named(dtype: Any, resolve: Callable[[Dtype], Any]) -> Any:
    """Turn what callers write for a floating dtype (a name, a torch or numpy dtype) into the framework's own."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    name = str(name).removeprefix("torch.")
    known = DTYPES.get(name) or BY_FRAMEWORK_NAME.get(name)
    if known is None or not known.floating:
        raise ValueError(f"dtype= takes a floating dtype such as 'bfloat16', not {dtype!r}")
    found = resolve(known)
    if found is None:
        raise ValueError(f"dtype={dtype!r} is not available here: {known.name} needs ml_dtypes or a newer framework")
    return found


class _Torch:
    name = "pt"

    def __init__(self, device: Device) -> None:
        import torch

        self._torch: Any = torch
        self._device: Any = torch.device(str(device))  # not a string: that is parsed again for every tensor
        self.device = device
        if device.is_gpu:
            self._check_gpu(device)

    def _check_gpu(self, device: Device) -> None:
        cuda = self._torch.cuda
        if not cuda.is_available():
            why = _native.cuda_unavailable_reason() or f"torch {self._torch.__version__} cannot use CUDA here"
            raise CudaError(f"{device} cannot be used: {why}")
        if device.index >= cuda.device_count():
            raise CudaError(f"there is no {device}: torch sees {cuda.device_count()} GPU(s)")

    def _resolve(self, dtype: Dtype) -> Any:
        return getattr(self._torch, dtype.torch, None) if dtype.torch is not None else None

    def dtype(self, info: TensorInfo, filename: str) -> Any:
        found = self._resolve(info.dtype)
        if found is None:
            raise FormatError(
                f"torch {self._torch.__version__} has no dtype for {info.dtype.name}",
                filename=filename,
                tensor=info.name,
            )
        if info.dtype.name == "F4" and (not info.shape or info.shape[-1] % 2):
            raise FormatError(
                f"torch packs two F4 elements into a byte, so the last dimension of {list(info.shape)} has to be even",
                filename=filename,
                tensor=info.name,
            )
        return found

    def convertible(self, dtype: Any) -> Any:
        return _named(dtype, self._resolve)

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        return (*info.shape[:-1], info.shape[-1] // 2) if info.dtype.name == "F4" else info.shape

    def empty(self, shape: tuple[int, ...], dtype: Any, nbytes: int, offset: int = 0) -> Any:
        torch = self._torch
        if self.device.is_gpu or nbytes < _OWN_MAPPING or offset % dtype.itemsize:
            return torch.empty(shape, dtype=dtype, device=self._device)
        # set_ makes a tensor that is no view of another and whose storage is exactly its own bytes.
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        return tensor.set_(self._mapped(nbytes, offset).untyped_storage(), 0, shape)

    def address(self, tensor: Any) -> int:
        return int(tensor.data_ptr())

    def _mapped(self, nbytes: int, offset: int) -> Any:
        mapping, skip = _host_memory(nbytes, offset)
        return self._torch.frombuffer(mapping, dtype=self._torch.uint8, count=nbytes, offset=skip)

    def scratch(self, nbytes: int) -> Any:
        if not self.device.is_gpu:
            return self._mapped(nbytes, 0)
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)

    def view(self, memory: Any, at: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        return memory[at : at + nbytes].view(dtype).view(shape)

    def convert(self, destination: Any, first: int, source: Any, dtype: Any) -> None:
        values = source.view(dtype)
        destination.view(-1)[first : first + values.numel()].copy_(values)

    def finish(self) -> None:
        if self.device.is_gpu:
            self._torch.cuda.current_stream(self._device).synchronize()


class _Numpy:
    name = "np"
    device = CPU

    def __init__(self) -> None:
        import numpy

        self._numpy: Any = numpy

    def _resolve(self, dtype: Dtype) -> Any:
        if dtype.numpy is None:
            return None
        if dtype.builtin:
            return self._numpy.dtype(dtype.numpy)
        if importlib.util.find_spec("ml_dtypes") is None:
            return None
        found = getattr(importlib.import_module("ml_dtypes"), dtype.numpy, None)
        return self._numpy.dtype(found) if found is not None else None

    def dtype(self, info: TensorInfo, filename: str) -> Any:
        found = self._resolve(info.dtype)
        if found is None:
            help_ = "install ml_dtypes" if info.dtype.numpy else "use File.read for its bytes"
            raise FormatError(
                f'numpy has no dtype for {info.dtype.name}: {help_}, or use framework="pt"',
                filename=filename,
                tensor=info.name,
            )
        return found

    def convertible(self, dtype: Any) -> Any:
        return _named(dtype, self._resolve)

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        return info.shape

    def empty(self, shape: tuple[int, ...], dtype: Any, nbytes: int, offset: int = 0) -> Any:
        if nbytes < _OWN_MAPPING or offset % dtype.itemsize:
            return self._numpy.empty(shape, dtype)
        mapping, skip = _host_memory(nbytes, offset)
        return self._numpy.ndarray(shape, dtype, buffer=mapping, offset=skip)

    def address(self, tensor: Any) -> int:
        return address_of(tensor)

    def scratch(self, nbytes: int) -> Any:
        return self._numpy.frombuffer(_host_memory(nbytes, 0)[0], self._numpy.uint8, nbytes)

    def view(self, memory: Any, at: int, nbytes: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        return memory[at : at + nbytes].view(dtype).reshape(shape)

    def convert(self, destination: Any, first: int, source: Any, dtype: Any) -> None:
        values = source.view(dtype)
        with self._numpy.errstate(over="ignore", under="ignore", invalid="ignore"):  # as silent as torch is
            destination.reshape(-1)[first : first + values.size] = values

    def finish(self) -> None:
        pass
