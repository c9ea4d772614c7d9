"""What the exit status means, and how an error becomes one line and one status."""

from __future__ import annotations

import enum
import json
import os
import sys
from typing import Any

from gpunvme.errors import (
    Cancelled,
    CatalogError,
    CudaError,
    DeadlineExceeded,
    Error,
    FormatError,
    NvmeError,
    PathError,
    RangeError,
    SpanError,
    TierError,
    TierNameError,
    TierStateError,
    UnsafeDeviceError,
    UriError,
)


class Exit(enum.IntEnum):
    """The exit statuses of every command."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    SYSTEM_REFUSED = 4
    NOT_USABLE = 5
    NOT_INSTALLED = 6
    UNSAFE = 7
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANINGS = {
    Exit.OK: "done",
    Exit.CHECK_FAILED: "a check or a verification failed",
    Exit.USAGE: "the command line makes no sense",
    Exit.BAD_INPUT: "the input is not valid (not a checkpoint, cut off, out of range)",
    Exit.SYSTEM_REFUSED: "the operating system or the device refused (no such file, I/O error, disk full, no memory)",
    Exit.NOT_USABLE: "the GPU, or the path asked for by name, cannot be used here",
    Exit.NOT_INSTALLED: "a package that the command needs is not installed",
    Exit.UNSAFE: "the device is in use or holds data, and nobody said that it may be taken",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.BROKEN_PIPE: "whoever read the output went away",
}


class CheckFailedError(Error):
    """A verification found other bytes than it should."""


class NotInstalledError(Error):
    """A package that a command needs is missing; the message says how to get it."""


def exit_status(error: BaseException) -> Exit:
    """Return the exit status that an error stands for."""
    # A cancelled transfer is how Ctrl-C ends one; an error that is two things counts as the first here.
    table: tuple[tuple[type[BaseException], Exit], ...] = (
        (KeyboardInterrupt, Exit.INTERRUPTED),
        (Cancelled, Exit.INTERRUPTED),
        (CheckFailedError, Exit.CHECK_FAILED),
        (NotInstalledError, Exit.NOT_INSTALLED),
        (CudaError, Exit.NOT_USABLE),
        (PathError, Exit.NOT_USABLE),
        (FormatError, Exit.BAD_INPUT),
        (CatalogError, Exit.BAD_INPUT),
        (RangeError, Exit.BAD_INPUT),
        (UriError, Exit.BAD_INPUT),
        (UnsafeDeviceError, Exit.UNSAFE),
        (TierNameError, Exit.BAD_INPUT),
        (TierStateError, Exit.BAD_INPUT),
        (TierError, Exit.SYSTEM_REFUSED),
        (NvmeError, Exit.SYSTEM_REFUSED),
        (SpanError, Exit.BAD_INPUT),
        (DeadlineExceeded, Exit.SYSTEM_REFUSED),
        (OSError, Exit.SYSTEM_REFUSED),
        (MemoryError, Exit.SYSTEM_REFUSED),
        (ImportError, Exit.NOT_INSTALLED),
    )
    for kind, status in table:
        if isinstance(error, kind):
            return status
    return Exit.CHECK_FAILED


def error_line(error: BaseException) -> str:
    """Say in one line what happened."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return f"out of memory{': ' if str(error) else ''}{error}"
    if isinstance(error, OSError) and not isinstance(error, Error) and error.strerror:
        named = [repr(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return ": ".join([error.strerror, " and ".join(named)]) if named else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def error_dict(error: BaseException) -> dict[str, Any]:
    """Return what is known about an error, for ``--json``."""
    known: dict[str, Any] = {
        "type": type(error).__name__,
        "message": error_line(error),
        "exit_status": int(exit_status(error)),
    }
    for name in ("errno", "filename", "offset", "tensor"):
        value = getattr(error, name, None)
        if isinstance(value, int | str):
            known[name] = value
    return known


def report_error(error: BaseException, *, as_json: bool) -> Exit:
    """Print an error where its reader looks, and return the exit status."""
    if as_json:
        print(json.dumps({"error": error_dict(error)}))
    else:
        print(f"gpunvme: {error_line(error)}", file=sys.stderr)
    return exit_status(error)
