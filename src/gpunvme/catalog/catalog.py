"""`Catalog`: regions of a file, a block device or a namespace by number or name."""

from __future__ import annotations

import operator
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np

from gpunvme import _native
from gpunvme.arguments import gathered_span, offsets_array
from gpunvme.catalog.change import Change, write_superblock, write_table
from gpunvme.catalog.generation import Generation, Region, read_generation, read_superblocks
from gpunvme.catalog.target import Source, Target, open_target
from gpunvme.catalog.verification import damaged
from gpunvme.errors import CatalogChangedError, CatalogError, RangeError
from gpunvme.file import File
from gpunvme.memory import Buffer
from gpunvme.replace import Replacement
from gpunvme.transfer import Progress, Transfer

_HEAD_BYTES = _native.CATALOG["HEAD_BYTES"]
_SLOT_BYTES = _native.CATALOG["SLOT_BYTES"]
_LEAST_ALIGNMENT = _native.CATALOG["LEAST_ALIGNMENT"]
_MOST_ALIGNMENT = _native.CATALOG["MOST_ALIGNMENT"]
_FILE_BLOCK = 512  # what `from_kinds` counts in where the source is no namespace


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


class Catalog:
    """An open catalog. A context manager, and a collection of its regions.

    Several threads may use one `Catalog`. Any number may read while one writes: a reader keeps the generation that it
    opened, also while the next one is written; once a second one was, what the reader reads may be overwritten, and
    then it says so by `CatalogChangedError` until `refresh` is called.

    Parameters
    ----------
    target
        The path of a file or block device, ``nvme+URI``, a `gpunvme.nvme.Namespace`, or an open `File`, which is not
        closed with the catalog.
    mode
        ``"r"``: read; ``"r+"``: read and change, which one object on one machine may do at a time.

    Raises
    ------
    CatalogError
        If there is no catalog, if it is damaged (with offset and reason), or if somebody else writes it.
    UnsafeDeviceError
        If a block device is to be written that the kernel uses.
    FileError, NvmeError
        If the target cannot be opened or read.
    """

    def __init__(self, target: Source, mode: str = "r") -> None:
        opened = open_target(target, mode)
        try:
            self._set_up(opened, read_generation(opened))
        except BaseException:
            opened.close()
            raise

    def _set_up(self, target: Target, generation: Generation) -> None:
        self._target = target
        self._generation = generation
        self._lock = threading.RLock()  # one change at a time
        self._uncertain = False  # a superblock was written, and perhaps did not arrive
        self._closed = False
        self.last_transfer: Transfer | None = None

    @classmethod
    def _of(cls, target: Target, generation: Generation) -> Self:
        made = cls.__new__(cls)
        made._set_up(target, generation)
        return made

    @classmethod
    def create(cls, target: Source, *, alignment: int | None = None, overwrite: str | None = None) -> Self:
        """Make an empty catalog and open it for changes.

        A file that does not exist appears as a whole. On what does exist, nothing is written unless it is empty: a file
        without data, or a device without partition table, file system or other data at its beginning and end.

        Parameters
        ----------
        target
            As for `Catalog`.
        alignment
            Of regions, in bytes: a power of two from 4096 to 1 GiB, and at least a block. If None, the least.
        overwrite
            The target's name, to lose what is there: of a file or block device its path as given, of a namespace its
            device (for ``pci:``, the PCI address).

        Raises
        ------
        UnsafeDeviceError
            If the target is not empty and ``overwrite`` is not its name, or if the kernel uses it.
        CatalogError
            If it is too small, if it cannot have that alignment, or if somebody writes it.
        FileError, NvmeError
            If it cannot be made, opened or written.
        """
        if isinstance(target, str | os.PathLike) and not str(target).startswith("nvme+") and not os.path.exists(target):
            with Replacement(target) as new, cls.create(new.file, alignment=alignment):
                pass
            return cls(target, "r+")
        opened = open_target(target, "r+", overwrite)
        try:
            return cls._of(opened, _make(opened, alignment, overwrite))
        except BaseException:
            opened.close()
            raise

    @classmethod
    def from_kinds(
        cls, source: Source, kinds: Mapping[int, Sequence[int]], *, block_size: int | None = None
    ) -> Self:
        """Read regions of a file or device that has no catalog; nothing is written, and nothing can be.

        Parameters
        ----------
        source
            As for `Catalog`.
        kinds
            ``{kind: (start_lba, nbytes)}`` or ``{kind: (start_lba, nbytes, record_size)}``: the first block, and the
            length in bytes. Records are blocks unless a size is given (single bytes, where the length is no whole number
            of blocks). Regions may overlap.
        block_size
            Bytes of a block: the namespace's own, which is also the default; 512 by default for files and block
            devices.

        Raises
        ------
        RangeError
            If a region is not inside the source; says which.
        CatalogError
            If a number, a length or a record size makes no sense.
        FileError, NvmeError
            If the source cannot be opened.
        """
        opened = open_target(source, "r")
        try:
            own = None if opened.namespace is None else opened.namespace.block_size
            if own is not None and block_size not in (None, own):
                raise CatalogError(f"blocks have {own} bytes, not {block_size}", filename=opened.name)
            block = operator.index(block_size or own or _FILE_BLOCK)
            if block < 1:
                raise CatalogError(f"blocks of {block} bytes", filename=opened.name)
            regions = tuple(_given(opened, kind, given, block) for kind, given in sorted(kinds.items()))
            return cls._of(opened, Generation(None, regions))
        except BaseException:
            opened.close()
            raise

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
        """Number of the generation that is read: 1 when it was made, one more with every change; 0 without a catalog."""
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

        Whoever reads there by itself asks `check` afterwards whether the bytes were still those of this generation.
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
        out = file.gather(
            offsets, region.record_size, out, device, stream=stream, progress=progress, timeout=timeout
        )
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

    def verify(
        self, kinds: Iterable[int | str] | None = None, *, progress: Progress | None = None
    ) -> list[Region]:
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

    # --- changing

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Change several regions at once: in a ``with`` block, at whose end all of it becomes valid, or nothing does.

        Whatever is raised inside leaves the catalog as it was; so does a crash at any point until the end.

        Raises
        ------
        CatalogError
            If the catalog is open for reading only, or if there is no room.
        FileError, NvmeError
            If it cannot be written. If that is the superblock, the next change finds out which generation is valid.
        """
        with self._lock:
            self._check_open()
            self._target.check_writer()
            if self._uncertain:
                self._settle()
            change = Change(self._target, self._generation)
            try:
                yield change
                self._generation = change.finish(self._now_uncertain)
                self._uncertain = False
            finally:
                change.abandon()

    def add(
        self,
        kind: int | None,
        source: Any,
        *,
        name: str = "",
        dtype: Any = None,
        shape: Sequence[int] | None = None,
        record_size: int | None = None,
    ) -> Region:
        """Add one region: `Change.add` in a change of its own."""
        with self.change() as change:
            return change.add(kind, source, name=name, dtype=dtype, shape=shape, record_size=record_size)

    def replace(
        self,
        kind: int | str,
        source: Any,
        *,
        name: str | None = None,
        dtype: Any = None,
        shape: Sequence[int] | None = None,
        record_size: int | None = None,
    ) -> Region:
        """Replace the contents of one region: `Change.replace` in a change of its own."""
        with self.change() as change:
            return change.replace(kind, source, name=name, dtype=dtype, shape=shape, record_size=record_size)

    def delete(self, kind: int | str) -> None:
        """Delete one region: `Change.delete` in a change of its own."""
        with self.change() as change:
            change.delete(kind)

    def _now_uncertain(self) -> None:
        self._uncertain = True

    def _settle(self) -> None:
        """Find out which generation is valid after a superblock's write failed, and make sure that it stays so.

        What can be read back need not be on the drive: after a failed fsync the page cache may keep, as clean, what
        never arrived. Written again, it does.
        """
        found = read_generation(self._target)
        if found.superblock is not None and found.number != self._generation.number:
            write_superblock(self._target, found.superblock)
        self._generation = found
        self._uncertain = False

    # --- generations and the end

    def refresh(self) -> bool:
        """Read what the catalog holds now; return whether that is another generation than before.

        Raises
        ------
        CatalogError, FileError, NvmeError
            As for `Catalog`; it then stays what it was.
        """
        with self._lock:
            before = self._generation
            self._check_open()
            if before.superblock is None:
                return False
            if self._target.writable:
                if self._uncertain:
                    self._settle()
            else:
                self._generation = read_generation(self._target)
            return _identity(self._generation) != _identity(before)

    def check(self) -> None:
        """Check that everything that was read until now was of this generation.

        Raises
        ------
        CatalogChangedError
            If the catalog was changed twice or more since it was opened or refreshed, or made anew: space of this
            generation may have been written again.
        """
        self._check_current(self._generation)

    def _check_current(self, generation: Generation) -> None:
        # Space of generation g is written again, at the earliest, in the change after g + 1; and that begins when the
        # superblock of g + 2 is on the target. So whoever sees none after reading has read what it meant to.
        if generation.superblock is None:
            return
        now: _native.CatalogSuperblock | None
        if self._target.writable:
            now = self._generation.superblock
        else:
            now = read_superblocks(self._target).newest
        if now is None or now.id != generation.superblock.id or now.generation > generation.number + 1:
            what = "is gone" if now is None else f"is at generation {now.generation} by now"
            raise CatalogChangedError(
                f"the catalog {what}, and what was read is of generation {generation.number}; its space may have been "
                "written again: refresh() and read again",
                filename=self.name,
            )

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Close it, and what was opened for it."""
        if not self._closed:
            self._closed = True
            self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


