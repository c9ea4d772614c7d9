"""What is where: tiers, files, and what could not be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpunvme.errors import TierError
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.policy import Policy
from gpunvme.tiers.state import FileRow, State


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier.

    Sizes are bytes. ``capacity`` is its budget and ``free`` what its file system has left, either None if there is
    none or it cannot be asked; ``trouble`` is empty where files can be read and written.
    """

    name: str
    directory: str
    files: int
    nbytes: int
    capacity: int | None
    free: int | None
    trouble: str


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One file. ``heat`` is its accesses as they weigh now; ``moving_to`` the tier that it is being moved to."""

    name: str
    tier: str
    nbytes: int
    accesses: int
    heat: float
    temperature: str
    pinned: bool
    moving_to: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """All tiers, fastest first; all files by name; what the latest background work could not do."""

    tiers: tuple[TierStatus, ...]
    files: tuple[FileStatus, ...]
    troubles: tuple[str, ...]


def read_status(
    state: State, directories: Mapping[str, TierDirectory], policy: Policy, now: float, troubles: Iterable[str]
) -> Status:
    """Put together what is on record and what the tiers say."""
    files = state.files()
    moving = {move.name: move.new_tier for move in state.moves() if move.step in ("copying", "placing")}
    on_record = state.tiers()
    return Status(
        tuple(
            _tier(directory, on_record[name][1] if name in on_record else None, files)
            for name, directory in directories.items()
        ),
        tuple(_file(file, policy, now, moving.get(file.name)) for file in files),
        tuple(troubles),
    )


def _tier(directory: TierDirectory, capacity: int | None, files: list[FileRow]) -> TierStatus:
    here = [file.nbytes for file in files if file.tier == directory.name]
    free, trouble = None, ""
    try:
        free, read_only = directory.space()
        trouble = "read-only" if read_only else ""
    except TierError as error:
        trouble = str(error)
    return TierStatus(directory.name, directory.path, len(here), sum(here), capacity, free, trouble)


def _file(file: FileRow, policy: Policy, now: float, moving_to: str | None) -> FileStatus:
    heat = policy.faded(file.heat, now - file.heat_at)
    temperature = policy.temperature(heat)
    return FileStatus(file.name, file.tier, file.nbytes, file.accesses, heat, temperature, file.pinned, moving_to)
