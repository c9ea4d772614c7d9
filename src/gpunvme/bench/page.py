"""A result as one page for people who have never heard of us: plots, ratios, losses, and what each word means.

The page needs nothing but itself: no script runs, nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from gpunvme.bench import contest, plots
from gpunvme.bench.contest import Row
from gpunvme.bench.latency import PERCENTILES
from gpunvme.bench.machine import size_text
from gpunvme.bench.page_words import STYLE, WORDS
from gpunvme.bench.report import rate_text, ratio_text, spread_text
from gpunvme.bench.sweep import ENOUGH, OURS

_CLOSE = 0.02  # ratios this near to 1 are told as equal


def html(result: dict[str, Any]) -> str:
    """Make the page.

    Parameters
    ----------
    result : dict
        What `run_bench` returned.

    Returns
    -------
    str
        HTML that is well-formed XML too.

    Raises
    ------
    PlotsMissingError
        If Matplotlib is not installed.
    """
    plots.require()
    rows: list[Row] = result["results"]
    parts = [_intro(result), _summary(rows), _losses(result), _machine(result), _paths(rows)]
    parts += [_sweep(result["sweep"])] if "sweep" in result else []
    parts += [_latency(result["latency"])] if result.get("latency") else []
    parts += [_figures(rows), _words(), _raw(result)]
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(_title(result))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _title(result: dict[str, Any]) -> str:
    return f"gpunvme bench: {result['file']['name']}"


def _where(result: dict[str, Any]) -> str:
    gpu = result["machine"].get("gpu")
    return f"the memory of a GPU ({gpu})" if gpu else "the memory of the host; no GPU took part"


def _intro(result: dict[str, Any]) -> str:
    file, machine = result["file"], result["machine"]
    return (
        "<h1>How fast does this machine read a file?</h1>\n"
        f"<p>Measured on {escape(result['date'])} by <b>gpunvme {escape(str(result['versions']['gpunvme']))}</b>, a "
        "Python library that moves bytes between files and GPU memory. On this page it stands beside the ways in which "
        "people read files today, and beside the limit: what the machine can do at most. All were measured in one run, "
        "in turns, with the same file and the same destination. What arrived was checked against the file.</p>\n"
        f"<p>The file <b>{escape(str(file['name']))}</b> ({size_text(file['nbytes'])}) was read into "
        f"{escape(_where(result))}. Processor: {escape(str(machine['processor']))}. "
        "Higher is better where rates are shown, lower where times are.</p>"
    )


def _table(heads: list[str], lines: list[list[str]], kinds: list[str] | None = None) -> str:
    """Make a table of cells that are HTML already; numbers stand right in all columns but the first."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(
        f'<tr class="{kinds[number] if kinds else ""}">' + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>"
        for number, line in enumerate(lines)
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _whole(figure: str) -> str:
    """Keep a figure and its unit on one line."""
    return f'<span class="figure">{figure}</span>'


def _verdict(ratio: float | None) -> str:
    if ratio is None:
        return "—"
    if abs(ratio - 1) <= _CLOSE:
        return '<span class="same">equal</span>'
    return '<span class="win">faster</span>' if ratio > 1 else '<span class="loss">slower</span>'


def _compared(rows: list[Row]) -> Iterator[tuple[str, Row | None, Row | None, Row | None]]:
    """Yield of each case the best of ours, of the peers and of the limits."""
    for case in contest.cases(rows):
        yield (
            case,
            contest.best(rows, case, "ours"),
            contest.best(rows, case, "peer"),
            contest.best(rows, case, "limit"),
        )


def _median(row: Row | None) -> float:
    return 0.0 if row is None else float(row["median"])


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _summary(rows: list[Row]) -> str:
    lines = []
    for case, ours, peer, limit in _compared(rows):
        some = ours or peer or limit
        if some is None:
            continue
        mine, theirs, most = _median(ours), _median(peer), _median(limit)
        lines.append(
            [
                escape(case),
                _whole(rate_text(some, mine or None)),
                _whole(rate_text(some, theirs or None))
                + (f"<br/><small>{escape(peer['contestant'])}</small>" if peer else ""),
                _whole(rate_text(some, most or None))
                + (f"<br/><small>{escape(limit['contestant'])}</small>" if limit else ""),
                f"{ratio_text(mine, theirs)} {_verdict(_over(mine, theirs))}",
                ratio_text(mine, most),
            ]
        )
    heads = [
        "what was done",
        "gpunvme",
        "best of today's ways",
        "limit",
        "gpunvme ÷ best of today's",
        "gpunvme ÷ limit",
    ]
    return "<h2>In short</h2>\n" + _table(heads, lines)


