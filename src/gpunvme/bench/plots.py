"""The plots of a report as SVG, to be put into a page: made by Matplotlib, which is asked for only here."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

from gpunvme.bench.contest import Row
from gpunvme.bench.machine import size_text
from gpunvme.bench.report import told_in_requests
from gpunvme.bench.sweep import GATHER, OURS
from gpunvme.errors import Error

_COLOURS = {"ours": "#1a66c2", "peer": "#9aa3ad", "limit": "#c2410c"}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searched and read aloud
    "svg.hashsalt": "gpunvme",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a name is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


class PlotsMissingError(Error, ImportError):
    """Matplotlib is not installed; the message says how to get it."""


def require() -> None:
    """Make sure that plots can be made, before anything is measured for them.

    Raises
    ------
    PlotsMissingError
        If Matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotsMissingError(
            "a report has plots, which Matplotlib makes, and it is not installed: pip install gpunvme[plot]"
        ) from error


def _drawn(name: str, width: float, height: float, draw: Any) -> str:
    """Draw one figure; return an ``<svg>`` element whose ids begin with its name, so that many share a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _inlined(text.getvalue(), name)


def _inlined(svg: bytes, name: str) -> str:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href":
                element.set(key, value.replace("#", f"#{name}-", 1))
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#", f"url(#{name}-", value))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def _unit(rates: list[float]) -> tuple[float, str]:
    return (1e9, "GB/s") if max(rates, default=0.0) >= 1e9 else (1e6, "MB/s")


def contest_plot(name: str, rows: list[Row]) -> str:
    """Draw one case: a bar for each contestant, and the limit as a line.

    Parameters
    ----------
    name : str
        What the ids in the SVG begin with.
    rows : list of dict
        The case's rows, at least one with a figure.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    done = [row for row in rows if row["median"] is not None]
    bars = [row for row in done if row["kind"] != "limit"]
    limit = max((row["median"] for row in done if row["kind"] == "limit"), default=None)
    scale, unit = _unit([row["high"] for row in done])
    if told_in_requests(done[0]):
        scale, unit = done[0]["block"] * 1e3, "k IOPS: thousand requests a second"

    def draw(axes: Any) -> None:
        places = range(len(bars))
        lengths = [row["median"] / scale for row in bars]
        spread = [
            [(row["median"] - row["low"]) / scale for row in bars],
            [(row["high"] - row["median"]) / scale for row in bars],
        ]
        colours = [_COLOURS[row["kind"]] for row in bars]
        axes.barh(places, lengths, xerr=spread, color=colours, height=0.65, error_kw={"ecolor": "#374151"})
        axes.set_yticks(places, [row["contestant"] for row in bars])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        if limit is not None:
            axes.axvline(limit / scale, color=_COLOURS["limit"], linestyle="--", linewidth=1.6, label="limit")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        axes.set_xlim(0, 1.05 * max(row["high"] for row in done) / scale)

    return _drawn(name, 5.6, 0.95 + 0.34 * max(2, len(bars)), draw)


def size_plot(name: str, rows: list[Row]) -> str:
    """Draw throughput by size: of each contestant the best over all depths; limits dashed."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["median"] is not None:
            line = lines.setdefault((row["contestant"], row["kind"]), {})
            line[row["block"]] = max(line.get(row["block"], 0.0), row["median"])
    scale, unit = _unit([rate for line in lines.values() for rate in line.values()])
    sizes = sorted({size for line in lines.values() for size in line})

    def draw(axes: Any) -> None:
        for (contestant, kind), line in lines.items():
            places = sorted(line)
            axes.plot(
                places,
                [line[size] / scale for size in places],
                color=_COLOURS[kind],
                linestyle="--" if kind == "limit" else ":" if contestant == GATHER else "-",
                marker="o",
                markersize=4,
                label=contestant + (" (limit)" if kind == "limit" else ""),
            )
        _size_axis(axes, sizes)
        axes.set_xlabel("bytes of one request")
        axes.set_ylabel(f"{unit}, at the best depth")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _drawn(name, 7.2, 4.0, draw)


def _size_axis(axes: Any, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [size_text(size) for size in sizes])
    axes.minorticks_off()


def depth_plot(name: str, rows: list[Row], knee: dict[str, Any] | None) -> str:
    """Draw throughput of ours by depth, a line for each size, the knee marked."""
    import matplotlib

    mine = [row for row in rows if row["contestant"] == OURS and row["depth"] is not None and row["median"] is not None]
    sizes = sorted({row["block"] for row in mine})
    depths = sorted({row["depth"] for row in mine})
    scale, unit = _unit([row["median"] for row in mine])
    shades = matplotlib.colormaps["viridis_r"]

    def draw(axes: Any) -> None:
        for number, size in enumerate(sizes):
            line = sorted((row["depth"], row["median"] / scale) for row in mine if row["block"] == size)
            shade = shades(0.12 + 0.88 * number / max(1, len(sizes) - 1))
            axes.plot(*zip(*line, strict=True), color=shade, marker="o", markersize=4, label=size_text(size))
        if knee is not None:
            place = (knee["depth"], knee["median"] / scale)
            axes.plot(*place, "o", markersize=13, fillstyle="none", color=_COLOURS["limit"], label="knee")
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("depth: requests in flight")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return _drawn(name, 7.2, 4.0, draw)


def latency_plot(name: str, rows: list[Row]) -> str:
    """Draw what share of requests was done after how long, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    done = [row for row in rows if row["quantiles"]]
    scale, unit = (1e3, "ms") if min(row["p50"] for row in done) >= 1e-3 else (1e6, "µs")

    def draw(axes: Any) -> None:
        for row in done:
            axes.plot(
                [seconds * scale for seconds in row["quantiles"]],
                range(101),
                drawstyle="steps-post",
                color=_COLOURS[row["kind"]],
                linestyle="--" if row["kind"] == "limit" else "-",
                label=row["contestant"] + (" (limit)" if row["kind"] == "limit" else ""),
            )
        axes.set_xscale("log")
        few = max(row["most"] for row in done) < 100 * min(row["least"] for row in done)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{unit} for one request")
        axes.set_ylabel("% of requests done")
        axes.set_ylim(0, 101)
        axes.legend(loc="lower right")

    return _drawn(name, 5.6, 3.2, draw)
