"""Regions read back and compared with their checksums, several at a time."""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from gpunvme.catalog.contents import sum_of
from gpunvme.catalog.generation import Region
from gpunvme.errors import Cancelled

if TYPE_CHECKING:
    from gpunvme.catalog.target import Target
    from gpunvme.transfer import Progress

# Summing keeps one CPU busy for a region, and a few of them any drive.
_THREADS = 4
_TICK_SECONDS = 0.05


def damaged(target: Target, regions: list[Region], progress: Progress | None) -> list[Region]:
    """Return the regions whose bytes do not have their checksum.

    Raises
    ------
    FileError, NvmeError
        If a region cannot be read.
    """
    total = sum(region.nbytes for region in regions)
    done = 0
    lock = threading.Lock()
    stopped = threading.Event()

    def advance(nbytes: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise Cancelled("the verification was stopped")
        with lock:
            done += nbytes

    def is_damaged(region: Region) -> bool:
        return sum_of(target, region.offset, region.nbytes, advance) != region.checksum

    with ThreadPoolExecutor(max(1, min(_THREADS, os.cpu_count() or 1, len(regions)))) as pool:
        results = [pool.submit(is_damaged, region) for region in regions]
        try:
            waiting = set(results)
            while waiting:
                finished, waiting = wait(waiting, _TICK_SECONDS, FIRST_EXCEPTION)
                for result in finished:
                    result.result()  # raises what it raised
                if progress is not None:
                    progress(done, total)
            return [region for region, result in zip(regions, results, strict=True) if result.result()]
        except BaseException:
            stopped.set()
            for result in results:
                result.cancel()
            raise
