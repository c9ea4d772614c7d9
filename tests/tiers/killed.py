"""Kill a process at every system call of what it does with tiers, and look at what the next one finds.

    python killed.py DIRECTORY OPERATION EVERY

Forks once for each point: a Python started for each would take minutes. Prints how many points there were.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpunvme
from gpunvme.file import File
from gpunvme.tiers import state
from gpunvme.tiers.directory import TierDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW, OTHER, LATE = b"o" * 70_001, b"n" * 80_003, b"y" * 100, b"l" * 60_000
NAME = "deep/er/x.bin"
CALLS = ("open", "link", "unlink", "rename", "mkdir", "rmdir", "fsync", "fchmod", "utime", "close")


def tiers(root: Path) -> gpunvme.TierManager:
    return gpunvme.TierManager({name: root / name for name in ("fast", "slow")})


def prepare(root: Path) -> None:
    for name in ("fast", "slow"):
        (root / name).mkdir()
    (root / "old").write_bytes(OLD)
    (root / "other").write_bytes(OTHER)
    (root / "new").write_bytes(NEW)
    with tiers(root) as made:
        made.add(root / "old", NAME, tier="fast")
        made.add(root / "other", "deep/other", tier="slow")
    (root / "old").unlink()
    (root / "other").unlink()


def migrate_while_somebody_writes(made: gpunvme.TierManager, root: Path) -> None:
    """The old copy changes just before it would be removed: it must count again."""
    remove_temporary = TierDirectory.remove_temporary

    def write_first(self: TierDirectory, temporary: str) -> None:
        if not (root / "late").exists():
            (root / "fast" / NAME).write_bytes(LATE)
            (root / "late").touch()
        remove_temporary(self, temporary)

    TierDirectory.remove_temporary = write_first
    made.migrate(NAME, "slow")


OPERATIONS: dict[str, Callable[[gpunvme.TierManager, Path], object]] = {
    "start": lambda made, root: None,
    "migrate": lambda made, root: made.migrate(NAME, "slow"),
    "changed": migrate_while_somebody_writes,
    "add": lambda made, root: made.add(root / "new", "new", tier="slow"),
    "move-in": lambda made, root: made.add(root / "new", "new", tier="slow", move=True),
    "replace": lambda made, root: made.add(root / "new", NAME, tier="fast", replace=True),
    "replace-elsewhere": lambda made, root: made.add(root / "new", NAME, tier="slow", replace=True, move=True),
    "remove": lambda made, root: made.remove(NAME),
}


def check(operation: str, root: Path, made: gpunvme.TierManager) -> None:
    """Every content is there exactly once, and what is on record is what is there."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and ".gpunvme-tier" not in path.parts and path.name != "late":
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    contents = sorted(
        {OLD: "old", NEW: "new", OTHER: "other", LATE: "late"}.get(data, "torn") for data in found.values()
    )
    recorded = {f"{file.tier}/{file.name}" for file in made.status().files}
    assert recorded == set(found) - {"new"}, (recorded, set(found))
    for file in made.status().files:
        assert file.moving_to is None
        with made.open(file.name) as opened:
            assert opened.read().numpy().tobytes() == found[f"{file.tier}/{file.name}"]
    for directory in (root / "fast", root / "slow"):
        assert os.listdir(directory / ".gpunvme-tier" / "incoming") == []
    assert not made.status().troubles, made.status().troubles
    outside, inside = "new" in found, recorded - {"slow/deep/other"}
    expected = {
        "start": contents == ["new", "old", "other"],
        "migrate": contents == ["new", "old", "other"] and inside in ({f"fast/{NAME}"}, {f"slow/{NAME}"}),
        "changed": contents == ["late", "new", "other"]
        or (contents == ["new", "old", "other"] and not (root / "late").exists()),
        "add": contents in (["new", "old", "other"], ["new", "new", "old", "other"]) and outside,
        "move-in": contents == ["new", "old", "other"],
        "replace": contents in (["new", "old", "other"], ["new", "new", "other"]) and outside,
        "replace-elsewhere": contents in (["new", "old", "other"], ["new", "other"]),
        "remove": contents in (["new", "old", "other"], ["new", "other"]),
    }
    assert expected[operation], (operation, sorted(found))


class Killer:
    """Ends this process before its Nth call that changes anything."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self, *_: Any) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def arm(self) -> None:
        for name in CALLS:
            setattr(os, name, self._before(getattr(os, name)))
        File.write_from = self._before(File.write_from)
        File.read_into = self._before(File.read_into)
        connect = state.State._connect

        def traced(self_: state.State) -> sqlite3.Connection:
            connection = connect(self_)
            connection.set_trace_callback(self.point)
            return connection

        state.State._connect = traced

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            self.point()
            return function(*args, **options)

        return called


def child(work: Callable[..., object], *arguments: Any) -> int:
    """Run something in a forked child and return how that ended; -9 is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001  # it must not go on as its parent does
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def doing(operation: str, root: Path, at: int | None) -> None:
    if at is not None:
        Killer(at).arm()
    with tiers(root) as made:
        OPERATIONS[operation](made, root)


def checking(operation: str, root: Path) -> None:
    with tiers(root) as made:
        check(operation, root, made)


def main(directory: str, operation: str, every: str) -> None:
    pristine = Path(directory) / "pristine"
    pristine.mkdir()
    if operation == "first-start":
        for name in ("fast", "slow"):
            (pristine / name).mkdir()
    else:
        assert child(prepare, pristine) == 0
    what = "start" if operation == "first-start" else operation
    at = points = 0
    while True:
        root = Path(directory) / f"{operation}-{at}"
        shutil.copytree(pristine, root)
        ended = child(doing, what, root, at)
        assert ended in (0, -signal.SIGKILL), (operation, at, ended)
        if ended:
            # The one that cleans up dies, too.
            assert child(doing, "start", root, at * 7 % 40) in (0, -signal.SIGKILL)
        if operation == "first-start":
            assert child(doing, "start", root, None) == 0, f"cannot start after being killed at {at}"
        else:
            assert child(checking, operation, root) == 0, f"{operation}, killed at point {at}"
        shutil.rmtree(root)
        if ended == 0:
            break
        points += 1
        at += int(every)
    print(points)


if __name__ == "__main__":
    main(*sys.argv[1:])
