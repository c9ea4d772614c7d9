"""A module that stands in for nvtx, and notes what it was asked for."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from gpunvme import nvtx_ranges, transfer

if TYPE_CHECKING:
    import pytest


class Notes:
    """What ranges there were.

    Attributes
    ----------
    calls
        ``("start", message, domain)``, ``("end", number of the start)``, ``("mark", message, domain)``, as they came.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start_range(self, *, message: str, domain: str) -> object:
        self.calls.append(("start", message, domain))
        return len(self.calls)

    def end_range(self, handle: object) -> None:
        self.calls.append(("end", handle))

    def mark(self, *, message: str, domain: str) -> None:
        self.calls.append(("mark", message, domain))

    def lasted(self) -> list[str]:
        """The messages of all ranges, in the order of their starts.

        Raises
        ------
        AssertionError
            If one did not end, or ended twice.
        """
        started = [number for number, call in enumerate(self.calls, 1) if call[0] == "start"]
        assert sorted(call[1] for call in self.calls if call[0] == "end") == started, self.calls
        return [self.calls[number - 1][1] for number in started]


def use(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """Have ranges made, by a module of our own."""
    notes, nvtx = Notes(), types.ModuleType("nvtx")
    for name in ("start_range", "end_range", "mark"):
        setattr(nvtx, name, getattr(notes, name))
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    monkeypatch.setenv(nvtx_ranges.VARIABLE, "1")
    ranges = nvtx_ranges.load()
    monkeypatch.setattr(nvtx_ranges, "ranges", ranges)
    monkeypatch.setattr(transfer, "_ranges", ranges)
    return notes
