"""Where the tensors of a `LayerLoader` come from: checkpoints, or extents that somebody else knows."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gpunvme import file as files
from gpunvme.errors import FormatError, RangeError
from gpunvme.models.dtypes import BY_FRAMEWORK_NAME, DTYPES, Dtype
from gpunvme.models.header import TensorInfo
from gpunvme.models.index import Checkpoint, Entry
from gpunvme.paths.nvme import NamespaceSource


class Extent(NamedTuple):
    """Where the bytes of one tensor are. A plain tuple in this order does as well.

    Attributes
    ----------
    file
        A `gpunvme.File` (stays the caller's), or whatever `gpunvme.open` takes: a name, ``nvme+URI``, a descriptor, a
        `gpunvme.nvme.Namespace`.
    offset
        Offset of the first byte in it, in bytes.
    nbytes
        Size in bytes.
    dtype
        Element type: its name in safetensors files (``"BF16"``), its name in torch or NumPy, or such a dtype; None for
        plain bytes.
    shape
        Shape in elements; None for one dimension.
    """

    file: Any
    offset: int
    nbytes: int
    dtype: Any = None
    shape: tuple[int, ...] | None = None


@runtime_checkable
class LayerSource(Protocol):
    """What a `LayerLoader` reads if it is no checkpoint: anything with this method, or a mapping like its result.

    Where the bytes may be overwritten later, there is a method ``checker()`` besides: it returns a function that is
    called after each read, and raises if the bytes may not be those of the extents any more. A `gpunvme.Catalog` has
    both.
    """

    def extents(self) -> Mapping[str, tuple[Any, ...]]:
        """Return ``{name: (file, offset, nbytes, dtype, shape)}``, see `Extent`, in the order of the bytes."""


class OpenSource:
    """The open files of a source and every tensor in them.

    Parameters
    ----------
    source
        A checkpoint as `load_file` takes it, a `LayerSource`, or a mapping of extents.
    path
        Name of the path that must carry every transfer, also those of files that are open already.

    Attributes
    ----------
    tensors
        ``{name: entry}`` in the order of the source.
    check
        Raises if what was read may not be what the source said that it is.

    Raises
    ------
    FormatError
        A checkpoint is not valid, or an extent contradicts itself.
    RangeError
        An extent lies outside its file.
    FileError, NvmeError, PathError
        As for `gpunvme.open`.
    """

    def __init__(self, source: Any, path: str) -> None:
        self._opened: list[Any] = []
        self._by_source: dict[Any, files.File] = {}
        self.check: Callable[[], None] = _nothing
        try:
            if isinstance(source, Mapping) or hasattr(source, "extents"):
                checker = getattr(source, "checker", None)
                if checker is not None:
                    self.check = checker()
                described = source if isinstance(source, Mapping) else source.extents()
                self.tensors = {name: self._entry(name, Extent(*extent), path) for name, extent in described.items()}
            elif isinstance(source, str) and source.startswith("nvme+"):
                raise FormatError(
                    "a raw namespace does not say what is where: pass gpunvme.Catalog(…) of it, if there is one, or "
                    "{name: (file, offset, nbytes, dtype, shape)}",
                    filename=source,
                )
            else:
                checkpoint = Checkpoint(source, path)
                self._opened.append(checkpoint)
                self.tensors = checkpoint.tensors
        except BaseException:
            self.close()
            raise

    def _file(self, file: Any, path: str) -> files.File:
        if isinstance(file, files.File) and path in ("auto", file._forced):
            return file
        key = os.fspath(file) if isinstance(file, os.PathLike) else file
        opened = self._by_source.get(key)
        if opened is None:
            opened = _opened_again(file, path) if isinstance(file, files.File) else files.open(file, path=path)
            self._by_source[key] = opened
            self._opened.append(opened)
        return opened

    def _entry(self, name: str, extent: Extent, path: str) -> Entry:
        file = self._file(extent.file, path)
        offset, nbytes = operator.index(extent.offset), operator.index(extent.nbytes)
        if offset < 0 or nbytes < 0 or offset + nbytes > file.size:
            raise RangeError(
                f"tensor {name!r}: bytes {offset} to {offset + nbytes} are not in {file.name!r}, which has {file.size}"
            )
        dtype = _dtype(extent.dtype, name, file.name)
        shape = tuple(operator.index(size) for size in extent.shape) if extent.shape is not None else None
        if shape is None:
            shape = (nbytes * 8 // dtype.bits,)
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.bits != nbytes * 8:
            raise FormatError(
                f"shape {list(shape)} of {dtype.name} does not have {nbytes} bytes", filename=file.name, tensor=name
            )
        return Entry(file, file.name, TensorInfo(name, dtype, shape, offset, nbytes))

    def close(self) -> None:
        """Close what was opened here."""
        while self._opened:
            self._opened.pop().close()


def _nothing() -> None:
    """What is checked where nobody changes anything."""


def _opened_again(file: files.File, path: str) -> files.File:
    """Open what a file has open, for another path."""
    source = file._file
    if isinstance(source, NamespaceSource):
        return files.File(source.namespace, path=path)
    return files.File(source.fileno(), path=path, name=file.name)


def _dtype(dtype: Any, name: str, filename: str) -> Dtype:
    if dtype is None:
        return DTYPES["U8"]
    if isinstance(dtype, Dtype):
        return dtype
    text = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    text = str(text).removeprefix("torch.")
    found = DTYPES.get(text) or BY_FRAMEWORK_NAME.get(text)
    if found is None:
        raise FormatError(f"unknown dtype {dtype!r}", filename=filename, tensor=name)
    return found
