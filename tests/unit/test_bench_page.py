"""The page of `gpunvme bench --report`: read by people who have nothing but the page, on machines without a network."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from gpunvme.bench import cases, fio, page, plots, run_bench, scratch
from gpunvme.bench.page_words import WORDS
from gpunvme.bench.report import rate_text
from gpunvme.cli import main
from gpunvme.cli.exits import Exit

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
XHTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real run, as small as can be."""
    path = tmp_path_factory.mktemp("bench") / "weights <&> $x$.bin"
    path.write_bytes(b"".join(scratch.random_pieces(9 * MIB + 123)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "QUICK", cases.Scale(2, 0.3, 8 * MIB, 8 * MIB, MIB, MIB // 4, 0.1))
        patch.setattr(fio, "version", lambda: None)
        return run_bench(str(path), device="cpu", quick=True, latency_seconds=0.4, sweep_seconds=1.0)


@pytest.fixture(scope="module")
def html(result: dict[str, Any]) -> str:
    return page.html(result)


def root_of(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>\n"))


def text_of(html: str) -> str:
    return " ".join("".join(root_of(html).itertext()).split())


def test_it_is_well_formed_and_no_two_elements_share_an_id(html: str) -> None:
    ids = [element.get("id") for element in root_of(html).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', html))
    assert used <= set(ids)
    assert used


def test_it_refers_to_nothing_outside_itself(html: str) -> None:
    for element in root_of(html).iter():
        assert element.tag.split("}")[-1] not in ("link", "img", "iframe", "object", "base", "image", "foreignObject")
        for name, value in element.attrib.items():
            if name.split("}")[-1] in ("href", "src", "data", "action", "srcset"):
                assert value.startswith("#"), (element.tag, name, value)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    scripts = [element.get("type") for element in root_of(html).iter(XHTML + "script")]
    assert scripts == ["application/json"]  # data, which nothing runs


def test_every_figure_is_on_it(result: dict[str, Any], html: str) -> None:
    text = text_of(html)
    for row in result["results"] + result["latency"]:
        assert row["case"] in text
        assert row["contestant"] in text
        assert " ".join(row["failure"].split()) in text
    for row in result["results"]:
        for figure in ("median", "low", "high"):
            assert rate_text(row, row[figure]) in text
    for row in result["sweep"]["rows"]:
        assert page._plain(row["median"]) in text
    for row in result["latency"]:
        for figure in ("p50", "p90", "p99", "least", "most"):
            assert page._time(row[figure]) in text
    for value in (result["machine"]["processor"], result["machine"]["kernel"], str(result["file"]["nbytes"])):
        assert value in text
    assert result["file"]["name"] in text
    for word, meaning in WORDS:
        assert word in text
        assert " ".join(meaning.split()) in text


def test_the_data_in_it_are_the_result(result: dict[str, Any], html: str) -> None:
    class Scripts(HTMLParser):
        found = ""

        def handle_data(self, data: str) -> None:
            self.found += data if self.lasttag == "script" else ""

    parser = Scripts()
    parser.feed(html)
    assert json.loads(parser.found[: parser.found.rindex("}") + 1]) == result


def losing(result: dict[str, Any]) -> dict[str, Any]:
    """The same run, had every other way been faster."""
    changed = copy.deepcopy(result)
    for row in changed["results"] + changed["sweep"]["rows"]:
        if row["median"] and row["kind"] == "ours":
            row.update(median=1e6, low=1e6, high=1e6)
    for row in changed["latency"]:
        if row["p50"] and row["kind"] == "ours":
            row.update(p50=60.0)
    return changed


def test_losses_are_told_and_not_only_wins(result: dict[str, Any]) -> None:
    losses = list(page._lost(losing(result)))
    compared = {row["case"] for row in result["results"] if row["kind"] == "peer" and row["median"]}
    assert compared <= {loss.rpartition(":")[0] for loss in losses}
    assert any(loss.startswith("one request of 4 KiB, hot: half of them took 6e+04 ms") for loss in losses)
    assert any(loss.startswith("requests of 4 KiB at their best depth: ") for loss in losses)
    text = text_of(page.html(losing(result)))
    assert all(loss in text for loss in losses)
    assert "faster" not in text.partition("Where gpunvme lost")[0].partition("In short")[2]


def test_a_case_without_a_figure_says_why(result: dict[str, Any]) -> None:
    changed = copy.deepcopy(result)
    changed["results"][0].update(median=None, low=None, high=None, rounds=0, failure="RuntimeError: <boom> & more")
    for row in changed["sweep"]["rows"]:
        row.update(median=None, low=None, high=None, failure="not measured: the time was up")
    changed["sweep"]["knees"] = {}
    for row in changed["latency"]:
        row.update(p50=None, p90=None, p99=None, least=None, most=None, quantiles=[], count=0, failure="gone")
    text = text_of(page.html(changed))
    assert "RuntimeError: <boom> & more" in text
    assert "the time was up" in text


def test_a_page_of_a_run_without_sweep_and_latency(result: dict[str, Any]) -> None:
    some = {key: value for key, value in result.items() if key not in ("sweep", "latency")}
    text = text_of(page.html(some))
    assert "By size and depth" not in text
    assert "Case by case" in text


def test_without_matplotlib_it_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr("gpunvme.bench.run_bench", lambda *_, **__: pytest.fail("minutes were spent in vain"))
    assert main(["bench", "--report", str(tmp_path / "out.html")]) == Exit.NOT_INSTALLED
    assert "pip install gpunvme[plot]" in capsys.readouterr().err
    with pytest.raises(plots.PlotsMissingError):
        plots.require()


def test_the_command_writes_it_whole(
    result: dict[str, Any],
    html: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gpunvme.bench.run_bench", lambda *_, **__: result)
    target = tmp_path / "out.html"
    assert main(["bench", "--quick", "--report", str(target), "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == result
    assert target.read_text(encoding="utf-8") == html
    assert main(["bench", "--report", str(tmp_path / "absent" / "out.html")]) == Exit.USAGE
    assert main(["bench", "--report", str(tmp_path)]) == Exit.USAGE


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OPTIONS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync
    --disable-component-update --disable-dev-shm-usage --hide-scrollbars --window-size=1120,9000 --enable-logging=stderr
"""


class Browser:
    """A browser without a screen."""

    def __init__(self, program: str, folder: Path) -> None:
        self._command = [program, *OPTIONS.split(), f"--user-data-dir={folder / 'profile'}"]
        self._folder = folder

    def open(self, html: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Load a page as a person's double click does."""
        target = self._folder / "out.html"
        target.write_text(html, encoding="utf-8")
        command = [*self._command, *options, target.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    return Browser(program, tmp_path)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a person would see in the browser's console: errors of scripts, and what was not found or not allowed."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_a_browser_shows_it(html: str, browser: Browser, tmp_path: Path) -> None:
    shown = browser.open(html, "--dump-dom")
    # The HTML parser of a browser sees what an XML parser sees: nothing has swallowed the rest of the page.
    assert shown.stdout.count("<svg") == html.count("<svg") > 3
    assert shown.stdout.count("<figcaption") == html.count("<figcaption")
    assert "What the words mean" in shown.stdout
    assert not complaints(shown)
    shot = tmp_path / "shot.png"
    assert not complaints(browser.open(html, f"--screenshot={shot}"))
    import matplotlib.image
    import numpy as np

    pixels = matplotlib.image.imread(shot)[..., :3]
    blue = np.abs(pixels - np.array([0x1A, 0x66, 0xC2]) / 255).max(axis=-1) < 0.02
    assert blue.sum() > 2000, "the bars of gpunvme are not drawn"


def test_a_browser_would_complain(html: str, browser: Browser) -> None:
    broken = html.replace("</body>", "<script>nowhere.to_be_found()</script></body>")
    assert "nowhere is not defined" in "".join(complaints(browser.open(broken, "--dump-dom")))
