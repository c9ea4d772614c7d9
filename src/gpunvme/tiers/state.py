"""What is on record: tiers, files and moves under way, in SQLite, for several processes at once."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from gpunvme.errors import TierError, TierStateError, file_error

#: "gpnt" in the database's header (PRAGMA application_id), and the version of what follows.
APPLICATION_ID = 0x67706E74
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE store (
    id TEXT NOT NULL CHECK (typeof(id) = 'text')
);
CREATE TABLE tier (
    name      TEXT PRIMARY KEY NOT NULL,
    directory TEXT NOT NULL CHECK (typeof(directory) = 'text'),
    capacity  INTEGER CHECK (typeof(capacity) IN ('integer', 'null'))
);
CREATE TABLE file (
    name     TEXT PRIMARY KEY NOT NULL CHECK (typeof(name) = 'text'),
    tier     TEXT NOT NULL REFERENCES tier (name),
    nbytes   INTEGER NOT NULL CHECK (typeof(nbytes) = 'integer' AND nbytes >= 0),
    mtime_ns INTEGER NOT NULL CHECK (typeof(mtime_ns) = 'integer'),
    checksum TEXT NOT NULL CHECK (typeof(checksum) = 'text'),
    accesses INTEGER NOT NULL DEFAULT 0 CHECK (typeof(accesses) = 'integer'),
    heat     REAL NOT NULL DEFAULT 0 CHECK (typeof(heat) = 'real'),
    heat_at  REAL NOT NULL DEFAULT 0 CHECK (typeof(heat_at) = 'real'),
    pinned   INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1))
);
CREATE TABLE move (
    name        TEXT PRIMARY KEY NOT NULL CHECK (typeof(name) = 'text'),
    owner       TEXT NOT NULL,
    step        TEXT NOT NULL CHECK (step IN ('copying', 'placing', 'switched', 'undoing')),
    origin      BLOB,
    drop_origin INTEGER NOT NULL DEFAULT 0 CHECK (drop_origin IN (0, 1)),
    old_tier    TEXT,
    new_tier    TEXT,
    temporary   TEXT NOT NULL,
    signature   TEXT,
    inode       INTEGER,
    nbytes      INTEGER NOT NULL CHECK (typeof(nbytes) = 'integer'),
    mtime_ns    INTEGER,
    checksum    TEXT
);
"""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file on record. ``heat`` is its accesses as they weighed at ``heat_at`` (seconds since 1970)."""

    name: str
    tier: str
    nbytes: int
    mtime_ns: int
    checksum: str
    accesses: int = 0
    heat: float = 0.0
    heat_at: float = 0.0
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class MoveRow:
    """A move under way: ``origin`` is a file outside the tiers that is added, ``old_tier`` where an old copy goes.

    ``step`` is ``copying`` (to a temporary file), ``placing`` (it gets its name), ``switched`` (the new place counts,
    the old copy goes) or ``undoing`` (the old place counts again, the new copy goes).
    """

    name: str
    owner: str
    step: str
    origin: bytes | None
    drop_origin: bool
    old_tier: str | None
    new_tier: str | None
    temporary: str
    signature: str | None
    inode: int | None
    nbytes: int
    mtime_ns: int | None
    checksum: str | None


_FILE = "name, tier, nbytes, mtime_ns, checksum, accesses, heat, heat_at, pinned"
_MOVE = "name, owner, step, origin, drop_origin, old_tier, new_tier, temporary, signature, inode, nbytes"
_MOVE += ", mtime_ns, checksum"


class State:
    """The database. One connection for each process, used by one thread at a time.

    Parameters
    ----------
    path
        Where it is; made if it is not there. On a local file system (WAL needs shared memory).
    timeout
        Seconds to wait for another process's transaction.

    Raises
    ------
    TierStateError
        If it is damaged, another program's, or of a newer version.
    FileError
        If it cannot be made.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self._lock = threading.RLock()
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._left_to_parents: list[sqlite3.Connection] = []
        if not os.path.exists(path):
            self._create()
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, if it is this process's."""
        with self._lock:
            opened, self._connection = self._connection, None
            if opened is not None and opened[0] == os.getpid():
                opened[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Making and checking it.

    def _create(self) -> None:
        """Make it aside and link it to its name: who comes second finds the first one's, complete."""
        aside = f"{self.path}.{secrets.token_hex(6)}.part"
        try:
            os.close(os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            try:
                with self._translated():
                    made = sqlite3.connect(aside, isolation_level=None)
                    try:
                        made.execute("PRAGMA journal_mode = WAL")
                        made.executescript(
                            f"BEGIN; {_SCHEMA} INSERT INTO store VALUES ('{secrets.token_hex(16)}');"
                            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
                        )
                    finally:
                        made.close()  # the last connection: everything is in the one file now
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            finally:
                os.unlink(aside)
            directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise file_error(error, "cannot make the tiers' database", self.path) from None

    def _check(self) -> None:
        with self._connected() as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if application != APPLICATION_ID:
                raise TierStateError(f"{self.path!r} is an SQLite database of another program's, and is left alone")
            if version != SCHEMA_VERSION:
                raise TierStateError(
                    f"{self.path!r} has version {version}; this release knows {SCHEMA_VERSION}. Use the release that "
                    f"wrote it, or {_REBUILD}"
                )
            trouble = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if trouble != "ok":
                raise self._damaged(str(trouble))
            if connection.execute("SELECT count(*) FROM store").fetchone()[0] != 1:
                raise self._damaged("it names no store")

    def _damaged(self, what: str) -> TierStateError:
        return TierStateError(f"the tiers' database {self.path!r} is damaged ({what}): {_REBUILD}")

    # Transactions.

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            opened = self._connection
            if opened is None or opened[0] != os.getpid():
                if opened is not None:
                    # A fork: SQLite forbids to use or even close a parent's connection in its child.
                    self._left_to_parents.append(opened[1])
                opened = self._connection = (os.getpid(), self._connect())
            yield opened[1]

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{_quoted(self.path)}?mode=rw",
            uri=True,
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            # FULL: what was committed survives a power cut, else a file could be removed on the word of a lost record.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Change it as a whole, or not at all, with nobody else changing it meanwhile."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error
        except UnicodeDecodeError as error:  # in SQLite's own message, or in a text
            raise self._damaged("text that is not UTF-8") from error

    def _error(self, error: sqlite3.Error) -> TierError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return TierError(f"another process kept the tiers' database {self.path!r} for {self._timeout:g} s")
        if code == sqlite3.SQLITE_FULL:
            return TierError(f"no room for the tiers' database {self.path!r}: make room on its disk")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
            return TierError(f"the tiers' database {self.path!r} cannot be used: {error}")
        return self._damaged(str(error))

    # The store and its tiers.

    @property
    def store(self) -> str:
        """The identity of these tiers, which each tier's directory is marked with."""
        with self._connected() as connection:
            return str(connection.execute("SELECT id FROM store").fetchone()[0])

    def tiers(self) -> dict[str, tuple[str, int | None]]:
        """Return the tiers on record: directory and budget in bytes by name."""
        with self._connected() as connection:
            rows = connection.execute("SELECT name, directory, capacity FROM tier").fetchall()
        return {name: (directory, capacity) for name, directory, capacity in rows}

    # Files and moves.

    def file(self, name: str) -> FileRow | None:
        """Look a file up."""
        with self._connected() as connection:
            return file_row(connection, name)

    def files(self) -> list[FileRow]:
        """Return all files, in the order of their names."""
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {_FILE} FROM file ORDER BY name").fetchall()
        return [_file(row) for row in rows]

    def move(self, name: str) -> MoveRow | None:
        """Look up whether a file is being moved."""
        with self._connected() as connection:
            return move_row(connection, name)

    def moves(self) -> list[MoveRow]:
        """Return all moves under way, or left over."""
        with self._connected() as connection:
            rows = connection.execute(f"SELECT {_MOVE} FROM move ORDER BY name").fetchall()
        return [_move(row) for row in rows]

    def change_move(self, name: str, owner: str, **columns: Any) -> None:
        """Write what is known now about a move.

        Raises
        ------
        TierError
            If it is not ``owner``'s any more.
        """
        with self.transaction() as connection:
            change_move(connection, name, owner, **columns)

    def hand_over(self, name: str, owner: str, to: str) -> None:
        """Give a dead process's move to another one.

        Raises
        ------
        TierError
            If somebody else has it already.
        """
        with self.transaction() as connection:
            change_move(connection, name, owner, owner=to)

    def end_move(self, name: str, owner: str) -> None:
        """Strike a move off."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM move WHERE name = ? AND owner = ?", (name, owner))


_REBUILD = (
    "`gpunvme tier rebuild`, or gpunvme.tiers.rebuild(), makes a new one from what is on the tiers and keeps this one "
    "aside; counted accesses and pins are lost"
)


def _quoted(path: str) -> str:
    """Write a path for SQLite's URI."""
    from urllib.parse import quote

    return quote(path)


def _file(row: Any) -> FileRow:
    return FileRow(**{**dict(zip(_FILE.split(", "), row, strict=True)), "pinned": bool(row[-1])})


def _move(row: Any) -> MoveRow:
    return MoveRow(**{**dict(zip(_MOVE.split(", "), row, strict=True)), "drop_origin": bool(row[4])})


def file_row(connection: sqlite3.Connection, name: str) -> FileRow | None:
    """Look a file up within a transaction."""
    row = connection.execute(f"SELECT {_FILE} FROM file WHERE name = ?", (name,)).fetchone()
    return None if row is None else _file(row)


def move_row(connection: sqlite3.Connection, name: str) -> MoveRow | None:
    """Look a move up within a transaction."""
    row = connection.execute(f"SELECT {_MOVE} FROM move WHERE name = ?", (name,)).fetchone()
    return None if row is None else _move(row)


def put_file(connection: sqlite3.Connection, row: FileRow) -> None:
    """Put a file on record; accesses and pin of one that is there stay."""
    connection.execute(
        f"INSERT INTO file ({_FILE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
        "tier = excluded.tier, nbytes = excluded.nbytes, mtime_ns = excluded.mtime_ns, checksum = excluded.checksum",
        (
            row.name,
            row.tier,
            row.nbytes,
            row.mtime_ns,
            row.checksum,
            row.accesses,
            float(row.heat),
            float(row.heat_at),
            int(row.pinned),
        ),
    )


def put_move(connection: sqlite3.Connection, row: MoveRow) -> None:
    """Put a move on record."""
    connection.execute(
        f"INSERT INTO move ({_MOVE}) VALUES ({', '.join('?' * 13)})",
        tuple(getattr(row, column) for column in _MOVE.split(", ")),
    )


def change_move(connection: sqlite3.Connection, name: str, was: str, /, **columns: Any) -> None:
    """Change a move's columns, if its owner is ``was``, within a transaction."""
    assignments = ", ".join(f"{column} = ?" for column in columns)
    done = connection.execute(
        f"UPDATE move SET {assignments} WHERE name = ? AND owner = ?", (*columns.values(), name, was)
    )
    if done.rowcount != 1:
        raise TierError(f"the move of {name!r} was taken over by another process")


def used_bytes(connection: sqlite3.Connection, tier: str) -> int:
    """Sum up what files take on a tier, those on their way to it included."""
    living = connection.execute("SELECT coalesce(sum(nbytes), 0) FROM file WHERE tier = ?", (tier,)).fetchone()[0]
    coming = connection.execute(
        "SELECT coalesce(sum(nbytes), 0) FROM move WHERE new_tier = ? AND step IN ('copying', 'placing')", (tier,)
    ).fetchone()[0]
    return int(living + coming)