def _identity(generation: Generation) -> tuple[bytes, int]:
    return (b"" if generation.superblock is None else generation.superblock.id, generation.number)


def _make(target: Target, alignment: int | None, overwrite: str | None) -> Generation:
    """Write the first generation of a catalog to a target that is empty, or may be lost."""
    least = max(_LEAST_ALIGNMENT, target.unit)
    alignment = least if alignment is None else operator.index(alignment)
    if alignment < least or alignment > _MOST_ALIGNMENT or alignment & (alignment - 1):
        raise CatalogError(
            f"alignment {alignment} is no power of two from {least} to {_MOST_ALIGNMENT}", filename=target.name
        )
    # A device's last MiB stays as it is: what lies there could be taken for a backup of a partition table.
    capacity = (target.size - _HEAD_BYTES) // alignment * alignment if target.fixed else 0
    first = -(-_HEAD_BYTES // alignment) * alignment
    if target.fixed and capacity < first + alignment:
        raise CatalogError(
            f"the device has {target.size} bytes; a catalog needs {first + alignment + _HEAD_BYTES} at least",
            filename=target.name,
        )
    if target.check_empty(overwrite):
        _wipe(target)
    superblock = _native.CatalogSuperblock()
    superblock.id, superblock.generation = secrets.token_bytes(16), 1
    superblock.alignment, superblock.capacity = alignment, capacity
    for slot in (0, _SLOT_BYTES):
        target.write(slot, b"\0")
    write_table(target, superblock, [], first)
    write_superblock(target, superblock)
    return Generation(superblock, ())


def _wipe(target: Target) -> None:
    """Make sure that nothing which was recognised is recognised again."""
    if not target.fixed:
        os.ftruncate(target.file.fileno(), 0)
        return
    zeros = bytes(_HEAD_BYTES)
    last = target.size // target.unit * target.unit - _HEAD_BYTES
    for begin in (0, max(0, last)):
        target.write(begin, zeros)
    target.flush()


def _given(target: Target, kind: int, given: Sequence[int], block: int) -> Region:
    """Make a region of what `Catalog.from_kinds` is given for it."""
    kind = operator.index(kind)
    parts = tuple(map(operator.index, given))
    if kind < 0 or len(parts) not in (2, 3):
        raise CatalogError(
            f"kind {kind} is given as {parts}; it takes (start_lba, nbytes) or (start_lba, nbytes, record_size)",
            filename=target.name,
        )
    lba, nbytes = parts[:2]
    record = parts[2] if len(parts) == 3 else (block if nbytes % block == 0 else 1)
    size = target.size
    if lba < 0 or nbytes < 0 or lba * block + nbytes > size:
        raise RangeError(
            f"{target.name!r} has {size} bytes; kind {kind} asks for {nbytes} bytes from block {lba} on, which is byte "
            f"{lba * block}"
        )
    if record < 1 or nbytes % record:
        raise CatalogError(
            f"kind {kind}: {nbytes} bytes are no whole number of records of {record}", filename=target.name
        )
    return Region(kind, "", lba * block, nbytes, record, "", (), None)
