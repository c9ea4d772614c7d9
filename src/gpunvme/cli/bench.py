"""``gpunvme bench``: this library, what people use today, and the machine's limit, in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from gpunvme.cli.device import resolve_device
from gpunvme.cli.output import Output


def bench(
    path: Annotated[str | None, typer.Argument(help="Measure with this file; a temporary one if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="Sizes of one read, such as 4KiB,1MiB,1GiB; chosen if not given.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Measure writing too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: a first impression.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure reads (and writes) beside what people use today and the limit of the machine, in the same run."""
    wanted = None if sizes is None else [parse_size(word) for word in sizes.split(",")]
    where = resolve_device(device)
    from gpunvme.bench import run_bench
    from gpunvme.bench.report import render

    output = Output(as_json=json)
    with output.status("measuring") as show:
        result = run_bench(
            path,
            device=where,
            sizes=wanted,
            write=write,
            quick=quick,
            on_result=lambda row: show(f"{row['case']}, {row['contestant']}"),
        )
    output.document(result)
    if not json:
        render(result, output.console)


def parse_size(text: str) -> int:
    """Read a size such as ``4096``, ``4KiB``, ``1.5 MiB`` or ``2GB``.

    Raises
    ------
    typer.BadParameter
        It is not a size.
    """
    word = text.strip().lower()
    scales = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
    number, scale = word, 1
    for unit, factor in scales.items():
        if word.endswith(unit):
            number, scale = word[: -len(unit)].strip(), factor
            break
    try:
        nbytes = float(number) * scale
    except ValueError:
        nbytes = 0.0
    if not 1 <= nbytes < 2**63 or nbytes != int(nbytes):
        raise typer.BadParameter(f"{text!r} is not a size: write 4096, 4KiB, 1MiB or 2GB", param_hint="--sizes")
    return int(nbytes)
