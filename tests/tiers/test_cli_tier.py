"""`gpunvme tier`, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpunvme.cli import main
from gpunvme.cli.exits import Exit


@pytest.fixture(autouse=True)
def named(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUNVME_TIERS", ":".join(f"{name}={path}" for name, path in directories.items()))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command, which must end as it should, and return what it printed."""

    def tier(*arguments: object, ends: Exit = Exit.OK) -> str:
        assert main(["tier", *map(str, arguments)]) == ends
        told = capsys.readouterr()
        if ends == Exit.OK:
            assert told.err == ""
            return told.out
        return told.err or told.out

    return tier


def test_a_files_life(run: Any, source: Path, directories: dict[str, Path]) -> None:
    assert run("add", source, "--name", "deep/x") == "deep/x is on nvme\n"
    assert source.exists()
    assert run("migrate", "deep/x", "ssd") == "deep/x: nvme → ssd (as told)\n"
    assert run("pin", "deep/x") == "deep/x stays on ssd\n"
    assert run("migrate") == "every file is where it belongs\n"
    assert run("unpin", "deep/x") == "deep/x may move\n"
    assert run("migrate", "deep/x") == "deep/x: ssd → hdd (cold, 0 accesses)\n"
    assert run("pin", "deep/x", "nvme") == "deep/x stays on nvme\n"
    assert run("capacity", "ssd", "1GiB") == "ssd may hold 1.0 GiB\n"
    shown = run("status")
    assert [line.split()[:3] for line in shown.splitlines() if line.split()[:1] == ["deep/x"]] == [
        ["deep/x", "nvme", "7"]
    ]
    for word in ("pinned", "cold", "1.0 GiB", str(directories["hdd"])):
        assert word in shown
    assert run("rm", "deep/x") == "deep/x is removed\n"
    assert run("add", source, "--move", "--to", "hdd") == "source is on hdd\n"
    assert not source.exists()


def test_documents(run: Any, source: Path) -> None:
    assert json.loads(run("add", source, "--json")) == {"file": str(source), "tier": "nvme"}
    (moved,) = json.loads(run("migrate", "--rate", "1GiB", "--json"))["files"]
    assert (moved["from"], moved["to"], moved["moved"]) == ("nvme", "hdd", True)
    status = json.loads(run("status", "--json"))
    assert [tier["files"] for tier in status["tiers"]] == [0, 0, 1]
    assert status["files"][0]["name"] == "source"
    looks = [json.loads(line) for line in run("watch", "--count", 2, "--interval", 0.1, "--json").splitlines()]
    assert looks == [status, status] or [look["files"] for look in looks] == [status["files"]] * 2


def test_watching_works_meanwhile(run: Any, source: Path) -> None:
    run("add", source)
    shown = run("watch", "--work", "--count", 3, "--interval", 0.1)
    assert shown.count("source") == 3


def test_rebuilding(run: Any, source: Path, directories: dict[str, Path]) -> None:
    run("add", source, "--to", "ssd")
    (directories["nvme"] / ".gpunvme-tier" / "state.sqlite").write_bytes(b"rubbish" * 1000)
    (directories["hdd"] / "source").write_bytes(b"another")
    assert "gpunvme tier rebuild" in run("status", ends=Exit.BAD_INPUT)
    told = run("rebuild")
    assert "0 files are on record" in told
    assert "differs between tiers, left alone: source" in told
    assert "the old database is" in told


@pytest.mark.parametrize(
    ("arguments", "ends", "word"),
    [
        (["status", "-t", "nvme"], Exit.USAGE, "NAME=DIRECTORY"),
        (["status", "-t", "a=/missing-directory"], Exit.SYSTEM_REFUSED, "cannot be reached"),
        (["status", "-t", "a=/tmp", "-t", "a=/var"], Exit.USAGE, "named twice"),
        (["status", "-t", "a=/usr", "-t", "b=/usr/lib"], Exit.USAGE, "inside"),
        (["add", "missing"], Exit.SYSTEM_REFUSED, "No such file"),
        (["add", "source", "--to", "tape"], Exit.USAGE, "not a tier"),
        (["add", "source", "--name", "../x"], Exit.BAD_INPUT, "'..'"),
        (["rm", "missing"], Exit.SYSTEM_REFUSED, "no such file on any tier"),
        (["migrate", "missing", "hdd"], Exit.SYSTEM_REFUSED, "no such file on any tier"),
        (["migrate", "--rate", "fast"], Exit.USAGE, "no size"),
        (["migrate", "--rate", "0"], Exit.USAGE, "more than nothing"),
        (["capacity", "tape", "1GiB"], Exit.USAGE, "not a tier"),
    ],
)
def test_mistakes(
    run: Any, source: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], ends: Exit, word: str
) -> None:
    monkeypatch.chdir(source.parent)
    assert word in " ".join(run(*arguments, ends=ends).split())


def test_no_tiers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUNVME_TIERS")
    assert "GPUNVME_TIERS" in run("status", ends=Exit.USAGE)
