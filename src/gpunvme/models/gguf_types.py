"""The element types that a GGUF file can hold: how many elements make a block, and how many bytes that is.

The numbers are those of ``ggml_type`` in ``ggml.h``; sizes are those of its block structures.
"""

from __future__ import annotations

from typing import NamedTuple

from gpunvme.models.dtypes import DTYPES, Dtype


class GgufType(NamedTuple):
    """One element type.

    Attributes
    ----------
    name
        Its name in ``ggml``, e.g. ``"Q4_K"``.
    number
        Its number in files.
    elements
        Elements in a block; 1 for types that are not quantised.
    nbytes
        Bytes of a block.
    """

    name: str
    number: int
    elements: int
    nbytes: int

    @property
    def quantised(self) -> bool:
        """Whether several elements share a block, so that tensors of it are handed out as bytes."""
        return self.elements > 1

    @property
    def dtype(self) -> Dtype:
        """What arrays of it are made of: the type itself, or U8 for quantised ones."""
        return DTYPES["U8" if self.quantised else self.name]


_TABLE = (
    *(("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22)),
    *(("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110)),
    *(("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292)),
    *(("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50)),
    *(("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136)),
    *(("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8)),
    *(("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66)),
    *(("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18)),
)

#: Every type by its number in files. Numbers that are missing were given up by ``ggml``.
GGUF_TYPES: dict[int, GgufType] = {number: GgufType(name, number, *sizes) for name, number, *sizes in _TABLE}
