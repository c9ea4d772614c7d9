"""The regions of one generation: which there are, and reading them."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpunvme import _native
from gpunvme.arguments import gathered_span, offsets_array
from gpunvme.catalog.generation import Generation, Region, read_superblocks
from gpunvme.catalog.target import Target
from gpunvme.catalog.verification import damaged
from gpunvme.errors import CatalogChangedError, CatalogError, RangeError
from gpunvme.file import File
from gpunvme.memory import Buffer
from gpunvme.transfer import Progress, Transfer


class Extent(NamedTuple):
    """Where a region's bytes are and what they are: what loaders of layers need.

    Attributes
    ----------
    file
        The open file, block device or namespace.
    offset
        Where it begins there, in bytes.
    nbytes
        Its size in bytes.
    dtype
        Element type as safetensors calls it; ``"U8"`` for bytes without a type.
    shape
        Shape in elements.
    """

    file: File
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Regions:
    """What can be read of a catalog; `Catalog` is what people open."""

    def __init__(self, target: Target, generation: Generation) -> None:
        self._target = target
        self._generation = generation
        self._lock = threading.RLock()  # one change at a time
        self._uncertain = False  # a superblock was written, and perhaps did not arrive
        self._closed = False
        self.last_transfer: Transfer | None = None

    # --- what there is

    @property
    def name(self) -> str:
        """What its target is called."""
        return self._target.name

    @property
    def mode(self) -> str:
        """``"r"`` or ``"r+"``."""
        return "r+" if self._target.writable else "r"

    @property
    def generation(self) -> int:
        """The generation that is read: 1 when it was made, one more with every change; 0 without a catalog."""
        return self._generation.number

    @property
    def alignment(self) -> int:
        """Regions begin at multiples of this, in bytes; 1 without a catalog."""
        superblock = self._generation.superblock
        return 1 if superblock is None else superblock.alignment

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, by their numbers."""
        return self._generation.regions

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)

    def __contains__(self, kind: object) -> bool:
        return kind in self._generation.by_kind or kind in self._generation.by_name

    def __getitem__(self, kind: int | str) -> Region:
        return self._find(self._generation, kind)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"generation {self.generation}, {len(self)} regions"
        return f"<gpunvme.Catalog {self.name!r}, {state}>"

    def extents(self) -> dict[str, Extent]:
        """Where every region lies, by its name (``#`` and its number, if it has none): what loaders stand on.

        Whoever reads there by itself calls afterwards what `checker` returned before, to know whether the bytes were
        those of this generation still. `LayerLoader` does.
        """
        file = self._file
        return {
            region.title: Extent(
                file,
                region.offset,
                region.nbytes,
                region.dtype or "U8",
                region.shape if region.dtype else (region.nbytes,),
            )
            for region in self.regions
        }

    # --- reading

    def read_kind(
        self,
        kind: int | str,
        index: int = 0,
        count: int | None = None,
        out: Any = None,
        device: Any = None,
        *,
        stream: Any = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Read records of a region.

        Parameters
        ----------
        kind
            The region's number or name.
        index
            The first record.
        count
            How many; all that follow if None.
        out
            Where to: memory of ``count * record_size`` bytes at least. If None, a new `Buffer` of shape
            ``(count, record_size)`` on ``device``.
        device
            Where to, if ``out`` is None: the host unless given.
        stream, progress, timeout
            As for `File.read_into`.

        Returns
        -------
        ``out``, or the new `Buffer`. `last_transfer` is the report.

        Raises
        ------
        RangeError
            If the region does not have these records.
        CatalogError
            If there is no such region.
        CatalogChangedError
            If the region may have been overwritten meanwhile; the destination's content is then undefined.
        SpanError, FileError, TruncatedError, NvmeError, CudaError, DeadlineExceeded, Cancelled
            As for `File.read_into`.
        """
        file, generation = self._file, self._generation
        region = self._find(generation, kind)
        index = operator.index(index)
        count = region.records - index if count is None else operator.index(count)
        if index < 0 or count < 0 or index + count > region.records:
            raise RangeError(
                f"{self.name!r}: {region} has {region.records} records; {index} to {index + count} were asked for"
            )
        offset, nbytes = region.offset + index * region.record_size, count * region.record_size
        if out is None:
            shape = (count, region.record_size)
            out = Buffer.empty(nbytes, "cpu" if device is None else device, shape=shape, congruent_to=offset)
        else:
            gathered_span(out, device, nbytes, f"{count} records of {region.record_size} bytes")
        self.last_transfer = file.read_into(out, offset, nbytes, stream=stream, progress=progress, timeout=timeout)
        self._check_current(generation)
        return out

    def gather_kind(
        self,
        kind: int | str,
        indices: Any,
        out: Any = None,
        device: Any = None,
        *,
        stream: Any = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Read many records of a region, packed in the order of ``indices``.

        Parameters
        ----------
        kind
            The region's number or name.
        indices
            Records: a sequence of int, or a one-dimensional integer array or tensor on the host or a GPU.
        out
            Where to: memory of ``len(indices) * record_size`` bytes at least. If None, a new `Buffer` of shape
            ``(len(indices), record_size)`` on ``device``.
        device
            Where to, if ``out`` is None: the host unless given.
        stream, progress, timeout
            As for `File.gather`.

        Returns
        -------
        ``out``, or the new `Buffer`. `last_transfer` is the report.

        Raises
        ------
        RangeError
            If a record is not in the region; says which.
        CatalogError, CatalogChangedError, SpanError, TypeError, FileError, NvmeError, CudaError, DeadlineExceeded, \
        Cancelled
            As for `read_kind`.
        """
        file, generation = self._file, self._generation
        region = self._find(generation, kind)
        places = offsets_array(indices)
        bad = np.flatnonzero((places < 0) | (places >= region.records))
        if len(bad):
            raise RangeError(
                f"{self.name!r}: {region} has {region.records} records; index number {bad[0]} asks for record "
                f"{places[bad[0]]} ({len(bad)} of {len(places)} are outside)"
            )
        offsets = region.offset + places * region.record_size
        out = file.gather(offsets, region.record_size, out, device, stream=stream, progress=progress, timeout=timeout)
        self.last_transfer = file.last_transfer
        self._check_current(generation)
        return out

    def load(
        self,
        kinds: Iterable[int | str] | None = None,
        device: Any = "cpu",
        *,
        framework: str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Load regions as tensors, each into memory of its own.

        Parameters
        ----------
        kinds
            Numbers or names; all regions if None.
        device
            Where to.
        framework
            ``"pt"`` or ``"np"``; if None, torch where it is installed.
        progress
            As for `File.read_into`.

        Returns
        -------
        dict
            ``{name: tensor}``, ``#`` and the number being the name of those that have none. Bytes without a type are
            arrays of uint8.

        Raises
        ------
        FormatError
            If the framework lacks an element type; raised before anything moves.
        CatalogError, CatalogChangedError, SpanError, FileError, NvmeError, CudaError, Cancelled
            As for `read_kind`.
        """
        from gpunvme.models import frameworks
        from gpunvme.models.dtypes import DTYPES
        from gpunvme.models.header import TensorInfo
        from gpunvme.models.index import Entry
        from gpunvme.models.safetensors import load_entries

        file, generation = self._file, self._generation
        wanted = generation.regions if kinds is None else [self._find(generation, kind) for kind in kinds]
        entries = []
        for region in sorted(dict.fromkeys(wanted), key=lambda region: region.offset):
            shape = region.shape if region.dtype else (region.nbytes,)
            info = TensorInfo(region.title, DTYPES[region.dtype or "U8"], shape, region.offset, region.nbytes)
            entries.append(Entry(file, self.name, info))

        def note(transfer: Transfer) -> None:
            self.last_transfer = transfer

        tensors = load_entries(entries, frameworks.choose(framework, device), None, progress, note)
        self._check_current(generation)
        return {region.title: tensors[region.title] for region in wanted}

    def verify(self, kinds: Iterable[int | str] | None = None, *, progress: Progress | None = None) -> list[Region]:
        """Read regions and compare their checksums.

        Parameters
        ----------
        kinds
            Numbers or names; all regions if None.
        progress
            Called as ``progress(bytes_done, bytes_total)`` by the caller's thread, about 20 times a second.

        Returns
        -------
        list
            The regions whose bytes are not those that were written; empty if there is none.

        Raises
        ------
        CatalogError
            If there is no such region, or if there are no checksums (`from_kinds`).
        CatalogChangedError, FileError, NvmeError
            As for `read_kind`.
        """
        generation = self._generation
        wanted = list(generation.regions if kinds is None else [self._find(generation, kind) for kind in kinds])
        if generation.superblock is None:
            raise CatalogError("regions on a device without a catalog have no checksums", filename=self.name)
        self._check_open()
        found = damaged(self._target, wanted, progress)
        self._check_current(generation)
        return found

    # --- is it still so?

    def check(self) -> None:
        """Check that everything that was read until now was of this generation.

        Raises
        ------
        CatalogChangedError
            If the catalog was changed twice since it was opened or refreshed, or made anew: the space of this
            generation may have been written again.
        """
        self.checker()()

    def checker(self) -> Callable[[], None]:
        """Return `check` for the generation of now, whatever this object changes or refreshes later."""
        return functools.partial(self._check_current, self._generation)

    def _check_current(self, generation: Generation) -> None:
        # A writer leaves alone what a whole superblock on the target refers to, and takes that superblock away before
        # it uses the space again. So whoever finds its own after reading has read what it meant to.
        wanted = generation.superblock
        if wanted is None:
            return
        newest: _native.CatalogSuperblock | None
        previous: _native.CatalogSuperblock | None
        if self._target.writable:
            held = self._generation
            newest, previous = held.superblock, None if held.previous is None else held.previous.superblock
        else:
            found = read_superblocks(self._target)
            newest, previous = found.newest, found.previous
        for superblock in (newest, previous):
            if superblock is not None and (superblock.id, superblock.generation) == (wanted.id, wanted.generation):
                return
        now = "is gone" if newest is None else f"is at generation {newest.generation} by now"
        raise CatalogChangedError(
            f"the catalog {now}, and what was read is of generation {wanted.generation}, whose space may have been "
            "written again: refresh() and read again",
            filename=self.name,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the catalog {self.name!r} is closed")

    @property
    def _file(self) -> File:
        self._check_open()
        return self._target.file

    def _find(self, generation: Generation, kind: int | str) -> Region:
        found = generation.by_name.get(kind) if isinstance(kind, str) else generation.by_kind.get(operator.index(kind))
        if found is None:
            some = ", ".join(str(region) for region in generation.regions[:8]) or "none"
            more = ", …" if len(generation.regions) > 8 else ""
            raise CatalogError(f"there is no region {kind!r}; there are: {some}{more}", filename=self.name)
        return found
