"""Where tiers and their database are, checked before anything is touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from gpunvme.errors import TierStateError, TierUnavailableError
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.names import PRIVATE


def directories_of(tiers: Mapping[str, str | os.PathLike[str]]) -> list[TierDirectory]:
    """Check what tiers are called, and that none is inside another."""
    if not tiers:
        raise ValueError("at least one tier is needed")
    directories = []
    for name, path in tiers.items():
        if not name or not name.isprintable() or len(name) > 64 or "=" in name:
            raise ValueError(f"{name!r} is no name for a tier: 1 to 64 printable characters without '='")
        directories.append(TierDirectory(name, path))
    for one in directories:
        try:
            one.path.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the directory of tier {one.name!r} has a name that is not UTF-8") from None
        for other in directories:
            real, others = os.path.realpath(one.path), os.path.realpath(other.path)
            if one is not other and (real + "/").startswith(others.rstrip("/") + "/"):
                raise ValueError(f"tier {one.name!r} at {real!r} lies inside tier {other.name!r} at {others!r}")
    return directories


def state_path(directories: list[TierDirectory], state: str | os.PathLike[str] | None) -> str:
    """Return where the database is."""
    if state is None:
        return os.path.join(directories[0].path, PRIVATE, "state.sqlite")
    return os.path.abspath(os.fspath(state))


def refuse_second(directories: list[TierDirectory], path: str) -> None:
    """Refuse to begin a new record where tiers have one already: its disk may only be not mounted."""
    for directory in directories:
        with contextlib.suppress(TierUnavailableError):
            if directory.marker() is not None and not os.path.exists(path):
                raise TierStateError(
                    f"tier {directory.name!r} at {directory.path!r} has a record, but not at {path!r}: is the file "
                    "system there mounted? If the record is lost, `gpunvme tier rebuild` makes a new one"
                )
