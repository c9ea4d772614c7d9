"""A fair contest: several ways to do one thing, timed in turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["ours", "peer", "limit"]
Row = dict[str, Any]


class WrongBytes(Exception):
    """A contestant was timed, but what it delivered is not what the file holds."""


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run.

    Attributes
    ----------
    seconds : float
        How long it took.
    nbytes : int
        How many bytes it moved.
    path, reason : str
        Which path carried them and why, where the contestant can say so.
    """

    seconds: float
    nbytes: int
    path: str = ""
    reason: str = ""


@dataclass(slots=True)
class Contestant:
    """One way to do it.

    Attributes
    ----------
    name : str
        What a person calls it.
    kind : {"ours", "peer", "limit"}
        This library; what people use today; what the hardware or the kernel can give at most.
    run : callable
        Does it once and says how long it took.
    settings : str
        How it was set up.
    lands : bool
        Whether its bytes arrive in the common destination, where they can be checked.
    warms_up : bool
        Whether it takes part in the round that does not count.
    """

    name: str
    kind: Kind
    run: Callable[[], Run]
    settings: str = ""
    lands: bool = True
    warms_up: bool = True


class Check(Protocol):
    """Verifies what a contestant delivers, once each, outside the timing."""

    def before(self) -> None:
        """Make sure that old bytes in the destination cannot pass for new ones."""

    def after(self) -> None:
        """Raise `WrongBytes` unless the destination holds what it should."""


@dataclass(slots=True)
class Outcome:
    """What came of one contestant: its timed runs, or why there are none."""

    contestant: Contestant
    runs: list[Run] = field(default_factory=list)
    first: Run | None = None
    resident: float | None = None
    failure: str = ""

    def row(self, case: str, block: int) -> Row:
        """Return it as a JSON-able row.

        Parameters
        ----------
        case : str
            What was measured, in words; rows of the same case are compared.
        block : int
            Bytes of one request, which turns bytes into requests per second.

        Returns
        -------
        dict
            Rates are bytes per second; ``low`` and ``high`` are the slowest and the fastest run.
        """
        rates = [run.nbytes / run.seconds for run in self.runs]
        last = self.runs[-1] if self.runs else None
        return {
            "case": case,
            "contestant": self.contestant.name,
            "kind": self.contestant.kind,
            "settings": self.contestant.settings,
            "block": block,
            "nbytes": last.nbytes if last else None,
            "median": statistics.median(rates) if rates else None,
            "low": min(rates) if rates else None,
            "high": max(rates) if rates else None,
            "first": self.first.nbytes / self.first.seconds if self.first else None,
            "rounds": len(rates),
            "rates": rates,
            "resident_before": self.resident,
            "path": last.path if last else "",
            "reason": last.reason if last else "",
            "failure": self.failure,
        }


def timed(action: Callable[[], object], nbytes: int) -> Run:
    """Time one call with the wall clock.

    Parameters
    ----------
    action : callable
        What to time. If it returns something with ``path`` and ``reason`` (a `Transfer`), both are kept.
    nbytes : int
        How many bytes it moves.

    Returns
    -------
    Run
    """
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    return Run(seconds, nbytes, str(getattr(result, "path", "")), str(getattr(result, "reason", "")))


def hold(
    contestants: Sequence[Contestant],
    *,
    before: Callable[[], float | None],
    rounds: int,
    seconds: float,
    warm_up: bool = True,
    check: Check | None = None,
) -> list[Outcome]:
    """Let contestants run in turns.

    Each round starts with another contestant, so that nobody always follows the same one. Whoever fails is left out
    from then on, and the failure is its result: one broken way costs nobody else's figures.

    Parameters
    ----------
    contestants : sequence of Contestant
        Who takes part.
    before : callable
        Brings the file into the case's state before every single run; returns the cached fraction, or None.
    rounds : int
        How many timed runs each gets.
    seconds : float
        After this long no further round starts; the first is always finished.
    warm_up : bool
        Whether each has one run that does not count first. It is kept as ``first``.
    check : Check, optional
        Verifies the bytes of each contestant's first run.

    Returns
    -------
    list of Outcome
        In the order of ``contestants``.
    """
    outcomes = [Outcome(contestant) for contestant in contestants]
    deadline = time.monotonic() + seconds
    for number in range(rounds + warm_up):
        if number > warm_up and time.monotonic() > deadline:
            break
        start = number % len(outcomes) if outcomes else 0
        for outcome in outcomes[start:] + outcomes[:start]:
            counts = number >= warm_up
            if not outcome.failure and (counts or outcome.contestant.warms_up):
                _one_run(outcome, before, check if number == 0 else None, counts=counts)
    return outcomes


def _one_run(outcome: Outcome, before: Callable[[], float | None], check: Check | None, *, counts: bool) -> None:
    contestant = outcome.contestant
    verify = check if contestant.lands else None
    try:
        if verify is not None:
            verify.before()
        outcome.resident = before()
        run = contestant.run()
        if verify is not None:
            verify.after()
    except Exception as error:  # noqa: BLE001 - whatever breaks in a contestant, a peer's library too, is its result
        outcome.failure = f"{type(error).__name__}: {error}"
        outcome.runs.clear()
        return
    if outcome.first is None:
        outcome.first = run
    if counts:
        outcome.runs.append(run)


def best(rows: Iterable[Row], case: str, kind: Kind) -> Row | None:
    """Return the fastest row of one kind in one case, or None if nobody of that kind finished."""
    done = [row for row in rows if row["case"] == case and row["kind"] == kind and row["median"] is not None]
    return max(done, key=lambda row: float(row["median"]), default=None)


def cases(rows: Iterable[Row]) -> list[str]:
    """Return the cases of some rows, each once, in order."""
    return list(dict.fromkeys(str(row["case"]) for row in rows))
