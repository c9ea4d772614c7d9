"""What is in a region: element type, shape and record size, as callers give them or as their arrays have them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpunvme.errors import CatalogError, SpanError
from gpunvme.models.dtypes import BY_FRAMEWORK_NAME, DTYPES


class Description(NamedTuple):
    """Element type (empty for bytes without one), shape, and record size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    record_size: int


def describe(
    source: Any, nbytes: int, dtype: Any, shape: Sequence[int] | None, record_size: int | None, filename: str
) -> Description:
    """Describe ``nbytes`` bytes of ``source``; what is not given is taken from it, if it is an array or a tensor.

    A record is a row: what one index of the first dimension selects. Without shape it is one byte.

    Raises
    ------
    CatalogError
        If type, shape and size do not fit each other, or the format does not have that type.
    SpanError
        If it is an array whose bytes are in the wrong order.
    """
    if dtype is None and shape is None:
        name, found = _of(source)
    else:
        name, found = _name(dtype, filename), None if shape is None else tuple(map(operator.index, shape))
    if not name:
        if found is not None and shape is not None:
            raise CatalogError("a shape needs a dtype", filename=filename)
        rows = found
        found = ()
    else:
        bits = DTYPES[name].bits
        if found is None:
            found = (nbytes * 8 // bits,)
        if any(extent < 0 for extent in found) or prod(found) * bits != nbytes * 8:
            raise CatalogError(f"{nbytes} bytes are no array of {name} with shape {list(found)}", filename=filename)
        rows = found
    if record_size is None:
        record_size = _row(rows, nbytes)
    record_size = operator.index(record_size)
    if record_size < 1 or nbytes % record_size:
        raise CatalogError(f"{nbytes} bytes are no whole number of records of {record_size}", filename=filename)
    return Description(name, found, record_size)


def _row(shape: tuple[int, ...] | None, nbytes: int) -> int:
    if shape is None or nbytes == 0:
        return 1
    rows = shape[0] if shape else 1
    return nbytes // rows if nbytes % rows == 0 else nbytes  # packed types: a row may end within a byte


def _name(dtype: Any, filename: str) -> str:
    if dtype is None or dtype == "":
        return ""
    text = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    text = str(text).removeprefix("torch.")
    found = DTYPES.get(text) or BY_FRAMEWORK_NAME.get(text)
    if found is None:
        raise CatalogError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPES)}", filename=filename)
    return found.name


def _of(source: Any) -> tuple[str, tuple[int, ...] | None]:
    """Return element type and shape of an array: no type where the format lacks it, but the shape, for its rows."""
    torch = sys.modules.get("torch")
    if isinstance(source, np.ndarray):
        if not source.dtype.isnative and source.dtype.itemsize > 1:
            raise SpanError(f"the array's bytes are in the other order ({source.dtype}); convert it first")
        known = BY_FRAMEWORK_NAME.get(source.dtype.name)
    elif torch is not None and isinstance(source, torch.Tensor):
        known = BY_FRAMEWORK_NAME.get(str(source.dtype).removeprefix("torch."))
        if known is not None and known.name == "F4" and source.dim():
            # torch counts bytes of two elements, the format counts elements.
            return known.name, (*source.shape[:-1], source.shape[-1] * 2)
    else:
        return "", None
    return "" if known is None else known.name, tuple(int(extent) for extent in source.shape)
