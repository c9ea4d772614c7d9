"""Checkpoints into catalogs: every tensor a region, all of them valid at once."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from gpunvme.catalog.catalog import Catalog
from gpunvme.catalog.contents import FilePart
from gpunvme.catalog.generation import NoCatalogError, Region
from gpunvme.errors import CatalogError
from gpunvme.models.index import Checkpoint
from gpunvme.replace import Replacement

if TYPE_CHECKING:
    from gpunvme.catalog.target import Source
    from gpunvme.models.index import Source as CheckpointSource
    from gpunvme.transfer import Progress


def pack(
    checkpoint: CheckpointSource,
    target: Source,
    *,
    replace: bool = False,
    only: bool = False,
    alignment: int | None = None,
    overwrite: str | None = None,
    progress: Progress | None = None,
) -> tuple[Region, ...]:
    """Write every tensor of a checkpoint as a region of its name; a crash leaves the old catalog or the new one.

    Parameters
    ----------
    checkpoint
        A safetensors file, its shards, its index or its directory.
    target
        A catalog, or what one can be made of: see `Catalog.create`. A file that does not exist appears as a whole.
    replace
        Whether regions that have a tensor's name already are replaced; they are an error otherwise.
    only
        Whether the catalog's other regions are deleted.
    alignment, overwrite
        For a catalog that has to be made: as for `Catalog.create`.
    progress
        Called as ``progress(bytes_done, bytes_total)``.

    Returns
    -------
    tuple
        The regions that were written, in the order of the checkpoint.

    Raises
    ------
    FormatError
        If the checkpoint is not valid; nothing was written then.
    CatalogError
        If names are in use, if there is no room for the new beside the old, or if somebody else writes the catalog.
    UnsafeDeviceError
        If the target is neither empty nor a catalog.
    FileError, NvmeError
        If something cannot be read or written.
    """
    with ExitStack() as stack:
        source = stack.enter_context(Checkpoint(checkpoint))
        if isinstance(target, str | os.PathLike) and not str(target).startswith("nvme+") and not os.path.exists(target):
            target = stack.enter_context(Replacement(target)).file
        catalog = stack.enter_context(_open(target, alignment, overwrite))
        entries = list(source.tensors.values())
        total = sum(entry.info.nbytes for entry in entries)
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        taken = [name for name in source.tensors if name in catalog]
        if taken and not (replace or only):
            raise CatalogError(
                f"{len(taken)} of the names are there already, the first is {taken[0]!r}; say that they may be "
                "replaced, or pack into another target",
                filename=catalog.name,
            )
        written = []
        with catalog.change() as change:
            for region in catalog.regions:
                if only or region.name in source.tensors:
                    change.delete(region.kind)
            for entry in entries:
                info = entry.info
                part = FilePart(entry.file, info.offset, info.nbytes)
                # A tensor keeps the number that its name had.
                kind = catalog[info.name].kind if info.name in catalog else None
                written.append(
                    change.add(kind, part, name=info.name, dtype=info.dtype.name, shape=info.shape, advance=advance)
                )
        return tuple(written)


def _open(target: Source, alignment: int | None, overwrite: str | None) -> Catalog:
    try:
        return Catalog(target, "r+")
    except NoCatalogError:
        return Catalog.create(target, alignment=alignment, overwrite=overwrite)
