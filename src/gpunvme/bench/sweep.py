"""Throughput by size of a request and by requests in flight, and where more of either stops paying: the knee."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

import gpunvme
from gpunvme.bench import contest, page_cache
from gpunvme.bench import contestants as who
from gpunvme.bench.cases import KIB, MIB, Subject
from gpunvme.bench.contest import Contestant, Row, Run, timed
from gpunvme.bench.machine import size_text

SIZES = tuple(4 * KIB * 4**step for step in range(6))
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
ENOUGH = 0.9
_ROUNDS = 3
_MOST_BYTES = 64 * MIB
_FIRST_GUESS = 100e6  # bytes per second; what the first cell finds takes its place
_OVERHEAD = 2.0  # of bringing the file into its state, and of the run that does not count
_KEEP_GOING = 4  # requests for each one in flight, or the depth is never reached

OURS, GATHER = "gpunvme", "gpunvme, one gather"


def measure(
    subject: Subject,
    seconds: float,
    *,
    sizes: Iterable[int] = SIZES,
    depths: Iterable[int] = DEPTHS,
    on_result: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Read at random places with every size and every number of requests in flight.

    Parameters
    ----------
    subject : Subject
        The file and its destination.
    seconds : float
        For how long in all, about; cells that this does not suffice for say so.
    sizes, depths : iterable of int
        Bytes of a request; requests in flight.
    on_result : callable, optional
        Called with each row as soon as it is known.

    Returns
    -------
    dict
        ``state`` (``"cold"``, or ``"hot"`` where nothing can be cold), ``seconds``, ``rows`` (those of the results,
        with ``depth``; None for a gather, which keeps its own number in flight), ``knees`` (by contestant, see
        `knee`), ``depth_knees`` (by contestant, one for each size).
    """
    state: page_cache.State = "hot" if subject.cannot_be_cold else "cold"
    wanted: list[tuple[int, int | None]] = [
        (size, depth) for size in dict.fromkeys(sizes) for depth in (*dict.fromkeys(depths), None)
    ]
    end = time.monotonic() + seconds
    rows: list[Row] = []
    rate = _FIRST_GUESS
    for number, (size, depth) in enumerate(wanted):
        share = (end - time.monotonic()) / (len(wanted) - number)
        cell = _cell(subject, state, size, depth, share, rate)
        rates = [float(row["median"]) for row in cell if row["median"]]
        rate = min(rates, default=rate)
        rows += cell
        for row in cell if on_result is not None else []:
            on_result(row)  # type: ignore[misc]
    names = list(dict.fromkeys(str(row["contestant"]) for row in rows if row["depth"] is not None))
    return {
        "state": state,
        "seconds": seconds,
        "rows": rows,
        "knees": {name: knee(rows, name) for name in names},
        "depth_knees": {name: _depth_knees(rows, name) for name in names},
    }


def knee(rows: Iterable[Row], contestant: str) -> dict[str, Any] | None:
    """Return the smallest request and depth that reach 90 % of a contestant's best rate.

    Smallest is what has the fewest bytes in flight, and of those the smallest depth.

    Parameters
    ----------
    rows : iterable of dict
        Rows of a sweep.
    contestant : str
        Whose.

    Returns
    -------
    dict or None
        ``block``, ``depth``, ``median``, ``best`` (bytes per second); None if it has no figures.
    """
    done = [
        row
        for row in rows
        if row["contestant"] == contestant and row["depth"] is not None and row["median"] is not None
    ]
    if not done:
        return None
    best = max(float(row["median"]) for row in done)
    enough = [row for row in done if row["median"] >= ENOUGH * best]
    found = min(enough, key=lambda row: (row["block"] * row["depth"], row["depth"]))
    return {"block": found["block"], "depth": found["depth"], "median": found["median"], "best": best}


def _depth_knees(rows: list[Row], contestant: str) -> list[dict[str, Any]]:
    sizes = dict.fromkeys(row["block"] for row in rows)
    found = (knee([row for row in rows if row["block"] == size], contestant) for size in sizes)
    return [each for each in found if each is not None]


def _cell(
    subject: Subject, state: page_cache.State, size: int, depth: int | None, share: float, rate: float
) -> list[Row]:
    in_words = "one call" if depth is None else f"depth {depth}"
    case = f"sweep, {size_text(size)}, {in_words}, {state}"
    why_not = ""
    at_once = size * (depth or 1)
    room = min(subject.to.nbytes, subject.to.window_bytes, subject.host.nbytes)
    if at_once > room:
        why_not = f"{size_text(at_once)} in flight do not fit into {size_text(room)} of memory"
    elif subject.nbytes < 2 * size:
        why_not = "the file is too small"
    elif share <= 0:
        why_not = "the time was up"
    if why_not:
        nobody = Contestant(GATHER if depth is None else OURS, "ours", lambda: Run(0, 0))
        return [contest.Outcome(nobody, failure=f"not measured: {why_not}").row(case, size) | {"depth": depth}]
    affordable = rate * share / (4 * _ROUNDS * _OVERHEAD)
    count = max(int(min(_MOST_BYTES, affordable, room) // size), min((depth or 16) * _KEEP_GOING, room // size), 1)
    # No place twice: who reads through the page cache would find it there the second time.
    places = np.random.default_rng(0).permutation(subject.nbytes // size)[:count] * size
    work = who.Random(subject.path, subject.to, size, places)
    outcomes = contest.hold(
        _contestants(subject, work, depth, state),
        before=lambda: page_cache.bring(subject.path, state, subject.nbytes),
        rounds=_ROUNDS,
        seconds=share,
        warm_up=state == "hot",
        check=who.SampleCheck(work),
    )
    return [outcome.row(case, size) | {"depth": depth} for outcome in outcomes]


def _contestants(subject: Subject, work: who.Random, depth: int | None, state: str) -> list[Contestant]:
    if depth is None:
        ours = who.ours_random(work)
        ours.name = GATHER
        return [ours]
    found = [ours_in_flight(work, depth), who.pread_random(work, depth)]
    found[1].name = "pread on threads" + (", then copy" if subject.on_gpu else "")
    if state == "cold":
        found.append(who.direct_random(subject.path, subject.host, work.offsets, work.block, depth))
        found[-1].name = "raw O_DIRECT"
    elif subject.on_gpu:
        found.append(who.copy_ceiling(subject.to.device, 64 * MIB))
    return found


def ours_in_flight(work: who.Random, depth: int) -> Contestant:
    """`File.read_into` with ``wait=False``, this many at a time: what a program in Python reaches by itself."""

    def run() -> Run:
        with gpunvme.open(work.path) as file:

            def read() -> gpunvme.Transfer | None:
                flying: deque[gpunvme.Transfer] = deque()
                last: gpunvme.Transfer | None = None
                for number, at in enumerate(work.offsets):
                    if len(flying) == depth:
                        last = flying.popleft().wait()
                    part = work.to.part(number * work.block, work.block)
                    flying.append(file.read_into(part, int(at), wait=depth == 1))
                while flying:
                    last = flying.popleft().wait()
                return last

            return timed(read, work.nbytes)

    return Contestant(OURS, "ours", run, settings=f"{depth} transfers in flight")
