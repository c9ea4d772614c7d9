"""``gpunvme bench``: this library, what people use today, and the machine's limit, in one run."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gpunvme.cli.device import resolve_device
from gpunvme.cli.exits import Exit
from gpunvme.cli.output import Output

LATENCY_SECONDS, SWEEP_SECONDS = 8.0, 60.0
_QUICK = 0.25  # of these


class BenchGroup(TyperGroup):
    """``bench compare …``, and ``bench [FILE] …``, which needs no name of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the usual command in front, unless the other one is asked for."""
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def run(
    path: Annotated[str | None, typer.Argument(help="Measure with this file; a temporary one if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    sizes: Annotated[
        str | None, typer.Option("--sizes", help="Sizes of one read, such as 4KiB,1MiB,1GiB; chosen if not given.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Measure writing too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: a first impression.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure by size and depth too, and find the knee: where more stops paying.")
    ] = False,
    sweep_seconds: Annotated[
        float | None,
        typer.Option(
            min=1, help=f"About how long the sweep takes; {SWEEP_SECONDS:.0f} if not given, less with --quick."
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            help="Write a page with plots to this file: with --sweep's figures and the time of single requests."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Measure reads (and writes) beside what people use today and the limit of the machine, in the same run.

    `gpunvme bench compare A B` compares two results.
    """
    options: dict[str, Any] = {}
    if report is not None:
        from gpunvme.bench.plots import require

        require()
        _check_place(report)
        options["latency_seconds"] = LATENCY_SECONDS * (_QUICK if quick else 1)
    if sweep or sweep_seconds is not None or report is not None:
        options["sweep_seconds"] = sweep_seconds or SWEEP_SECONDS * (_QUICK if quick else 1)
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
            **options,
            on_result=lambda row: show(f"{row['case']}, {row['contestant']}"),
        )
    output.document(result)
    if not json:
        render(result, output.console)
    if report is not None:
        from gpunvme.bench.page import html
        from gpunvme.replace import Replacement

        with Replacement(report, sync=False) as page:
            page.file.write_from(html(result).encode())
        if not json:
            output.line(f"The page is {report}.")


def _check_place(name: str) -> None:
    """Find out before minutes of measuring whether the page can be written."""
    folder = os.path.dirname(os.path.abspath(name))
    if os.path.isdir(name):
        raise typer.BadParameter(f"{name!r} is a directory: name a file in it", param_hint="--report")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"no file can be made in {folder!r}", param_hint="--report")


def compare(
    before: Annotated[str, typer.Argument(help="What bench --json printed, or a page of bench --report.")],
    after: Annotated[str, typer.Argument(help="The same, of the run that is compared with it.")],
    threshold: Annotated[
        float, typer.Option(min=0, max=0.99, help="The share that a figure of gpunvme may lose: 0.1 is 10 %.")
    ] = 0.1,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two results: ratios with their spread, and whether both are of one machine.

    The exit status is 1 if a figure of gpunvme is lower by more than the threshold, and by more than the spread of both
    runs, or was not measured any more.
    """
    from gpunvme.bench import compare as comparing

    output = Output(as_json=json)
    compared = comparing.compare(comparing.load(before), comparing.load(after), threshold)
    output.document(compared)
    if not json:
        comparing.render(compared, output.console)
    if compared["regressions"]:
        raise typer.Exit(Exit.CHECK_FAILED)


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
