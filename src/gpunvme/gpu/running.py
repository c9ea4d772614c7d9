"""Which kernels of a set of queues are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpunvme.errors import CudaError
from gpunvme.freeing import ask_before_freeing, free_what_waits
from gpunvme.gpu.driver import Gpu


class Running:
    """Kernels that are launched here and have not ended; no GPU memory is freed meanwhile (`gpunvme.freeing`).

    Kernels of the caller's own are not known.

    Parameters
    ----------
    gpu
        Where they run.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        # Changed by one step each, and looked at without a lock: the garbage collector asks.
        self._beginning: set[object] = set()
        self._events: set[int] = set()
        self.close = ask_before_freeing(gpu.index, self.__call__)

    def __call__(self) -> bool:
        """Whether any runs, or is about to."""
        return bool(self._beginning) or any(not self._happened(event) for event in tuple(self._events))

    def _happened(self, event: int) -> bool:
        try:
            return self._gpu.happened(event)
        except CudaError:
            return True  # a kernel failed, and with it everything on this GPU has ended

    @contextmanager
    def launching(self, event: int = 0) -> Iterator[None]:
        """Something is launched here, and ``event`` recorded behind it; without one, its end is awaited here."""
        one = object()
        self._beginning.add(one)
        try:
            yield
            if event:
                self._events.add(event)
        finally:
            self._beginning.discard(one)

    def ended(self, event: int) -> None:
        """The event has happened; it may be used for something else, or destroyed."""
        self._events.discard(event)
        free_what_waits()
