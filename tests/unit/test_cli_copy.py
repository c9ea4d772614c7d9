"""`gpunvme copy`: what would be lost if it were wrong is the user's file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import gpunvme
from gpunvme.cli import main
from gpunvme.cli.copy import compare, copy_bytes
from gpunvme.cli.exits import CheckFailedError, Exit

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks small enough that a test file has many."""
    monkeypatch.setattr("gpunvme.cli.copy.CHUNK", 64 << 10)


def leftovers(folder: Path, *known: Path) -> list[str]:
    return sorted(set(os.listdir(folder)) - {path.name for path in known})


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 65536, 65537, 3 * 65536, 1_000_003])
@pytest.mark.usefixtures("small_chunks")
def test_every_size_arrives(nbytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.write_bytes(os.urandom(nbytes))
    source.chmod(0o640)
    assert main(["copy", str(source), str(copied), "--verify", "--json"]) == Exit.OK
    report = json.loads(capsys.readouterr().out)
    assert copied.read_bytes() == source.read_bytes()
    assert copied.stat().st_mode & 0o7777 == 0o640
    assert report["nbytes"] == nbytes
    assert report["read"]["nbytes"] == report["write"]["nbytes"] == nbytes
    assert report["verified"]["nbytes"] == nbytes
    assert leftovers(tmp_path, source, copied) == []


def test_report_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10000)
    assert main(["copy", str(tmp_path / "source"), str(tmp_path / "copied"), "--verify"]) == Exit.OK
    told = capsys.readouterr()
    assert "9.8 KiB in" in told.out
    assert "safe on its drive" in told.out
    assert "verified" in told.out
    assert told.err == ""


def test_existing_file_is_only_replaced_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.write_bytes(b"new")
    there.write_bytes(b"old")
    assert main(["copy", str(source), str(there)]) == Exit.SYSTEM_REFUSED
    assert there.read_bytes() == b"old"
    assert "--force" in capsys.readouterr().err
    assert main(["copy", "--force", str(source), str(there)]) == Exit.OK
    assert there.read_bytes() == b"new"


def test_file_onto_itself_is_refused_even_by_force(tmp_path: Path) -> None:
    # A hard link is the same file under another name.
    source, link = tmp_path / "source", tmp_path / "link"
    source.write_bytes(b"precious")
    os.link(source, link)
    for name in (source, link):
        assert main(["copy", "--force", str(source), str(name)]) == Exit.SYSTEM_REFUSED
    assert source.read_bytes() == b"precious"


def test_directories_and_devices_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    assert main(["copy", str(source), str(tmp_path)]) == Exit.SYSTEM_REFUSED
    assert main(["copy", str(tmp_path), str(tmp_path / "copied")]) == Exit.SYSTEM_REFUSED
    assert main(["copy", "--force", str(source), "/dev/null"]) == Exit.SYSTEM_REFUSED
    assert not os.path.isfile("/dev/null")
    assert main(["copy", str(source), str(tmp_path / "no" / "folder")]) == Exit.SYSTEM_REFUSED


def test_holes_stay_holes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    nbytes, where = 256 << 20, 100 << 20
    with open(source, "wb") as file:
        file.truncate(nbytes)
        file.seek(where)
        file.write(b"data" * 1024)
    assert main(["copy", "--json", "--verify", str(source), str(copied)]) == Exit.OK
    assert copied.stat().st_size == nbytes
    with open(copied, "rb") as file:
        file.seek(where)
        assert file.read(8192) == b"data" * 1024 + bytes(4096)
    report = json.loads(capsys.readouterr().out)
    if source.stat().st_blocks * 512 < nbytes:  # the file system knows holes
        assert copied.stat().st_blocks * 512 < nbytes // 10
        assert report["hole_bytes"] > nbytes // 2


@pytest.mark.usefixtures("small_chunks")
def test_damaged_copy_is_found_and_nothing_is_replaced(tmp_path: Path) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    data = bytearray(os.urandom(300_000))
    source.write_bytes(data)
    data[200_000] ^= 1
    copied.write_bytes(data)
    with gpunvme.open(source) as one, gpunvme.open(copied) as other, pytest.raises(CheckFailedError, match="200000"):
        compare(one, other)


def test_private_file_is_private_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.write_bytes(b"secret")
    source.chmod(0o4600)
    seen = []

    def watch(one: gpunvme.File, other: gpunvme.File, progress: object) -> object:
        seen.append(os.stat(other.fileno()).st_mode & 0o7777)
        return copy_bytes(one, other)

    monkeypatch.setattr("gpunvme.cli.copy.copy_bytes", watch)
    assert main(["copy", str(source), str(copied)]) == Exit.OK
    assert seen == [0o600]
    assert copied.stat().st_mode & 0o7777 == 0o4600


def test_failed_verification_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    source.write_bytes(b"new")
    there.write_bytes(b"old")
    monkeypatch.setattr("gpunvme.cli.copy._equal", lambda *_: False)
    monkeypatch.setattr("gpunvme.cli.copy._first_difference", lambda *_: 1)
    assert main(["copy", "--force", "--verify", str(source), str(there)]) == Exit.CHECK_FAILED
    assert there.read_bytes() == b"old"
    assert leftovers(tmp_path, source, there) == []


def test_full_disk_leaves_the_old_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A limit on file sizes is the full disk that every machine can have.
    source, there = tmp_path / "source", tmp_path / "there"
    source.write_bytes(os.urandom(1 << 20))
    there.write_bytes(b"old")
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from gpunvme.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", program, "copy", "--force", "--no-fsync", str(source), str(there)]
    child = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == Exit.SYSTEM_REFUSED, child.stderr
    assert child.stderr.startswith("gpunvme: ")
    assert child.stderr.count("\n") == 1
    assert there.read_bytes() == b"old"
    assert leftovers(tmp_path, source, there) == []


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    with open(source, "wb") as file:
        file.writelines(os.urandom(16 << 20) for _ in range(8))
    arguments = [sys.executable, "-m", "gpunvme", "copy", str(source), str(copied)]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    # It may have been done before the signal came.
    assert child.returncode in (Exit.INTERRUPTED, Exit.OK)
    assert b"Traceback" not in told
    if child.returncode == Exit.INTERRUPTED:
        assert leftovers(tmp_path, source) == []
