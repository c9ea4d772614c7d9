"""Several processes and threads on the same tiers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from on_tiers import NAMES, Tiers, nothing_left_over, on_disk

import files
import gpunvme
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.owner import held

if TYPE_CHECKING:
    from collections.abc import Callable

BUSY = """
import random, sys, gpunvme
root, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
with gpunvme.TierManager({name: f"{root}/{name}" for name in ("nvme", "ssd", "hdd")}, timeout=30) as tiers:
    for number in range(40):
        name = f"file-{chance.randrange(4)}"
        what = chance.randrange(4)
        if what == 0:
            tiers.migrate(name, chance.choice(tiers.tiers))
        elif what == 1:
            tiers.balance(moves=2)
        elif what == 2:
            tiers.auto_tier(name)
        with tiers.open(name) as file:
            data = file.read().numpy().tobytes()
        assert len(data) == 5000 and len(set(data)) == 1, (name, len(data))
print("done")
"""


def test_two_processes_move_the_same_files(
    make: Callable[..., Tiers], tmp_path: Path, directories: dict[str, Path]
) -> None:
    contents = {f"file-{number}": bytes([number + 1]) * 5000 for number in range(4)}
    with make() as tiers:
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
            tiers.add(tmp_path / name)
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", BUSY, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=files.environment(),
        )
        for seed in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=100)
        assert (out, child.returncode) == ("done\n", 0), err
    assert sorted(path.split("/", 1)[1] for path in on_disk(directories)) == sorted(contents)
    assert sorted(on_disk(directories).values()) == sorted(contents.values())
    assert nothing_left_over(directories)
    assert sum(file.accesses for file in make().status().files) >= 160


def test_readers_never_miss_a_file_that_moves(tiers: Tiers, source: Path) -> None:
    tiers.add(source, "x")
    stop, reads, wrong = threading.Event(), [0], []

    def read() -> None:
        while not stop.is_set():
            try:
                assert tiers.read("x") == b"content"
                reads[0] += 1
            except BaseException as error:
                wrong.append(error)
                raise

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            tiers.migrate("x", NAMES[number % 3])
    finally:
        stop.set()
        reader.join()
    assert reads[0]
    assert wrong == []


HOLDING = """
import sys, gpunvme
from gpunvme.tiers import copying
tiers = gpunvme.TierManager({name: f"{sys.argv[1]}/{name}" for name in ("nvme", "ssd", "hdd")})
def wait(*_):
    print("copied", flush=True)
    sys.stdin.read()
copying.checksum_of = wait
tiers.migrate("x", "hdd")
"""


@pytest.mark.parametrize("meanwhile", ["moved", "moved there and back", "removed", "removed behind our back"])
def test_a_file_that_moves_between_looking_and_opening(
    tiers: Tiers, source: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Whoever opens it gets it, wherever it is by then; what is gone is missing."""
    tiers.add(source, "x", tier="nvme")
    really = TierDirectory.open_file
    calls = 0

    def open_file(self: TierDirectory, name: str) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            if meanwhile == "removed behind our back":
                os.unlink(tiers.where("x"))
            elif meanwhile == "removed":
                tiers.remove("x")
            else:
                for tier in ("hdd", "ssd") if "back" in meanwhile else ("hdd",):
                    tiers.migrate("x", tier)
        return really(self, name)

    monkeypatch.setattr(TierDirectory, "open_file", open_file)
    if meanwhile.startswith("moved"):
        assert tiers.read("x") == b"content"
    else:
        with pytest.raises(gpunvme.MissingFileError, match="removed it" if "behind" in meanwhile else "no such file"):
            tiers.open("x")


def test_a_living_processs_move_is_respected_and_a_dead_ones_rolled_back(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    tiers = make(timeout=0.1)
    tiers.add(source, "x", tier="nvme")
    command = [sys.executable, "-W", "ignore", "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=files.environment()) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"copied\n"
        other = make(timeout=0.1)  # its start must not take the living one's move for a dead one's
        assert other.status().files[0].moving_to == "hdd"
        assert other.read("x") == b"content"
        for call in (lambda: other.migrate("x", "ssd"), lambda: other.remove("x")):
            with pytest.raises(gpunvme.TierError, match="is being moved by another"):
                call()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert other.migrate("x", "ssd")
    assert on_disk(directories) == {"ssd/x": b"content"}
    assert nothing_left_over(directories)


def test_a_forked_child_may_use_them_and_its_parent_too(
    tiers: Tiers, source: Path, directories: dict[str, Path]
) -> None:
    tiers.add(source, "x", tier="nvme")
    tiers.touch("x", 5)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if tiers.read("x") == b"content" and tiers.migrate("x", "hdd") and tiers.read("x") == b"content":
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tiers.tier_of("x") == "hdd"
    assert tiers.migrate("x", "ssd")
    assert on_disk(directories) == {"ssd/x": b"content"}
    assert tiers.accesses("x") == 5  # the child's were its own to write, and it was killed before


def test_a_lock_does_not_outlive_its_holder_in_a_forked_child(tmp_path: Path) -> None:
    """Workers of a data loader live long: a round that ran while they were forked must not be the last one."""
    lock, (ours, theirs) = str(tmp_path / "lock"), os.pipe()
    with held(lock, "held"):
        pid = os.fork()
        if pid == 0:
            os.close(theirs)
            os.read(ours, 1)  # until the parent is done
            os._exit(0)
        with pytest.raises(gpunvme.TierError, match="held"), held(lock, "held"):
            pass
    try:
        with held(lock, "held"):
            pass
    finally:
        os.close(theirs)
        os.waitpid(pid, 0)
        os.close(ours)


def test_many_threads(make: Callable[..., Tiers], source: Path, directories: dict[str, Path]) -> None:
    tiers = make(timeout=60)
    tiers.add(source, "x")
    troubles: list[BaseException] = []

    def move(tier: str) -> None:
        try:
            for _ in range(5):
                tiers.migrate("x", tier)
                assert tiers.read("x") == b"content"
        except BaseException as error:
            troubles.append(error)
            raise

    threads = [threading.Thread(target=move, args=(tier,)) for tier in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert len(on_disk(directories)) == 1
    assert nothing_left_over(directories)
