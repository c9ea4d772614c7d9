"""Data structures whose bytes a specification fixes, written down as dataclasses and decoded from bytes.

    @dataclass(frozen=True, slots=True)
    class Example(Structure, size=16, name="Example"):
        flags: int = number(0, 1)
        serial: str = text(4, 8)

Whatever the bytes are, decoding them gives a value or a `ControllerError`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field, fields
from typing import Any, ClassVar, NamedTuple, Self

from gpunvme.errors import ControllerError

Bytes = bytes | bytearray | memoryview


class _Place(NamedTuple):
    offset: int
    nbytes: int
    decode: Callable[[bytes], Any]


def _field(offset: int, nbytes: int, decode: Callable[[bytes], Any]) -> Any:
    return field(metadata={"place": _Place(offset, nbytes, decode)})


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _text(data: bytes) -> str:
    # Specified as printable ASCII; what is not becomes an escape, so that a hostile controller cannot steer terminals.
    plain = data.split(b"\0", 1)[0].decode("ascii", "backslashreplace").strip(" ")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in plain)


def number(offset: int, nbytes: int) -> Any:
    """A little-endian number."""
    return _field(offset, nbytes, _number)


def numbers(offset: int, count: int, nbytes: int) -> Any:
    """A tuple of ``count`` little-endian numbers of ``nbytes`` bytes each."""

    def decode(data: bytes) -> tuple[int, ...]:
        return tuple(_number(data[i : i + nbytes]) for i in range(0, len(data), nbytes))

    return _field(offset, count * nbytes, decode)


def text(offset: int, nbytes: int) -> Any:
    """ASCII, padded with spaces or ended by NUL."""
    return _field(offset, nbytes, _text)


def texts(offset: int, count: int, nbytes: int) -> Any:
    """A tuple of ``count`` texts of ``nbytes`` bytes each."""

    def decode(data: bytes) -> tuple[str, ...]:
        return tuple(_text(data[i : i + nbytes]) for i in range(0, len(data), nbytes))

    return _field(offset, count * nbytes, decode)


def raw(offset: int, nbytes: int) -> Any:
    """Bytes as they are."""
    return _field(offset, nbytes, bytes)


def structures(kind: type[Structure], offset: int, count: int) -> Any:
    """A tuple of ``count`` structures."""

    def decode(data: bytes) -> tuple[Structure, ...]:
        return tuple(kind.decode(data[i : i + kind.SIZE]) for i in range(0, len(data), kind.SIZE))

    return _field(offset, count * kind.SIZE, decode)


class Structure:
    """Base of such dataclasses. ``SIZE`` is their size in bytes, ``NAME`` what messages call them."""

    __slots__ = ()
    SIZE: ClassVar[int]
    NAME: ClassVar[str]

    def __init_subclass__(cls, size: int | None = None, name: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        if size is not None:  # a dataclass with slots is made twice, the second time without arguments
            cls.SIZE = size
            cls.NAME = name or cls.__name__

    @classmethod
    def decode(cls, data: Bytes) -> Self:
        """Take bytes apart; what is behind the structure's end is not looked at.

        Raises
        ------
        ControllerError
            If there are too few.
        """
        data = bytes(data[: cls.SIZE])
        if len(data) < cls.SIZE:
            raise ControllerError(f"{cls.NAME} has {cls.SIZE} bytes, the controller returned {len(data)}")
        return cls(**{name: place.decode(data[place.offset :][: place.nbytes]) for name, place in _places(cls)})

    @classmethod
    def layout(cls) -> Iterator[tuple[str, int, int]]:
        """Name, offset and size in bytes of every field."""
        for name, place in _places(cls):
            yield name, place.offset, place.nbytes


def _places(cls: type[Structure]) -> Iterator[tuple[str, _Place]]:
    return ((f.name, f.metadata["place"]) for f in fields(cls))  # type: ignore[arg-type]  # they are dataclasses
