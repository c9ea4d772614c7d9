"""The GGUF header, strictly: versions 2 and 3, little-endian, every length checked against the file and a limit.

A file is ``GGUF``, a version, two counts, that many metadata pairs and tensor descriptions, padding, and the tensors'
bytes (``docs/gguf.md`` in the ggml repository). The header has no length of its own, so it is read piece by piece as
it is parsed. Metadata is stepped over and decoded when somebody asks for it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from gpunvme.errors import FileError, FormatError, TruncatedError
from gpunvme.models.gguf_types import GGUF_TYPES, GgufType
from gpunvme.models.header import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Far above what real files have: a vocabulary of 256 Ki tokens with merges and scores takes some 20 MiB.
MAX_HEADER_BYTES = 128 << 20
MAX_TENSORS = 1 << 18
MAX_KEYS = 1 << 16
MAX_NAME_BYTES = (1 << 16) - 1
MAX_DIMENSIONS = 8
MAX_DEPTH = 4  # of arrays in arrays
_MAX_I64 = 2**63 - 1
_FIRST_PIECE = 256 << 10

_STRING, _ARRAY, _BOOL = 8, 9, 7
_KINDS = (0, 1, 2, 3, 4, 5, 6, _BOOL, 10, 11, 12)
_NUMPY = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")
_SCALARS = dict(zip(_KINDS, _NUMPY, strict=True))
_SIZES = {number: np.dtype(name).itemsize for number, name in _SCALARS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32


class GgufTensor(NamedTuple):
    """Where one tensor lies and what it is.

    Attributes
    ----------
    name
        The tensor's name.
    type
        Its element type, which says how it is quantised.
    shape
        Its shape in elements, slowest dimension first, as NumPy and torch have it (the file has it the other way).
    offset
        File offset of its first byte, in bytes from the start of the file.
    nbytes
        Its size in bytes.
    """

    name: str
    type: GgufType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array that it is handed out as: of quantised types the last dimension is bytes of a row."""
        if not self.type.quantised:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // self.type.elements * self.type.nbytes)

    @property
    def info(self) -> TensorInfo:
        """The same in the terms of all checkpoints."""
        return TensorInfo(self.name, self.type.dtype, self.stored_shape, self.offset, self.nbytes)


class GgufHeader(NamedTuple):
    """A whole header; tensors are in the order of the file's bytes."""

    version: int
    alignment: int
    metadata: Metadata
    described: dict[str, GgufTensor]
    data_offset: int

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the terms of all checkpoints."""
        return {name: tensor.info for name, tensor in self.described.items()}


def is_gguf(descriptor: int, filename: str) -> bool:
    """Whether an open file begins like a GGUF file; no safetensors file does."""
    return _pread(descriptor, len(MAGIC), 0, filename) == MAGIC


def read(descriptor: int, size: int, filename: str) -> GgufHeader:
    """Read and check the header of an open file.

    Parameters
    ----------
    descriptor
        An open file descriptor; its position is neither used nor moved.
    size
        The file's size in bytes.
    filename
        The name that errors carry.

    Raises
    ------
    FormatError
        The file is not valid, or of a version or byte order that is not read here; says at which offset.
    FileError
        It could not be read.
    """
    return _Parser(_Text(b"", size, filename, descriptor)).header()


def parse(data: bytes, size: int, filename: str | None = None) -> GgufHeader:
    """Check the header at the start of a file of ``size`` bytes, of which ``data`` is the beginning."""
    return _Parser(_Text(data, size, filename, None)).header()


def _pread(descriptor: int, nbytes: int, offset: int, filename: str | None) -> bytes:
    try:
        return os.pread(descriptor, nbytes, offset)
    except OSError as error:
        raise FileError(error.errno or 0, error.strerror or str(error), filename, offset) from error


class _Text:
    """The header's bytes, read as far as somebody has come."""

    def __init__(self, data: bytes, size: int, filename: str | None, descriptor: int | None) -> None:
        self.data = bytearray(data)
        self.size = size
        self.filename = filename
        self._descriptor = descriptor

    def refuse(self, message: str, offset: int, tensor: str | None = None) -> NoReturn:
        raise FormatError(message, filename=self.filename, offset=offset, tensor=tensor)

    def need(self, at: int, nbytes: int, what: str) -> None:
        """Have the bytes from ``at`` on, or refuse the file."""
        end = at + nbytes
        if end <= len(self.data):
            return
        if end > self.size:
            self.refuse(f"{what} needs {nbytes} bytes and the file ends at {self.size}: truncated, or no header", at)
        if end > MAX_HEADER_BYTES:
            self.refuse(f"{what} reaches byte {end}: a header has {MAX_HEADER_BYTES} bytes at most", at)
        while len(self.data) < end:
            if self._descriptor is None:
                self.refuse(f"{what} lies beyond the bytes at hand", at)
            here = len(self.data)
            room = min(self.size, MAX_HEADER_BYTES) - here
            piece = _pread(self._descriptor, min(room, max(here, _FIRST_PIECE)), here, self.filename)
            if not piece:
                raise TruncatedError(0, "the file became shorter while its header was read", self.filename, here)
            self.data += piece

    def u32(self, at: int, what: str) -> int:
        self.need(at, 4, what)
        return int(_U32.unpack_from(self.data, at)[0])

    def u64(self, at: int, what: str) -> int:
        self.need(at, 8, what)
        return int(_U64.unpack_from(self.data, at)[0])

    def string(self, at: int, what: str, limit: int = MAX_HEADER_BYTES) -> tuple[str, int]:
        """Return the string at ``at``, and where it ends."""
        nbytes = self.u64(at, what)
        if nbytes > limit:
            self.refuse(f"{what} has {nbytes} bytes: {limit} at most", at)
        self.need(at + 8, nbytes, what)
        raw = bytes(self.data[at + 8 : at + 8 + nbytes])
        try:
            return raw.decode(), at + 8 + nbytes
        except UnicodeDecodeError as error:
            self.refuse(f"{what} is not UTF-8: {error.reason}", at + 8 + error.start)


