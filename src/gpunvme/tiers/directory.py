"""One tier's directory: files opened, put in place and removed without ever following a link out of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from gpunvme.errors import FileError, TierError, TierStateError, TierUnavailableError, file_error
from gpunvme.tiers.names import PRIVATE, parts_of

MARKER = "tier.json"
INCOMING = "incoming"
_FORMAT, _VERSION = "gpunvme-tier", 1
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ATTEMPTS = 10
_BENEATH = _DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Signature:
    """What tells whether a file is still the one that it was: any write, replacement or chmod changes it."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """Make it from what stat says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def text(self) -> str:
        """Write it for the journal."""
        return f"{self.device} {self.inode} {self.nbytes} {self.mtime_ns} {self.ctime_ns}"


class TierDirectory:
    """The directory of one tier.

    It is opened anew for each operation and its marker compared, so that a mount that went away is noticed, and so
    that nothing here keeps anybody from unmounting it. Below it no symbolic link is followed (`openat(2)` with
    O_NOFOLLOW, part by part).

    Parameters
    ----------
    name
        The tier's name.
    path
        Its directory, which exists. This path itself may be a symbolic link.
    """

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        self.name = name
        self.path = os.path.abspath(os.fspath(path))
        self._store: str | None = None

    def __repr__(self) -> str:
        return f"<tier {self.name!r} at {self.path!r}>"

    # Whose directory it is.

    def marker(self) -> dict[str, str] | None:
        """Read whose tier it is; None if nobody's.

        Raises
        ------
        TierUnavailableError, TierStateError
            If there is no such directory; if the marker is not one.
        """
        with self._opened_root() as root:
            return self._marker(root)

    def _marker(self, root: int) -> dict[str, str] | None:
        try:
            private = os.open(PRIVATE, _BENEATH, dir_fd=root)
            try:
                fd = os.open(MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=private)
            finally:
                os.close(private)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TierUnavailableError(f"{self._who()}: {PRIVATE}/{MARKER}: {error.strerror}") from None
        with open(fd, "rb") as file:
            try:
                found = json.loads(file.read(4096))
                if found["format"] != _FORMAT or found["version"] != _VERSION:
                    raise ValueError
                return {"store": str(found["store"]), "tier": str(found["tier"])}
            except (OSError, ValueError, KeyError, TypeError):
                raise TierStateError(
                    f"{self._who()}: {PRIVATE}/{MARKER} is damaged or of another version; remove it if this is the "
                    "right directory"
                ) from None

    def claim(self, store: str, *, known: bool) -> None:
        """Make sure that it is this tier of this store, and mark it if it is nobody's and was never seen before.

        Raises
        ------
        TierUnavailableError
            If it is missing, or if it was marked before and is not now: something is not mounted.
        TierStateError
            If it is another tier or another store's.
        """
        with self._opened_root() as root:
            found = self._marker(root)
            if found is None:
                if known:
                    raise self._not_mounted()
                self._mark(root, store)
            elif found["store"] != store:
                raise TierStateError(
                    f"{self._who()} belongs to other tiers (store {found['store']}); they have {store}"
                )
            elif found["tier"] != self.name:
                raise TierStateError(f"{self._who()} is the directory of tier {found['tier']!r}: are two swapped?")
        self._store = store

    def expect(self, store: str) -> None:
        """Remember whose it must be, even though it cannot be looked at now."""
        self._store = store

    def mark(self, store: str) -> None:
        """Make it a tier of ``store``, whatever it was before."""
        with self._opened_root() as root:
            self._mark(root, store)
        self._store = store

    def _mark(self, root: int, store: str) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(PRIVATE, 0o700, dir_fd=root)
            private = os.open(PRIVATE, _BENEATH, dir_fd=root)
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(INCOMING, 0o700, dir_fd=private)
                part = f"{MARKER}.{os.getpid()}"
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=private)
                with open(fd, "w") as file:
                    json.dump({"format": _FORMAT, "version": _VERSION, "store": store, "tier": self.name}, file)
                    file.flush()
                    os.fsync(fd)
                os.rename(part, MARKER, src_dir_fd=private, dst_dir_fd=private)
                os.fsync(private)
            finally:
                os.close(private)
            os.fsync(root)
        except OSError as error:
            raise file_error(error, f"cannot make it tier {self.name!r}", self.path) from None

    def _who(self) -> str:
        return f"tier {self.name!r} at {self.path!r}"

    def _not_mounted(self) -> TierUnavailableError:
        return TierUnavailableError(f"{self._who()} is not the directory that it was: is its file system mounted?")

    @contextlib.contextmanager
    def _opened_root(self) -> Iterator[int]:
        try:
            root = os.open(self.path, _DIRECTORY)
        except OSError as error:
            raise TierUnavailableError(f"{self._who()} cannot be reached: {error.strerror}") from None
        try:
            yield root
        finally:
            os.close(root)

    @contextlib.contextmanager
    def _root(self) -> Iterator[int]:
        with self._opened_root() as root:
            found = self._marker(root)
            if found is None or found["store"] != self._store or found["tier"] != self.name:
                raise self._not_mounted()
            yield root

    # Files.

    @contextlib.contextmanager
    def _parent(self, name: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
        """Open the directory that a file is in, and give its last part."""
        parts = parts_of(name)
        with self._root() as root:
            here = os.dup(root)
            try:
                for part in parts[:-1]:
                    here = self._enter(here, part, create)
                yield here, parts[-1]
            finally:
                os.close(here)

    @staticmethod
    def _enter(here: int, part: str, create: bool) -> int:
        if create:
            try:
                os.mkdir(part, dir_fd=here)
                os.fsync(here)
            except FileExistsError:
                pass
        below = os.open(part, _BENEATH, dir_fd=here)
        os.close(here)
        return below

    def where(self, name: str) -> str:
        """The path of a file, for messages."""
        return os.path.join(self.path, name)

    def open_file(self, name: str) -> int:
        """Open a file for reading and return its descriptor, which is the caller's to close.

        Raises
        ------
        MissingFileError
            If it is not there.
        FileError
            If it is no regular file, or behind a symbolic link.
        TierUnavailableError
            If the tier is not there.
        """
        try:
            with self._parent(name) as (parent, last):
                # O_NONBLOCK: opening a FIFO that somebody put there must not wait for its writer.
                fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise FileError(
                    error.errno, "a symbolic link or no directory is on its way", self.where(name)
                ) from None
            raise file_error(error, "cannot open", self.where(name)) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileError(errno.EINVAL, "not a regular file", self.where(name))
        return fd

    def signature(self, name: str) -> Signature | None:
        """Tell which file has this name now; None if there is none, or something that is no regular file."""
        try:
            with self._parent(name) as (parent, last):
                status = os.stat(last, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise file_error(error, "cannot look at it", self.where(name)) from None
        return Signature.of(status) if stat.S_ISREG(status.st_mode) else None

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[int]:
        with self._root() as root:
            private = os.open(PRIVATE, _BENEATH, dir_fd=root)
            try:
                incoming = os.open(INCOMING, _BENEATH, dir_fd=private)
            finally:
                os.close(private)
            try:
                yield incoming
            finally:
                os.close(incoming)

    def create_temporary(self, temporary: str) -> int:
        """Make an empty file that no name leads to yet, and return its descriptor."""
        try:
            with self._incoming() as incoming:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                return os.open(temporary, flags, 0o600, dir_fd=incoming)
        except OSError as error:
            raise file_error(error, f"cannot write to tier {self.name!r}", self.path) from None

    def place(self, temporary: str, name: str, *, replace: bool) -> None:
        """Give a temporary file its name, durably.

        Raises
        ------
        TierError
            If a file that is not on record has that name, and ``replace`` is not set.
        FileError
            If the operating system refuses.
        """
        try:
            for _ in range(_ATTEMPTS):
                with (
                    contextlib.suppress(FileNotFoundError),  # somebody removed the directory, which was empty
                    self._incoming() as incoming,
                    self._parent(name, create=True) as (parent, last),
                ):
                    if replace:
                        os.rename(temporary, last, src_dir_fd=incoming, dst_dir_fd=parent)
                    else:
                        _put(temporary, incoming, last, parent)
                    os.fsync(parent)
                    return
            raise FileNotFoundError(errno.ENOENT, "its directory goes away again and again")
        except FileExistsError:
            raise TierError(
                f"{self.where(name)!r} exists and is not on record: move it away, or add it under this name"
            ) from None
        except OSError as error:
            raise file_error(error, "cannot put in place", self.where(name)) from None

    def remove(self, name: str) -> None:
        """Remove a file, durably, and the directories that it leaves empty. One that is gone already is fine."""
        try:
            with self._parent(name) as (parent, last):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(last, dir_fd=parent)
                os.fsync(parent)
            self._prune(parts_of(name)[:-1])
        except FileNotFoundError:
            pass
        except OSError as error:
            raise file_error(error, "cannot remove", self.where(name)) from None

    def _prune(self, directories: tuple[str, ...]) -> None:
        for depth in range(len(directories), 0, -1):
            try:
                with self._parent("/".join(directories[:depth])) as (parent, last):
                    os.rmdir(last, dir_fd=parent)
            except OSError:  # not empty, or removed by somebody else: nothing is lost by leaving it
                return

    def remove_temporary(self, temporary: str) -> None:
        """Remove a temporary file; one that is gone already is fine."""
        try:
            with self._incoming() as incoming, contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=incoming)
        except OSError as error:
            raise file_error(error, "cannot remove a temporary file", self.path) from None

    def temporaries(self) -> list[str]:
        """List the temporary files that are there."""
        with self._incoming() as incoming:
            return sorted(os.listdir(incoming))

    def names(self) -> Iterator[str]:
        """Walk over the files on it: regular ones, ours and links left out."""
        with self._root() as root:
            yield from self._walk(root, ())

    def _walk(self, directory: int, above: tuple[str, ...]) -> Iterator[str]:
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if not above and entry.name == PRIVATE:
                continue
            parts = (*above, entry.name)
            if entry.is_file(follow_symlinks=False):
                yield "/".join(parts)
            elif entry.is_dir(follow_symlinks=False):
                below = os.open(entry.name, _BENEATH, dir_fd=directory)
                try:
                    yield from self._walk(below, parts)
                finally:
                    os.close(below)

    def space(self) -> tuple[int, bool]:
        """Ask for the free bytes of the file system that it is on, and whether that is read-only."""
        with self._root() as root:
            told = os.fstatvfs(root)
        return told.f_bavail * told.f_frsize, bool(told.f_flag & os.ST_RDONLY)


def _put(temporary: str, incoming: int, last: str, parent: int) -> None:
    """Rename without replacing: what another program put there meanwhile is not ours to overwrite."""
    try:
        os.link(temporary, last, src_dir_fd=incoming, dst_dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
    else:
        os.unlink(temporary, dir_fd=incoming)
        return
    # A file system without hard links: look, then rename. Only another program can come between.
    try:
        os.stat(last, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(temporary, last, src_dir_fd=incoming, dst_dir_fd=parent)
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), last)
