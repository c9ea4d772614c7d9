"""NVTX ranges on transfers and queues, for Nsight Systems: with ``GPUNVME_NVTX=1`` and the package ``nvtx``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

VARIABLE = "GPUNVME_NVTX"
DOMAIN = "gpunvme"


class Ranges:
    """Ranges from the start of something to its end, in a domain of their own.

    Parameters
    ----------
    nvtx
        The module ``nvtx``.
    """

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def start(self, message: str) -> Any:
        """Start a range; return what `end` takes."""
        return self._nvtx.start_range(message=message, domain=DOMAIN)

    def end(self, handle: Any) -> None:
        """End a range, in whichever thread."""
        self._nvtx.end_range(handle)

    def mark(self, message: str) -> None:
        """Mark a moment: a transfer that was over before it had a name."""
        self._nvtx.mark(message=message, domain=DOMAIN)

    @contextmanager
    def during(self, message: str) -> Iterator[None]:
        """A range around what one thread does, however that ends."""
        handle = self.start(message)
        try:
            yield
        finally:
            self.end(handle)


def load() -> Ranges | None:
    """Return what makes ranges if they are asked for and can be had.

    Warns
    -----
    RuntimeWarning
        If they are asked for and the package ``nvtx`` is not installed.
    """
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return None
    try:
        import nvtx
    except ImportError:
        warnings.warn(f"{VARIABLE} is set, but there is no package nvtx: pip install nvtx", RuntimeWarning, 2)
        return None
    return Ranges(nvtx)


ranges: Ranges | None = load()
"""What makes this process's ranges; None unless they are asked for."""


def during(message: str) -> AbstractContextManager[None]:
    """A range around what one thread does, or nothing where none are asked for."""
    return nullcontext() if ranges is None else ranges.during(message)
