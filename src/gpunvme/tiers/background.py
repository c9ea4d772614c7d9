"""Files moved in the background: a thread that makes a bounded round now and then, at a bounded speed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpunvme.errors import Cancelled
from gpunvme.tiers.pace import Pace


class Background:
    """A thread that calls ``work(pace)`` every ``interval`` seconds until it is stopped.

    Parameters
    ----------
    work
        One round. It ends early when its pace raises `Cancelled`.
    interval
        Seconds between rounds.
    rate
        Bytes per second that are copied, or None.
    """

    def __init__(self, work: Callable[[Pace], object], interval: float, rate: float | None) -> None:
        if not interval > 0:
            raise ValueError(f"interval {interval!r}: seconds above 0")
        self._work = work
        self._interval = interval
        self._stop = threading.Event()
        self._pace = Pace(rate, stop=self._stop)
        self._thread = threading.Thread(target=self._run, name="gpunvme-tiers", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread is there; in a forked child it is not."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._work(self._pace)
            except Cancelled:
                return
            self._stop.wait(self._interval)

    def stop(self) -> None:
        """End it; a copy under way is given up and rolled back."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
