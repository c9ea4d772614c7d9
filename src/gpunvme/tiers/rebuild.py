"""A new database from what is on the tiers, when the old one is damaged or gone."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from gpunvme.errors import TierError, TierNameError, TierStateError, file_error
from gpunvme.file import File
from gpunvme.tiers.copying import checksum_of
from gpunvme.tiers.directory import Signature, TierDirectory
from gpunvme.tiers.layout import directories_of, state_path
from gpunvme.tiers.names import parts_of
from gpunvme.tiers.owner import held
from gpunvme.tiers.state import FileRow, State, put_file


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was found.

    ``files`` are on record again; of ``doubles`` equal copies on slower tiers were removed; ``conflicts`` differ
    between tiers and ``refused`` have names that no file may have: both were left alone and are not on record.
    ``aside`` is where the old database is, if there was one.
    """

    files: tuple[str, ...]
    doubles: tuple[str, ...]
    conflicts: tuple[str, ...]
    refused: tuple[str, ...]
    aside: str | None


def rebuild(tiers: Mapping[str, str | os.PathLike[str]], *, state: str | os.PathLike[str] | None = None) -> Rebuilt:
    """Make a new database from the tiers' directories. Every file is read, for its checksum.

    Counted accesses, pins and budgets are lost. Temporary files of moves that did not end are removed: what they were
    copied from is still there.

    Parameters
    ----------
    tiers, state
        As for `TierManager`. All tiers must be there: a file that is not found would be lost from the record.

    Raises
    ------
    TierError
        If somebody uses the tiers.
    TierUnavailableError
        If a tier is missing.
    """
    directories = directories_of(tiers)
    path = state_path(directories, state)
    for directory in directories:
        with contextlib.suppress(TierStateError):  # a damaged marker is written anew
            directory.marker()
    _make_private(path)
    with held(f"{path}-users", "the tiers are in use by another process (or this one): close them first"):
        aside = _set_aside(path)
        with State(path, timeout=10) as made:
            store = made.store
            for directory in directories:
                directory.mark(store)
                for temporary in directory.temporaries():
                    directory.remove_temporary(temporary)
            return _record(made, directories, aside)


def _make_private(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(path), 0o700)


def _set_aside(path: str) -> str | None:
    if not os.path.lexists(path):
        return None
    aside = f"{path}.{time.strftime('%Y%m%d-%H%M%S')}"
    while os.path.lexists(aside):
        aside += "x"
    try:
        # The log first: without its database it is never taken for the new one's.
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, aside + suffix)
    except OSError as error:
        raise file_error(error, "cannot set the old database aside", path) from None
    return aside


def _record(made: State, directories: list[TierDirectory], aside: str | None) -> Rebuilt:
    found: defaultdict[str, list[FileRow]] = defaultdict(list)
    refused: list[str] = []
    for directory in directories:
        for name in directory.names():
            try:
                parts_of(name)
            except TierNameError:
                refused.append(directory.where(name))
                continue
            found[name].append(read_row(directory, name))
    kept, doubles, conflicts = [], [], []
    for name, rows in found.items():
        if len({(row.nbytes, row.checksum) for row in rows}) > 1:
            conflicts.append(name)
            continue
        kept.append(rows[0])
        if len(rows) > 1:
            doubles.append(name)
    with made.transaction() as connection:
        for directory in directories:
            connection.execute("INSERT INTO tier VALUES (?, ?, NULL)", (directory.name, directory.path))
        for row in kept:
            put_file(connection, row)
    by_name = {directory.name: directory for directory in directories}
    for name in doubles:
        for row in found[name][1:]:
            by_name[row.tier].remove(name)
    return Rebuilt(tuple(row.name for row in kept), tuple(doubles), tuple(conflicts), tuple(refused), aside)


def read_row(directory: TierDirectory, name: str) -> FileRow:
    """Read a file where it is and make its record.

    Raises
    ------
    TierError
        If it is written to meanwhile.
    FileError
        If it cannot be read.
    """
    fd = directory.open_file(name)
    try:
        status = os.fstat(fd)
        with File(fd, "r", name=directory.where(name)) as file:
            checksum = checksum_of(file, status.st_size)
        if Signature.of(os.fstat(fd)) != Signature.of(status):
            raise TierError(f"{directory.where(name)!r} was written to while it was read: try again")
    finally:
        os.close(fd)
    return FileRow(name, directory.name, status.st_size, status.st_mtime_ns, checksum)