def _lost(result: dict[str, Any]) -> Iterator[str]:
    """Yield where another way was better, of everything that was measured."""
    for case, ours, peer, _ in _compared(result["results"]):
        if ours and peer and ours["median"] < peer["median"] * (1 - _CLOSE):
            yield f"{case}: {ratio_text(ours['median'], peer['median'])} of {peer['contestant']}"
    swept: list[Row] = result.get("sweep", {}).get("rows", [])
    for size in dict.fromkeys(row["block"] for row in swept):
        done = [row for row in swept if row["block"] == size and row["median"] is not None]
        ours, peer = (
            max((row for row in done if row["kind"] == kind), key=_median, default=None) for kind in ("ours", "peer")
        )
        if ours and peer and ours["median"] < peer["median"] * (1 - _CLOSE):
            yield (
                f"requests of {size_text(size)} at their best depth: {ratio_text(ours['median'], peer['median'])} of "
                f"{peer['contestant']}"
            )
    for case in contest.cases(result.get("latency", [])):
        done = [row for row in result["latency"] if row["case"] == case and row["p50"] is not None]
        mine = min((row["p50"] for row in done if row["kind"] == "ours"), default=None)
        theirs = min((row["p50"] for row in done if row["kind"] == "peer"), default=None)
        if mine and theirs and mine > theirs * (1 + _CLOSE):
            yield f"{case}: half of them took {_time(mine)}; the best of today's ways took {_time(theirs)}"


def _losses(result: dict[str, Any]) -> str:
    told = [escape(loss) for loss in _lost(result)]
    rows = result["results"] + result.get("latency", [])
    absent = [
        f"{escape(row['case'])}, {escape(row['contestant'])}: {escape(row['failure'])}"
        for row in rows
        if row["failure"]
    ]
    text = "<h2>Where gpunvme lost, and what is missing</h2>\n"
    text += _list(told) if told else "<p>In no case was another way faster by more than 2 %.</p>"
    if absent:
        text += f"<p>Not measured ({len(absent)}):</p>\n{_list(absent)}"
    if not result["versions"].get("fio"):
        text += "<p>fio, which measures drives, was not installed, so it is not compared with.</p>"
    return text


