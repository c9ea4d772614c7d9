"""`Catalog`: regions of a file, a block device or a namespace by number or name."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from gpunvme.catalog.beginning import first_generation, given_region
from gpunvme.catalog.change import Change, write_superblock
from gpunvme.catalog.generation import Generation, Region, read_generation
from gpunvme.catalog.reading import Regions
from gpunvme.catalog.target import Source, Target, open_target
from gpunvme.errors import CatalogError
from gpunvme.replace import Replacement

_FILE_BLOCK = 512  # what `from_kinds` counts in where the source is no namespace


class Catalog(Regions):
    """An open catalog. A context manager, and a collection of its regions.

    Several threads may use one `Catalog`. Any number may read while one writes: a reader keeps the generation that it
    opened, also after the next one was made; once a second one is, what the reader reads may be overwritten, and it
    says so by `CatalogChangedError` until `refresh` is called.

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
            super().__init__(opened, read_generation(opened))
        except BaseException:
            opened.close()
            raise

    @classmethod
    def _of(cls, target: Target, generation: Generation) -> Self:
        made = cls.__new__(cls)
        Regions.__init__(made, target, generation)
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
            return cls._of(opened, first_generation(opened, alignment, overwrite))
        except BaseException:
            opened.close()
            raise

    @classmethod
    def from_kinds(cls, source: Source, kinds: Mapping[int, Sequence[int]], *, block_size: int | None = None) -> Self:
        """Read regions of a file or device that has no catalog; nothing is written, and nothing can be.

        Parameters
        ----------
        source
            As for `Catalog`.
        kinds
            ``{kind: (start_lba, nbytes)}`` or ``{kind: (start_lba, nbytes, record_size)}``: the number of the first
            block, counted from the beginning of the source, and the length in bytes, which need not be whole blocks.
            Records are blocks unless a size is given, or single bytes where the length is no whole number of blocks.
            Regions may overlap.
        block_size
            Bytes of a block: the namespace's own, which is also the default; 512 by default for files and block
            devices, whatever their sectors are. With 1 the start is a byte.

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
            block = operator.index((own or _FILE_BLOCK) if block_size is None else block_size)
            if block < 1:
                raise CatalogError(f"blocks of {block} bytes", filename=opened.name)
            regions = tuple(given_region(opened, kind, given, block) for kind, given in sorted(kinds.items()))
            return cls._of(opened, Generation(None, regions))
        except BaseException:
            opened.close()
            raise

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
        stream: Any = None,
    ) -> Region:
        """Add one region: `Change.add` in a change of its own."""
        with self.change() as change:
            return change.add(kind, source, name=name, dtype=dtype, shape=shape, record_size=record_size, stream=stream)

    def replace(
        self,
        kind: int | str,
        source: Any,
        *,
        name: str | None = None,
        dtype: Any = None,
        shape: Sequence[int] | None = None,
        record_size: int | None = None,
        stream: Any = None,
    ) -> Region:
        """Replace the contents of one region: `Change.replace` in a change of its own."""
        with self.change() as change:
            return change.replace(
                kind, source, name=name, dtype=dtype, shape=shape, record_size=record_size, stream=stream
            )

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


def _identity(generation: Generation) -> tuple[bytes, int]:
    return (b"" if generation.superblock is None else generation.superblock.id, generation.number)
