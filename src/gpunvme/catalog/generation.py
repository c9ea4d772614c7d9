"""One generation of a catalog: its superblock and its regions, as they were read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpunvme import _native
from gpunvme.errors import CatalogError

if TYPE_CHECKING:
    from gpunvme.catalog.target import Target

# A reader that finds another generation each time it looks gives up after so many.
_LOOKS = 10
_SUPERBLOCK_BYTES = _native.CATALOG["SUPERBLOCK_BYTES"]
_SLOT_BYTES = _native.CATALOG["SLOT_BYTES"]


class NoCatalogError(CatalogError):
    """There is nothing that looks like a catalog."""


class Region(NamedTuple):
    """One region: an array, or records of one size.

    Attributes
    ----------
    kind
        Its number.
    name
        Its name, which may be empty.
    offset
        Where it begins on its target, in bytes.
    nbytes
        Its size in bytes.
    record_size
        Size of a record in bytes; it divides ``nbytes``.
    dtype
        Element type as safetensors calls it (``"F32"``, ``"BF16"``, …), or empty for bytes without a type.
    shape
        Shape in elements; empty for bytes without a type.
    checksum
        CRC-32 of its bytes; None for regions that nobody summed (`Catalog.from_kinds`).
    """

    kind: int
    name: str
    offset: int
    nbytes: int
    record_size: int
    dtype: str
    shape: tuple[int, ...]
    checksum: int | None

    @property
    def records(self) -> int:
        """How many records it has."""
        return self.nbytes // self.record_size

    @property
    def title(self) -> str:
        """What it is called where a name is needed: its name, or ``#`` and its number."""
        return self.name or f"#{self.kind}"

    def __str__(self) -> str:
        return f"kind {self.kind} ({self.name!r})" if self.name else f"kind {self.kind}"


def from_native(region: _native.CatalogRegion) -> Region:
    """Turn the native side's region into ours."""
    return Region(
        region.kind,
        region.name,
        region.offset,
        region.nbytes,
        region.record_bytes,
        region.dtype,
        tuple(region.shape),
        region.crc32,
    )


def to_native(region: Region, filename: str) -> _native.CatalogRegion:
    """Turn a region into the native side's.

    Raises
    ------
    CatalogError
        If a part of it has no place in the format.
    """
    made = _native.CatalogRegion()
    try:
        made.kind, made.name = region.kind, region.name
        made.offset, made.nbytes, made.record_bytes = region.offset, region.nbytes, region.record_size
        made.dtype, made.shape = region.dtype, list(region.shape)
        made.crc32 = region.checksum or 0
    except (TypeError, ValueError, OverflowError) as error:
        # nanobind says only that a number does not fit; the name may hold half a surrogate pair.
        raise CatalogError(f"{region!r} cannot be stored: {error}", filename=filename) from None
    return made


@dataclass(frozen=True)
class Generation:
    """What one version of a catalog holds. Never changed: a change makes the next one.

    ``superblock`` is None for regions on a device that has no catalog. ``previous`` is the generation before, whose
    bytes must stay as they are until its superblock is gone, or None where there is no whole one.
    """

    superblock: _native.CatalogSuperblock | None
    regions: tuple[Region, ...]
    previous: Generation | None = None
    by_kind: dict[int, Region] = field(init=False)
    by_name: dict[str, Region] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_kind", {region.kind: region for region in self.regions})
        object.__setattr__(self, "by_name", {region.name: region for region in self.regions if region.name})

    @property
    def number(self) -> int:
        """Its number, 1 at first; 0 where there is no catalog."""
        return 0 if self.superblock is None else self.superblock.generation

    def natives(self, filename: str) -> list[_native.CatalogRegion]:
        """Its regions for the native side."""
        return [to_native(region, filename) for region in self.regions]


class Superblocks(NamedTuple):
    """What both slots of a target hold."""

    newest: _native.CatalogSuperblock | None
    previous: _native.CatalogSuperblock | None
    refusal: tuple[int, str] | None
    problems: tuple[tuple[int, str] | None, tuple[int, str] | None]
    begun: bool


def read_superblocks(target: Target) -> Superblocks:
    """Read both slots."""
    size = target.size
    first, second = (
        target.read(at, max(0, min(_SUPERBLOCK_BYTES, size - at))) if at < size else b"" for at in (0, _SLOT_BYTES)
    )
    # The size as it is now: a writer may have made the target larger for the table that a slot names.
    return Superblocks(*_native.catalog_superblocks(first, second, target.size))


def read_generation(target: Target) -> Generation:
    """Read the newest generation of a catalog and, for a writer, the one before it.

    Raises
    ------
    CatalogError
        If there is no catalog, or if it is damaged: with the offset on the target, and the reason.
    """
    for _ in range(_LOOKS):
        found = read_superblocks(target)
        if found.newest is None or found.refusal is not None:
            raise _no_catalog(target, found)
        regions, problem = _read_table(target, found.newest)
        if problem is None:
            previous = _previous(target, found.previous) if target.writable else None
            return Generation(found.newest, tuple(map(from_native, regions)), previous)
        again = read_superblocks(target).newest
        if again is not None and again.generation == found.newest.generation:
            raise CatalogError(f"the catalog is damaged: {problem[1]}", filename=target.name, offset=problem[0])
        # A writer was faster: the table that was wanted is not there any more.
    raise CatalogError(f"the catalog changed each of the {_LOOKS} times that it was read", filename=target.name)


def _previous(target: Target, superblock: _native.CatalogSuperblock | None) -> Generation | None:
    if superblock is None:
        return None
    regions, problem = _read_table(target, superblock)
    # Where its table cannot be read there is no going back to it, and nothing to protect.
    return None if problem is not None else Generation(superblock, tuple(map(from_native, regions)))


def _read_table(
    target: Target, superblock: _native.CatalogSuperblock
) -> tuple[list[_native.CatalogRegion], tuple[int, str] | None]:
    size = target.size
    if superblock.table_offset + superblock.table_bytes > size:
        return [], (superblock.table_offset, "the target became smaller while it was read")
    data = target.read(superblock.table_offset, superblock.table_bytes)
    regions, problem = _native.catalog_table(data, superblock, size)
    return regions or [], problem


def _no_catalog(target: Target, found: Superblocks) -> CatalogError:
    if found.refusal is not None:
        offset, reason = found.refusal
        return CatalogError(f"the catalog is damaged: {reason}", filename=target.name, offset=offset)
    if not found.begun:
        return NoCatalogError("there is no catalog: gpunvme.Catalog.create makes one", filename=target.name, offset=0)
    reasons: Iterable[str] = dict.fromkeys(problem[1] for problem in found.problems if problem is not None)
    offset = next(problem[0] for problem in found.problems if problem is not None)
    return CatalogError(
        f"the catalog is damaged, in both its superblocks: {'; '.join(reasons)}", filename=target.name, offset=offset
    )
