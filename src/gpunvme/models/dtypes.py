"""The element types that a safetensors file can hold, and what torch and numpy call them."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One element type.

    Attributes
    ----------
    name
        The name in the header, e.g. ``"BF16"``.
    bits
        Size of one element in bits; less than 8 for packed types.
    numpy
        Name of the numpy dtype, or None. Names that numpy itself lacks come from ``ml_dtypes``.
    torch
        Name of the dtype in the ``torch`` module, or None.
    rank
        Position in the order that files are laid out in: by rank descending, then by tensor name.
    """

    name: str
    bits: int
    numpy: str | None
    torch: str | None
    rank: int

    @property
    def floating(self) -> bool:
        """Whether ``dtype=`` converts tensors of this type: every float of at least 8 bits."""
        return self.name.startswith(("F", "BF")) and self.bits >= 8

    @property
    def builtin(self) -> bool:
        """Whether numpy knows this type without ``ml_dtypes``."""
        return self.numpy is not None and not self.name.startswith(("BF16", "F8_"))


# In the order of increasing rank, which is the order of the declaration in the safetensors library.
_TABLE: tuple[tuple[str, int, str | None, str | None], ...] = (
    ("BOOL", 8, "bool", "bool"),
    ("F4", 4, None, "float4_e2m1fn_x2"),
    ("F6_E2M3", 6, None, None),
    ("F6_E3M2", 6, None, None),
    ("U8", 8, "uint8", "uint8"),
    ("I8", 8, "int8", "int8"),
    ("F8_E5M2", 8, "float8_e5m2", "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn", "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float8_e5m2fnuz"),
    ("I16", 16, "int16", "int16"),
    ("U16", 16, "uint16", "uint16"),
    ("F16", 16, "float16", "float16"),
    ("BF16", 16, "bfloat16", "bfloat16"),
    ("I32", 32, "int32", "int32"),
    ("U32", 32, "uint32", "uint32"),
    ("F32", 32, "float32", "float32"),
    ("C64", 64, "complex64", "complex64"),
    ("F64", 64, "float64", "float64"),
    ("I64", 64, "int64", "int64"),
    ("U64", 64, "uint64", "uint64"),
)

#: Every type by its name in the header.
DTYPES: dict[str, Dtype] = {
    name: Dtype(name, bits, numpy, torch, rank) for rank, (name, bits, numpy, torch) in enumerate(_TABLE)
}

#: Every type by the name that torch, numpy and ml_dtypes give it (they agree on all that both have).
BY_FRAMEWORK_NAME: dict[str, Dtype] = {
    framework_name: dtype
    for dtype in DTYPES.values()
    for framework_name in (dtype.torch, dtype.numpy)
    if framework_name
}
