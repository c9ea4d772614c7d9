"""How long one request takes when nothing else is in flight: by percentiles, for a mean hides what a user waits for."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gpunvme
from gpunvme.bench import page_cache
from gpunvme.bench.cases import KIB, MIB, Subject
from gpunvme.bench.contest import Kind, WrongBytes
from gpunvme.bench.machine import size_text
from gpunvme.bench.page_cache import State

BLOCKS = (4 * KIB, MIB)
STATES: tuple[State, ...] = ("hot", "cold")
_MOST = 2000
_WARM_UP = 5
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(slots=True)
class _Timed:
    """One way to do a request, and how long each one took."""

    name: str
    kind: Kind
    read: Callable[[int], object]
    lands: bool = True
    seconds: list[float] = field(default_factory=list)
    failure: str = ""


def measure(subject: Subject, seconds: float) -> list[dict[str, Any]]:
    """Time single requests at random places of the file, one after the other, the contestants in turns.

    Parameters
    ----------
    subject : Subject
        The file and its destination.
    seconds : float
        For how long in all.

    Returns
    -------
    list of dict
        One row for each contestant of each case: ``case``, ``contestant``, ``kind``, ``block``, ``state``, ``count``,
        seconds at ``p50``, ``p90``, ``p99``, ``least`` and ``most``, ``quantiles`` (101 of them, seconds, from the
        least to the most) and ``failure``.
    """
    rows: list[dict[str, Any]] = []
    for state in STATES:
        for block in BLOCKS:
            if block * (_WARM_UP + 1) * 4 <= subject.nbytes and block <= subject.to.window_bytes:
                rows += _case(subject, block, state, seconds / len(STATES) / len(BLOCKS))
    return rows


def _case(subject: Subject, block: int, state: State, seconds: float) -> list[dict[str, Any]]:
    name = f"one request of {size_text(block)}, {state}"
    why_not = subject.cannot_be_cold if state == "cold" else ""
    contestants: list[_Timed] = []
    if not why_not:
        try:
            page_cache.bring(subject.path, state, subject.nbytes)
            with contextlib.ExitStack() as keep:
                contestants = list(_contestants(subject, block, state, keep))
                _take_turns(subject, contestants, block, seconds)
        except (page_cache.StateError, OSError) as error:
            why_not, contestants = str(error), []
    if why_not:
        contestants = [_Timed("gpunvme", "ours", lambda at: None, failure=f"not measured: {why_not}")]
    return [_row(name, block, state, contestant) for contestant in contestants]


def _contestants(subject: Subject, block: int, state: State, keep: contextlib.ExitStack) -> Iterator[_Timed]:
    file = keep.enter_context(gpunvme.open(subject.path))
    part = subject.to.part(0, block)
    yield _Timed("gpunvme", "ours", lambda at: file.read_into(part, at))
    fd = _descriptor(subject.path, os.O_RDONLY, keep)

    def pread(at: int) -> None:
        _read(fd, subject.to.window(0), block, at)
        subject.to.arrived(0, block)

    yield _Timed("pread" if subject.to.device == "cpu" else "pread, then copy", "peer", pread)
    if state == "cold":
        try:
            direct = _descriptor(subject.path, os.O_RDONLY | os.O_DIRECT, keep)
        except OSError:  # a file system that knows no O_DIRECT has no such limit
            return
        address = subject.host.window(0)
        yield _Timed("raw O_DIRECT, depth 1", "limit", lambda at: _read(direct, address, block, at), lands=False)


def _descriptor(path: str, flags: int, keep: contextlib.ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    keep.callback(os.close, fd)
    return fd


def _read(fd: int, address: int, nbytes: int, offset: int) -> None:
    from gpunvme.bench.contestants import host_view

    got = os.preadv(fd, [host_view(address, nbytes)], offset)
    if got != nbytes:
        raise OSError(f"{got} of {nbytes} bytes were read at {offset}")


def _take_turns(subject: Subject, contestants: list[_Timed], block: int, seconds: float) -> None:
    """Each request goes to a place that nobody has read before, or the second one would find it cached."""
    places = np.random.default_rng(0).permutation(subject.nbytes // block) * block
    rounds = min(_MOST, len(places) // len(contestants))
    end = time.monotonic() + seconds
    for number in range(rounds):
        if number > _WARM_UP and time.monotonic() > end:
            break
        for turn in range(len(contestants)):
            contestant = contestants[(number + turn) % len(contestants)]
            if not contestant.failure:
                _one(subject, contestant, int(places[number * len(contestants) + turn]), block, number)


def _one(subject: Subject, contestant: _Timed, place: int, block: int, number: int) -> None:
    try:
        start = time.perf_counter()
        contestant.read(place)
        took = time.perf_counter() - start
        if number == 0 and contestant.lands:
            _check(subject, place, block)
    except Exception as error:  # noqa: BLE001 - whatever breaks in a contestant is its result
        contestant.failure = f"{type(error).__name__}: {error}"
        contestant.seconds.clear()
        return
    if number >= _WARM_UP:
        contestant.seconds.append(took)


def _check(subject: Subject, place: int, block: int) -> None:
    with open(subject.path, "rb", buffering=0) as file:
        if os.pread(file.fileno(), block, place) != subject.to.fetch(0, block):
            raise WrongBytes(f"what arrived is not what {subject.path} holds at {place}")


def quantile(ordered: list[float], share: float) -> float:
    """Return the smallest value that at least this share of all does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _row(case: str, block: int, state: State, contestant: _Timed) -> dict[str, Any]:
    ordered = sorted(contestant.seconds)
    if not ordered and not contestant.failure:
        contestant.failure = "not measured: the time was up"
    row: dict[str, Any] = {
        "case": case,
        "contestant": contestant.name,
        "kind": contestant.kind,
        "block": block,
        "state": state,
        "count": len(ordered),
    }
    row |= {name: quantile(ordered, share) if ordered else None for name, share in PERCENTILES.items()}
    row["least"], row["most"] = (ordered[0], ordered[-1]) if ordered else (None, None)
    row["quantiles"] = [quantile(ordered, step / 100) for step in range(101)] if ordered else []
    row["failure"] = contestant.failure
    return row
