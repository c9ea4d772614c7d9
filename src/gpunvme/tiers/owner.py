"""Who is moving a file, and whether they are still alive: locks that the kernel drops when their process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator

from gpunvme.errors import TierError, file_error


class Owner:
    """Our process, as the journal names it: a locked file beside the database.

    `flock(2)` rather than process numbers, which are used again. A forked child gets an identity of its own; until it
    closes or ends, its copy of the descriptor keeps its parent's alive, which only delays what is done for the dead.

    Parameters
    ----------
    state
        The database's path; the lock files are in ``<state>-owners``.
    """

    def __init__(self, state: str) -> None:
        self._directory = state + "-owners"
        self._held: tuple[int, str, int] | None = None  # process, identity, descriptor

    @property
    def identity(self) -> str:
        """Our process's name in the journal."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = self._register()
        return self._held[1]

    def _register(self) -> tuple[int, str, int]:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._directory, 0o700)
            while True:
                identity = secrets.token_hex(8)
                path = os.path.join(self._directory, identity)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:  # else somebody took it for a dead one's before it was locked
                    return os.getpid(), identity, fd
                os.close(fd)
        except OSError as error:
            raise file_error(error, "cannot make a lock file", self._directory) from None

    def alive(self, identity: str) -> bool:
        """Tell whether the process of that name, or a child of it, is still there."""
        if self._held is not None and self._held[:2] == (os.getpid(), identity):
            return True
        path = os.path.join(self._directory, os.path.basename(identity))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return not _locked(fd, fcntl.LOCK_SH)  # shared: two who ask at once do not take each other for it
        finally:
            os.close(fd)

    def forget_dead(self) -> None:
        """Remove the lock files of processes that are gone."""
        with contextlib.suppress(OSError):
            for identity in os.listdir(self._directory):
                with contextlib.suppress(OSError):
                    self._forget(os.path.join(self._directory, identity))

    def _forget(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # Removed while it is locked, so that one who is about to lock it finds that it is gone.
            if _locked(fd, fcntl.LOCK_EX):
                os.unlink(path)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Stop being anybody."""
        held, self._held = self._held, None
        if held is not None and held[0] == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._directory, held[1]))
            _let_go(held[2])


def _locked(fd: int, kind: int) -> bool:
    """Lock a file if nobody's lock is in the way, and tell whether that worked."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextlib.contextmanager
def held(path: str, refusal: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file while something runs that must not run twice, or beside what holds it ``shared``.

    Raises
    ------
    TierError
        If somebody else holds it; with the text of ``refusal``.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise file_error(error, "cannot make a lock file", path) from None
    process = os.getpid()
    try:
        if not _locked(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            raise TierError(refusal)
        yield
    finally:
        if process == os.getpid():
            _let_go(fd)
        else:
            os.close(fd)  # a forked child's copy: the lock is its parent's


def _let_go(fd: int) -> None:
    """Unlock, and not only close: a child that was forked meanwhile has the descriptor, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
