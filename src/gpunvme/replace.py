"""A file replaced as a whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gpunvme.errors import FileError, file_error

if TYPE_CHECKING:
    from gpunvme.file import File


class Replacement:
    """Write a new version of a file beside it and put it in its place at the end.

    A context manager: ``file`` inside is the temporary file, open for writing. On a normal exit it is fsynced,
    renamed over the target, and the directory is fsynced, so that a crash leaves the old content or the new. On an
    exception it is removed, and the target is untouched. An existing target's permissions are kept; a symbolic link
    is followed.

    Parameters
    ----------
    path
        The target, which need not exist.
    sync
        Whether to fsync. If not, a crash of the machine soon after may leave an empty or partial file.

    Raises
    ------
    FileError
        If the temporary file cannot be made, or if fsync or rename fail.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = True) -> None:
        self._sync = sync
        self._target = os.path.realpath(os.fspath(path))
        self._directory, name = os.path.split(self._target)
        start = os.fsdecode(os.fsencode(name)[:200])  # a name has at most 255 bytes
        self._temporary = os.path.join(self._directory, f".{start}.{secrets.token_hex(6)}.part")
        self._file: File | None = None
        # Ctrl-C may come where no `except` is in force yet, or any more: then this object's end removes the file.
        self._remove = weakref.finalize(self, _remove, self._temporary, os.getpid())

    @property
    def file(self) -> File:
        """The temporary file."""
        if self._file is None:
            raise ValueError("the replacement is not open")
        return self._file

    def __enter__(self) -> Self:
        from gpunvme.file import File

        try:
            existing = os.stat(self._target)
        except OSError:
            existing = None
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            raise FileError(errno.EINVAL, "not a regular file, so it cannot be replaced", self._target)
        try:
            # O_EXCL: never write into a file that somebody else made.
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise file_error(error, "cannot write beside it", self._target) from None
        try:
            if existing is not None:
                os.fchmod(fd, stat.S_IMODE(existing.st_mode))
            self._file = File(fd, "r+", name=self._target)
        except BaseException:
            self._remove()
            raise
        finally:
            os.close(fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._put_in_place()
        except OSError as failure:
            self._remove()
            raise file_error(failure, "cannot replace", self._target) from None
        except BaseException:
            self._remove()
            raise
        else:
            if kind is not None:
                self._remove()
        finally:
            if self._file is not None:
                self._file.close()

    def _put_in_place(self) -> None:
        if self._sync:
            os.fsync(self.file.fileno())
        os.rename(self._temporary, self._target)
        if not self._sync:
            return
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _remove(temporary: str, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child's copy of the object: the file is its parent's
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass  # it was renamed already, or never made
