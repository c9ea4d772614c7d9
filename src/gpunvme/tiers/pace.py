"""How fast bytes may be moved, and the word to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpunvme.errors import Cancelled


class Pace:
    """Lets bytes pass at a rate; a token bucket that holds one second.

    Parameters
    ----------
    rate
        Bytes per second; None for no limit.
    stop
        Set to end whatever waits here.
    clock, wait
        Seconds that never go backwards; a wait of so many seconds that returns early when ``stop`` is set.
    """

    def __init__(
        self,
        rate: float | None = None,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(f"rate {rate!r}: bytes per second, or None for no limit")
        self._rate = rate
        self._stop = threading.Event() if stop is None else stop
        self._clock = clock
        self._wait = self._stop.wait if wait is None else wait
        self._free_at = clock()  # when everything that has passed is paid for
        self._lock = threading.Lock()

    @property
    def piece(self) -> int | None:
        """The most bytes to ask for at once, so that a wait is a second at most; None for any number."""
        return None if self._rate is None else max(1, int(self._rate))

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may pass.

        Raises
        ------
        Cancelled
            If it was told to stop.
        """
        if self._rate is not None:
            with self._lock:
                now = self._clock()
                self._free_at = max(self._free_at, now) + nbytes / self._rate
                pause = self._free_at - now
            if pause > 0:
                self._wait(pause)
        if self._stop.is_set():
            raise Cancelled("moving files between tiers was stopped")
