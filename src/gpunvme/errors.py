"""The error tree: every error says what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EIO
from typing import NamedTuple


class Error(Exception):
    """Base of every error that gpunvme raises on purpose."""


class RangeError(Error, ValueError):
    """An offset or a length lies outside the file."""


class SpanError(Error, ValueError):
    """A destination or source cannot be used: size, device, contiguity or read-only memory."""


class FileError(Error, OSError):
    """The operating system refused an operation on a file.

    ``errno`` and ``filename`` are set as for any `OSError`; ``offset`` is the file offset in bytes
    where it happened, or None.
    """

    def __init__(self, errno: int, message: str, filename: str | None = None, offset: int | None = None) -> None:
        super().__init__(errno, message, filename)
        self.offset = offset

    def __str__(self) -> str:
        where = f": {self.filename!r}" if self.filename is not None else ""
        at = f" at offset {self.offset}" if self.offset is not None else ""
        return f"{self.strerror}{where}{at}"


class MissingFileError(FileError, FileNotFoundError):
    """There is no such file."""


class AccessDeniedError(FileError, PermissionError):
    """The operating system does not allow it."""


class TruncatedError(FileError):
    """A file ended before the bytes that it had when it was opened."""


def file_error(error: OSError, what: str, filename: str, offset: int | None = None) -> FileError:
    """Make the `FileError` for an `OSError` of the interpreter's."""
    kind = FileError
    if isinstance(error, FileNotFoundError):
        kind = MissingFileError
    elif isinstance(error, PermissionError):
        kind = AccessDeniedError
    return kind(error.errno or EIO, f"{what}: {error.strerror}", filename, offset)


class FormatError(Error, ValueError):
    """A checkpoint is not valid. ``filename``, ``offset`` and ``tensor`` say where, each may be None."""

    def __init__(
        self,
        message: str,
        *,
        filename: str | None = None,
        offset: int | None = None,
        tensor: str | None = None,
    ) -> None:
        where = [f"file {filename!r}"] if filename is not None else []
        where += [f"offset {offset}"] if offset is not None else []
        where += [f"tensor {tensor!r}"] if tensor is not None else []
        super().__init__(f"{message} ({', '.join(where)})" if where else message)
        self.filename = filename
        self.offset = offset
        self.tensor = tensor


class CatalogError(Error, ValueError):
    """A catalog is damaged, is none, or does not have or take what was asked for.

    ``reason`` is the bare reason, ``filename`` the target's name, ``offset`` the byte on it where something is wrong;
    the last two may be None.
    """

    def __init__(self, reason: str, *, filename: str | None = None, offset: int | None = None) -> None:
        where = [filename] if filename is not None else []
        where += [f"offset {offset}"] if offset is not None else []
        super().__init__(f"{reason} ({', '.join(where)})" if where else reason)
        self.reason = reason
        self.filename = filename
        self.offset = offset


class CatalogChangedError(CatalogError):
    """A catalog was changed so often that what was just read may be somebody else's: `Catalog.refresh`, read again."""


class LayerError(Error, RuntimeError):
    """A layer loader is used as it cannot be: closed, by two at once, in a forked child, or a layer given back."""


class BudgetError(Error, ValueError):
    """A memory budget cannot be kept; the message says how much is needed at least."""


class PathError(Error):
    """A path that was asked for by name cannot carry this transfer; the message says why."""


class CudaError(Error):
    """A CUDA call failed, or CUDA cannot be used here; the message says why. ``code`` is its CUresult, or None."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class CufileError(Error):
    """cuFile failed, or contradicts itself; ``code`` is its CUfileOpError, or None."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Cancelled(Error):
    """The transfer was cancelled before it was complete."""


class DeadlineExceeded(Error, TimeoutError):
    """The transfer was not complete by its deadline, or `Transfer.wait` gave up waiting."""


class NvmeError(Error):
    """Something went wrong between us and an NVMe controller."""


class UriError(NvmeError, ValueError):
    """The URI of a controller cannot be understood; the message lists what is valid."""


class TransportError(NvmeError):
    """A controller cannot be reached, or the way to it broke; the message says what to do."""


class ControllerError(NvmeError):
    """A controller does not do what it must: it never gets ready, reports a fatal status or contradicts itself."""


class DeviceGoneError(ControllerError):
    """A controller's registers read all ones: it was unplugged, or its process ended."""


class UnsafeDeviceError(NvmeError):
    """A device is in use, or holds data that would be lost; the message says which and how to go on."""


class Failed(NamedTuple):
    """One command that failed, as `CommandError` lists it.

    ``kind`` is ``"status"`` (the controller said so), ``"timeout"`` (it never answered and was given up) or ``"lost"``
    (it was in flight when the controller was reset, and could not be repeated).
    """

    opcode: int
    lba: int
    blocks: int
    queue_id: int
    cid: int
    status: int
    kind: str

    @property
    def sct(self) -> int:
        """Status Code Type."""
        return self.status >> 8 & 7

    @property
    def sc(self) -> int:
        """Status Code."""
        return self.status & 0xFF

    @property
    def dnr(self) -> bool:
        """Do Not Retry: the same command would fail again."""
        return bool(self.status >> 14 & 1)


class CommandError(NvmeError):
    """Commands failed. ``failures`` lists every one of them."""

    def __init__(self, message: str, failures: Sequence[Failed] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class TierError(Error):
    """Something went wrong with files on tiers; nothing was lost."""


class TierNameError(TierError, ValueError):
    """A name that no file on a tier may have; the message says why."""


class TierStateError(TierError):
    """The tiers' database is damaged, foreign or of a newer version; the message says how to go on."""


class TierUnavailableError(TierError):
    """A tier is missing, not mounted or another directory than it was."""


class TierFullError(TierError):
    """A tier has no room, or its budget is spent."""
