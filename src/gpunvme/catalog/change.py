"""The next generation of a catalog in the making: its bytes are written, and nobody refers to them yet."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpunvme import _native
from gpunvme.catalog.contents import Advance, Contents
from gpunvme.catalog.describe import describe
from gpunvme.catalog.generation import Generation, Region, from_native, to_native
from gpunvme.errors import CatalogError

if TYPE_CHECKING:
    from gpunvme.catalog.target import Target

_MOST_KIND = 2**32 - 1
_SLOT_BYTES = _native.CATALOG["SLOT_BYTES"]
_MOST_BYTES = _native.CATALOG["MOST_BYTES"]


class Change:
    """Additions, replacements and deletions that become valid together. Made by `Catalog.change`.

    Contents are written at once, into space that neither of the two last generations uses; what is replaced or deleted
    needs its space until the change after the next one.
    """

    def __init__(self, target: Target, base: Generation) -> None:
        if base.superblock is None:
            raise CatalogError("regions on a device without a catalog cannot be changed", filename=target.name)
        self._target = target
        self._base = base
        self._superblock = base.superblock
        self._regions = dict(base.by_kind)
        self._names = {name: region.kind for name, region in base.by_name.items()}
        self._space = _space(target, base.superblock)
        self._open = True
        self._highest = max(self._regions, default=0)
        for generation in (base, base.previous):
            if generation is not None and generation.superblock is not None:
                self._space.add(generation.superblock, generation.natives(target.name))

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions as they will be, by their numbers."""
        return tuple(self._regions[kind] for kind in sorted(self._regions))

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
        advance: Advance | None = None,
    ) -> Region:
        """Write a new region.

        Parameters
        ----------
        kind
            Its number, from 0 to 4294967295; if None, the one above the highest that there is or was in this change.
        source
            A tensor, an array or a buffer on the host or a GPU, a `Span`, or a `FilePart`.
        name
            Its name, unlike every other; may be empty.
        dtype, shape
            Element type (by its name in safetensors, NumPy or torch) and shape in elements. If neither is given, the
            array's own; bytes without a type if it has none.
        record_size
            Bytes of a record; a row's if None, or 1 where there is no shape.
        stream
            As for `File.write_from`, for a source on a GPU.
        advance
            Called with the number of bytes after each piece.

        Raises
        ------
        CatalogError
            If number or name are in use, if there is no room, or if size, type, shape and record do not fit.
        SpanError, RangeError, FileError, NvmeError, CudaError
            If the source cannot be read, or the target not written.
        """
        self._check_open()
        if kind is None:
            kind = self._highest + 1
        kind = operator.index(kind)
        if not 0 <= kind <= _MOST_KIND:
            raise self._error(f"kind {kind} is no number from 0 to {_MOST_KIND}")
        if kind in self._regions:
            raise self._error(f"kind {kind} is there already; replace it, or choose another number")
        return self._write(kind, source, name, dtype, shape, record_size, stream, advance)

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
        advance: Advance | None = None,
    ) -> Region:
        """Write new contents for a region, given by its number or its name; it keeps its name unless one is given.

        Parameters and errors are those of `add`; it is also an error if there is no such region.
        """
        self._check_open()
        old = self._find(kind)
        self._forget(old)
        try:
            return self._write(
                old.kind, source, old.name if name is None else name, dtype, shape, record_size, stream, advance
            )
        except BaseException:
            self._remember(old)
            raise

    def delete(self, kind: int | str) -> None:
        """Take a region out, given by its number or its name.

        Raises
        ------
        CatalogError
            If there is no such region.
        """
        self._check_open()
        self._forget(self._find(kind))

    # --- how

    def _write(
        self,
        kind: int,
        source: Any,
        name: str,
        dtype: Any,
        shape: Sequence[int] | None,
        record_size: int | None,
        stream: Any,
        advance: Advance | None,
    ) -> Region:
        if name in self._names:
            raise self._error(f"the name {name!r} is that of kind {self._names[name]}")
        contents = Contents(source, stream)
        what = describe(source, contents.nbytes, dtype, shape, record_size, self._target.name)
        offset = self._space.take(contents.nbytes)
        if offset is None:
            raise self._no_room(f"kind {kind} needs", contents.nbytes)
        region = Region(kind, name, offset, contents.nbytes, what.record_size, what.dtype, what.shape, 0)
        # Before megabytes are written for something that cannot be stored.
        self._check([to_native(region, self._target.name)])
        region = region._replace(checksum=contents.write(self._target, offset, advance))
        self._remember(region)
        return region

    def _find(self, kind: int | str) -> Region:
        number = self._names.get(kind) if isinstance(kind, str) else operator.index(kind)
        if number is None or number not in self._regions:
            raise self._error(f"there is no region {kind!r}")
        return self._regions[number]

    def _remember(self, region: Region) -> None:
        self._regions[region.kind] = region
        self._highest = max(self._highest, region.kind)
        if region.name:
            self._names[region.name] = region.kind

    def _forget(self, region: Region) -> None:
        del self._regions[region.kind]
        if region.name:
            del self._names[region.name]

    def _check_open(self) -> None:
        if not self._open:
            raise self._error("this change is finished; begin another one")
        self._target.check_writer()

    def _check(self, regions: list[_native.CatalogRegion]) -> None:
        problem = _native.catalog_check(regions, self._superblock, _end(self._target))
        if problem is not None:
            raise CatalogError(problem[1], filename=self._target.name, offset=problem[0])

    def _error(self, reason: str) -> CatalogError:
        return CatalogError(reason, filename=self._target.name)

    def _no_room(self, what: str, nbytes: int) -> CatalogError:
        return self._error(
            f"no room: {what} {nbytes} bytes, the longest free run has {self._space.longest()}; what was replaced or "
            "deleted by this change or the last one is free after the next one"
        )

    def finish(self, before_superblock: Callable[[], None] | None = None) -> Generation:
        """Make it valid: everything written is flushed, then the table, then the superblock.

        Parameters
        ----------
        before_superblock
            Called before the superblock is written: from then on, until this returns, a failure leaves open which
            generation is valid.
        """
        self._check_open()
        self._open = False
        target, old = self._target, self._superblock
        regions = [to_native(region, target.name) for region in self.regions]
        new = next_superblock(old)
        nbytes = _native.catalog_table_bytes(regions)
        if len(regions) > _native.CATALOG["MOST_REGIONS"] or nbytes > _native.CATALOG["MOST_TABLE_BYTES"]:
            raise self._error(f"{len(regions)} regions, with a table of {nbytes} bytes, are more than the format takes")
        table_offset = self._space.take(nbytes)
        if table_offset is None:
            raise self._no_room("the table needs", nbytes)
        write_table(target, new, regions, table_offset)
        if before_superblock is not None:
            before_superblock()
        write_superblock(target, new)
        # What was read before is still protected: by `previous` here, by its superblock on the target.
        return Generation(new, tuple(map(from_native, regions)), Generation(old, self._base.regions))

    def abandon(self) -> None:
        """Forget it; what it wrote lies in free space."""
        self._open = False