class Metadata(Mapping[str, Any]):
    """The metadata of a file. A value is decoded when it is asked for.

    Numbers and booleans are Python's, strings ``str``, arrays of numbers NumPy arrays, other arrays lists.
    """

    def __init__(self, text: _Text, places: dict[str, tuple[int, int]]) -> None:
        self._text = text
        self._places = places

    def __getitem__(self, key: str) -> Any:
        """Decode one value.

        Raises
        ------
        KeyError
            There is no such key.
        FormatError
            A string in it is not UTF-8, or a boolean neither 0 nor 1.
        """
        kind, at = self._places[key]
        return self._value(kind, at)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def kind(self, key: str) -> int:
        """Number of a value's type (``gguf_metadata_value_type``)."""
        return self._places[key][0]

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        text = self._text
        if kind == _STRING:
            return text.string(at, "a string")
        if kind != _ARRAY:
            return self._numbers(kind, at, 1)[0].item(), at + _SIZES[kind]
        inner, count = text.u32(at, "an array"), text.u64(at + 4, "an array")
        at += 12
        if inner in _SCALARS:
            return self._numbers(inner, at, count), at + count * _SIZES[inner]
        values = []
        for _ in range(count):
            value, at = self._value(inner, at)
            values.append(value)
        return values, at

    def _numbers(self, kind: int, at: int, count: int) -> Any:
        raw = bytes(self._text.data[at : at + count * _SIZES[kind]])
        if kind == _BOOL and raw.strip(b"\0\1"):
            self._text.refuse("a boolean is neither 0 nor 1", at)
        return np.frombuffer(raw, _SCALARS[kind])


