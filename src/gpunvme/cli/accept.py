"""``gpunvme accept``: every path and tier tried on a drive of one's own, and a table to be sent to us."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from gpunvme.cli.exits import Exit
from gpunvme.cli.output import Output, size

if TYPE_CHECKING:
    from gpunvme.accept.session import Acceptance

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def accept(
    bdf: Annotated[str, typer.Argument(metavar="BDF", help="PCI address of an empty drive.", show_default=False)],
    erase: Annotated[
        str | None,
        typer.Option(
            help="The address once more, in full: the drive will be written to. One that holds anything is refused "
            "whatever is said.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda:0",
    directory: Annotated[
        str | None,
        typer.Option(help="Try files there too: cuFile and p2pdma need a file system.", show_default=False),
    ] = None,
    report: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result there, as JSON.", show_default=False)
    ] = None,
    serial: Annotated[bool, typer.Option("--serial", help="Leave serial numbers in; without it none is.")] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out the steps that begin so; can be repeated.", show_default=False)
    ] = None,
) -> None:
    """Try every path and tier with an empty drive of this machine; needs root.

    The drive is taken from the kernel's driver and given back, whatever happens. Each step has a deadline, and is
    passed, failed or skipped with the reason. Figures are for orientation. Exits with 0 if all that ran passed.
    """
    from gpunvme.accept.drive import look_at
    from gpunvme.accept.session import Wish
    from gpunvme.accept.session import accept as run
    from gpunvme.memory import Device
    from gpunvme.nvme.sysfs import Machine

    try:
        gpu = Device.parse(device)
    except ValueError as error:
        raise typer.BadParameter(f"{device!r} is no device", param_hint="--device") from error
    if not gpu.is_gpu:
        raise typer.BadParameter(f"{device!r} is no GPU", param_hint="--device")
    if directory is not None and not (os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)):
        raise typer.BadParameter(f"{directory!r} is no directory that can be written to", param_hint="--directory")
    output = Output(as_json=False)
    drive = look_at(bdf, erase, Machine())
    if report is not None:
        open(report, "a").close()  # not after minutes
    wish = Wish(str(gpu), directory or "", serial, tuple(skip or ()))
    with output.status("accept") as show:
        acceptance = run(drive, wish, show=show)
    if report is not None:
        with open(report, "w") as file:
            json.dump(acceptance.document(), file, indent=2)
            file.write("\n")
    _print(output, acceptance, report)
    if acceptance.interrupted:
        raise KeyboardInterrupt
    if not acceptance.passed:
        raise typer.Exit(Exit.CHECK_FAILED)


def _print(output: Output, acceptance: Acceptance, report: str | None) -> None:
    drive = acceptance.drive
    output.line(f"{drive.info.model}, firmware {drive.firmware}, {size(drive.nbytes)} at {drive.address}")
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("step", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("what was seen, or why not", overflow="fold")
    table.add_column("figures: seen (limit)", overflow="fold")
    for row in acceptance.rows:
        outcome = Text(row.outcome.value, style=_STYLES[row.outcome.value])
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        table.add_row(row.step, outcome, seconds, row.reason, "\n".join(map(str, row.figures)))
    output.console.print(table)
    counts = acceptance.document()["summary"]
    output.line(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), style="bold")
    private = "serial numbers, as asked for" if acceptance.wish.serials else "no serial numbers"
    output.line(f"The table{' and ' + report if report else ''}: {private}, no names of machine or user, no paths.")
    output.line("Figures were taken once and shortly: they show that a path works, not how fast it is.", style="dim")
