"""What this process has moved so far, by path: counted where transfers end."""

from __future__ import annotations

import atexit
import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpunvme.transfer import Report

VARIABLE = "GPUNVME_STATS"
"""Names a file to which a process appends its totals, one line of JSON, when it exits."""


@dataclass(frozen=True, slots=True)
class PathTotals:
    """What one path has carried. Sizes in bytes.

    Attributes
    ----------
    transfers : int
        Transfers that have ended, well or not.
    errors : int
        Those among them that failed, were cancelled or passed their deadline.
    nbytes : int
        Bytes moved, those of failed transfers included.
    direct_bytes, cached_bytes, buffered_bytes, bounced_bytes : int
        The same bytes by how they travelled; as in `Transfer`.
    seconds : float
        Sum of the transfers' times. Transfers that run side by side count each for themselves.
    """

    transfers: int
    errors: int
    nbytes: int
    direct_bytes: int
    cached_bytes: int
    buffered_bytes: int
    bounced_bytes: int
    seconds: float


class Stats(dict[str, PathTotals]):
    """Totals by the name of the path. ``str()`` is a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing was moved"
        heads = ("path", "transfers", "errors", "bytes", "direct", "cached", "buffered", "bounced", "seconds")
        lines: list[tuple[str, ...]] = [heads]
        for name, totals in sorted(self.items()):
            *counts, seconds = (str(value) for value in asdict(totals).values())
            lines.append((name, *counts, f"{float(seconds):.3f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                word.ljust(width) if at == 0 else word.rjust(width)
                for at, (word, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


# In the order of PathTotals; lists that are changed in place.
_counted: dict[str, list[float]] = {}
# One that its owner may take again: a finaliser that runs in between may end a transfer of its own.
_lock = threading.RLock()


def count(report: Report, *, failed: bool) -> None:
    """Count a transfer that has ended.

    Parameters
    ----------
    report : Report
        What it did.
    failed : bool
        Whether it ended with an error.
    """
    direct, cached, buffered = report.direct_bytes, report.cached_bytes, report.buffered_bytes
    with _lock:
        sums = _counted.get(report.path)
        if sums is None:
            sums = _counted[report.path] = [0, 0, 0, 0, 0, 0, 0, 0.0]
        sums[0] += 1
        sums[1] += failed
        sums[2] += direct + cached + buffered
        sums[3] += direct
        sums[4] += cached
        sums[5] += buffered
        sums[6] += report.bounced_bytes
        sums[7] += report.seconds


def stats() -> Stats:
    """Return what this process has moved so far, by path.

    A transfer counts when its end has been seen: by whoever waited for it, or by the next transfer that begins. Totals
    start at zero in every process, a forked one as well.

    Returns
    -------
    Stats
        ``{path: PathTotals}``; ``print(gpunvme.stats())`` shows a table.
    """
    with _lock:
        copied = {name: list(sums) for name, sums in _counted.items()}
    return Stats({name: _totals(*sums) for name, sums in copied.items()})


def _totals(*sums: float) -> PathTotals:
    counts = dict(zip(PathTotals.__slots__, map(int, sums[:-1]), strict=False))
    return PathTotals(**counts, seconds=sums[-1])


def append_to(path: str) -> None:
    """Append this process's totals to a file, as one line of JSON; nothing if it has moved nothing.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    totals = stats()
    if not totals:
        return
    line = json.dumps({"pid": os.getpid(), "paths": {name: asdict(each) for name, each in totals.items()}}) + "\n"
    # One write to a file opened for appending: lines of processes that end together do not mix.
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def _start_anew() -> None:
    _counted.clear()
    _lock.release()


# A child counts what it moves itself; what its parent moved, the parent tells.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_start_anew)

if os.environ.get(VARIABLE):
    atexit.register(append_to, os.environ[VARIABLE])
