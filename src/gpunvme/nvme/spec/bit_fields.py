"""Registers and dwords whose bits a specification fixes, written down as dataclasses.

    @dataclass(frozen=True, slots=True)
    class Example(BitFields):
        en: int = bits(0, 1)
        mps: int = bits(7, 4)

A field of one bit is 0 or 1; exponents and 0's based numbers stay as they stand in the register, properties resolve
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar, Self


def bits(low: int, width: int, *, default: int = 0, required: bool = False) -> Any:
    """A field of ``width`` bits from bit ``low`` on; ``required``: who makes one must say it."""
    return field(default=MISSING if required else default, metadata={"bits": (low, width)})


class _Bits:
    """The layout of the class that it is asked for, made of its fields when it is first asked."""

    def __init__(self) -> None:
        self._known: dict[type[BitFields], Mapping[str, tuple[int, int]]] = {}

    def __get__(self, _: BitFields | None, cls: type[BitFields]) -> Mapping[str, tuple[int, int]]:
        layout = self._known.get(cls)
        if layout is None:
            layout = self._known[cls] = {each.name: each.metadata["bits"] for each in fields(cls)}  # type: ignore[arg-type]  # they are dataclasses
        return layout


class BitFields:
    """Base of such dataclasses. ``BITS`` is {name: (lowest bit, number of bits)}."""

    __slots__ = ()
    BITS: ClassVar[_Bits] = _Bits()

    @classmethod
    def decode(cls, value: int) -> Self:
        """Take a number apart; what no field covers is not looked at."""
        return cls(**{name: value >> low & (1 << width) - 1 for name, (low, width) in cls.BITS.items()})

    def encode(self) -> int:
        """Put the number together.

        Raises
        ------
        ValueError
            If a field does not fit.
        """
        value = 0
        for name, (low, width) in self.BITS.items():
            part: int = getattr(self, name)
            if not 0 <= part < 1 << width:
                raise ValueError(f"{type(self).__name__}.{name} has {width} bits: {part} does not fit")
            value |= part << low
        return value
