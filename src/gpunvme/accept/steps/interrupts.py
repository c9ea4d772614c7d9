"""Interrupts: the driver polls and needs none, other programs do; each vector is seen to arrive."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import numpy as np

from gpunvme.accept.job import Job
from gpunvme.accept.result import Result, Skipped
from gpunvme.accept.steps.driver import area_of
from gpunvme.nvme.controller import Controller
from gpunvme.nvme.transport import InterruptTransport, connect

_MOST = 17  # vectors: the admin queue's, and one for each of 16 I/O queues
_SECONDS = 20.0


def vectors(job: Job) -> Result:
    """Have each completion queue raise a vector of its own, and see each arrive at its eventfd."""
    with ExitStack() as opened:
        transport = connect(job.uri)
        opened.callback(transport.close)
        if not isinstance(transport, InterruptTransport):
            raise Skipped(f"{job.uri} passes no interrupts on")
        total = transport.interrupt_vectors
        count = min(total, _MOST)
        if not count:
            raise Skipped("the function has no MSI-X vectors")
        events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        for event in events:
            opened.callback(os.close, event)
        transport.set_interrupts(events)
        with Controller(transport, queues=max(1, count - 1), depth=32, vectors=count) as controller:
            queues = len(controller.io_queues)
            waiting = {0, *(queue % count for queue in range(1, queues + 1))}
            wanted = len(waiting)
            namespace = controller.namespace(job.nsid)
            places = area_of(job) + np.arange(64 * queues)
            give_up = time.monotonic() + _SECONDS
            while waiting:
                if time.monotonic() > give_up:
                    missing = ", ".join(map(str, sorted(waiting)))
                    raise ValueError(f"no interrupt arrived by vector {missing} of {count}, within {_SECONDS:g} s")
                namespace.gather(places)
                waiting = {vector for vector in waiting if not _arrived(events[vector])}
    return Result(f"{wanted} of {total} vectors tried, each arrived", facts={"vectors": total, "left": job.left})


def _arrived(event: int) -> bool:
    try:
        return os.eventfd_read(event) > 0
    except BlockingIOError:
        return False
