"""PCI memory that this process has mapped: found by its address, whatever array or tensor it was wrapped into."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gpunvme.errors import SpanError

if TYPE_CHECKING:
    from gpunvme.memory import Span

_lock = threading.RLock()  # a mapping may be forgotten by a garbage collection in the thread that holds it
_mappings: list[Mapping] = []


class Mapping:
    """A range of addresses behind which there is a PCI device's memory.

    Parameters
    ----------
    address, nbytes
        The range.
    provider
        Whose memory it is: a PCI address, or ``cuda:N``.
    spare
        Address of a page behind it that a probe may write to; None where there is none.
    """

    def __init__(self, address: int, nbytes: int, provider: str, spare: int | None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.provider = provider
        self.spare = spare
        self._users = 0
        self._open = True
        with _lock:
            _mappings.append(self)

    def hold(self) -> None:
        """Keep it mapped until `release`.

        Raises
        ------
        SpanError
            If it is not any more.
        """
        with _lock:
            if not self._open:
                raise SpanError(f"the memory of {self.provider} was given back")
            self._users += 1

    def release(self) -> None:
        """Undo `hold`."""
        with _lock:
            self._users -= 1

    def retire(self) -> bool:
        """Forget it, unless it is held; whether it was forgotten."""
        with _lock:
            if self._users:
                return False
            self._remove()
            return True

    def restore(self) -> None:
        """Undo `retire`."""
        with _lock:
            self._open = True
            _mappings.append(self)

    def forget(self) -> None:
        """It is mapped no more."""
        with _lock:
            self._remove()

    def _remove(self) -> None:
        if self._open:
            self._open = False
            _mappings.remove(self)


def mapping_of(span: Span) -> Mapping | None:
    """Return the PCI memory that a span of host addresses lies in, or None for ordinary memory.

    Raises
    ------
    SpanError
        If it reaches beyond it.
    """
    if not _mappings or span.device.is_gpu:
        return None
    with _lock:
        for mapping in _mappings:
            if mapping.address <= span.ptr < mapping.address + mapping.nbytes:
                if span.ptr + span.nbytes > mapping.address + mapping.nbytes:
                    raise SpanError(f"{span.nbytes} bytes at {span.ptr:#x} reach past the memory of {mapping.provider}")
                return mapping
    return None
