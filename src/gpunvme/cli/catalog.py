"""``gpunvme pack`` and ``gpunvme catalog ls | verify | rm``: named regions in a file or on a device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.exits import CheckFailedError
from gpunvme.cli.output import Output, duration, size, speed

if TYPE_CHECKING:
    from gpunvme.catalog import Region

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="A file, a block device, or nvme+URI such as nvme+pci:0000:01:00.0.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def pack(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A safetensors file, its index or directory.", show_default=False)
    ],
    target: Target,
    replace: Annotated[bool, typer.Option("--replace", help="Replace regions of the same names.")] = False,
    only: Annotated[bool, typer.Option("--only", help="Delete all other regions.")] = False,
    overwrite: Annotated[
        str | None,
        typer.Option(help="TARGET's name once more, to lose what it holds if that is no catalog.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Write every tensor of a checkpoint into a catalog: all of them, or none. Memory used: 16 MiB."""
    from gpunvme.catalog import pack as pack_checkpoint

    output = Output(as_json=json)
    start = time.perf_counter()
    with output.progress("pack") as progress:
        written = pack_checkpoint(model, target, replace=replace, only=only, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - start
    nbytes = sum(region.nbytes for region in written)
    output.document(
        {
            "source": model,
            "target": target,
            "nbytes": nbytes,
            "seconds": seconds,
            "regions": [_region(region) for region in written],
        }
    )
    output.line(
        f"{len(written)} tensors, {size(nbytes)} in {duration(seconds)} ({speed(nbytes, seconds)}), safe on {target}"
    )


def ls(target: Target, json: Json = False) -> None:
    """List the regions of a catalog."""
    import gpunvme

    output = Output(as_json=json)
    with gpunvme.Catalog(target) as catalog:
        regions, generation, alignment = catalog.regions, catalog.generation, catalog.alignment
    output.document(
        {
            "target": target,
            "generation": generation,
            "alignment": alignment,
            "regions": [_region(region) for region in regions],
        }
    )
    width = max((len(str(region.kind)) for region in regions), default=0)
    for region in regions:
        output.line(f"{region.kind:>{width}}  {region.name or '–'}  {_what(region)}  at {region.offset}")
    total = sum(region.nbytes for region in regions)
    output.line(f"{len(regions)} regions, {size(total)}, generation {generation}")


def verify(
    target: Target,
    regions: Annotated[
        list[str] | None, typer.Argument(metavar="[REGION]...", help="Names or numbers; all if none.")
    ] = None,
    json: Json = False,
) -> None:
    """Read regions and compare their checksums."""
    import gpunvme

    output = Output(as_json=json)
    start = time.perf_counter()
    with gpunvme.Catalog(target) as catalog:
        wanted = [_chosen(catalog, text) for text in regions] if regions else list(catalog.regions)
        with output.progress("verify") as progress:
            damaged = catalog.verify([region.kind for region in wanted], progress=progress)
    seconds = time.perf_counter() - start
    nbytes = sum(region.nbytes for region in wanted)
    if damaged:
        names = ", ".join(f"{region} at {region.offset}" for region in damaged)
        raise CheckFailedError(f"{len(damaged)} of {len(wanted)} regions of {target} are damaged: {names}")
    output.document({"target": target, "regions": len(wanted), "nbytes": nbytes, "seconds": seconds, "damaged": []})
    output.line(f"{len(wanted)} regions are as they were written: {size(nbytes)} in {duration(seconds)}")


def rm(
    target: Target,
    regions: Annotated[list[str], typer.Argument(metavar="REGION...", help="Names or numbers.", show_default=False)],
    json: Json = False,
) -> None:
    """Delete regions, all at once. Their space is used again by the change after the next one."""
    import gpunvme

    output = Output(as_json=json)
    with gpunvme.Catalog(target, "r+") as catalog, catalog.change() as change:
        gone = list(dict.fromkeys(_chosen(catalog, text) for text in regions))
        for region in gone:
            change.delete(region.kind)
    output.document({"target": target, "deleted": [_region(region) for region in gone]})
    output.line(f"deleted: {', '.join(map(str, gone))}")


def _chosen(catalog: Any, text: str) -> Region:
    """Find a region by its name, else by its number, with or without ``#``."""
    number = text.removeprefix("#")
    region: Region = catalog[text if text in catalog or not number.isdecimal() else int(number)]
    return region


def _what(region: Region) -> str:
    if region.dtype:
        return f"{region.dtype} {list(region.shape)}, {size(region.nbytes)}"
    return f"{size(region.nbytes)}, {region.records} records of {region.record_size} bytes"


def _region(region: Region) -> dict[str, Any]:
    return {**region._asdict(), "shape": list(region.shape)}
