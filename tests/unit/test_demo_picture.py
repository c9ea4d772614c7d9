"""The picture in the README: whoever decides by it must see what the program says today. `make demo-svg` makes it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import files
import gpunvme

PICTURE = Path(__file__).parents[2] / "docs" / "demo.svg"


def lines(svg: str) -> list[str]:
    """What stands in each line of a picture, its pieces from left to right."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in re.findall(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg, re.DOTALL):
        rows.setdefault(float(y), []).append((float(x), unescape(text).replace("\N{NO-BREAK SPACE}", " ")))
    return ["".join(text for _, text in sorted(row)).rstrip() for _, row in sorted(rows.items())]


def test_it_shows_the_paths_and_reasons_of_today(tmp_path: Path) -> None:
    shown = lines(PICTURE.read_text())
    files.make(tmp_path / "file", 4096)
    with gpunvme.open(tmp_path / "file") as file:
        said = str(file.explain("cpu")).splitlines()
    assert len(said) >= 7
    # How `host` would read is the machine's.
    assert [line for line in said if " host " not in line and line not in shown] == []


def test_it_fetches_nothing() -> None:
    assert not re.search(r"url\((?!#)|href=\"(?!#)|@import|@font-face", PICTURE.read_text())
