"""Threads that call cuFile: as many as there are CPUs, for each GPU, with its context current."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from typing import Protocol

from gpunvme.cufile.cuda import Context, context

# With as many, and requests of 16 MiB, KvikIO was at its best where it was measured (docs/performance.md).
_MOST_THREADS = 16
# How long a thread rests after a visit at which nothing could be done, in seconds.
_REST = 0.0002


class Visited(Protocol):
    """What has work for the pool: each entry in the queue is one visit."""

    def visit(self) -> bool | None:
        """Do a part of the work. True: visit again; False: the same, after a rest; None: not for this entry."""


class Pool:
    """Threads of one GPU. They take turns between all transfers, so that none waits for another one's end."""

    def __init__(self, of: Context) -> None:
        self._context = of
        self._queue: queue.SimpleQueue[Visited] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self.most = min(_MOST_THREADS, len(os.sched_getaffinity(0)))

    def add(self, work: Visited) -> None:
        """Have something visited."""
        self._queue.put(work)
        with self._lock:
            if self._threads < self.most and self._queue.qsize() > self._idle:
                self._threads += 1
                threading.Thread(target=self._work, name=f"gpunvme-cufile-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        self._context.make_current()
        while True:
            with self._lock:
                self._idle += 1
            work = self._queue.get()
            with self._lock:
                self._idle -= 1
            again = work.visit()
            if again is not None:
                if not again:
                    time.sleep(_REST)
                self._queue.put(work)
            del work  # or what was moved last would live until something else moves


@functools.cache
def _pool(index: int, process: int) -> Pool:  # noqa: ARG001 - a forked child has none of its parent's threads
    return Pool(context(index))


def pool(index: int) -> Pool:
    """The pool of a GPU."""
    return _pool(index, os.getpid())
