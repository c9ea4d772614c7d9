"""A table of features on disk as a dataset: a batch is one gather."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gpunvme.errors import FormatError, RangeError
from gpunvme.file import File


class Rows(list[torch.Tensor]):
    """The rows of a batch; ``batch`` is all of them as one tensor, which they are views of."""

    def __init__(self, batch: torch.Tensor) -> None:
        super().__init__(batch.unbind(0))
        self.batch = batch


class FeatureTable(Dataset[torch.Tensor]):  # type: ignore[misc]  # torch is not looked into
    """A map-style dataset of rows of one shape and type in a file, or in a namespace.

    `DataLoader` asks for whole batches (``__getitems__``), each of which is one `File.gather`; with
    ``collate_fn=FeatureTable.collate`` the batch is handed on as it was read, else it is copied once. It can be
    pickled; each process opens the file for itself. In forked workers use host memory: CUDA does not survive a fork.

    Parameters
    ----------
    source
        A path or ``nvme+URI``.
    shape
        Of one row; ``()`` for a number a row.
    dtype
        Of the elements, as they lie in the file (little-endian).
    offset
        Where the first row is, in bytes.
    rows
        How many; as many as the file has if None.
    device
        Where batches go.

    Raises
    ------
    FileError
        If it cannot be opened.
    FormatError
        If ``rows`` is None and the rest of the file is no whole number of rows.
    RangeError
        If the file has fewer rows.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        shape: Sequence[int] | int,
        dtype: torch.dtype = torch.float32,
        *,
        offset: int = 0,
        rows: int | None = None,
        device: Any = "cpu",
    ) -> None:
        self.source = os.fspath(source)
        self.shape = (shape,) if isinstance(shape, int) else tuple(operator.index(each) for each in shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self.row_bytes = math.prod(self.shape) * dtype.itemsize
        if offset < 0 or any(each <= 0 for each in self.shape) or (rows is not None and rows < 0):
            raise ValueError(f"offset {offset}, shape {self.shape}, rows {rows}: must not be negative, nor a row empty")
        self._offset = offset
        self._opened: tuple[int, File] | None = None
        size = self._file.size
        if rows is None:
            rows, rest = divmod(size - offset, self.row_bytes)
            if rest or size < offset:
                raise FormatError(
                    f"{size} bytes from offset {offset} on are no whole number of rows of {self.row_bytes} bytes; "
                    "rows= says how many there are",
                    filename=self.source,
                )
        if offset + rows * self.row_bytes > size:
            raise RangeError(f"{self.source!r} has {size} bytes; {rows} rows end at {offset + rows * self.row_bytes}")
        self._rows = rows

    @classmethod
    def from_npy(cls, path: str | os.PathLike[str], *, device: Any = "cpu") -> FeatureTable:
        """Take the table of a ``.npy`` file, in C order and little-endian.

        Raises
        ------
        FormatError
            If it is no such file.
        FileError
            If it cannot be opened.
        """
        with open(path, "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[version](file)
                element = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
            except (ValueError, KeyError, TypeError, EOFError) as error:
                raise FormatError(f"not a table in NumPy's format: {error}", filename=os.fspath(path)) from None
            if (fortran and len(shape) > 1) or not shape or (dtype.byteorder == ">" and dtype.itemsize > 1):
                raise FormatError("the table must be in C order and little-endian", filename=os.fspath(path))
            return cls(path, shape[1:], element, offset=file.tell(), rows=shape[0], device=device)

    @property
    def _file(self) -> File:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), File(self.source))
        return self._opened[1]

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.gather([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """Read a batch; what `DataLoader` calls."""
        return Rows(self.gather(indices))

    @staticmethod
    def collate(rows: Rows | list[torch.Tensor]) -> torch.Tensor:
        """Return a batch as it was read, for `DataLoader`'s ``collate_fn``."""
        return rows.batch if isinstance(rows, Rows) else torch.stack(rows)

    def gather(self, indices: Any) -> torch.Tensor:
        """Read rows by their numbers, in this order.

        Parameters
        ----------
        indices
            Sequence, array or tensor of int; negative ones count from the end.

        Returns
        -------
        torch.Tensor
            Of shape ``(len(indices), *shape)`` on ``device``.

        Raises
        ------
        IndexError
            If there is no such row.
        FileError, CudaError, NvmeError
            If reading fails.
        """
        if isinstance(indices, torch.Tensor):
            indices = indices.detach().cpu().numpy()
        places = np.asarray(indices)
        if places.ndim != 1 or (places.size and places.dtype.kind not in "iu"):
            raise TypeError(f"indices must be integers in one dimension, not {places.dtype} of shape {places.shape}")
        places = places.astype(np.int64)
        bad = np.flatnonzero((places < -self._rows) | (places >= self._rows))
        if len(bad):
            raise IndexError(f"row {places[bad[0]]} of {self._rows} in {self.source!r}")
        places[places < 0] += self._rows
        batch = torch.empty((len(places), *self.shape), dtype=self.dtype, device=self.device)
        if len(places):
            self._file.gather(self._offset + places * self.row_bytes, self.row_bytes, out=batch)
        return batch
