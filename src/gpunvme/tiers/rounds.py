"""Files moved to where they belong by their accesses: one, or a round over all."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpunvme.errors import FileError, MissingFileError, TierError, TierFullError, TierUnavailableError
from gpunvme.tiers.accesses import Accesses
from gpunvme.tiers.directory import TierDirectory
from gpunvme.tiers.moves import Moves, not_on_record
from gpunvme.tiers.pace import Pace
from gpunvme.tiers.policy import Candidate, Planned, Policy, plan
from gpunvme.tiers.state import FileRow, State


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a file: it moved from ``source`` to ``destination``, or stays if they are one."""

    name: str
    source: str
    destination: str
    reason: str

    @property
    def moved(self) -> bool:
        """Whether it moved."""
        return self.source != self.destination

    def __str__(self) -> str:
        what = f"{self.source} → {self.destination}" if self.moved else f"stays on {self.source}"
        return f"{self.name}: {what} ({self.reason})"


class Rounds:
    """Decides by heat, and lets `Moves` do it. ``troubles`` collects what could not be done."""

    def __init__(
        self,
        state: State,
        directories: Mapping[str, TierDirectory],
        moves: Moves,
        accesses: Accesses,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self.troubles: deque[str] = deque(maxlen=1)
        self._state = state
        self._directories = directories
        self._order = list(directories)
        self._moves = moves
        self._accesses = accesses
        self._policy = policy
        self._clock = clock

    def _heat(self, file: FileRow) -> float:
        return self._policy.faded(file.heat, self._clock() - file.heat_at)

    def one(self, name: str) -> Decision:
        """Move a file to where it belongs, or to the nearest slower tier with room; see `TierManager.auto_tier`."""
        self._accesses.write()
        file = self._state.file(name)
        if file is None:
            raise not_on_record(name)
        if file.pinned:
            return Decision(name, file.tier, file.tier, "pinned")
        heat = self._heat(file)
        reasons = [f"{self._policy.temperature(heat)}, {round(heat)} accesses"]
        here = self._order.index(file.tier)
        wanted = self._policy.wanted(heat, len(self._order))
        for place in range(wanted, len(self._order)):
            # What does not fit where it belongs goes to a slower tier, but never to a slower one than it is on.
            if place == here or (place > here and wanted < here):
                break
            tier = self._order[place]
            try:
                if self._moves.migrate(name, tier, Pace(), allowed=lambda row: not row.pinned):
                    return Decision(name, file.tier, tier, "; ".join(reasons))
                break
            except (TierFullError, TierUnavailableError) as error:
                reasons.append(str(error))
        return Decision(name, file.tier, file.tier, "; ".join(reasons))

    def all(self, pace: Pace, most: int) -> list[Decision]:
        """Make one round of at most ``most`` moves; see `TierManager.balance`."""
        with contextlib.suppress(TierError):
            self._accesses.write()
        self.troubles.extend(self._moves.recover())
        decisions: list[Decision] = []
        for planned in self._planned()[:most]:
            source, destination = self._order[planned.source], self._order[planned.destination]

            def unchanged(row: FileRow, source: str = source) -> bool:
                return not row.pinned and row.tier == source

            try:
                if self._moves.migrate(planned.name, destination, pace, allowed=unchanged):
                    decisions.append(Decision(planned.name, source, destination, "by its accesses"))
            except MissingFileError:
                continue  # removed meanwhile
            except (TierError, FileError) as error:
                self.troubles.append(str(error))
                decisions.append(Decision(planned.name, source, source, str(error)))
        return decisions

    def _planned(self) -> list[Planned]:
        files = self._state.files()
        on_record = self._state.tiers()
        room: list[int | None] = []
        closed: list[int] = []
        for place, (name, directory) in enumerate(self._directories.items()):
            used = sum(file.nbytes for file in files if file.tier == name)
            capacity = on_record[name][1] if name in on_record else None
            try:
                free, read_only = directory.space()
            except TierError:
                free, read_only = 0, True
            if read_only:
                closed.append(place)
            room.append(used + free if capacity is None else min(capacity, used + free))
        candidates = []
        for file in files:
            place = self._order.index(file.tier)
            fixed = file.pinned or place in closed
            candidates.append(Candidate(file.name, place, file.nbytes, self._heat(file), fixed))
        return plan(candidates, room, self._policy, closed)
