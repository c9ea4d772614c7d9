"""A peer that crashes, hangs or is missing must cost nobody else's figures, and a table must not hide a loss."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
ADAPTERS = """
import os, time
class Sound:
    def about(self): return {"version": "1", "settings": "none"}
    def prepare(self, nbytes): self.nbytes = nbytes
    def poison(self): self.poisoned = True
    def check(self, nbytes):
        if nbytes == 666: raise ValueError("wrong bytes")
    def read(self, nbytes):
        print("libraries print", flush=True)
        return {"seconds": 0.5, "nbytes": nbytes, "path": "host", "reason": str(self.nbytes)}
    def crash(self): os._exit(7)
    def hang(self): time.sleep(60)
class Missing:
    def __init__(self): import a_module_that_is_not_installed
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, ModuleType]]:
    if not SCRIPTS.is_dir():
        pytest.skip("the benchmarks are part of the repository only")
    (tmp_path / "adapters.py").write_text(ADAPTERS)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    names = ("worker", "session", "table")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def worker(scripts: dict[str, ModuleType]) -> Iterator[Any]:
    with scripts["worker"].Worker("adapters:Sound", {}) as made:
        yield made


def test_what_a_library_prints_does_not_get_between_the_answers(worker: Any) -> None:
    worker.call("prepare", nbytes=3)
    for _ in range(2):
        assert worker.call("read", nbytes=8)["nbytes"] == 8


def test_a_crash_is_told_with_its_status_and_does_not_hang_the_run(worker: Any, scripts: dict[str, ModuleType]) -> None:
    error = scripts["worker"].WorkerError
    with pytest.raises(error, match="status 7 in crash"):
        worker.call("crash", limit=30)
    with pytest.raises(error, match=r"gone|ended"):
        worker.call("read", nbytes=8)


def test_a_contestant_that_hangs_is_ended_at_its_limit(worker: Any, scripts: dict[str, ModuleType]) -> None:
    worker.call("about")
    with pytest.raises(scripts["worker"].WorkerError, match="did not finish within"):
        worker.call("hang", limit=0.2)


def arguments(out: Path) -> argparse.Namespace:
    return argparse.Namespace(rounds=2, quick=False, out=str(out), deadline=60.0, keep=False, dir=str(out.parent))


def test_a_run_with_a_missing_peer_and_one_of_wrong_bytes_keeps_the_others_figures(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    with scripts["session"].Session("some_benchmark", arguments(out)) as session:
        session.workers(
            {name: ("adapters:Sound", {}) for name in ("gpunvme", "liar", "peer")}
            | {"missing": ("adapters:Missing", {})},
            nbytes=1,
        )
        session.hold(
            "a case",
            [
                session.contestant("gpunvme", "ours", "read", check="check", nbytes=1000),
                session.contestant("liar", "peer", "read", check="check", nbytes=666),
                session.contestant("peer", "peer", "read", check="check", nbytes=2000),
                session.contestant("missing", "peer", "read", nbytes=1),
            ],
        )
        session.target("a case", "peer", 0.9)
        assert json.loads(out.read_text())["results"], "what is known is on the drive before the run ends"
    result = json.loads(out.read_text())
    medians = {row["contestant"]: row["median"] for row in result["results"]}
    assert medians == {"gpunvme": 2000.0, "liar": None, "peer": 4000.0, "missing": None}
    failures = {row["contestant"]: row["failure"] for row in result["results"]}
    assert "wrong bytes" in failures["liar"]
    assert "a_module_that_is_not_installed" in failures["missing"]
    (target,) = result["targets"]
    assert (target["contestant"], target["ratio"], target["met"]) == ("peer", 0.5, False)
    text = "\n".join(scripts["table"].tables(result))
    assert "0.50×" in text
    assert "**missed**" in text
    assert "a_module_that_is_not_installed" in text
    everybody = "\n".join(scripts["table"].tables(result, everybody=True))
    assert "wrong bytes" in everybody


def test_after_the_deadline_cases_are_recorded_as_not_measured(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    given = arguments(tmp_path / "out.json")
    given.deadline = -1.0
    with scripts["session"].Session("some_benchmark", given) as session:
        (row,) = session.hold("a case", [session.contestant("gpunvme", "ours", "read")])
        session.target("a case", "limit", 0.9)
    assert "deadline" in row["failure"]
    assert session.result["targets"][0]["met"] is None
