"""``gpunvme doctor``: what this machine has, what it lacks, what that costs, and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gpunvme.cli.exits import Exit
from gpunvme.cli.output import Output

if TYPE_CHECKING:
    from gpunvme.doctor import Finding


def doctor(
    path: Annotated[str, typer.Argument(help="Look at the file system that holds this file or folder.")] = ".",
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure too, for some seconds: drive, copies, round trip, doorbells.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Print the fixes as a shell script, to be read first; nothing is run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine: what works, what is lost, and the exact fix. Nothing is changed.

    Exits with 1 if something that this machine ought to be able to do does not work (a red line).
    """
    from gpunvme.doctor import Level, System, examine_machine

    output = Output(as_json=json)
    findings = examine_machine(path)
    if probe and not System().probes.engine_reason():
        from gpunvme.doctor.measure import measure

        with output.status("measuring"):
            findings += measure(System(), path)
    output.document({"findings": [finding.as_dict() for finding in findings]})
    if fix:
        for line in script(findings):
            output.line(line)
    else:
        _show(output, findings)
    if any(finding.level is Level.RED for finding in findings):
        raise typer.Exit(Exit.CHECK_FAILED)


def _show(output: Output, findings: list[Finding]) -> None:
    """Print a line a finding, and below those that cost something the cost and the fix."""
    topics = max(len(finding.topic) for finding in findings)
    for finding in findings:
        head = Text.assemble(
            (f"{finding.level.value:<6}", f"bold {finding.level.value}"), f"  {finding.topic:<{topics}}  {finding.fact}"
        )
        output.console.print(head, soft_wrap=True)
        indent = " " * (topics + 10)
        if finding.cost:
            output.line(f"{indent}costs: {finding.cost}", style="dim")
        if finding.fix:
            output.line(f"{indent}fix:   {finding.fix}")
        for command in finding.commands:
            output.line(f"{indent}       $ {command}")


def script(findings: list[Finding]) -> list[str]:
    """Return the lines of a shell script: commands where there are any, everything else as comments.

    What a machine says of itself, a model or a path, never ends its comment.
    """
    lines = ["#!/bin/sh", "# Read this before you run any of it. What is not a command is to be done by hand."]
    for finding in findings:
        if not finding.fix and not finding.commands:
            continue
        said = [f"{finding.level.value}  {finding.topic}: {finding.fact}", f"  costs: {finding.cost or 'nothing'}"]
        said.append(f"  {finding.fix}")
        lines += ["", *("# " + " ".join(each.split()) for each in said), *finding.commands]
    return lines