def next_superblock(old: _native.CatalogSuperblock) -> _native.CatalogSuperblock:
    """Return a superblock for the generation after ``old``, without a table yet."""
    new = _native.CatalogSuperblock()
    new.id, new.alignment, new.capacity = old.id, old.alignment, old.capacity
    new.generation = old.generation + 1
    return new


def write_table(
    target: Target, superblock: _native.CatalogSuperblock, regions: list[_native.CatalogRegion], offset: int
) -> None:
    """Write the table of a superblock to ``offset`` and enter it there; flushed, as is everything written before.

    Raises
    ------
    CatalogError
        If what would be written could not be read again: a fault of ours, found before it does harm.
    """
    data = _native.catalog_serialise_table(regions, superblock.generation)
    superblock.table_offset, superblock.table_bytes, superblock.regions = offset, len(data), len(regions)
    superblock.table_crc32 = _native.catalog_crc32(data)
    _, problem = _native.catalog_table(data, superblock, _end(target))
    if problem is not None:
        raise CatalogError(problem[1], filename=target.name, offset=problem[0])
    target.flush()
    target.write(offset, data)
    target.flush()


def write_superblock(target: Target, superblock: _native.CatalogSuperblock) -> None:
    """Write a superblock into the slot of its generation, and flush it."""
    target.write(superblock.generation % 2 * _SLOT_BYTES, superblock.serialise())
    target.flush()


def _end(target: Target) -> int:
    """Where space ends: files grow."""
    return target.size if target.fixed else int(_MOST_BYTES)


def _space(target: Target, superblock: _native.CatalogSuperblock) -> _native.CatalogSpace:
    return _native.CatalogSpace(superblock.capacity or _end(target), superblock.alignment)
