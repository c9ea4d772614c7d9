"""``gpunvme doctor``: what this machine has, what it lacks, what that costs, and the fix."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from gpunvme.cli.exits import Exit
from gpunvme.cli.output import Output


def doctor(
    path: Annotated[str, typer.Argument(help="Look at the file system that holds this file or folder.")] = ".",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine: what works, what is lost, and the exact fix. Nothing is changed.

    Exits with 1 if something that this machine ought to be able to do does not work (a red line).
    """
    from gpunvme.doctor import Level, examine_machine

    output = Output(as_json=json)
    findings = examine_machine(path)
    output.document({"findings": [finding.as_dict() for finding in findings]})
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
    if any(finding.level is Level.RED for finding in findings):
        raise typer.Exit(Exit.CHECK_FAILED)
