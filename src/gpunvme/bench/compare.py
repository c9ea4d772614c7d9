"""Two runs of ``gpunvme bench`` side by side: ratios with their spread, and what else differs between the two."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpunvme.bench.contest import Row
from gpunvme.bench.report import rate_text
from gpunvme.errors import FormatError

SCHEMA = 1
_IN_PAGE = re.compile(r'<script type="application/json" id="gpunvme-bench">(.*?)</script>', re.DOTALL)
_WORDS = {
    "slower": "slower",
    "faster": "faster",
    "same": "same, within the spread or the threshold",
    "lost": "measured before, not any more",
    "gained": "not measured before",
    "neither": "measured in neither",
}


def load(path: str) -> dict[str, Any]:
    """Read what ``gpunvme bench --json`` printed, or the page that ``--report`` wrote.

    Raises
    ------
    gpunvme.FormatError
        It is something else, or of a version that this release does not know.
    OSError
        It cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    in_page = _IN_PAGE.search(text)
    text = in_page.group(1) if in_page else text
    try:
        document = json.loads(text)
    except ValueError as error:
        raise FormatError(
            f"not JSON ({error}): compare takes what gpunvme bench --json prints", filename=path
        ) from None
    if not isinstance(document, dict) or document.get("benchmark") != "gpunvme bench":
        raise FormatError("not a result of gpunvme bench --json", filename=path)
    if document.get("schema") != SCHEMA:
        raise FormatError(f"a result of schema {document.get('schema')!r}; this release reads {SCHEMA}", filename=path)
    try:
        for row in _rows(document):
            _ = row["case"], row["contestant"], row["kind"], row["block"], row["median"], row["low"], row["high"]
        _ = document["machine"].items(), document["file"].items(), document["versions"].items(), document["device"]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"a result of gpunvme bench that lacks a part of it: {error}", filename=path) from None
    return document


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Compare two results, row by row.

    Parameters
    ----------
    before, after : dict
        What `load` returned.
    threshold : float
        The share that a median must lose to count as slower: 0.1 is 10 %. And it must lie outside the spread: the
        fastest run after is slower than the slowest one before.

    Returns
    -------
    dict
        ``rows`` (``case``, ``contestant``, ``kind``, ``before``, ``after`` in bytes per second, ``ratio`` of medians,
        ``low`` and ``high`` of what the ratio may be by the spread, ``verdict``), ``others`` (the median ratio of peers
        and limits: what became of the machine), ``differences`` of what was measured on (``what``, ``before``,
        ``after``), ``comparable`` (nothing but versions differs), ``threshold`` and
        ``regressions``: rows of ours that are slower, or not measured any more.
    """
    old = {_key(row): row for row in _rows(before)}
    new = {_key(row): row for row in _rows(after)}
    rows = [_compared(old.get(key), new.get(key), threshold) for key in dict.fromkeys([*old, *new])]
    differences = list(_differences(before, after))
    others = [float(row["ratio"]) for row in rows if row["kind"] != "ours" and row["ratio"] is not None]
    return {
        "rows": rows,
        "others": statistics.median(others) if others else None,
        "differences": differences,
        "comparable": all(difference["what"].startswith("version") for difference in differences),
        "threshold": threshold,
        "regressions": [row for row in rows if row["kind"] == "ours" and row["verdict"] in ("slower", "lost")],
    }


def _rows(document: dict[str, Any]) -> list[Row]:
    return [*document["results"], *document.get("sweep", {}).get("rows", [])]


def _key(row: Row) -> tuple[str, str]:
    return str(row["case"]), str(row["contestant"])


def _compared(old: Row | None, new: Row | None, threshold: float) -> dict[str, Any]:
    some = old or new
    assert some is not None
    was = old["median"] if old else None
    now = new["median"] if new else None
    compared: dict[str, Any] = {name: some[name] for name in ("case", "contestant", "kind", "block")}
    compared |= {"before": was, "after": now, "ratio": None, "low": None, "high": None}
    if old and new and was and now:
        ratio, low, high = now / was, new["low"] / old["high"], new["high"] / old["low"]
        verdict = "slower" if ratio < 1 - threshold and high < 1 else "same"
        verdict = "faster" if ratio > 1 / (1 - threshold) and low > 1 else verdict
        return compared | {"ratio": ratio, "low": low, "high": high, "verdict": verdict}
    # A case that the second run did not contain was not asked for; one that it contains and has no figure is a loss.
    verdict = "lost" if was and new else "gained" if now else "neither"
    if was and not new:
        verdict = "neither"
    return compared | {"verdict": verdict}


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part, prefix in (("machine", ""), ("file", "file's "), ("versions", "version of ")):
        for name in sorted({*before[part], *after[part]}):
            was, now = before[part].get(name), after[part].get(name)
            if was != now and (part, name) != ("file", "name"):
                yield {"what": prefix + name, "before": was, "after": now}
    if before["device"] != after["device"]:
        yield {"what": "device", "before": before["device"], "after": after["device"]}


def render(compared: dict[str, Any], console: Console) -> None:
    """Print a comparison.

    Parameters
    ----------
    compared : dict
        What `compare` returned.
    console : rich.console.Console
        Where to.
    """
    for difference in compared["differences"]:
        text = f"{difference['what']}: {difference['before']} before, {difference['after']} after"
        console.print(escape(text), highlight=False)
    if not compared["comparable"]:
        text = "Not the same machine, file or device: the ratios below say little about gpunvme."
        console.print(text, style="bold yellow", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("case", "left"), ("", "left"), ("before", "right"), ("after", "right"), ("ratio", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("by the spread", justify="right")
    table.add_column("", overflow="fold")
    for row in compared["rows"]:
        style = {"slower": "bold red", "lost": "bold red", "faster": "green"}.get(row["verdict"], "")
        table.add_row(
            escape(str(row["case"])),
            escape(str(row["contestant"])),
            rate_text(row, row["before"]),
            rate_text(row, row["after"]),
            f"{row['ratio']:.2f}×" if row["ratio"] else "—",
            f"{row['low']:.2f}–{row['high']:.2f}×" if row["ratio"] else "",
            _WORDS[row["verdict"]],
            style=style if row["kind"] == "ours" else f"dim {style}",
        )
    console.print(table)
    if compared["others"] is not None:
        text = f"Half of the ratios of peers and limits are above {compared['others']:.2f}×."
        if compared["others"] < 1 - compared["threshold"]:
            text += " They fell too: the machine was slower, or busy. Measure again before you believe a loss."
        console.print(text, highlight=False)
    count, share = len(compared["regressions"]), f"{compared['threshold']:.0%}"
    console.print(
        f"{count} figures of gpunvme are lower by more than {share} and by more than the spread, or are missing."
        if count
        else f"No figure of gpunvme is lower by more than {share} and by more than the spread.",
        highlight=False,
    )
