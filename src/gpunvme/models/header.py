"""The safetensors header, strictly: what the safetensors library accepts is accepted, all else is refused.

A file is eight bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes without a
hole. The rules beyond JSON are those of the library (Rust, serde), found by reading it and held to by differential
tests; where one looks odd, a comment says so. Only the header is ever read here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from gpunvme.errors import FileError, FormatError, TruncatedError
from gpunvme.models.dtypes import DTYPES, Dtype
from gpunvme.models.plain_header import Entry, plain_entries

MAX_HEADER_BYTES = 100_000_000
_MAX_DEPTH = 127  # serde_json refuses the 128th open bracket
_MAX_U64 = 2**64 - 1

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKET = re.compile(r"[^][{}]+")
_NUMBER = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?")
# Group 2 matches half a surrogate pair; the alternatives before it step over whole pairs and over other escapes.
_ESCAPE = re.compile(
    r"\\(?:(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class TensorInfo(NamedTuple):  # not a dataclass: that costs twice as much for each of thousands
    """Where one tensor lies and what it is.

    Attributes
    ----------
    name
        The tensor's name.
    dtype
        Its element type.
    shape
        Its shape in elements, as the header says it (of packed types too).
    offset
        File offset of its first byte, in bytes from the start of the file.
    nbytes
        Its size in bytes.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header.

    Attributes
    ----------
    tensors
        Every tensor by name, in the order of the file's bytes.
    metadata
        The file's free-form text, or None when it has none.
    data_offset
        File offset of the first tensor byte.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] | None
    data_offset: int


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that duplicate keys are still visible."""


def read(descriptor: int, size: int, filename: str) -> Header:
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
        The file is not a valid checkpoint.
    FileError
        It could not be read.
    """
    prefix = _pread(descriptor, min(8, size), 0, filename)
    nbytes = _header_bytes(prefix, size, filename)
    return parse(prefix + _pread(descriptor, nbytes, 8, filename), size, filename)


def parse(data: bytes, size: int, filename: str | None = None) -> Header:
    """Check the header at the start of a file.

    Parameters
    ----------
    data
        The file's first bytes: at least the eight of the length and the header.
    size
        The whole file's size in bytes, which the tensors have to cover exactly.
    filename
        The name that errors carry.

    Raises
    ------
    FormatError
        The header is not valid; the message says what is wrong, and where.
    """
    nbytes = _header_bytes(data[:8], size, filename)
    text = _text(data[8 : 8 + nbytes], filename)
    found = plain_entries(text)
    tensors, metadata = found if found is not None else _entries(_decode(text, filename), filename)
    end = _check_layout(tensors, filename)
    start = 8 + nbytes
    if start + end != size:
        raise FormatError(
            f"the tensors end at byte {start + end}, but the file has {size} bytes: "
            + ("it is truncated" if start + end > size else "bytes follow that belong to no tensor"),
            filename=filename,
            offset=min(start + end, size),
        )
    placed = {
        name: TensorInfo(name, dtype, shape, start + begin, stop - begin)
        for name, (dtype, shape, (begin, stop)) in tensors.items()
    }
    return Header(placed, metadata, start)


def _pread(descriptor: int, nbytes: int, offset: int, filename: str) -> bytes:
    pieces = []
    while nbytes:
        try:
            piece = os.pread(descriptor, nbytes, offset)
        except OSError as error:
            raise FileError(error.errno or 0, error.strerror or str(error), filename, offset) from error
        if not piece:
            raise TruncatedError(0, "the file became shorter while its header was read", filename, offset)
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _header_bytes(prefix: bytes, size: int, filename: str | None) -> int:
    if size < 8 or len(prefix) < 8:
        raise FormatError(
            f"a safetensors file starts with 8 bytes of header length, this one has {size} bytes in all",
            filename=filename,
            offset=0,
        )
    nbytes = int.from_bytes(prefix, "little")
    if nbytes > MAX_HEADER_BYTES:
        raise FormatError(
            f"header length {nbytes} is over the limit of {MAX_HEADER_BYTES} bytes", filename=filename, offset=0
        )
    if 8 + nbytes > size:
        raise FormatError(
            f"the header of {nbytes} bytes does not fit into the file's {size} bytes", filename=filename, offset=0
        )
    return nbytes


