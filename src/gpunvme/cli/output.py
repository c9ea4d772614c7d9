"""What a command prints: text for a person, or one JSON document and nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpunvme.transfer import Transfer

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the error out; rich would leave with 1, which here means that a check failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Output:
    """Where a command's results go.

    Parameters
    ----------
    as_json
        Whether stdout carries one JSON document instead of text.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # Piped output is for grep: no line may be folded at some column that nobody sees.
        width = None if sys.stdout.isatty() else 200
        self.console = _Console(width=width, highlight=False, markup=False, emoji=False, quiet=as_json)

    def document(self, document: dict[str, Any]) -> None:
        """Print the JSON document, if that is what was asked for."""
        if self.as_json:
            print(json.dumps(document, indent=2))

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line for a person; long ones are left to the terminal, so that they can be copied whole."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def facts(self, facts: dict[str, str]) -> None:
        """Print names and values below each other."""
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.console.print(Text.assemble((f"{name:<{width}}", "bold"), "  ", value), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None] | None]:
        """Show a bar on stderr while something runs, if a person is watching there.

        Yields
        ------
        callable or None
            To be called with the bytes done and the bytes in all; None where nothing is shown.
        """
        if self.as_json or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), Speed())
        shown = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        with shown:
            task = shown.add_task(title, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def status(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show on stderr what is going on, if a person is watching there.

        Yields
        ------
        callable
            To be called with what is going on now.
        """
        if self.as_json or not sys.stderr.isatty():
            yield lambda _: None
            return
        with Console(stderr=True).status(Text(title)) as shown:
            yield lambda text: shown.update(Text(f"{title}: {text}"))


def size(nbytes: int) -> str:
    """Write a number of bytes for a person: ``1.5 GiB``, ``17 B``."""
    for unit, scale in _UNITS:
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Write a time for a person: ``1.53 s``, ``21.0 ms``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def speed(nbytes: int, seconds: float) -> str:
    """Write a speed for a person, in GB/s as drives and links are sold."""
    if seconds <= 0 or not nbytes:
        return "–"
    return f"{nbytes / seconds / 1e9:.2f} GB/s"


def transfer_dict(transfer: Transfer) -> dict[str, Any]:
    """Return a transfer's report, for ``--json``."""
    return {
        "path": transfer.path,
        "reason": transfer.reason,
        "nbytes": transfer.nbytes,
        "seconds": transfer.seconds,
        "direct_bytes": transfer.direct_bytes,
        "cached_bytes": transfer.cached_bytes,
        "buffered_bytes": transfer.buffered_bytes,
        "bounced_bytes": transfer.bounced_bytes,
    }
