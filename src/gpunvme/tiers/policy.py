"""Which tier a file should live on: counted accesses that fade, thresholds, and room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Policy:
    """From accesses to tiers.

    Parameters
    ----------
    hot, warm
        Accesses from which on a file is hot, or warm; below ``warm`` it is cold.
    half_life
        Seconds in which counted accesses lose half of their weight; None: they never do.
    """

    hot: float = 100
    warm: float = 10
    half_life: float | None = WEEK

    def __post_init__(self) -> None:
        if not 0 < self.warm <= self.hot:
            raise ValueError(f"hot={self.hot!r}, warm={self.warm!r}: must be above 0, and hot not below warm")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life={self.half_life!r}: seconds above 0, or None")

    def faded(self, heat: float, seconds: float) -> float:
        """Tell what a heat is worth so many seconds later. A clock that was set back changes nothing."""
        if self.half_life is None or seconds <= 0:
            return heat
        return float(heat * 0.5 ** (seconds / self.half_life))

    def temperature(self, heat: float) -> str:
        """``"hot"``, ``"warm"`` or ``"cold"``. Heat counts in whole accesses: a hundred quick ones are a hundred."""
        whole = round(heat)
        return "hot" if whole >= self.hot else "warm" if whole >= self.warm else "cold"

    def thresholds(self, tiers: int) -> list[float]:
        """Return for each tier but the last the accesses from which on a file belongs there or higher.

        Two tiers: warm and hot files on the first. Three: hot, warm, cold. More: in equal ratios from hot to warm.
        """
        if tiers <= 2:
            return [self.warm] * (tiers - 1)
        ratio = self.warm / self.hot
        return [self.hot * ratio ** (place / (tiers - 2)) for place in range(tiers - 1)]

    def wanted(self, heat: float, tiers: int) -> int:
        """Return the place of the tier where a file of this heat belongs; 0 is the fastest."""
        thresholds = self.thresholds(tiers)
        whole = round(heat)
        # A hair's breadth for the ratios above: 100 * 0.1 ** 1.0 may be a little more than 10.
        return next((place for place, least in enumerate(thresholds) if whole >= least * (1 - 1e-9)), tiers - 1)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file as the plan sees it. ``fixed``: pinned, or on a tier that is not there, so it stays."""

    name: str
    place: int
    nbytes: int
    heat: float
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """One move: from tier to tier, by their places."""

    name: str
    source: int
    destination: int


def plan(
    files: Iterable[Candidate], room: Sequence[int | None], policy: Policy, closed: Iterable[int] = ()
) -> list[Planned]:
    """Decide which files move, so that the hottest have the fastest tiers and no tier holds more than it may.

    Parameters
    ----------
    files
        All files on record.
    room
        For each tier, fastest first: bytes that files may take there in all; None for any number.
    policy
        What is hot.
    closed
        Places of tiers where nothing can be put now.

    Returns
    -------
    list of Planned
        Moves to slower tiers first, as they make room; then to faster ones, the hottest first.
    """
    tiers = len(room)
    left: list[float] = [float("inf") if most is None else most for most in room]
    shut = set(closed)
    moving: list[tuple[Candidate, int]] = []
    ordered: list[Candidate] = []
    for file in files:
        if file.fixed:
            left[file.place] -= file.nbytes
        else:
            ordered.append(file)
    # Of equally hot files those that are on a faster tier already are asked first: nothing is swapped for nothing.
    ordered.sort(key=lambda file: (-round(file.heat), file.place, file.name))
    for file in ordered:
        wanted = policy.wanted(file.heat, tiers)
        # Where it belongs, else slower, else faster than it needs.
        choices = [*range(wanted, tiers), *range(wanted - 1, -1, -1)]
        chosen = next(
            (place for place in choices if file.nbytes <= left[place] and (place == file.place or place not in shut)),
            file.place,
        )
        left[chosen] -= file.nbytes  # below nothing where a file that fits nowhere stays
        if chosen != file.place:
            moving.append((file, chosen))
    _cancel_what_does_not_fit(moving, left)
    down = [Planned(file.name, file.place, chosen) for file, chosen in reversed(moving) if chosen > file.place]
    up = [Planned(file.name, file.place, chosen) for file, chosen in moving if chosen < file.place]
    return down + up


def _cancel_what_does_not_fit(moving: list[tuple[Candidate, int]], left: list[float]) -> None:
    """Let files stay, coldest first, until no tier that something moves to holds too much."""
    while True:
        full = (index for index in range(len(moving) - 1, -1, -1) if left[moving[index][1]] < 0)
        index = next(full, None)
        if index is None:
            return
        file, chosen = moving.pop(index)
        left[chosen] += file.nbytes
        left[file.place] -= file.nbytes
