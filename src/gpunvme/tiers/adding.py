"""Files added: copied from outside, or put on record where they lie already."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from gpunvme.errors import FileError, TierError, TierFullError, TierNameError, TierUnavailableError
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.moves import Moves
from gpunvme.tiers.names import PRIVATE, parts_of
from gpunvme.tiers.outside import Outside
from gpunvme.tiers.pace import Pace
from gpunvme.tiers.rebuild import read_row
from gpunvme.tiers.state import State, file_row, move_row, put_file


class Additions:
    """Decides where an added file goes, and lets `Moves` bring it there; see `TierManager.add`."""

    def __init__(self, state: State, directories: Mapping[str, TierDirectory], moves: Moves) -> None:
        self._state = state
        self._directories = directories
        self._moves = moves

    def add(
        self, path: str | os.PathLike[str], name: str | None, tier: str | None, *, move: bool, replace: bool
    ) -> str:
        """Add a file and return its tier; see `TierManager.add`."""
        path = os.path.abspath(os.fspath(path))
        here = self._place_of(path)
        if name is None:
            name = here[1] if here is not None else os.path.basename(path)
        parts_of(name)
        if here is not None:
            if here[1].split("/")[0] == PRIVATE:
                raise TierNameError(f"{path!r} belongs to the tiers themselves")
            if here[1] == name:
                return self._adopt(here[0], name, tier)
            on_record = self._state.file(here[1])
            if move and on_record is not None and on_record.tier == here[0]:
                raise TierError(f"{path!r} is on record as {here[1]!r}: remove that after adding it as {name!r}")
        outside = Outside(path, move)
        os.close(outside.open())  # refused before a tier is asked
        refusals = []
        choices = self._choices(name, tier)
        for choice in choices:
            try:
                self._moves.add(outside, name, choice, Pace(), replace=replace)
                return choice
            except (TierFullError, TierUnavailableError) as error:
                if len(choices) == 1:
                    raise
                refusals.append(str(error))
        raise TierFullError("no tier has room: " + "; ".join(refusals))

    def _choices(self, name: str, tier: str | None) -> list[str]:
        """Return the tiers to try: the one that was named, or where the file is pinned that is replaced, or all."""
        replaced = self._state.file(name)
        if tier is None and replaced is not None and replaced.pinned:
            tier = replaced.tier
        return list(self._directories) if tier is None else [tier]

    def _place_of(self, path: str) -> tuple[str, str] | None:
        """Tell on which tier a path lies, and as what."""
        real = os.path.realpath(path)
        for name, directory in self._directories.items():
            root = os.path.realpath(directory.path).rstrip("/") + "/"
            if real.startswith(root):
                return name, real[len(root) :]
        return None

    def _adopt(self, tier: str, name: str, wanted: str | None) -> str:
        row = read_row(self._directories[tier], name)
        with self._state.transaction() as connection:
            if file_row(connection, name) is not None or move_row(connection, name) is not None:
                raise FileError(errno.EEXIST, "on record already", name)
            put_file(connection, row)
        if wanted is None or wanted == tier:
            return tier
        self._moves.migrate(name, wanted, Pace(), allowed=lambda _: True)
        return wanted