def _text(raw: bytes, filename: str | None) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"the header is not UTF-8: {error.reason}", filename=filename, offset=8 + error.start
        ) from None


class _RefusedError(Exception):
    """A JSON value that the stdlib parser takes and the format does not: its text, and what is wrong with it."""


def _decode(text: str, filename: str | None) -> _Object:
    """Decode the header's JSON as serde_json does."""

    def refuse(message: str, position: int | None) -> NoReturn:
        offset = None if position is None else 8 + len(text[:position].encode())
        raise FormatError(message, filename=filename, offset=offset) from None

    if _depth(text) > _MAX_DEPTH:
        refuse(f"the header nests more than {_MAX_DEPTH} levels deep", 0)
    if "\\u" in text:
        for escape in _ESCAPE.finditer(text):
            if escape.group(2):
                refuse(f"half a surrogate pair (\\{escape.group(2)}) in a string", escape.start())
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        refuse(f"the header is not JSON: {error.msg}", error.pos)
    except _RefusedError as error:
        token, problem = error.args
        refuse(f"the header is not JSON: {token[:40]} {problem}", text.find(token) if text.count(token) == 1 else None)
    except RecursionError:
        refuse("the header nests too deep for the stack that is left", 0)
    if type(value) is not _Object:
        refuse(f"the header is {_kind(value)}, expected an object", 0)
    return value


def _depth(text: str) -> int:
    """How deep the brackets of ``text`` nest, found without recursion so that no header can exhaust the stack."""
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text)).replace("{", "[").replace("}", "]")
    depth = 0
    while brackets and depth <= _MAX_DEPTH:
        outer = brackets.replace("[]", "")  # one round takes the innermost level away
        if outer == brackets:
            break  # not balanced: the decoder says where, unless that nests too deep for it
        brackets = outer
        depth += 1
    return depth + len(brackets)


def _integer(text: str) -> int | float:
    # "-0" is a float to serde_json; so is what does not fit 64 bits, and then it has to be a finite one.
    if len(text) < 19 and text != "-0":
        return int(text)
    if len(text) < 21 and text != "-0" and -(2**63) <= int(text) <= _MAX_U64:
        return int(text)
    return _float(text)


