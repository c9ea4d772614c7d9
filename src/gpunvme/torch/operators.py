"""Reads and writes as PyTorch operators, which torch.compile can keep in its graphs."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from gpunvme.errors import FileError, SpanError
from gpunvme.file import File
from gpunvme.file import open as open_file
from gpunvme.paths.nvme import NamespaceSource, is_namespace

if TYPE_CHECKING:
    from gpunvme.nvme.namespace import Namespace

# Operators take numbers and text, so what is open is handed to them by its number.
_ATTRIBUTE = "_torch_operator_source"
_PREFIX = "open:"
_numbers = itertools.count(1)
_open: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(source: File | Namespace) -> str:
    """Give an open file or namespace a name that operators can take; done by the first read or write with it.

    Call it before ``torch.compile(…, fullgraph=True)`` traces a function that uses ``source``. The name is valid in
    this process for as long as ``source`` is alive.
    """
    known = getattr(source, _ATTRIBUTE, None)
    if known is not None and _open.get(known) is source:
        return str(known)
    if not isinstance(source, File) and not is_namespace(source):
        raise TypeError(f"a source is a path, a URI, a gpunvme.File or a Namespace, not a {type(source).__name__}")
    name = f"{_PREFIX}{next(_numbers)}"
    setattr(source, _ATTRIBUTE, name)
    _open[name] = source
    return name


def read_into_tensor(
    tensor: torch.Tensor,
    source: File | Namespace | str | os.PathLike[str],
    offset: int = 0,
    *,
    lba: int | None = None,
) -> torch.Tensor:
    """Fill a tensor from a file or namespace, ordered behind the work on its current stream.

    The operator ``torch.ops.gpunvme.read_into_tensor``; the bytes are there when it returns. Not recorded by autograd.

    Parameters
    ----------
    tensor
        Contiguous, on the CPU or a GPU. Its size says how much is read.
    source
        An open file or namespace; or a path or ``nvme+URI``, which is opened for this read.
    offset
        Where to start, in bytes.
    lba
        For a namespace, by whatever it was opened: the block to start at, in place of ``offset``.

    Returns
    -------
    torch.Tensor
        ``tensor``.

    Raises
    ------
    RangeError, SpanError, FileError, CudaError, NvmeError
        As `File.read_into` and `Namespace.read_into`.
    """
    name, start, blocks = _place(source, offset, lba)
    torch.ops.gpunvme.read_into_tensor(tensor.detach(), name, start, blocks)
    return tensor


def write_from_tensor(
    tensor: torch.Tensor,
    target: File | Namespace | str | os.PathLike[str],
    offset: int = 0,
    *,
    lba: int | None = None,
    fsync: bool = False,
) -> None:
    """Write a tensor to a file or namespace, ordered behind the work on its current stream.

    The operator ``torch.ops.gpunvme.write_from_tensor``. It is declared to change the tensor, though it does not: a
    compiler must neither drop it nor move it behind what changes the tensor later.

    Parameters
    ----------
    tensor
        Contiguous, on the CPU or a GPU.
    target
        A file or namespace that is open for writing; or a path or ``nvme+URI`` of one that exists, opened for this
        write.
    offset, lba
        As for `read_into_tensor`.
    fsync
        Whether the bytes are on the drive when it returns.

    Raises
    ------
    RangeError, SpanError, FileError, CudaError, NvmeError
        As `File.write_from` and `Namespace.write_from`.
    """
    name, start, blocks = _place(target, offset, lba)
    torch.ops.gpunvme.write_from_tensor(tensor.detach(), name, start, blocks, fsync)


def _place(source: Any, offset: int, lba: int | None) -> tuple[str, int, bool]:
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name.startswith(_PREFIX):  # a file that is called so is no registered one
            name = os.path.join(os.curdir, name)
    else:
        name = getattr(source, _ATTRIBUTE, None) or register(source)
    if lba is None:
        return name, offset, False
    if offset != 0:
        raise ValueError("offset and lba both say where to start: give one")
    return name, lba, True


def _source(name: str, mode: str) -> tuple[Any, bool]:
    """Return what a name stands for, and whether it was opened just now."""
    if not name.startswith(_PREFIX):
        return open_file(name, mode), True
    source = _open.get(name)
    if source is None:
        raise FileError(9, "the file or namespace that was registered so is gone", name)
    return source, False


def _start(source: Any, start: int, blocks: bool) -> int:
    """Return where to start, in what the source counts in: a namespace counts blocks, a file bytes."""
    if isinstance(source, File):
        if not blocks:
            return start
        inner = source._file
        if not isinstance(inner, NamespaceSource):
            raise SpanError(f"{source!r} has no blocks: say where to start by offset=, in bytes")
        return start * inner.namespace.block_size
    if blocks:
        return start
    if start % source.block_size:
        raise SpanError(f"offset {start} is not at a block of {source.block_size} bytes of {source!r}")
    return int(start // source.block_size)


def _read(tensor: torch.Tensor, source: str, start: int, blocks: bool) -> None:
    opened, ours = _source(source, "r")
    try:
        opened.read_into(tensor, _start(opened, start, blocks))
    finally:
        if ours:
            opened.close()


def _write(tensor: torch.Tensor, target: str, start: int, blocks: bool, fsync: bool) -> None:
    opened, ours = _source(target, "r+")
    try:
        durable = {"fua" if hasattr(opened, "block_size") else "fsync": fsync}
        opened.write_from(tensor, _start(opened, start, blocks), **durable)
    finally:
        if ours:
            opened.close()


def _nothing(*_: Any) -> None:
    """What a fake tensor gets: shapes do not change, and nothing is read or written while a graph is made."""


torch.library.custom_op("gpunvme::read_into_tensor", _read, mutates_args=("tensor",)).register_fake(_nothing)
torch.library.custom_op("gpunvme::write_from_tensor", _write, mutates_args=("tensor",)).register_fake(_nothing)
