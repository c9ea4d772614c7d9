"""How catalogs begin: the first generation on a target, and regions that are given where there is no catalog."""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpunvme import _native
from gpunvme.catalog.change import write_superblock, write_table
from gpunvme.catalog.generation import Generation, Region
from gpunvme.errors import CatalogError, RangeError

if TYPE_CHECKING:
    from gpunvme.catalog.target import Target

_HEAD_BYTES = _native.CATALOG["HEAD_BYTES"]
_SLOT_BYTES = _native.CATALOG["SLOT_BYTES"]
_LEAST_ALIGNMENT = _native.CATALOG["LEAST_ALIGNMENT"]
_MOST_ALIGNMENT = _native.CATALOG["MOST_ALIGNMENT"]


def first_generation(target: Target, alignment: int | None, overwrite: str | None) -> Generation:
    """Write the first generation of a catalog to a target that is empty, or may be lost: see `Catalog.create`."""
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


def given_region(target: Target, kind: int, given: Sequence[int], block: int) -> Region:
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
