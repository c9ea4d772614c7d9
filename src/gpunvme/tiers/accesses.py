"""Accesses counted where they happen, and written down now and then."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from gpunvme.errors import TierError
from gpunvme.file import File
from gpunvme.tiers.policy import Policy
from gpunvme.tiers.state import State, file_row
from gpunvme.transfer import Transfer

#: Seconds, and accesses, after which they are written down. What was not yet is lost when the process is killed.
SECONDS = 1.0
MOST = 1000


class Accesses:
    """Counts by name. Threads may share it; a forked child starts at nothing.

    Parameters
    ----------
    state, policy
        Where they are written, and how they fade.
    clock
        Seconds since 1970.
    """

    def __init__(self, state: State, policy: Policy, clock: Callable[[], float]) -> None:
        self._state = state
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._pid = os.getpid()
        self._written = time.monotonic()

    def count(self, name: str) -> None:
        """Count one access. Never fails: a read is worth more than its count."""
        with self._lock:
            if self._pid != os.getpid():
                self._counts.clear()
                self._pid = os.getpid()
            self._counts[name] += 1
            due = time.monotonic() - self._written > SECONDS or self._counts.total() >= MOST
        if due:
            with contextlib.suppress(TierError):
                self.write()

    def write(self) -> None:
        """Write down what was counted.

        Raises
        ------
        TierError
            If the database cannot be written; the counts are kept.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
            self._written = time.monotonic()
            mine = self._pid == os.getpid()
        if not counts or not mine:
            return
        now = self._clock()
        try:
            with self._state.transaction() as connection:
                for name, number in counts.items():
                    file = file_row(connection, name)
                    if file is not None:
                        heat = self._policy.faded(file.heat, now - file.heat_at) + number
                        connection.execute(
                            "UPDATE file SET accesses = accesses + ?, heat = ?, heat_at = ? WHERE name = ?",
                            (number, float(heat), float(now), name),
                        )
        except BaseException:
            with self._lock:
                self._counts.update(counts)
            raise


class CountedFile(File):
    """A `File` of which each read is counted as an access."""

    def __init__(self, fd: int, path: str, count: Callable[[], None]) -> None:
        super().__init__(fd, "r", name=path)
        self._count = count

    def read_into(self, *args: Any, **options: Any) -> Transfer:
        """Read a range of the file into memory; see `File.read_into`."""
        self._count()
        return super().read_into(*args, **options)

    def gather(self, *args: Any, **options: Any) -> Any:
        """Read many small ranges; see `File.gather`. Counts as one access."""
        self._count()
        return super().gather(*args, **options)