class _Parser:
    """Steps over a header once."""

    def __init__(self, text: _Text) -> None:
        self._text = text
        self._at = 0

    def header(self) -> GgufHeader:
        text = self._text
        text.need(0, 24, "the start of a GGUF file")
        if text.data[:4] != MAGIC:
            text.refuse(f"a GGUF file starts with {MAGIC!r}, this one with {bytes(text.data[:4])!r}", 0)
        version = text.u32(4, "the version")
        if version not in VERSIONS:
            if version and not version & 0xFFFF:
                text.refuse("the file is big-endian; make it little-endian with gguf's gguf-convert-endian", 4)
            text.refuse(f"version {version} of GGUF is not read here: {VERSIONS[0]} and {VERSIONS[1]} are", 4)
        tensors, keys = text.u64(8, "the number of tensors"), text.u64(16, "the number of metadata keys")
        for count, most, smallest, what, at in (
            (tensors, MAX_TENSORS, 24, "tensors", 8),
            (keys, MAX_KEYS, 13, "metadata keys", 16),
        ):
            if count > most or count * smallest > text.size:
                text.refuse(f"{count} {what} are more than the file can hold, or than {most}", at)
        self._at = 24
        places = dict(self._pair() for _ in range(keys)) if keys else {}
        if len(places) != keys:
            text.refuse("the metadata has a key twice", 24)
        metadata = Metadata(text, places)
        alignment = self._alignment(metadata)
        described: dict[str, GgufTensor] = {}
        begin = self._at
        for _ in range(tensors):
            at, tensor = self._at, self._tensor(alignment)
            if tensor.name in described:
                text.refuse("the tensor is there twice", at, tensor.name)
            described[tensor.name] = tensor
        start = -(-self._at // alignment) * alignment
        placed = [tensor._replace(offset=start + tensor.offset) for tensor in described.values()]
        placed.sort(key=lambda tensor: tensor.offset)
        self._check_layout(placed, begin)
        del text.data[self._at :]  # what was read ahead
        return GgufHeader(version, alignment, metadata, {tensor.name: tensor for tensor in placed}, start)

    def _pair(self) -> tuple[str, tuple[int, int]]:
        key, at = self._text.string(self._at, "a metadata key", MAX_NAME_BYTES)
        kind = self._text.u32(at, f"the type of {key[:80]!r}")
        self._at = self._past(kind, at + 4, key[:80], 0)
        return key, (kind, at + 4)

    def _past(self, kind: int, at: int, key: str, depth: int) -> int:
        """Where the value of this type at ``at`` ends."""
        text, what = self._text, f"the value of {key!r}"
        if kind == _STRING:
            nbytes = text.u64(at, what)
            text.need(at + 8, nbytes, what)
            return at + 8 + nbytes
        if kind in _SIZES:
            text.need(at, _SIZES[kind], what)
            return at + _SIZES[kind]
        if kind != _ARRAY:
            text.refuse(f"{what} has the unknown type {kind}", at - 4)
        if depth == MAX_DEPTH:
            text.refuse(f"{what} nests more than {MAX_DEPTH} levels deep", at)
        inner, count = text.u32(at, what), text.u64(at + 4, what)
        at += 12
        if inner in _SIZES:
            text.need(at, count * _SIZES[inner], what)
            return at + count * _SIZES[inner]
        if inner not in (_STRING, _ARRAY):
            text.refuse(f"{what} is an array of the unknown type {inner}", at - 12)
        if count * (8 if inner == _STRING else 12) > text.size - at:
            text.refuse(f"{what} has {count} elements, more than the file can hold", at - 8)
        if inner == _STRING:
            return self._past_strings(at, count, what)
        for _ in range(count):
            at = self._past(inner, at, key, depth + 1)
        return at

    def _past_strings(self, at: int, count: int, what: str) -> int:
        """Where so many strings end: a vocabulary has hundreds of thousands."""
        text, data, length = self._text, self._text.data, _U64.unpack_from
        have = len(data)
        for _ in range(count):
            if at + 8 > have:
                text.need(at, 8, what)
                have = len(data)
            end = at + 8 + int(length(data, at)[0])
            if end > have:
                text.need(at + 8, end - at - 8, what)
                have = len(data)
            at = end
        return at

    def _alignment(self, metadata: Metadata) -> int:
        if _ALIGNMENT_KEY not in metadata:
            return _DEFAULT_ALIGNMENT
        kind, at = metadata._places[_ALIGNMENT_KEY]
        alignment = metadata[_ALIGNMENT_KEY] if kind == 4 else 0
        if alignment <= 0 or alignment & (alignment - 1):
            self._text.refuse(f"{_ALIGNMENT_KEY} is no 32-bit power of two", at)
        return int(alignment)

    def _tensor(self, alignment: int) -> GgufTensor:
        text, begin = self._text, self._at
        name, at = text.string(begin, "a tensor's name", MAX_NAME_BYTES)
        dimensions = text.u32(at, "a tensor's dimensions")
        if dimensions > MAX_DIMENSIONS:
            text.refuse(f"{dimensions} dimensions: {MAX_DIMENSIONS} at most", at, name)
        at += 4
        text.need(at, 8 * dimensions + 12, "a tensor's description")
        shape = struct.unpack_from(f"<{dimensions}Q", text.data, at)[::-1]
        at += 8 * dimensions
        number, offset = text.u32(at, "a tensor's type"), text.u64(at + 4, "a tensor's offset")
        kind = GGUF_TYPES.get(number)
        if kind is None:
            text.refuse(f"unknown tensor type {number}", at, name)
        elements = 1
        for size in shape:
            elements *= size
        if elements > _MAX_I64 or any(size > _MAX_I64 for size in shape):
            text.refuse(f"the shape {list(shape)} overflows 64 bits", begin, name)
        if kind.quantised and (not shape or shape[-1] % kind.elements):
            text.refuse(f"the rows of {list(shape)} are no whole blocks of {kind.elements} elements", begin, name)
        if offset % alignment:
            text.refuse(f"offset {offset} is not aligned to {alignment} bytes", at + 4, name)
        self._at = at + 12
        return GgufTensor(name, kind, shape, offset, elements // kind.elements * kind.nbytes)

    def _check_layout(self, tensors: list[GgufTensor], begin: int) -> None:
        end, before = 0, ""
        for tensor in tensors:
            if tensor.offset + tensor.nbytes > self._text.size:
                self._text.refuse(
                    f"bytes {tensor.offset} to {tensor.offset + tensor.nbytes} are not in the file, which has "
                    f"{self._text.size}: it is truncated, or the header is wrong",
                    begin,
                    tensor.name,
                )
            if not tensor.nbytes:
                continue
            if tensor.offset < end:
                self._text.refuse(f"it overlaps tensor {before!r}, which ends at {end}", begin, tensor.name)
            end, before = tensor.offset + tensor.nbytes, tensor.name
