"""`TierManager`: files on tiers, opened by name wherever they live."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Self

from gpunvme.errors import (
    FileError,
    MissingFileError,
    TierError,
    TierUnavailableError,
)
from gpunvme.file import File
from gpunvme.tiers.accesses import Accesses, CountedFile
from gpunvme.tiers.adding import Additions
from gpunvme.tiers.background import Background
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.layout import directories_of, refuse_second, state_path
from gpunvme.tiers.moves import Moves, not_on_record
from gpunvme.tiers.names import parts_of
from gpunvme.tiers.owner import Owner, held
from gpunvme.tiers.pace import Pace
from gpunvme.tiers.policy import WEEK, Policy
from gpunvme.tiers.rounds import Decision, Rounds
from gpunvme.tiers.state import FileRow, State
from gpunvme.tiers.status import Status, read_status

#: How many troubles of background work are kept for `TierManager.status`.
TROUBLES = 20
#: How often `TierManager.open` looks again for a file that has just moved on.
_LOOKS = 100


class TierManager:
    """Files that live on one of several directories, and move between them by how often they are read.

    A context manager. Threads may share it, and several processes may have one each for the same directories.

    Parameters
    ----------
    tiers
        Directories by name, fastest first, such as ``{"nvme": "/mnt/nvme", "hdd": "/mnt/hdd"}``. They exist already.
        Once on record, a tier that is missing is only reported; its files cannot be opened until it is back.
    state
        Where the SQLite database is: on a local file system; ``.gpunvme-tier/state.sqlite`` on the first tier if None.
    hot, warm, half_life
        See `Policy`: accesses from which on a file is hot or warm, and the seconds in which accesses lose half of
        their weight.
    capacity
        Budgets in bytes by tier, None for no budget. They are on record: every process keeps to them, and what is not
        named here keeps the budget that it has.
    rate, interval, moves
        Background work: bytes copied a second (None: no limit), seconds between rounds, and files moved in a round.
    timeout
        Seconds to wait for another process's transaction, or its move of the same file.
    clock
        Seconds since 1970, for the fading of accesses.

    Raises
    ------
    TierUnavailableError
        If a directory that was never seen before is missing; if the database's tier is.
    TierStateError
        If the database is damaged, foreign or newer; if a directory belongs to other tiers.
    TierError
        If files on record are on a tier that is not named.
    """

    def __init__(
        self,
        tiers: Mapping[str, str | os.PathLike[str]],
        *,
        state: str | os.PathLike[str] | None = None,
        hot: float = 100,
        warm: float = 10,
        half_life: float | None = WEEK,
        capacity: Mapping[str, int | None] | None = None,
        rate: float | None = None,
        interval: float = 60.0,
        moves: int = 16,
        timeout: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.policy = Policy(hot, warm, half_life)
        directories = directories_of(tiers)
        self._directories = {directory.name: directory for directory in directories}
        self._order = list(self._directories)
        self._check_capacity(capacity or {})
        Pace(rate)  # refuses what is no rate
        if moves < 1:
            raise ValueError(f"moves={moves!r}: at least one a round")
        self._rate, self._interval, self._most = rate, interval, moves
        self._timeout = timeout
        self._clock = clock
        self.troubles: deque[str] = deque(maxlen=TROUBLES)
        """What the latest background work could not do."""
        self._background: Background | None = None
        path = state_path(directories, state)
        if state is None:
            directories[0].marker()  # says clearly that it is missing
        if not os.path.exists(path):
            refuse_second(directories, path)
        if state is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                held(f"{path}-users", "the tiers' database is being rebuilt: try again when that is done", shared=True)
            )
            self._state = stack.enter_context(State(path, timeout))
            self._claim(capacity or {})
            self._owner = Owner(path)
            stack.callback(self._owner.close)
            self._accesses = Accesses(self._state, self.policy, clock)
            self._moves = Moves(self._state, self._owner, self._directories, timeout)
            self._additions = Additions(self._state, self._directories, self._moves)
            self._rounds = Rounds(self._state, self._directories, self._moves, self._accesses, self.policy, clock)
            self._rounds.troubles = self.troubles
            self._owner.forget_dead()
            self.troubles.extend(self._moves.recover())
            self._stack: contextlib.ExitStack | None = stack.pop_all()

    def _check_capacity(self, capacity: Mapping[str, int | None]) -> None:
        for name, nbytes in capacity.items():
            if name not in self._directories:
                raise ValueError(f"capacity for {name!r}, which is not a tier: {', '.join(self._order)}")
            if nbytes is not None and operator.index(nbytes) < 0:
                raise ValueError(f"capacity of {name!r} is {nbytes!r}: bytes, or None")

    def _claim(self, capacity: Mapping[str, int | None]) -> None:
        """Make sure that the directories are the ones on record, and put new ones there."""
        store, known = self._state.store, self._state.tiers()
        for name, directory in self._directories.items():
            directory.expect(store)
            try:
                directory.claim(store, known=name in known)
            except TierUnavailableError as error:
                if name not in known:
                    raise
                self.troubles.append(str(error))
        with self._state.transaction() as connection:
            for name in known.keys() - self._directories.keys():
                left = connection.execute("SELECT count(*) FROM file WHERE tier = ?", (name,)).fetchone()[0]
                if left:
                    raise TierError(f"{left} files are on tier {name!r} at {known[name][0]!r}: name it too")
                connection.execute("DELETE FROM tier WHERE name = ?", (name,))
            for name, directory in self._directories.items():
                connection.execute(
                    "INSERT INTO tier VALUES (?, ?, NULL) ON CONFLICT DO UPDATE SET directory = excluded.directory",
                    (name, directory.path),
                )
                if name in capacity:
                    connection.execute("UPDATE tier SET capacity = ? WHERE name = ?", (capacity[name], name))

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers' names, fastest first."""
        return tuple(self._order)

    def close(self) -> None:
        """End background work, write counted accesses down, and let go of the database."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        with stack:
            self.stop()
            self._accesses.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gpunvme.TierManager of {', '.join(self._order)}>"

    # Files.

    def add(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        tier: str | None = None,
        move: bool = False,
        replace: bool = False,
    ) -> str:
        """Copy a file to a tier and put it on record.

        A file that lies on a tier already, under this name, is put on record where it is.

        Parameters
        ----------
        path
            The file. A symbolic link is followed.
        name
            What it is called from now on, such as ``"llama/shard-1.safetensors"``; the last part of ``path`` if None.
        tier
            Where to; the fastest tier that has room if None.
        move
            Remove the original, after the copy is durable, compared and on record. An original that was written to
            meanwhile is kept.
        replace
            Replace the file of that name, as a whole; its accesses and its pin stay.

        Returns
        -------
        str
            The name of the tier.

        Raises
        ------
        TierNameError
            If no file may have that name.
        FileError
            If there is one on record (EEXIST) and ``replace`` is not set; if reading or writing fails.
        TierFullError, TierUnavailableError, TierError
            If no tier has room; if the tier is not there; if a file that is not on record is in the way.
        """
        self._check_open()
        if tier is not None:
            self._directory(tier)
        return self._additions.add(path, name, tier, move=move, replace=replace)

    def open(self, name: str) -> File:
        """Open a file for reading, wherever it lives. Counts as an access, and so does each read.

        It stays valid and unchanged while the file is moved, replaced or removed; the next `open` sees the new place.

        Raises
        ------
        MissingFileError
            If it is not on record, or was removed behind our back.
        TierUnavailableError
            If its tier is not there.
        FileError
            If it cannot be opened.
        """
        self._check_open()
        parts_of(name)
        for _ in range(_LOOKS):
            file = self._state.file(name)
            if file is None:
                raise not_on_record(name)
            directory = self._directory(file.tier)
            try:
                fd = directory.open_file(name)
            except MissingFileError:
                if self._state.file(name) != file or self._state.move(name) is not None:
                    continue  # it has just moved on
                raise MissingFileError(
                    errno.ENOENT,
                    f"on record on tier {file.tier!r}, but somebody removed it there",
                    directory.where(name),
                ) from None
            try:
                opened = CountedFile(fd, directory.where(name), lambda: self._accesses.count(name))
            finally:
                os.close(fd)
            self._accesses.count(name)
            return opened
        raise TierError(f"{name!r} moves from tier to tier faster than it can be opened")

    def where(self, name: str) -> str:
        """Return the path of a file as it is now; it may move at any time unless it is pinned.

        Raises
        ------
        MissingFileError
            If it is not on record.
        """
        file = self._file(name)
        return self._directory(file.tier).where(name)

    def remove(self, name: str) -> None:
        """Remove a file from the record and from its tier. Open ones stay readable.

        Raises
        ------
        MissingFileError, TierUnavailableError, TierError, FileError
            If it is not on record; if its tier is not there or is read-only; if it is being moved.
        """
        self._check_open()
        parts_of(name)
        self._moves.remove(name)

    def migrate(self, name: str, tier: str, *, rate: float | None = None) -> bool:
        """Move a file to a tier now.

        Parameters
        ----------
        name, tier
            What, and where to.
        rate
            Bytes a second that are copied; None for no limit.

        Returns
        -------
        bool
            False if it was there already.

        Raises
        ------
        TierFullError, TierUnavailableError, FileError
            If there is no room; if a tier is not there or is read-only; if reading or writing fails. Nothing changed.
        TierError
            If it is pinned to another tier, being moved by somebody else, or written to all the time.
        """
        self._check_open()
        file = self._file(name)
        self._directory(tier)
        if file.pinned and file.tier != tier:
            raise TierError(f"{name!r} is pinned to tier {file.tier!r}: unpin it first")
        return self._moves.migrate(name, tier, Pace(rate), allowed=lambda row: not row.pinned)

    def pin(self, name: str, tier: str | None = None) -> None:
        """Keep a file on a tier: on ``tier``, where it is moved now, or where it is.

        Raises the same errors as `migrate`; then it is not pinned anew.
        """
        self._check_open()
        file = self._file(name)
        if tier is not None and tier != file.tier:
            self._directory(tier)
            self._moves.migrate(name, tier, Pace(), allowed=lambda row: True)
        self._set_pin(name, True)

    def unpin(self, name: str) -> None:
        """Let a file move again.

        Raises
        ------
        MissingFileError
            If it is not on record.
        """
        self._check_open()
        self._set_pin(name, False)

    def _set_pin(self, name: str, pinned: bool) -> None:
        with self._state.transaction() as connection:
            done = connection.execute("UPDATE file SET pinned = ? WHERE name = ?", (int(pinned), name))
            if done.rowcount == 0:
                raise not_on_record(name)

    # By heat.

    def auto_tier(self, name: str) -> Decision:
        """Move a file to the tier where it belongs by its accesses, or to the nearest slower one that has room.

        Returns
        -------
        Decision
            Where it is now, and why.

        Raises
        ------
        MissingFileError, FileError, TierError
            As `migrate`, but a tier that is full or not there only changes the decision.
        """
        self._check_open()
        parts_of(name)
        return self._rounds.one(name)

    def balance(self, *, moves: int | None = None, rate: float | None = None) -> list[Decision]:
        """Make one round: move files to where they belong, so that the hottest have the fastest tiers.

        Parameters
        ----------
        moves
            The most files that are moved; as given to the constructor if None.
        rate
            Bytes a second that are copied; as given to the constructor if None.

        Returns
        -------
        list of Decision
            One for each file that moved or should have. What went wrong is its reason, and in `status`.
        """
        self._check_open()
        return self._rounds.all(Pace(self._rate if rate is None else rate), self._most if moves is None else moves)

    def start(self) -> None:
        """Begin background work: a round of `balance` every ``interval`` seconds, in a thread.

        Processes take turns: while one makes a round, the others' rounds are skipped.
        """
        self._check_open()
        if self._background is None or not self._background.running:
            self._background = Background(self._turn, self._interval, self._rate)

    def stop(self) -> None:
        """End background work; a copy under way is given up, and its file stays where it was."""
        background, self._background = self._background, None
        if background is not None:
            background.stop()

    def _turn(self, pace: Pace) -> None:
        try:
            with held(f"{self._state.path}-round", "another process makes a round"):
                self._rounds.all(pace, self._most)
        except (TierError, FileError) as error:
            self.troubles.append(str(error))

    # Looking.

    def status(self) -> Status:
        """Tell what is where."""
        self._check_open()
        with contextlib.suppress(TierError):
            self._accesses.write()
        return read_status(self._state, self._directories, self.policy, self._clock(), self.troubles)

    def _file(self, name: str) -> FileRow:
        parts_of(name)
        file = self._state.file(name)
        if file is None:
            raise not_on_record(name)
        return file

    def _directory(self, tier: str) -> TierDirectory:
        try:
            return self._directories[tier]
        except KeyError:
            raise ValueError(f"{tier!r} is not a tier: {', '.join(self._order)}") from None

    def _check_open(self) -> None:
        if self._stack is None:
            raise ValueError("the TierManager is closed")
