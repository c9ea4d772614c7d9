"""Turns the benchmarks' JSON into Markdown tables: ``python table.py gpu_files.json gpu_gather.json > tables.md``.

Losses are rows like all others. Without ``--all`` a case is one row: gpunvme, the limit and the best peer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpunvme.bench import contest
from gpunvme.bench.contest import Row
from gpunvme.bench.machine import size_text
from gpunvme.bench.report import rate_text, ratio_text, spread_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="JSON files that the benchmarks or `gpunvme bench --json` wrote")
    parser.add_argument("--all", action="store_true", help="every contestant, not only the best of each kind")
    arguments = parser.parse_args()
    for number, name in enumerate(arguments.files):
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        print(("\n" if number else "") + "\n".join(tables(result, everybody=arguments.all)))


def tables(result: dict[str, Any], *, everybody: bool = False) -> list[str]:
    """Return the Markdown lines of one result.

    Parameters
    ----------
    result : dict
        What a benchmark wrote.
    everybody : bool
        Whether each contestant has a row.

    Returns
    -------
    list of str
    """
    lines = [f"**{result['benchmark']}** — {machine(result)}", ""]
    rows: list[Row] = result["results"]
    lines += all_rows(rows) if everybody else compared(rows)
    if result.get("targets"):
        lines += ["", *targets(result["targets"])]
    missing = {name: about["why_not"] for name, about in result.get("contestants", {}).items() if "why_not" in about}
    lines += [line for name, why in missing.items() for line in ("", f"{name} took no part: {cell(why)}")]
    versions = result.get("versions") or {
        name: about.get("version", "") for name, about in result.get("contestants", {}).items()
    }
    known = {name: version for name, version in versions.items() if version and name != "limits"}
    if known:
        lines += ["", "Versions: " + ", ".join(f"{name} ({version})" for name, version in known.items()) + "."]
    return lines


def machine(result: dict[str, Any]) -> str:
    """Return machine, file system and date in one line."""
    about, file = result["machine"], result.get("file", {})
    parts = [
        about.get("gpu", ""),
        f"{about['processor']}, {about['cpus']} CPUs, {size_text(about['memory_bytes'])}",
        f"{about['system']} {about['kernel']}",
        " on ".join(part for part in (file.get("filesystem", ""), file.get("drive") or file.get("source", "")) if part),
        result["date"][:10],
        "a quick run: sizes and rounds are too small to quote" if result.get("quick") else "",
    ]
    return "; ".join(part for part in parts if part)


def compared(rows: list[Row]) -> list[str]:
    """Return one row a case: gpunvme beside the limit and the best peer."""
    lines = [
        "| case | gpunvme | limit | × limit | best peer | | × best peer | first call |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for case in contest.cases(rows):
        ours, limit, peer = (contest.best(rows, case, kind) for kind in ("ours", "limit", "peer"))
        if ours is None:
            why = next((row["failure"] for row in rows if row["case"] == case and row["kind"] == "ours"), "")
            lines.append(f"| {cell(case)} | — {cell(why)} | {rate(limit)} | | {name(peer)} | {rate(peer)} | | |")
            continue
        lines.append(
            f"| {cell(case)} | {rate(ours)} | {rate(limit)} | {ratio(ours, limit)} | {name(peer)} | {rate(peer)} "
            f"| {ratio(ours, peer)} | {rate_text(ours, ours['first'])} |"
        )
    return lines


def all_rows(rows: list[Row]) -> list[str]:
    """Return one row a contestant."""
    lines = ["| case | contestant | median | spread | × limit | settings |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        limit = contest.best(rows, row["case"], "limit")
        if row["median"] is None:
            lines.append(f"| {cell(row['case'])} | {cell(row['contestant'])} | — | | | {cell(row['failure'])} |")
            continue
        who = f"{row['contestant']} (limit)" if row["kind"] == "limit" else row["contestant"]
        lines.append(
            f"| {cell(row['case'])} | {cell(who)} | {rate(row)} | {spread_text(row)} | {ratio(row, limit)} "
            f"| {cell(row['settings'])} |"
        )
    return lines


def targets(stated: list[dict[str, Any]]) -> list[str]:
    """Return one row a target, the missed ones too."""
    lines = ["| target | against | asked | reached | |", "|---|---|---:|---:|---|"]
    for one in stated:
        what = one["case"] if one["measure"] == "median" else f"{one['case']}: {one['measure']}"
        asked = f"≥ {one['at_least']:g}×" if "at_least" in one else f"≤ {one['at_most']:g}×"
        reached = "—" if one["ratio"] is None else f"{one['ratio']:.3f}×"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[one["met"]]
        lines.append(
            f"| {cell(what)} | {cell(one['contestant'] or one['against'])} | {asked} | {reached} | {verdict} |"
        )
    return lines


def rate(row: Row | None) -> str:
    return "—" if row is None else rate_text(row, row["median"])


def ratio(row: Row, other: Row | None) -> str:
    return ratio_text(row["median"], other["median"] if other else None)


def name(row: Row | None) -> str:
    return "—" if row is None else cell(row["contestant"])


def cell(text: str) -> str:
    """Return text as it may stand in a table's cell."""
    return " ".join(str(text).replace("|", "\\|").split())


if __name__ == "__main__":
    main()
