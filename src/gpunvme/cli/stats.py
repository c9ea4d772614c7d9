"""``gpunvme stats``: a command is run, and what its processes moved with gpunvme is told at the end."""

from __future__ import annotations

import json as json_
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Annotated, Any

import typer

from gpunvme.totals import VARIABLE, PathTotals, Stats


def stats(
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments, after --.", metavar="-- COMMAND")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the totals as JSON, on stderr as always.")] = False,
) -> None:
    """Run a command and print, on stderr, what gpunvme moved in it: transfers, bytes and time by path.

    Every process that the command starts counts, if it exits by itself: one that is killed, or ends by os._exit as
    multiprocessing's forked children do, tells nothing. A program asks for its own totals by gpunvme.stats().
    The exit status is the command's.
    """
    with tempfile.TemporaryDirectory(prefix="gpunvme-stats-") as folder:
        told = os.path.join(folder, "totals")
        try:
            status = _run(command, told)
        except FileNotFoundError as error:
            raise typer.BadParameter(f"there is no command {command[0]!r}") from error
        processes = read(told)
    totals = summed(processes)
    if json:
        document = {"processes": processes, "paths": summed_dict(totals), "exit_status": status}
        print(json_.dumps(document, indent=2), file=sys.stderr)
    else:
        text = f"gpunvme stats: {len(processes)} process{'' if len(processes) == 1 else 'es'} moved bytes"
        print(f"{text}\n{totals}", file=sys.stderr)
    raise typer.Exit(status)


def _run(command: list[str], told: str) -> int:
    """Run it with our terminal; Ctrl-C is for the command, and what it did is told even then."""
    child = subprocess.Popen(command, env={**os.environ, VARIABLE: told})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def read(path: str) -> list[dict[str, Any]]:
    """Read what processes told; nothing if none did."""
    try:
        with open(path, encoding="utf-8") as lines:
            return [json_.loads(line) for line in lines]
    except FileNotFoundError:
        return []


def summed(processes: list[dict[str, Any]]) -> Stats:
    """Add up the totals of processes."""
    sums: dict[str, dict[str, Any]] = {}
    for process in processes:
        for name, totals in process["paths"].items():
            sum_ = sums.setdefault(name, dict.fromkeys(totals, 0))
            for key, value in totals.items():
                sum_[key] += value
    return Stats({name: PathTotals(**each) for name, each in sums.items()})


def summed_dict(totals: Stats) -> dict[str, Any]:
    """Return totals as JSON takes them."""
    return {name: asdict(each) for name, each in totals.items()}
