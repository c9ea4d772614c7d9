"""Lines of a `CachedArray` that the host keeps in GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpunvme.errors import NvmeError
from gpunvme.gpu.cache_memory import CacheMemory
from gpunvme.memory import Buffer

if TYPE_CHECKING:
    from gpunvme.gpu.queues import GpuQueues


@dataclass(slots=True)
class _Pin:
    """A run of lines that is pinned: a flag for each on the GPU, freed when no kernel runs, and how often."""

    flags: Buffer
    times: int = 1


class PinnedLines:
    """Which runs of lines are pinned, and how often. The caller sees to it that one thread at a time is here.

    Parameters
    ----------
    queues, memory
        Through which lines are read, and the cache.
    run
        ``run(kernel, line, lines, flags)`` pins or unpins them, and waits; a flag for each says what was pinned.
    check
        Raises what went wrong.
    """

    def __init__(
        self,
        queues: GpuQueues,
        memory: CacheMemory,
        run: Callable[[str, int, int, int], None],
        check: Callable[[], None],
    ) -> None:
        self._queues, self._memory, self._run, self._check = queues, memory, run, check
        self._pins: dict[tuple[int, int], _Pin] = {}  # by (line, lines)

    def __bool__(self) -> bool:
        return bool(self._pins)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._pins

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
        if key in self._pins:
            self._pins[key].times += 1
            return
        self._check_room(key)
        flags: Buffer = self._queues._moves.while_quiet(lambda: Buffer.empty(lines, self._queues.device))
        self._queues.gpu.fill(flags.ptr, lines, self._memory.stream)
        self._run("pin", line, lines, flags.ptr)
        try:
            self._check()
        except NvmeError:
            self._run("unpin", line, lines, flags.ptr)
            raise
        self._pins[key] = _Pin(flags)

    def _check_room(self, key: tuple[int, int]) -> None:
        sets, ways = self._memory.sets, self._memory.ways
        taken = np.zeros(sets, np.int64)
        for start, number in (*self._pins, key):
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
        pin = self._pins[key]
        pin.times -= 1
        if pin.times == 0:
            del self._pins[key]
            self._run("unpin", line, lines, pin.flags.ptr)

    def free(self) -> None:
        """Free what belongs to pins; the cache is no more."""
        self._pins.clear()
