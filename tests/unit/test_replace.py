"""A file replaced as a whole: old or new, whatever happens in between, and nothing left beside it.

This is what `save_file` and `write_from(atomic=True)` stand on: a checkpoint that is half old is lost.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import files
import gpunvme
from files import MIB
from gpunvme.replace import Replacement


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_bytes(b"old")
    return path


def write(path: Path, data: bytes = b"new") -> gpunvme.Transfer:
    with gpunvme.open(path, "r+") as file:
        return file.write_from(data, atomic=True)


@pytest.mark.parametrize("data", [b"", b"n", files.contents(3 * MIB + 5)])
def test_the_whole_file_is_replaced(target: Path, data: bytes) -> None:
    target.write_bytes(bytes(4 * MIB))
    transfer = write(target, data)
    assert target.read_bytes() == data
    assert os.listdir(target.parent) == ["target"]
    assert transfer.nbytes == len(data)


def test_the_file_object_is_the_new_file_afterwards(target: Path) -> None:
    with gpunvme.open(target, "r+") as file:
        file.write_from(b"first", atomic=True)
        assert file.read().numpy().tobytes() == b"first"
        file.write_from(b"F", 0)
        assert target.read_bytes() == b"First"
        file.write_from(b"second", atomic=True)
        assert (file.size, target.read_bytes()) == (6, b"second")


def test_readers_of_the_old_file_keep_it(target: Path) -> None:
    with gpunvme.open(target) as reader, target.open("rb") as python_reader:
        write(target)
        assert reader.read().numpy().tobytes() == b"old" == python_reader.read()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o755, 0o711])
def test_permissions_are_kept(target: Path, mode: int) -> None:
    target.chmod(mode)
    write(target)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with Replacement(tmp_path / "new") as replacement:
        replacement.file.write_from(b"new")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_symbolic_link_is_followed(target: Path) -> None:
    """Stores of models are full of links to blobs: the blob is replaced, the link stays."""
    (target.parent / "away").mkdir()
    (target.parent / "away" / "link").symlink_to("../target")
    write(target.parent / "away" / "link")
    assert target.read_bytes() == b"new"
    assert (target.parent / "away" / "link").is_symlink()
    assert os.listdir(target.parent / "away") == ["link"]


def test_other_hard_links_keep_the_old_bytes(target: Path) -> None:
    os.link(target, target.parent / "other")
    write(target)
    assert target.read_bytes() == b"new"
    assert (target.parent / "other").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "模" * 85, "\udce9" * 255, " ", "-rf", "a\nb"])
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


class WrongError(Exception):
    pass


def test_an_error_inside_leaves_the_old_file_alone(target: Path) -> None:
    def fail() -> None:
        with Replacement(target) as replacement:
            replacement.file.write_from(b"half")
            raise WrongError

    with pytest.raises(WrongError):
        fail()
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == ["target"]


def test_an_interruption_where_nothing_catches_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may raise KeyboardInterrupt between the making of the file and the `try`, or before `__exit__` begins."""
    opened = os.open

    def open_and_interrupt(*arguments: Any, **options: Any) -> int:
        os.close(opened(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", open_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        Replacement(target).__enter__()
    monkeypatch.undo()
    gc.collect()
    assert os.listdir(target.parent) == ["target"]
    replacement = Replacement(target).__enter__()
    assert len(os.listdir(target.parent)) == 2
    replacement.file.close()
    del replacement  # without __exit__
    gc.collect()
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_old_file_alone(
    target: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error(5, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((gpunvme.FileError, KeyboardInterrupt)) as caught:
        write(target)
    monkeypatch.undo()
    if isinstance(caught.value, OSError):
        assert caught.value.errno == 5
        assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == ["target"]


def test_a_directory_that_cannot_be_synced_is_an_error(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename may be lost in a crash, so it must not be reported as done."""
    fsync = os.fsync

    def fail_for_directories(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_for_directories)
    with pytest.raises(gpunvme.FileError, match="Input/output"):
        write(target)
    assert sorted(os.listdir(target.parent)) == ["target"]


def test_refused_sources_leave_no_temporary_file(target: Path) -> None:
    with gpunvme.open(target, "r+") as file:
        with pytest.raises(gpunvme.SpanError):
            file.write_from(["no memory"], atomic=True)
        with pytest.raises(gpunvme.SpanError):
            file.write_from(b"abc", 0, 4, atomic=True)
        with pytest.raises(ValueError, match="offset must be 0"):
            file.write_from(b"abc", 1, atomic=True)
        with pytest.raises(ValueError, match="wait True"):
            file.write_from(b"abc", wait=False, atomic=True)
        assert file.read().numpy().tobytes() == b"old"
    assert os.listdir(target.parent) == ["target"]


def test_a_descriptor_has_no_place_to_replace(target: Path) -> None:
    with target.open("r+b") as python_file:
        file = gpunvme.open(python_file.fileno(), "r+")
    with pytest.raises(ValueError, match="opened by its path"):
        file.write_from(b"new", atomic=True)
    assert target.read_bytes() == b"old"


def test_directories_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(gpunvme.FileError, match="not a regular file"), Replacement(tmp_path):
        pass
    with pytest.raises(gpunvme.FileError, match="No such file"), Replacement(tmp_path / "missing" / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any other order a crash can leave a name without its bytes."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (steps.append("rename"), rename(old, new)))
    write(target)
    assert steps == ["file", "rename", "directory"]


REPLACING = """
import sys, gpunvme
with gpunvme.open(sys.argv[1], "r+") as file:
    number = 0
    print("ready", flush=True)
    while True:
        number = number % 255 + 1
        file.write_from(bytes([number]) * (int(sys.argv[2]) + number), atomic=True)
"""


@pytest.mark.parametrize("round_", range(100 if os.environ.get("GPUNVME_TEST_LEVEL") == "long" else 5))
def test_killed_at_any_moment_leaves_old_or_new(tmp_path: Path, round_: int) -> None:
    target, size = tmp_path / "target", MIB
    target.write_bytes(bytes(size))
    command = [sys.executable, "-c", REPLACING, str(target), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=files.environment()) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(random.Random(round_).uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
    data = target.read_bytes()
    assert len(set(data)) == 1, "bytes of two versions"
    assert len(data) == size + data[0], "a version cut short"
    assert len(os.listdir(tmp_path)) <= 2  # the target and what was being written
    with gpunvme.open(target) as file:
        assert file.read().numpy().tobytes() == data


def test_read_only_directories(target: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    target.parent.chmod(0o555)
    try:
        with pytest.raises(gpunvme.FileError, match="cannot write beside it"):
            write(target)
    finally:
        target.parent.chmod(0o755)
    assert target.read_bytes() == b"old"
