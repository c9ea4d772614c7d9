"""``gpunvme info``: one file, where it lies, how much of it is cached, and which paths could carry it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.output import Output, size

if TYPE_CHECKING:
    from gpunvme.doctor.file_facts import FileFacts


def info(
    file: Annotated[str, typer.Argument(help="The file to look at.", show_default=False)],
    device: Annotated[str, typer.Option(help="Where its bytes would go: auto, cpu, cuda or cuda:N.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what is known about a file: size, cached share, extents, drive, alignment, paths, tensors.

    Nothing of it is read but a safetensors header.
    """
    import gpunvme
    from gpunvme.cli.device import resolve_device
    from gpunvme.doctor.file_facts import file_facts

    output = Output(as_json=json)
    where = resolve_device(device)
    with gpunvme.open(file) as opened:
        facts = file_facts(opened.fileno(), file, opened.size)
        explanation = opened.explain(where)
        verdicts = [
            {"path": verdict.path, "usable": verdict.usable, "reason": verdict.reason} for verdict in explanation
        ]
        tensors = _tensors(opened.fileno(), opened.size, file)
    output.document({**facts.as_dict(), "device": where, "paths": verdicts, "safetensors": tensors})
    output.facts(_lines(facts, tensors))
    output.line()
    output.line(f"paths to {where}:")
    output.line(str(explanation))


def _tensors(fd: int, nbytes: int, name: str) -> dict[str, Any] | None:
    """Sum up a safetensors file; None for a file that is not named like one."""
    if not name.endswith(".safetensors"):
        return None
    from gpunvme.errors import FormatError
    from gpunvme.models import header

    try:
        found = header.read(fd, nbytes, name)
    except FormatError as error:
        return {"error": str(error)}
    dtypes: dict[str, int] = {}
    for tensor in found.tensors.values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + 1
    return {
        "tensors": len(found.tensors),
        "dtypes": dtypes,
        "nbytes": sum(tensor.nbytes for tensor in found.tensors.values()),
        "metadata": found.metadata,
    }


def _lines(facts: FileFacts, tensors: dict[str, Any] | None) -> dict[str, str]:
    """Put the facts into words."""
    lines = {"file": facts.name, "size": f"{size(facts.nbytes)} ({facts.nbytes} bytes)"}
    if facts.cached_bytes is None:
        lines["cached"] = "unknown: the kernel does not tell (before Linux 6.5, or a file of somebody else)"
    else:
        share = facts.cached_bytes / facts.nbytes if facts.nbytes else 0.0
        lines["cached"] = f"{size(facts.cached_bytes)} ({share:.0%})"
    lines["extents"] = facts.layout if isinstance(facts.layout, str) else _layout_text(facts.layout.__dict__)
    if facts.mount is not None:
        mount = facts.mount
        lines["file system"] = f"{mount.kind} at {mount.mount_point}, from {mount.source} ({mount.options})"
    if facts.direct_io is None:
        lines["O_DIRECT"] = "alignment unknown: the file system does not tell, or has no O_DIRECT"
    else:
        memory, offset = facts.direct_io
        lines["O_DIRECT"] = f"memory aligned to {memory} bytes, file offsets to {offset}"
    for drive in facts.drives:
        known = [drive.model or "no model given, as virtual disks do"]
        # Virtual disks say "rotating" whatever is beneath them.
        known += ["rotating"] if drive.rotational and drive.model else []
        known += [f"blocks of {drive.logical_block_size} bytes"] if drive.logical_block_size else []
        known += [f"scheduler {drive.scheduler}"] if drive.scheduler else []
        lines[f"drive {drive.name}"] = ", ".join(known)
    if tensors is not None:
        lines["tensors"] = tensors.get("error") or (
            f"{tensors['tensors']} ({', '.join(f'{count} {name}' for name, count in tensors['dtypes'].items())}), "
            f"{size(tensors['nbytes'])}"
        )
    return lines


def _layout_text(layout: dict[str, int]) -> str:
    words = {
        "hole_bytes": "holes",
        "unwritten_bytes": "allocated but never written",
        "shared_bytes": "shared with other files",
        "encoded_bytes": "compressed or encrypted",
        "inline_bytes": "inside the inode",
        "delayed_bytes": "not allocated yet",
    }
    parts = [f"{size(layout[name])} {word}" for name, word in words.items() if layout[name]]
    return ", ".join([f"{layout['extents']} in {layout['runs']} pieces of the drive", *parts])
