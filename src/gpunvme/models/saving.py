"""Checkpoints written as the safetensors library writes them, byte for byte, and replaced as a whole."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gpunvme import file as files
from gpunvme import many
from gpunvme.errors import FormatError, SpanError
from gpunvme.models.dtypes import BY_FRAMEWORK_NAME, Dtype
from gpunvme.models.header import MAX_HEADER_BYTES
from gpunvme.replace import Replacement

# Copies (of arrays that are not contiguous) are written once they add up to this many bytes, and then dropped.
_COPIES = 64 << 20


class _Item(NamedTuple):
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    nbytes: int
    tensor: Any


def save_file(
    tensors: Mapping[str, Any], filename: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    The file is written beside its final name and takes that name once all of it is on the disk: a reader sees the
    old file or the new one, and after an error the old one is still there. The bytes are those that the safetensors
    library writes for the same input (which, however, puts several metadata entries in random order).

    Parameters
    ----------
    tensors
        ``{name: tensor}``: numpy arrays, and torch tensors on any device, which have to be contiguous.
        numpy arrays that are not contiguous or not little-endian are copied, a few at a time.
    filename
        The file to write or replace.
    metadata
        Free-form text for the header.

    Raises
    ------
    SpanError
        A value is no tensor, is sparse or not contiguous, or shares memory with another.
    FormatError
        A dtype, a name or the metadata cannot be written to this format.
    FileError
        The file could not be written.
    """
    items = [_describe(name, tensor) for name, tensor in tensors.items()]
    _refuse_shared(item for item in items if _is_torch(item.tensor))
    # The order of the library: alignment descending (as its dtypes are declared), then name.
    items.sort(key=lambda item: (-item.dtype.rank, item.name))
    header = _header(items, metadata, os.fspath(filename))
    with Replacement(filename) as replacement:
        _write(replacement.file, header, items)


def _is_torch(tensor: Any) -> bool:
    torch: Any = sys.modules.get("torch")  # who has a tensor has imported torch
    return torch is not None and isinstance(tensor, torch.Tensor)


def _describe(name: Any, tensor: Any) -> _Item:
    if not isinstance(name, str):
        raise FormatError(f"names are strings, not {type(name).__name__}")
    if name == "__metadata__":
        raise FormatError("__metadata__ is no name for a tensor: the header has it for its text", tensor=name)
    shape = tuple(int(size) for size in getattr(tensor, "shape", ()))
    if _is_torch(tensor):
        _check_torch(name, tensor)
        dtype = BY_FRAMEWORK_NAME.get(str(tensor.dtype).removeprefix("torch."))
        nbytes = tensor.numel() * tensor.element_size()
        if dtype is not None and dtype.name == "F4" and shape:
            shape = (*shape[:-1], shape[-1] * 2)  # torch counts bytes of two elements, the format counts elements
    elif hasattr(tensor, "__array_interface__"):
        dtype = BY_FRAMEWORK_NAME.get(tensor.dtype.name)
        nbytes = tensor.nbytes
    else:
        raise SpanError(f"tensor {name!r} is neither a numpy array nor a torch tensor but a {type(tensor).__name__}")
    if dtype is None:
        raise FormatError(f"the format has no dtype for {tensor.dtype}", tensor=name)
    return _Item(name, dtype, shape, nbytes, tensor)


def _check_torch(name: str, tensor: Any) -> None:
    torch: Any = sys.modules["torch"]
    if tensor.layout != torch.strided:
        raise SpanError(f"tensor {name!r} is sparse; .to_dense() makes one that can be saved")
    if tensor.device.type == "meta":
        raise SpanError(f"tensor {name!r} is on the meta device and has no bytes")
    if not tensor.is_contiguous():
        raise SpanError(f"tensor {name!r} is not contiguous; .contiguous() packs it")


def _refuse_shared(items: Iterable[_Item]) -> None:
    """Refuse torch tensors that overlap in memory: they would be written twice and come back as two."""
    storages: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for item in items:
        if item.nbytes:
            begin = item.tensor.data_ptr()
            where = (str(item.tensor.device), item.tensor.untyped_storage().data_ptr())
            storages.setdefault(where, []).append((begin, begin + item.nbytes, item.name))
    for areas in storages.values():
        areas.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(areas):
            if begin < end:
                raise SpanError(
                    f"tensors {name!r} and {other!r} share memory: save one of them, or a .clone() of the other"
                )


def _header(items: list[_Item], metadata: Mapping[str, str] | None, filename: str) -> bytes:
    content: dict[str, Any] = {}
    if metadata is not None:
        untrusted: Mapping[Any, Any] = metadata
        for key, value in untrusted.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise FormatError(f"metadata[{key!r}] is not text: keys and values are strings", filename=filename)
        content["__metadata__"] = dict(metadata)
    end = 0
    for item in items:
        offsets = [end, end + item.nbytes]
        content[item.name] = {"dtype": item.dtype.name, "shape": item.shape, "data_offsets": offsets}
        end += item.nbytes
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"a name or the metadata is not Unicode text: {error.object[error.start : error.end]!r}", filename=filename
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"the header needs {len(text)} bytes, over the limit of {MAX_HEADER_BYTES}", filename=filename
        )
    return len(text).to_bytes(8, "little") + text


def _flat(tensor: Any) -> Any:
    """Return the bytes of a tensor as contiguous uint8 where it lies."""
    if _is_torch(tensor):
        torch: Any = sys.modules["torch"]
        # Lazy conjugation and negation are flags; the bytes in the file have to be the values.
        return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    import numpy

    array = numpy.ascontiguousarray(tensor)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.byteswap()
    return array.reshape(-1).view(numpy.uint8)


def _write(file: files.File, header: bytes, items: list[_Item]) -> None:
    """Write the header and every tensor: what is on one device in one movement, straight from where it lies."""
    groups: dict[str, list[tuple[files.File, int, Any]]] = {"cpu": [(file, 0, header)]}
    position = len(header)
    copied = 0
    for item in items:
        if item.nbytes:
            flat = _flat(item.tensor)
            device = str(flat.device) if _is_torch(flat) else "cpu"
            groups.setdefault(device, []).append((file, position, flat))
            position += item.nbytes
            copied += 0 if _shares(flat, item.tensor) else item.nbytes
        if copied > _COPIES:
            _write_groups(groups)
            copied = 0
    _write_groups(groups)


def _write_groups(groups: dict[str, list[tuple[files.File, int, Any]]]) -> None:
    for parts in groups.values():
        if parts:
            many.write_parts(parts)
            parts.clear()


def _shares(flat: Any, tensor: Any) -> bool:
    """Whether ``flat`` is the tensor's own memory and not a copy."""
    if _is_torch(flat):
        return bool(flat.data_ptr() == tensor.data_ptr())
    return bool(flat.__array_interface__["data"][0] == tensor.__array_interface__["data"][0])
