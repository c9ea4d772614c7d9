"""Parts of a tensor, read without reading the rest of it more than is worth it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpunvme import file as files
from gpunvme import many
from gpunvme.models.frameworks import Framework
from gpunvme.models.index import Entry

# One more read costs about as much as reading this many bytes on; with less between two runs, one read takes both.
_GAP = 32 << 10
# What lies between the wanted elements is read in pieces of at most this many bytes.
_PIECE = 32 << 20


class Axis(NamedTuple):
    """The elements wanted along one dimension: ``start``, ``start + step``, ... ``size`` of them."""

    start: int
    size: int
    step: int


class Selection(NamedTuple):
    """A parsed index.

    Attributes
    ----------
    axes
        One `Axis` for each dimension of the tensor.
    shape
        Shape of the result: integers take their dimension away, None adds one.
    """

    axes: tuple[Axis, ...]
    shape: tuple[int, ...]


def parse(index: Any, shape: tuple[int, ...]) -> Selection | None:
    """Parse a basic index: integers, slices, one ellipsis, None, or a tuple of them.

    Returns
    -------
    Selection or None
        None where the index is of another kind (a list, a mask, an array), which only the framework knows.

    Raises
    ------
    IndexError
        An integer is out of range, or there are more indices than dimensions.
    ValueError
        A slice's step is not positive, as in torch and in the safetensors library.
    """
    items = index if isinstance(index, tuple) else (index,)
    ellipses = sum(item is Ellipsis for item in items)
    if ellipses > 1 or not all(_basic(item) for item in items):
        return None
    given = sum(item is not None and item is not Ellipsis for item in items)
    if given > len(shape):
        raise IndexError(f"{given} indices for a tensor of {len(shape)} dimensions")
    if not ellipses:
        items = (*items, Ellipsis)
    axes: list[Axis] = []
    result: list[int] = []
    for item in items:
        if item is None:
            result.append(1)
        elif item is Ellipsis:
            whole = shape[len(axes) : len(axes) + len(shape) - given]
            axes += [Axis(0, size, 1) for size in whole]
            result += whole
        elif isinstance(item, slice):
            axes.append(_axis(item, shape[len(axes)]))
            result.append(axes[-1].size)
        else:
            axes.append(Axis(_position(item, shape[len(axes)], len(axes)), 1, 1))
    return Selection(tuple(axes), tuple(result))


def _basic(item: Any) -> bool:
    if item is None or item is Ellipsis or isinstance(item, slice):
        return True
    # A boolean is a mask to torch and numpy; an array with one element is an index of its own kind.
    return hasattr(item, "__index__") and not isinstance(item, bool) and getattr(item, "ndim", 0) == 0


def _axis(item: slice, size: int) -> Axis:
    if item.step is not None and operator.index(item.step) <= 0:
        raise ValueError(f"a slice's step has to be positive, not {item.step}")
    start, stop, step = item.indices(size)
    return Axis(start, max(0, -((start - stop) // step)), step)


def _position(item: Any, size: int, dimension: int) -> int:
    position = operator.index(item)
    if not -size <= position < size:
        raise IndexError(f"index {position} is out of range for dimension {dimension} of size {size}")
    return position % size


def read(entry: Entry, selection: Selection, adapter: Framework) -> Any:
    """Read a selection into a new contiguous tensor."""
    counts = tuple(axis.size for axis in selection.axes)
    dtype = adapter.dtype(entry.info, entry.filename)
    nbytes = math.prod(counts) * dtype.itemsize
    reader = _Reader(entry, selection.axes, dtype, adapter)
    out = adapter.empty(counts, dtype, nbytes, reader.first_byte)
    if nbytes:
        reader.read(out)
    return out if selection.shape == counts else out.reshape(selection.shape)


class _Reader:
    """Reads the selected elements of one tensor."""

    def __init__(self, entry: Entry, axes: tuple[Axis, ...], dtype: Any, adapter: Framework) -> None:
        self._entry = entry
        self._axes = axes
        self._dtype = dtype
        self._adapter = adapter
        self._shape = entry.info.shape
        sizes = itertools.accumulate(reversed(self._shape), operator.mul, initial=dtype.itemsize)
        self._strides = list(sizes)[-2::-1]  # bytes from one element to the next, for each dimension
        self.first_byte = entry.info.offset + sum(
            axis.start * stride for axis, stride in zip(axes, self._strides, strict=True)
        )
        self._parts: list[tuple[files.File, int, Any]] = []
        self._scratch: Any = None

    def read(self, out: Any) -> None:
        """Fill ``out``, which is contiguous and has one dimension for each axis."""
        self._block(0, self._entry.info.offset, out.reshape(-1))
        if len(self._parts) == 1:  # the most common index: some rows
            file, offset, part = self._parts[0]
            file.read_into(part, offset)
        elif self._parts:
            many.read_many(self._parts)

    def _block(self, dimension: int, offset: int, out: Any) -> None:
        """Read what is selected of the block at ``offset`` that has the dimensions from ``dimension`` on.

        ``out`` is flat and receives exactly these elements.
        """
        axes, strides = self._axes[dimension:], self._strides[dimension:]
        outer = self._outer(dimension)
        runs = math.prod(axis.size for axis in axes[:outer])
        run = len(out) // runs
        run_bytes = run * self._dtype.itemsize
        span = self._dtype.itemsize + sum(
            (axis.size - 1) * axis.step * stride for axis, stride in zip(axes, strides, strict=True)
        )
        if runs == 1 or runs * max(run_bytes, _GAP) <= span:
            tail = sum(axis.start * stride for axis, stride in zip(axes[outer:], strides[outer:], strict=True))
            positions = itertools.product(
                *(_offsets(axis, stride) for axis, stride in zip(axes[:outer], strides[:outer], strict=True))
            )
            for number, steps in enumerate(positions):
                first = number * run
                self._parts.append((self._entry.file, offset + sum(steps) + tail, out[first : first + run]))
        elif strides[0] > _PIECE:
            rows = len(out) // axes[0].size
            for number, position in enumerate(_offsets(axes[0], strides[0])):
                self._block(dimension + 1, offset + position, out[number * rows : (number + 1) * rows])
        else:
            self._cover(dimension, offset, out)

    def _outer(self, dimension: int) -> int:
        """How many dimensions from ``dimension`` on have to be stepped through; the rest is one run of bytes."""
        axes, shape = self._axes[dimension:], self._shape[dimension:]
        outer = len(axes)
        while outer and axes[outer - 1] == Axis(0, shape[outer - 1], 1):
            outer -= 1
        if outer and (axes[outer - 1].step == 1 or axes[outer - 1].size == 1):
            outer -= 1
        return outer

    def _cover(self, dimension: int, offset: int, out: Any) -> None:
        """Read whole rows, in pieces, and copy what is selected of them."""
        axis, row = self._axes[dimension], self._strides[dimension]
        inside = self._axes[dimension + 1 :]
        wanted = (slice(None, None, axis.step), *(slice(a.start, a.start + a.size * a.step, a.step) for a in inside))
        rows = out.reshape([inner.size for inner in self._axes[dimension:]])
        at_once = max(1, _PIECE // (row * axis.step))
        for first in range(0, axis.size, at_once):
            count = min(at_once, axis.size - first)
            covered = (count - 1) * axis.step + 1
            piece = self._staging(covered * row)
            self._entry.file.read_into(piece, offset + (axis.start + first * axis.step) * row)
            values = piece.view(self._dtype).reshape((covered, *self._shape[dimension + 1 :]))
            rows[first : first + count] = values[wanted]
            self._adapter.finish()  # the copy has read the staging memory, which the next piece goes into

    def _staging(self, nbytes: int) -> Any:
        if self._scratch is None or len(self._scratch) < nbytes:
            self._scratch = self._adapter.scratch(nbytes)
        return self._scratch[:nbytes]


def _offsets(axis: Axis, stride: int) -> Iterator[int]:
    return (axis.start * stride + number * axis.step * stride for number in range(axis.size))
