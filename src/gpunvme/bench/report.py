"""The result of a run, for people: one table a case, each rate beside the limit and the best of what people use."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpunvme.bench import contest
from gpunvme.bench.contest import Row
from gpunvme.bench.machine import size_text

_SMALL = 256 << 10  # requests up to this size are told in requests per second
_STYLE = {"ours": "bold", "limit": "cyan", "peer": ""}


def rate_text(row: Row, rate: float | None) -> str:
    """Write a rate of a row as people do.

    Parameters
    ----------
    row : dict
        A row of the results; its request size decides between bytes and requests.
    rate : float or None
        Bytes per second.

    Returns
    -------
    str
        For example ``"12.8 GB/s"`` or ``"1.57 M IOPS"``.
    """
    if rate is None:
        return "—"
    if told_in_requests(row):
        requests = rate / row["block"]
        return f"{requests / 1e6:.2f} M IOPS" if requests >= 1e6 else f"{requests / 1e3:.3g} k IOPS"
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


def told_in_requests(row: Row) -> bool:
    """Whether a row's rate is told in requests per second: of small random reads."""
    return bool(str(row["case"]).startswith("random") and row["block"] <= _SMALL)


def ratio_text(rate: float | None, other: float | None) -> str:
    """Write how many times one rate another is, or a dash where there is none to compare with."""
    return f"{rate / other:.2f}×" if rate and other else "—"


def spread_text(row: Row) -> str:
    """Write how far the slowest and the fastest run lie from the median."""
    if row["median"] is None or row["rounds"] < 2:
        return ""
    return f"{row['low'] / row['median'] - 1:+.0%} {row['high'] / row['median'] - 1:+.0%}"


def case_table(rows: list[Row], case: str) -> Table:
    """Make the table of one case.

    Parameters
    ----------
    rows : list of dict
        Rows, of this case and others.
    case : str
        The case's name.

    Returns
    -------
    rich.table.Table
    """
    limit, peer = contest.best(rows, case, "limit"), contest.best(rows, case, "peer")
    table = Table(title=escape(case), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold", min_width=24)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("spread", justify="right", no_wrap=True)
    table.add_column("× limit", justify="right", no_wrap=True)
    table.add_column("× best peer", justify="right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for row in (row for row in rows if row["case"] == case):
        style = _STYLE[row["kind"]]
        name = escape(str(row["contestant"])) + (" (limit)" if row["kind"] == "limit" else "")
        if row["median"] is None:
            table.add_row(name, "—", "", "", "", escape(str(row["failure"])), style="dim")
            continue
        table.add_row(
            name,
            rate_text(row, row["median"]),
            spread_text(row),
            ratio_text(row["median"], limit["median"] if limit else None),
            ratio_text(row["median"], peer["median"] if peer else None),
            escape(_how(row)),
            style=style,
        )
    return table


def _how(row: Row) -> str:
    if row["path"]:
        return f"{row['path']}: {row['reason']}" if row["reason"] else str(row["path"])
    return "" if row["contestant"].startswith("fio") else str(row["settings"])


def headline(result: dict[str, Any]) -> list[str]:
    """Return what a figure must never be told without: machine, file, versions.

    Parameters
    ----------
    result : dict
        What `run_bench` returned.

    Returns
    -------
    list of str
        Lines.
    """
    machine, file, versions = result["machine"], result["file"], dict(result["versions"])
    to = f"{result['device']} ({machine['gpu']})" if machine.get("gpu") else "host memory"
    on = " on ".join(part for part in (file["filesystem"], file["drive"] or file["source"]) if part)
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = "" if versions.get("fio") else "; fio is not installed, so it is not compared with"
    memory = size_text(machine["memory_bytes"])
    return [
        f"{machine['processor']}, {machine['cpus']} CPUs, {memory}, {machine['system']} {machine['kernel']}",
        f"{file['name']}: {size_text(file['nbytes'])}, {on or 'unknown file system'} → {to}",
        known + missing,
    ]


def render(result: dict[str, Any], console: Console) -> None:
    """Print a result.

    Parameters
    ----------
    result : dict
        What `run_bench` returned.
    console : rich.console.Console
        Where to.
    """
    for line in headline(result):
        console.print(escape(line), highlight=False)
    rows: list[Row] = result["results"]
    for case in contest.cases(rows):
        console.print()
        mine = [row for row in rows if row["case"] == case]
        if all(row["median"] is None for row in mine) and len(mine) == 1:
            console.print(f"[bold]{escape(case)}[/]  [dim]{escape(str(mine[0]['failure']))}[/]", highlight=False)
            continue
        console.print(case_table(rows, case))
    console.print()
    console.print(
        "Medians of interleaved runs; spread is slowest and fastest against the median. × limit: hot against a copy "
        "from page-locked memory (to a GPU) or fio, which throws the bytes away (to the host); not cached against raw "
        "O_DIRECT reads into host memory; all in this run. × best peer: against the fastest of what people use today. "
        "What arrives is checked against the file.",
        style="dim",
        highlight=False,
    )