def _float(text: str) -> float:
    """Check a number as serde_json reads it: 64 bits of significand times a power of ten, which has to be finite.

    That differs from rounding correctly only within a few parts in 10**16 of the largest double.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise _RefusedError(text, "is not a number")
    whole, fraction, power = match.group(1), match.group(2) or "", match.group(3) or "0"
    significand = exponent = 0
    for position, digit in enumerate(whole):
        if significand * 10 + int(digit) > _MAX_U64:
            exponent = len(whole) - position
            break
        significand = significand * 10 + int(digit)
    if not significand:
        exponent -= len(fraction) - len(fraction.lstrip("0"))
        fraction = fraction.lstrip("0")
    for digit in fraction:
        if significand * 10 + int(digit) > _MAX_U64:
            break
        significand = significand * 10 + int(digit)
        exponent -= 1
    # An exponent of more digits than any header has bytes decides alone.
    digits = power.lstrip("+-0")[:12] or "0"
    exponent += -int(digits) if power.startswith("-") else int(digits)
    if significand and exponent > 0 and (exponent > 308 or significand * float(f"1e{exponent}") == float("inf")):
        raise _RefusedError(text, "is out of range")
    return 0.0  # nobody asks for the value


def _constant(text: str) -> NoReturn:
    raise _RefusedError(text, "is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _entries(pairs: _Object, filename: str | None) -> tuple[dict[str, Entry], dict[str, str] | None]:
    """Turn the top-level pairs into typed entries ordered by offset, and the metadata."""
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    seen = False
    for name, value in pairs:
        if name != "__metadata__":
            tensors[name] = _entry(name, value, filename)  # of a name that is there twice, the last one counts
            continue
        if seen:
            raise FormatError("the header has __metadata__ twice", filename=filename)
        seen = True
        metadata = None if value is None else dict(_strings(value, filename))
    ordered = sorted(tensors.items(), key=lambda item: item[1][2])
    return dict(ordered), metadata


def _strings(value: Any, filename: str | None) -> Iterator[tuple[str, str]]:
    if type(value) is not _Object:
        raise FormatError(f"__metadata__ is {_kind(value)}, expected an object of strings", filename=filename)
    for key, text in value:
        if type(text) is not str:
            raise FormatError(f"__metadata__[{key!r}] is {_kind(text)}, expected a string", filename=filename)
        yield key, text


_FIELDS = ("dtype", "shape", "data_offsets")


def _entry(name: str, value: Any, filename: str | None) -> Entry:
    fields: dict[str, Any] = {}
    if type(value) is _Object:
        for key, field in value:
            if key in fields:
                raise FormatError(f"{key} is there twice", filename=filename, tensor=name)
            if key in _FIELDS:  # others are ignored
                fields[key] = field
        missing = [field for field in _FIELDS if field not in fields]
        if missing:
            raise FormatError(f"{', '.join(missing)} missing", filename=filename, tensor=name)
    elif type(value) is list and len(value) == 3:  # the library takes [dtype, shape, data_offsets] as well
        fields = dict(zip(_FIELDS, value, strict=True))
    else:
        raise FormatError(f"a tensor is described by an object, not by {_kind(value)}", filename=filename, tensor=name)
    offsets = _integers("data_offsets", fields["data_offsets"], name, filename)
    if len(offsets) != 2:
        raise FormatError(f"data_offsets has {len(offsets)} numbers, expected 2", filename=filename, tensor=name)
    return (
        _dtype(fields["dtype"], name, filename),
        _integers("shape", fields["shape"], name, filename),
        (offsets[0], offsets[1]),
    )


def _dtype(value: Any, name: str, filename: str | None) -> Dtype:
    if type(value) is _Object and len(value) == 1 and value[0][1] is None:
        value = value[0][0]  # the library takes {"F32": null} as well
    if type(value) is not str:
        raise FormatError(f"dtype is {_kind(value)}, expected a string", filename=filename, tensor=name)
    dtype = DTYPES.get(value)
    if dtype is None:
        raise FormatError(f"unknown dtype {value[:40]!r}", filename=filename, tensor=name)
    return dtype


def _integers(field: str, value: Any, name: str, filename: str | None) -> tuple[int, ...]:
    if type(value) is not list:
        raise FormatError(f"{field} is {_kind(value)}, expected a list of integers", filename=filename, tensor=name)
    for number in value:
        if type(number) is not int or number < 0:
            what = str(number) if type(number) is int else _kind(number)
            raise FormatError(f"{field} holds {what}, expected integers >= 0", filename=filename, tensor=name)
    return tuple(value)


def _check_layout(tensors: dict[str, Entry], filename: str | None) -> int:
    """Check that the tensors, ordered by offset, cover the data without hole or overlap; return where they end."""
    end = 0
    for name, (dtype, shape, (begin, stop)) in tensors.items():
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise FormatError(
                f"data_offsets [{begin}, {stop}] {what}, which ends at {end}", filename=filename, tensor=name
            )
        if stop < begin:
            raise FormatError(f"data_offsets [{begin}, {stop}] ends before it begins", filename=filename, tensor=name)
        elements = 1
        for dimension in shape:
            elements *= dimension
            if elements > _MAX_U64:
                break
        if elements * dtype.bits > _MAX_U64:
            raise FormatError("the size of shape and dtype overflows 64 bits", filename=filename, tensor=name)
        if elements * dtype.bits % 8:
            raise FormatError(
                f"{elements} elements of {dtype.bits} bits do not fill whole bytes", filename=filename, tensor=name
            )
        if stop - begin != elements * dtype.bits // 8:
            raise FormatError(
                f"shape {list(shape)} of {dtype.name} needs {elements * dtype.bits // 8} bytes, "
                f"data_offsets [{begin}, {stop}] has {stop - begin}",
                filename=filename,
                tensor=name,
            )
        end = stop
    return end


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
