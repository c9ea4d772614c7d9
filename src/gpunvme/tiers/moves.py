"""A file's way from one tier to another, in steps of which each can be the last: nothing is lost, or there twice.

1. On record: step ``copying``. The copy goes to a temporary file without a name.
2. fsync, read back, compared; the source is still what it was. On record: ``placing``, with the copy's inode.
3. The copy gets its name on the new tier, durably.
4. On record, in one transaction: the new tier counts, step ``switched``.
5. The old copy is removed; the move is struck off.

Who dies on the way is found by the lock that the kernel dropped. Before 3 the copy is removed, from 3 on the move is
finished: `_settle` does both, after a crash and after an error alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gpunvme.errors import (
    Error,
    FileError,
    MissingFileError,
    TierError,
    TierFullError,
    TierUnavailableError,
)
from gpunvme.tiers.copying import SourceChangedError, copy_verified
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.outside import Outside
from gpunvme.tiers.owner import Owner
from gpunvme.tiers.pace import Pace
from gpunvme.tiers.state import (
    FileRow,
    MoveRow,
    State,
    change_move,
    file_row,
    move_row,
    put_file,
    put_move,
    used_bytes,
)

#: How often a source that changes while it is copied is copied anew.
ATTEMPTS = 3
_POLL = 0.02  # seconds between looks at somebody else's move


class Moves:
    """Moves files between tiers, one at a time for each name, whoever else does the same.

    Parameters
    ----------
    state, owner, directories
        The record, who we are in it, and the tiers.
    timeout
        Seconds to wait for somebody else's move of the same file.
    """

    def __init__(self, state: State, owner: Owner, directories: Mapping[str, TierDirectory], timeout: float) -> None:
        self._state = state
        self._owner = owner
        self._directories = directories
        self._timeout = timeout
        self._active: set[str] = set()
        self._lock = threading.Lock()

    # What can be done.

    def migrate(self, name: str, destination: str, pace: Pace, *, allowed: Callable[[FileRow], bool]) -> bool:
        """Move a file to another tier.

        Returns
        -------
        bool
            False if it is there already, or if ``allowed`` says no to what is on record when nobody else can change
            it any more.

        Raises
        ------
        MissingFileError, TierFullError, TierUnavailableError, TierError, FileError, Cancelled
            Then it is where it was.
        """

        def begin(file: FileRow | None) -> MoveRow | None:
            if file is None:
                raise not_on_record(name)
            if file.tier == destination or not allowed(file):
                return None
            return self._row(name, "copying", old_tier=file.tier, new_tier=destination, nbytes=file.nbytes)

        return self._copied(name, begin, None, pace)

    def add(self, outside: Outside, name: str, tier: str, pace: Pace, *, replace: bool) -> None:
        """Copy a file from outside to a tier and put it on record; see `migrate` for what is raised."""
        first = outside.signature()
        nbytes = 0 if first is None else first.nbytes

        def begin(file: FileRow | None) -> MoveRow:
            if file is not None and not replace:
                raise FileError(
                    errno.EEXIST, f"on record already, on tier {file.tier!r}; replace=True replaces it", name
                )
            row = self._row(
                name, "copying", old_tier=file.tier if file is not None else None, new_tier=tier, nbytes=nbytes
            )
            return _changed(row, origin=os.fsencode(outside.path), drop_origin=outside.drop)

        self._copied(name, begin, outside, pace)

    def remove(self, name: str) -> None:
        """Take a file off the record and remove it.

        Raises
        ------
        MissingFileError, TierUnavailableError, TierError, FileError
            If it is not on record; if its tier is not there; if somebody moves it.
        """

        def begin(file: FileRow | None) -> MoveRow:
            if file is None:
                raise not_on_record(name)
            self._directories[file.tier].signature(name)  # is the tier there?
            self._check_writable(file.tier)
            return self._row(name, "switched", old_tier=file.tier, new_tier=None, nbytes=0)

        with self._begun(name, begin) as row:
            if row is not None:
                self._finish(row)

    def recover(self) -> list[str]:
        """Finish or roll back what the dead left, and what could not be finished before.

        Returns
        -------
        list of str
            What still cannot be done, and why.
        """
        troubles = []
        for row in self._state.moves():
            try:
                with self._claimed(row.name) as mine:
                    if mine:
                        self._take_over(row.name)
            except (Error, OSError) as error:
                troubles.append(f"{row.name!r}: {error}")
        return troubles

    # Beginning.

    def _row(self, name: str, step: str, *, old_tier: str | None, new_tier: str | None, nbytes: int) -> MoveRow:
        return MoveRow(
            name=name,
            owner=self._owner.identity,
            step=step,
            origin=None,
            drop_origin=False,
            old_tier=old_tier,
            new_tier=new_tier,
            temporary=secrets.token_hex(12),
            signature=None,
            inode=None,
            nbytes=nbytes,
            mtime_ns=None,
            checksum=None,
        )

    @contextlib.contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        """Be the only thread of this process that touches a move of this file, if no other one does."""
        with self._lock:
            mine = name not in self._active
            if mine:
                self._active.add(name)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._active.discard(name)

    @contextlib.contextmanager
    def _begun(self, name: str, begin: Callable[[FileRow | None], MoveRow | None]) -> Iterator[MoveRow | None]:
        """Put a move on record when nobody else moves the file."""
        deadline = time.monotonic() + self._timeout
        while True:
            with self._claimed(name) as mine:
                if mine and self._take_over(name):
                    with self._state.transaction() as connection:
                        free = move_row(connection, name) is None
                        row = begin(file_row(connection, name)) if free else None
                        if row is not None:
                            self._check_budget(connection, row)
                            if row.new_tier is None:
                                connection.execute("DELETE FROM file WHERE name = ?", (name,))
                            put_move(connection, row)
                    if free:
                        yield row
                        return
            if time.monotonic() > deadline:
                raise TierError(f"{name!r} is being moved by another thread or process: try again later")
            time.sleep(_POLL)

    def _take_over(self, name: str) -> bool:
        """Settle what the dead, or we ourselves, left of a move; False if somebody alive is at it."""
        row = self._state.move(name)
        if row is None:
            return True
        me = self._owner.identity
        if row.owner != me and self._owner.alive(row.owner):
            return False
        if row.owner != me:
            try:
                self._state.hand_over(name, row.owner, me)
            except TierError:
                return False  # somebody was faster
        with contextlib.suppress(SourceChangedError):  # settled all the same: it is where it was
            self._settle(_changed(row, owner=me))
        return True

    def _check_budget(self, connection: sqlite3.Connection, row: MoveRow) -> None:
        if row.new_tier is None:
            return
        file = file_row(connection, row.name)
        capacity = connection.execute("SELECT capacity FROM tier WHERE name = ?", (row.new_tier,)).fetchone()[0]
        if capacity is None:
            return
        used = used_bytes(connection, row.new_tier)
        if file is not None and file.tier == row.new_tier:
            used -= file.nbytes  # it is replaced
        if used + row.nbytes > capacity:
            raise TierFullError(
                f"tier {row.new_tier!r} may hold {capacity} bytes and has {used}: no room for the {row.nbytes} of "
                f"{row.name!r}"
            )

    def _check_writable(self, tier: str) -> None:
        if self._directories[tier].space()[1]:
            raise TierUnavailableError(f"tier {tier!r} is read-only: nothing can be removed from it")

    # Copying.

    def _copied(
        self, name: str, begin: Callable[[FileRow | None], MoveRow | None], outside: Outside | None, pace: Pace
    ) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._begun(name, begin) as row:
                    if row is None:
                        return False
                    self._carry(row, outside, pace)
                    return True
            except SourceChangedError:
                if attempt == ATTEMPTS:
                    raise TierError(
                        f"{name!r} is written to all the time: {ATTEMPTS} copies of it were outdated; nothing was moved"
                    ) from None
        raise AssertionError("unreachable")

    def _carry(self, row: MoveRow, outside: Outside | None, pace: Pace) -> None:
        assert row.new_tier is not None
        destination = self._directories[row.new_tier]
        try:
            if row.old_tier is not None and row.old_tier != row.new_tier:
                self._check_writable(row.old_tier)
            placing = self._copy(row, destination, outside, pace)
            destination.place(row.temporary, row.name, replace=row.old_tier == row.new_tier)
            switched = self._switch(placing)
        except BaseException as error:
            # What cannot be settled now (the tier is gone) is on record, and settled later.
            with contextlib.suppress(Error, OSError):
                now = self._state.move(row.name)
                if now is not None and now.owner == row.owner:
                    self._settle(now)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise TierFullError(
                    f"tier {row.new_tier!r} is full: {error}; {row.name!r} stays where it is"
                ) from error
            if isinstance(error, OSError) and error.errno == errno.EROFS:
                raise TierUnavailableError(f"tier {row.new_tier!r} is read-only; {row.name!r} stays") from error
            raise
        try:
            self._finish(switched)
        except SourceChangedError:
            raise
        except (Error, OSError) as error:
            raise TierError(
                f"{row.name!r} is on tier {row.new_tier!r} now, but its old copy could not be removed: {error}"
            ) from error

    def _copy(self, row: MoveRow, destination: TierDirectory, outside: Outside | None, pace: Pace) -> MoveRow:
        name = row.name
        source = outside.open() if outside is not None else self._directories[row.old_tier or ""].open_file(name)
        try:
            nbytes = os.fstat(source).st_size
            free, _ = destination.space()
            if nbytes > free:
                raise TierFullError(
                    f"tier {destination.name!r} has {free} bytes free: no room for the {nbytes} of {name!r}"
                )
            copy = destination.create_temporary(row.temporary)
            try:
                copied = copy_verified(source, copy, name, pace)
            finally:
                os.close(copy)
        finally:
            os.close(source)
        if outside is None:
            now = self._directories[row.old_tier or ""].signature(name)
            self._check_against_record(name, copied.nbytes, copied.source.mtime_ns, copied.checksum)
        else:
            now = outside.signature()
        if now != copied.source:
            raise SourceChangedError(f"{name!r} was replaced while it was copied")
        known = {
            "step": "placing",
            "signature": copied.source.text(),
            "inode": copied.inode,
            "nbytes": copied.nbytes,
            "mtime_ns": copied.mtime_ns,
            "checksum": copied.checksum,
        }
        self._state.change_move(name, row.owner, **known)
        return _changed(row, **known)

    def _check_against_record(self, name: str, nbytes: int, mtime_ns: int, checksum: str) -> None:
        """Refuse to carry on what a drive has damaged: nobody wrote to it, and yet it is another content."""
        file = self._state.file(name)
        if file is not None and (file.nbytes, file.mtime_ns) == (nbytes, mtime_ns) and file.checksum != checksum:
            raise TierError(
                f"{name!r} on tier {file.tier!r} has another checksum than on record, but neither its size nor its "
                "time changed: its drive may have damaged it. It stays; compare it with another copy, then add it anew"
            )

    # Ending.

    def _switch(self, row: MoveRow) -> MoveRow:
        assert row.new_tier is not None
        assert row.mtime_ns is not None
        assert row.checksum is not None
        with self._state.transaction() as connection:
            change_move(connection, row.name, row.owner, step="switched")
            put_file(connection, FileRow(row.name, row.new_tier, row.nbytes, row.mtime_ns, row.checksum))
        return _changed(row, step="switched")

    def _settle(self, row: MoveRow) -> None:
        """Roll a move back, or finish it, whatever step it stands at."""
        new = None if row.new_tier is None else self._directory(row.new_tier)
        if row.step in ("placing", "undoing"):
            assert new is not None
            found = new.signature(row.name)
            placed = found is not None and found.inode == row.inode
            if placed and row.step == "placing":
                row = self._switch(row)
            elif placed:
                new.remove(row.name)
        if row.step == "switched":
            self._finish(row)
            return
        if new is not None:
            new.remove_temporary(row.temporary)
        self._state.end_move(row.name, row.owner)

    def _finish(self, row: MoveRow) -> None:
        """Remove what the new place makes superfluous."""
        if row.new_tier is not None:
            self._directory(row.new_tier).remove_temporary(row.temporary)
        if row.old_tier is not None and row.old_tier != row.new_tier:
            old = self._directory(row.old_tier)
            if row.new_tier is not None and row.origin is None:
                found = old.signature(row.name)
                if found is not None and found.text() != row.signature:
                    self._undo(row)
            old.remove(row.name)
        if row.origin is not None and row.drop_origin:
            outside = Outside(os.fsdecode(row.origin), drop=True)
            found = outside.signature()
            if found is not None and found.text() == row.signature:
                try:
                    outside.remove()
                except FileError:
                    self._state.end_move(row.name, row.owner)  # theirs to remove, and no reason to keep the file busy
                    raise
        self._state.end_move(row.name, row.owner)

    def _undo(self, row: MoveRow) -> None:
        """Let the old place count again: somebody wrote there after the copy was made.

        Raises
        ------
        SourceChangedError
            Always, when that is done.
        """
        assert row.old_tier is not None
        with self._state.transaction() as connection:
            change_move(connection, row.name, row.owner, step="undoing")
            connection.execute("UPDATE file SET tier = ? WHERE name = ?", (row.old_tier, row.name))
        self._settle(_changed(row, step="undoing"))
        raise SourceChangedError(f"{row.name!r} changed after it was copied; it stays on tier {row.old_tier!r}")

    def _directory(self, tier: str) -> TierDirectory:
        try:
            return self._directories[tier]
        except KeyError:
            raise TierUnavailableError(f"tier {tier!r} is on record, but was not named") from None


def _changed(row: MoveRow, **columns: object) -> MoveRow:
    return replace(row, **columns)  # type: ignore[arg-type]


def not_on_record(name: str) -> MissingFileError:
    """Say that there is no such file."""
    return MissingFileError(errno.ENOENT, "no such file on any tier", name)
