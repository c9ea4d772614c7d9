"""Registers and data structures whose bits a specification fixes, written down as dataclasses.

    @dataclass(frozen=True, slots=True)
    class Register(BitFields):
        en: int = bits(0, 1)
        mps: int = bits(7, 4)

    @dataclass(frozen=True, slots=True)
    class Page(Structure, size=16, name="the page"):
        flags: int = number(0, 1)
        serial: str = text(4, 8)

Every field is a run of bits of one little-endian number, be that a register or 4,096 bytes. Exponents and 0's based
numbers stay as they stand there, properties resolve them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar, NamedTuple, Self

from gpunvme.errors import ControllerError

Bytes = bytes | bytearray | memoryview


class Place(NamedTuple):
    """Where a field is: ``width`` bits from bit ``low`` on; ``read`` makes of its bytes what it is, if no number."""

    low: int
    width: int
    read: Callable[[bytes], Any] | None = None

    def take(self, value: int) -> Any:
        """The field, out of the number that it is a part of."""
        part = value >> self.low & (1 << self.width) - 1
        return part if self.read is None else self.read(part.to_bytes(self.width // 8, "little"))


def bits(low: int, width: int, *, default: int = 0, required: bool = False) -> Any:
    """A number of ``width`` bits from bit ``low`` on; ``required``: who makes one must say it."""
    return field(default=MISSING if required else default, metadata={"place": Place(low, width)})


def number(offset: int, nbytes: int) -> Any:
    """A number of whole bytes."""
    return bits(8 * offset, 8 * nbytes, required=True)


def _field(offset: int, nbytes: int, read: Callable[[bytes], Any]) -> Any:
    return field(metadata={"place": Place(8 * offset, 8 * nbytes, read)})


def _several(offset: int, count: int, nbytes: int, read: Callable[[bytes], Any]) -> Any:
    def read_all(data: bytes) -> tuple[Any, ...]:
        return tuple(read(data[i : i + nbytes]) for i in range(0, len(data), nbytes))

    return _field(offset, count * nbytes, read_all)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _text(data: bytes) -> str:
    # Specified as printable ASCII; what is not becomes an escape, so that a hostile controller cannot steer terminals.
    plain = data.split(b"\0", 1)[0].decode("ascii", "backslashreplace").strip(" ")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in plain)


def numbers(offset: int, count: int, nbytes: int) -> Any:
    """A tuple of ``count`` numbers of ``nbytes`` bytes each."""
    return _several(offset, count, nbytes, _number)


def text(offset: int, nbytes: int) -> Any:
    """ASCII, padded with spaces or ended by NUL."""
    return _field(offset, nbytes, _text)


def texts(offset: int, count: int, nbytes: int) -> Any:
    """A tuple of ``count`` texts of ``nbytes`` bytes each."""
    return _several(offset, count, nbytes, _text)


def raw(offset: int, nbytes: int) -> Any:
    """Bytes as they are."""
    return _field(offset, nbytes, bytes)


def structures(kind: type[Structure], offset: int, count: int) -> Any:
    """A tuple of ``count`` structures."""
    return _several(offset, count, kind.SIZE, kind.decode)


class _Places:
    """Those of the class that it is asked for, made of its fields when it is first asked."""

    def __init__(self) -> None:
        self._known: dict[type[Layout], Mapping[str, Place]] = {}

    def __get__(self, _: Layout | None, cls: type[Layout]) -> Mapping[str, Place]:
        places = self._known.get(cls)
        if places is None:
            places = self._known[cls] = {each.name: each.metadata["place"] for each in fields(cls)}  # type: ignore[arg-type]  # they are dataclasses
        return places


class Layout:
    """Base of such dataclasses. ``PLACES`` is {name: place}."""

    __slots__ = ()
    PLACES: ClassVar[_Places] = _Places()

    @classmethod
    def _take_apart(cls, value: int) -> Self:
        return cls(**{name: place.take(value) for name, place in cls.PLACES.items()})


class BitFields(Layout):
    """Base of registers and dwords; a field of one bit is 0 or 1."""

    __slots__ = ()

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take a number apart; what no field covers is not looked at."""
        return cls._take_apart(value)

    def encode(self) -> int:
        """Put the number together.

        Raises
        ------
        ValueError
            If a field does not fit.
        """
        value = 0
        for name, place in self.PLACES.items():
            part: int = getattr(self, name)
            if not 0 <= part < 1 << place.width:
                raise ValueError(f"{type(self).__name__}.{name} has {place.width} bits: {part} does not fit")
            value |= part << place.low
        return value


class Structure(Layout):
    """Base of data structures. ``SIZE`` is their size in bytes, ``NAME`` what messages call them.

    Whatever the bytes are, decoding them gives a value or a `ControllerError`, and nothing else.
    """

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
        return cls._take_apart(_number(data))
