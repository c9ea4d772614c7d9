"""`gpunvme bench compare` decides whether a change is let in: noise must not stop it, and a loss must."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from gpunvme.bench import compare
from gpunvme.cli import main
from gpunvme.cli.exits import Exit

if TYPE_CHECKING:
    from pathlib import Path


def row(contestant: str = "gpunvme", kind: str = "ours", case: str = "hot", **changed: Any) -> dict[str, Any]:
    whole = {"case": case, "contestant": contestant, "kind": kind, "block": 1 << 20, "failure": ""}
    return whole | {"median": 1e9, "low": 0.95e9, "high": 1.05e9} | changed


def document(*rows: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "benchmark": "gpunvme bench",
        "machine": {"processor": "Some CPU", "cpus": 2},
        "device": "cpu",
        "file": {"name": "weights.bin", "nbytes": 5, "drive": "QD1"},
        "versions": {"gpunvme": "0.1.0"},
        "results": list(rows),
    } | changed


def scaled(factor: float, spread: float = 0.05) -> dict[str, float]:
    return {"median": factor * 1e9, "low": (factor - spread) * 1e9, "high": (factor + spread) * 1e9}


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [
        (1.0, 0.05, "same"),
        (0.85, 0.05, "slower"),
        (0.85, 0.2, "same"),  # the fastest run now is no slower than the slowest before
        (0.91, 0.001, "same"),  # outside the spread, and within the threshold
        (0.5, 0.05, "slower"),
        (1.5, 0.05, "faster"),
        (1.5, 0.6, "same"),
        (1.05, 0.0, "same"),
    ],
)
def test_slower_is_what_lies_beyond_threshold_and_spread(factor: float, spread: float, verdict: str) -> None:
    told = compare.compare(document(row()), document(row(**scaled(factor, spread))), 0.1)
    (only,) = told["rows"]
    assert only["verdict"] == verdict
    assert only["ratio"] == pytest.approx(factor)
    assert only["low"] <= only["ratio"] <= only["high"]
    assert bool(told["regressions"]) == (verdict == "slower")


def test_only_our_own_losses_are_regressions() -> None:
    old = document(row(), row("pread", "peer"), row("raw", "limit"))
    new = document(row(), row("pread", "peer", **scaled(0.5)), row("raw", "limit", **scaled(0.5)))
    told = compare.compare(old, new, 0.1)
    assert [each["verdict"] for each in told["rows"]] == ["same", "slower", "slower"]
    assert told["regressions"] == []
    assert told["others"] == pytest.approx(0.5)
    text = io.StringIO()
    compare.render(told, Console(file=text, width=160))
    assert "the machine was slower, or busy" in text.getvalue()


def test_what_broke_is_a_regression_and_what_was_not_asked_for_is_none() -> None:
    failed = row(median=None, low=None, high=None, failure="RuntimeError: boom")
    assert [each["verdict"] for each in compare.compare(document(row()), document(failed), 0.1)["regressions"]] == [
        "lost"
    ]
    assert compare.compare(document(row(), row(case="cold")), document(row()), 0.1)["regressions"] == []
    gained = compare.compare(document(failed), document(row()), 0.1)
    assert [each["verdict"] for each in gained["rows"]] == ["gained"]


def test_sweeps_are_compared_too() -> None:
    old = document(sweep={"rows": [row(case="sweep, 4 KiB, depth 1, cold") | {"depth": 1}]})
    new = document(sweep={"rows": [row(case="sweep, 4 KiB, depth 1, cold", **scaled(0.5)) | {"depth": 1}]})
    assert [each["case"] for each in compare.compare(old, new, 0.1)["regressions"]] == ["sweep, 4 KiB, depth 1, cold"]


def test_another_machine_is_said_and_another_version_is_expected() -> None:
    told = compare.compare(document(row()), document(row(), versions={"gpunvme": "0.2.0"}), 0.1)
    assert told["comparable"]
    assert told["differences"] == [{"what": "version of gpunvme", "before": "0.1.0", "after": "0.2.0"}]
    for changed in ({"machine": {"processor": "Another CPU", "cpus": 2}}, {"device": "cuda:0"}):
        assert not compare.compare(document(row()), document(row(), **changed), 0.1)["comparable"]
    renamed = document(row(), file={"name": "another name", "nbytes": 5, "drive": "QD1"})
    assert compare.compare(document(row()), renamed, 0.1)["differences"] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name, content in zip(names, (document(row()), document(row(**scaled(0.8)), device="cuda:0")), strict=True):
        with open(name, "w", encoding="utf-8") as file:
            json.dump(content, file)
    assert main(["bench", "compare", names[0], names[0]]) == Exit.OK
    assert "No figure of gpunvme is lower" in capsys.readouterr().out
    assert main(["bench", "compare", *names]) == Exit.CHECK_FAILED
    told = capsys.readouterr().out
    assert "0.80×" in told
    assert "Not the same machine" in told
    assert main(["bench", "compare", *names, "--threshold", "0.3"]) == Exit.OK
    capsys.readouterr()
    assert main(["bench", "compare", *names, "--json"]) == Exit.CHECK_FAILED
    assert json.loads(capsys.readouterr().out)["regressions"][0]["ratio"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "{}", '{"benchmark": "gpunvme bench", "schema": 99}', json.dumps(document({"case": "hot"}))],
)
def test_what_is_no_result_is_refused_with_its_name(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "something"
    path.write_text(text, encoding="utf-8")
    assert main(["bench", "compare", str(path), str(path)]) == Exit.BAD_INPUT
    assert str(path) in capsys.readouterr().err


def test_a_page_is_read_like_the_data_in_it(tmp_path: Path) -> None:
    whole = document(row(case="</script> & <b>"), date="2026-01-01")
    from gpunvme.bench import page

    path = tmp_path / "out.html"
    path.write_text("<html>" + page._raw(whole) + "</html>", encoding="utf-8")
    assert compare.load(str(path)) == whole
