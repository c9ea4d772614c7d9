"""`gpunvme accept` as a person types it: refusals are lines and statuses, the result a table and a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_accept_session import drive

from gpunvme.accept import drive as looking
from gpunvme.accept import session
from gpunvme.accept.result import Figure, Outcome, Row
from gpunvme.cli import main
from gpunvme.errors import UnsafeDeviceError
from nvme_machine import simple

BDF = "0000:01:00.0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    simple(tmp_path / "root")
    return tmp_path / "root"


def result(root: Path, *rows: Row, interrupted: bool = False) -> session.Acceptance:
    wish = session.Wish()
    made = session.Acceptance(drive(root), wish, session.Privacy(session.Machine(root)), list(rows))
    made.interrupted = interrupted
    return made


def stub(monkeypatch: pytest.MonkeyPatch, acceptance: session.Acceptance) -> list[Any]:
    """Put a result in the place of a run; return what was asked for."""
    asked: list[Any] = []

    def look(*arguments: Any) -> looking.Drive:
        asked.append(arguments[:2])
        return acceptance.drive

    def accept(_: looking.Drive, wish: session.Wish, **__: Any) -> session.Acceptance:
        asked.append(wish)
        return acceptance

    monkeypatch.setattr(looking, "look_at", look)
    monkeypatch.setattr(session, "accept", accept)
    return asked


PASSED = Row(
    "vfio speed", "once", Outcome.PASSED, "64 commands", 1.25, (Figure("read", 6.9, "GB/s", 7.0, "the kernel's"),)
)
FAILED = Row("vfio reset", "resets", Outcome.FAILED, "it hung")
SKIPPED = Row.skipped("vfio to GPU", "to GPU", "there is no GPU")


def test_the_table_has_every_step_with_its_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, result(root, PASSED, SKIPPED))
    assert main(["accept", "01:00.0", "--erase", BDF]) == 0
    said = capsys.readouterr().out
    lines = {line.strip().split("  ")[0]: " ".join(line.split()) for line in said.splitlines()}
    assert lines["vfio speed"] == "vfio speed passed 1.2 64 commands read 6.9 GB/s (the kernel's 7)"
    assert lines["vfio to GPU"] == "vfio to GPU skipped there is no GPU"
    assert "1 passed, 0 failed, 1 skipped" in said
    assert "no serial numbers" in said
    assert "S7KG" not in said


def test_a_failure_is_a_status(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, result(root, PASSED, FAILED))
    assert main(["accept", BDF, "--erase", BDF]) == 1
    stub(monkeypatch, result(root, SKIPPED))
    assert main(["accept", BDF, "--erase", BDF]) == 1, "nothing ran"
    stub(monkeypatch, result(root, PASSED, interrupted=True))
    assert main(["accept", BDF, "--erase", BDF]) == 130


def test_the_document_is_written_also_when_it_was_interrupted(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub(monkeypatch, result(root, PASSED, interrupted=True))
    main(["accept", BDF, "--erase", BDF, "--json", str(tmp_path / "report.json")])
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["interrupted"]
    assert document["steps"][0]["figures"][0]["value"] == 6.9


def test_wishes_arrive(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = stub(monkeypatch, result(root, PASSED))
    options = ["--device", "cuda:1", "--directory", str(tmp_path), "--serial", "--skip", "kmod", "--skip", "vfio abort"]
    main(["accept", BDF, "--erase", BDF, *options])
    assert asked == [(BDF, BDF), session.Wish("cuda:1", str(tmp_path), True, ("kmod", "vfio abort"))]


def test_refusals_are_lines_and_statuses(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = stub(monkeypatch, result(root, PASSED))
    for wrong in (["--device", "cpu"], ["--device", "disk"], ["--directory", str(tmp_path / "absent")]):
        assert main(["accept", BDF, "--erase", BDF, *wrong]) == 2
    assert not asked, "the drive was looked at for nothing"
    assert main(["accept", BDF, "--erase", BDF, "--json", str(tmp_path / "absent" / "file")]) == 4
    assert not any(isinstance(each, session.Wish) for each in asked), "it ran, and there is nowhere to write the result"

    def refuse(*_: Any) -> looking.Drive:
        raise UnsafeDeviceError("nvme0n1 is mounted at /home")

    monkeypatch.setattr(looking, "look_at", refuse)
    capsys.readouterr()
    assert main(["accept", BDF, "--erase", BDF]) == 7
    assert capsys.readouterr().err == "gpunvme: nvme0n1 is mounted at /home\n"