def _list(items: list[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"


def _machine(result: dict[str, Any]) -> str:
    machine, file, versions = result["machine"], result["file"], result["versions"]
    facts = [
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs for this program"),
        ("memory", size_text(machine["memory_bytes"])),
        ("system", f"{machine['system']} {machine['kernel']}"),
        ("GPU", str(machine.get("gpu") or "none took part")),
        ("file", f"{file['name']}, {size_text(file['nbytes'])} ({file['nbytes']} bytes)"),
        ("file system", f"{file['filesystem'] or 'unknown'} on {file['drive'] or file['source'] or 'unknown'}"),
        ("destination", str(result["device"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]
    lines = [[f"<b>{escape(name)}</b>", escape(value)] for name, value in facts]
    return '<h2>The machine</h2>\n<div class="facts">' + _table(["", ""], lines) + "</div>"


def _paths(rows: list[Row]) -> str:
    text = (
        "<h2>Case by case</h2>\n<p>One plot for each case. Blue is gpunvme, grey are the ways of today; the dashed "
        "line is the limit. Thin black lines reach from the slowest to the fastest run.</p>\n"
    )
    figures = []
    for number, case in enumerate(contest.cases(rows)):
        mine = [row for row in rows if row["case"] == case]
        if any(row["median"] is not None and row["kind"] != "limit" for row in mine):
            figures.append(_figure(case, plots.contest_plot(f"case{number}", mine)))
    return text + '<div class="grid">\n' + "\n".join(figures) + "\n</div>"


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>\n{svg}</figure>"


def _sweep(sweep: dict[str, Any]) -> str:
    rows: list[Row] = sweep["rows"]
    text = (
        "<h2>By size and depth</h2>\n<p>Blocks at random places of the file, "
        + ("not cached" if sweep["state"] == "cold" else "all of them in the page cache")
        + ". Depth is how many requests are in flight at once. <i>One gather</i> is a single call of gpunvme for all "
        "blocks, which keeps as many in flight as it sees fit.</p>\n"
    )
    if not any(row["median"] is not None for row in rows):
        return text + f"<p>Nothing was measured: {escape(str(rows[0]['failure'] if rows else 'no sizes'))}</p>"
    text += _figure("Throughput by size of a request", plots.size_plot("sizes", rows))
    knee = sweep["knees"].get(OURS)
    if knee is not None:
        text += _figure("Throughput of gpunvme by depth", plots.depth_plot("depths", rows, knee))
        text += (
            f"<p>The <b>knee</b> (circle): requests of <b>{size_text(knee['block'])}</b> at depth "
            f"<b>{knee['depth']}</b> reach {_plain(knee['median'])}, {knee['median'] / knee['best']:.0%} of the best, "
            f"{_plain(knee['best'])}. It is the least in flight that reaches {ENOUGH:.0%}; more pays little.</p>\n"
        )
    return text + _sweep_tables(sweep)


def _plain(rate: float | None) -> str:
    if rate is None:
        return "—"
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


def _sweep_tables(sweep: dict[str, Any]) -> str:
    rows: list[Row] = sweep["rows"]
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    sizes = sorted({row["block"] for row in rows})
    text = ""
    for name in dict.fromkeys(str(row["contestant"]) for row in rows):
        known = {(row["block"], row["depth"]): row for row in rows if row["contestant"] == name}
        if not any(row["median"] is not None for row in known.values()):
            continue
        columns: list[int | None] = [depth for depth in depths if any(key[1] == depth for key in known)]
        columns += [None] if any(key[1] is None for key in known) else []
        marked = {(knee["block"], knee["depth"]) for knee in sweep["depth_knees"].get(name, [])}
        lines = []
        for size in sizes:
            cells = [_cell(known.get((size, depth)), (size, depth) in marked) for depth in columns]
            lines.append([size_text(size), *cells])
        heads = ["", *("one call" if depth is None else f"depth {depth}" for depth in columns)]
        text += f"<h3>{escape(name)}</h3>\n" + _table(heads, lines)
    return text + (
        f"<p>Bold: of each size the smallest depth that reaches {ENOUGH:.0%} of what the size reaches. "
        "A dash was not measured: the time was up, or so much in flight does not fit into the memory set apart.</p>"
    )


def _cell(row: Row | None, marked: bool) -> str:
    text = _plain(row["median"] if row else None)
    return f"<b>{text}</b>" if marked else text


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _latency(rows: list[dict[str, Any]]) -> str:
    text = (
        "<h2>How long one request takes</h2>\n<p>One request at a time, at random places; the curve says what share of "
        "requests was done after how long. The further left, the better. Times include what Python adds to each "
        "call.</p>\n"
        '<div class="grid">\n'
    )
    for number, case in enumerate(contest.cases(rows)):
        mine = [row for row in rows if row["case"] == case]
        if any(row["quantiles"] for row in mine):
            text += _figure(case, plots.latency_plot(f"latency{number}", mine))
    heads = ["case", "", *PERCENTILES, "least", "most", "requests"]
    lines = [
        [
            escape(row["case"]),
            escape(row["contestant"]),
            *(_time(row[name]) for name in (*PERCENTILES, "least", "most")),
            str(row["count"]),
        ]
        for row in rows
    ]
    return text + "\n</div>\n" + _table(heads, lines, [row["kind"] for row in rows])


def _figures(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        how = f"{row['path']}: {row['reason']}" if row["path"] else str(row["settings"])
        lines.append(
            [
                escape(row["case"]),
                escape(row["contestant"]) + (" (limit)" if row["kind"] == "limit" else ""),
                rate_text(row, row["median"]),
                rate_text(row, row["low"]),
                rate_text(row, row["high"]),
                spread_text(row),
                str(row["rounds"]),
                escape(row["failure"] or how),
            ]
        )
    heads = ["case", "who", "median", "slowest", "fastest", "spread", "runs", "how, or why not"]
    table = _table(heads, lines, [row["kind"] for row in rows])
    return f"<h2>All figures</h2>\n<details><summary>{len(rows)} rows</summary>\n{table}\n</details>"


def _words() -> str:
    lines = "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in WORDS)
    return f"<h2>What the words mean</h2>\n<dl>\n{lines}\n</dl>"


def _raw(result: dict[str, Any]) -> str:
    # Nothing in it may end the element, or begin one: it is data, and the page stays well-formed.
    text = json.dumps(result, indent=1)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (
        "<h2>The same as data</h2>\n<p><code>gpunvme bench compare</code> takes this page, too.</p>\n"
        f'<script type="application/json" id="gpunvme-bench">\n{text}\n</script>'
    )
