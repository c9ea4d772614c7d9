"""A file outside the tiers that is added to them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass

from gpunvme.errors import FileError, file_error
from gpunvme.tiers.directory import Signature


@dataclass(frozen=True, slots=True)
class Outside:
    """A file outside the tiers that is added. ``drop``: it is removed when the copy is durable."""

    path: str
    drop: bool

    def open(self) -> int:
        """Open it for reading."""
        # A link that is followed would be removed in place of the file.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if self.drop else 0)
        try:
            fd = os.open(self.path, flags)
        except OSError as error:
            if self.drop and error.errno == errno.ELOOP:
                raise FileError(errno.ELOOP, "a symbolic link: name the file itself to move it", self.path) from None
            raise file_error(error, "cannot open", self.path) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileError(errno.EINVAL, "not a regular file", self.path)
        return fd

    def signature(self) -> Signature | None:
        """Tell which file has its name now."""
        try:
            status = os.stat(self.path, follow_symlinks=not self.drop)
        except OSError:
            return None
        return Signature.of(status)

    def remove(self) -> None:
        """Remove it, durably."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise file_error(error, "it was added, but the original cannot be removed", self.path) from None
