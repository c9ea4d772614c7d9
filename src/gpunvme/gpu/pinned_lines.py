"""Lines of a `CachedArray` that the host keeps in GPU memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpunvme.errors import NvmeError
from gpunvme.gpu.cache_memory import CacheMemory
from gpunvme.gpu.driver import Gpu


class PinnedLines:
    """Which runs of lines are pinned, and how often. The caller sees to it that one thread at a time is here.

    Parameters
    ----------
    gpu, memory
        The GPU, and the cache.
    run
        ``run(kernel, line, lines, flags)`` pins or unpins them, and waits; a flag for each says what was pinned.
    check
        Raises what went wrong.
    """

    def __init__(
        self, gpu: Gpu, memory: CacheMemory, run: Callable[[str, int, int, int], None], check: Callable[[], None]
    ) -> None:
        self._gpu, self._memory, self._run, self._check = gpu, memory, run, check
        self._times: dict[tuple[int, int], list[int]] = {}  # (line, lines): times, address of the flags

    def __bool__(self) -> bool:
        return bool(self._times)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._times

    def pin(self, line: int, lines: int) -> None:
        """Read them, and keep them once more.

        Raises
        ------
        ValueError
            If too little of the cache would be left for other lines.
        CommandError, NvmeError
            If they cannot be read; then none is pinned.
        """
        key = line, lines
        if key in self._times:
            self._times[key][0] += 1
            return
        self._check_room(key)
        flags = self._gpu.allocate(lines)
        try:
            self._gpu.fill(flags, lines, self._memory.stream)
            self._run("pin", line, lines, flags)
            try:
                self._check()
            except NvmeError:
                self._run("unpin", line, lines, flags)
                raise
        except BaseException:
            self._gpu.free(flags)
            raise
        self._times[key] = [1, flags]

    def _check_room(self, key: tuple[int, int]) -> None:
        sets, ways = self._memory.sets, self._memory.ways
        taken = np.zeros(sets, np.int64)
        for start, number in (*self._times, key):
            taken += number // sets
            taken[(start + np.arange(number % sets)) % sets] += 1
        if taken.max() >= ways:
            raise ValueError(
                f"{key[1]} lines cannot be pinned: each set of {ways} lines must keep one for others, and with those "
                f"that are pinned some would not; the cache has {sets} sets"
            )

    def unpin(self, line: int, lines: int) -> None:
        """Undo one `pin` of the same run."""
        key = line, lines
        self._times[key][0] -= 1
        if self._times[key][0] == 0:
            flags = self._times.pop(key)[1]
            self._run("unpin", line, lines, flags)
            self._gpu.free(flags)

    def free(self) -> None:
        """Free what belongs to pins; the cache is no more."""
        times, self._times = self._times, {}
        for _, flags in times.values():
            self._gpu.free(flags)
