"""Which tier a file belongs on, how accesses count and fade, and how fast files may be copied."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given
from on_tiers import Tiers, nothing_left_over, on_disk

import files
import gpunvme
from gpunvme.tiers import Policy
from gpunvme.tiers.background import Background
from gpunvme.tiers.pace import Pace
from gpunvme.tiers.policy import Candidate, plan

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("accesses", "temperature", "places"),
    [
        (0, "cold", [0, 1, 2, 3]),
        (9, "cold", [0, 1, 2, 3]),
        (10, "warm", [0, 0, 1, 2]),
        (31, "warm", [0, 0, 1, 2]),
        (32, "warm", [0, 0, 1, 1]),
        (99, "warm", [0, 0, 1, 1]),
        (100, "hot", [0, 0, 0, 0]),
        (10**9, "hot", [0, 0, 0, 0]),
    ],
)
def test_the_thresholds(accesses: int, temperature: str, places: list[int]) -> None:
    policy = Policy()
    assert policy.temperature(accesses) == temperature
    assert [policy.wanted(accesses, tiers) for tiers in (1, 2, 3, 4)] == places


def test_accesses_fade() -> None:
    policy = Policy(half_life=100)
    assert policy.faded(80, 100) == 40
    assert policy.faded(80, 300) == 10
    assert policy.faded(80, -5) == 80
    assert Policy(half_life=None).faded(80, 1e9) == 80


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def test_accesses_are_counted_where_they_happen(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path]
) -> None:
    clock = Clock()
    tiers = make(half_life=1000, clock=clock)
    tiers.add(source, tier="ssd")
    with tiers.open("source") as file:  # 1
        file.read()
        file.read_into(bytearray(3))
        file.gather([0, 1], 2)
        assert isinstance(file, gpunvme.File)
    assert tiers.accesses("source") == 4
    tiers.touch("source", 96)
    clock.now += 1
    assert str(tiers.auto_tier("source")) == "source: ssd → nvme (hot, 100 accesses)"
    clock.now += 1000
    assert str(tiers.auto_tier("source")) == "source: nvme → ssd (warm, 50 accesses)"
    tiers.touch("source", 1)
    assert tiers.accesses("source") == 101  # written down now
    clock.now += 3000
    assert str(tiers.auto_tier("source")) == "source: ssd → hdd (cold, 6 accesses)"
    (status,) = tiers.status().files
    assert (status.accesses, status.temperature) == (101, "cold")
    tiers.touch("source", 3)
    tiers.close()
    assert make().accesses("source") == 104  # written down at the end


def test_the_database_in_use_costs_a_count_and_not_a_read(make: Callable[..., Tiers], source: Path) -> None:
    tiers, other = make(timeout=0.01), make()
    tiers.add(source)
    file = tiers.open("source")
    tiers._accesses._written = -1e9  # long ago: it is due
    with other._state.transaction():
        assert file.read().numpy().tobytes() == b"content"
    assert tiers.accesses("source") == 2  # written down later
    file.close()


def test_pins(tiers: Tiers, source: Path) -> None:
    tiers.add(source, "x", tier="nvme")
    tiers.pin("x", "ssd")
    assert tiers.tier_of("x") == "ssd"
    tiers.touch("x", 100)
    assert str(tiers.auto_tier("x")) == "x: stays on ssd (pinned)"
    assert tiers.balance() == []
    with pytest.raises(gpunvme.TierError, match="pinned to tier 'ssd'"):
        tiers.migrate("x", "nvme")
    source.write_bytes(b"second")
    assert tiers.add(source, "x", replace=True) == "ssd"
    assert tiers.status().files[0].pinned
    tiers.unpin("x")
    assert tiers.auto_tier("x").moved
    for call in (tiers.pin, tiers.unpin):
        with pytest.raises(gpunvme.MissingFileError):
            call("missing")
    with pytest.raises(ValueError, match="'tape' is not a tier"):
        tiers.pin("x", "tape")


candidates = st.lists(
    st.builds(
        Candidate,
        name=st.uuids().map(str),
        place=st.integers(0, 3),
        nbytes=st.integers(0, 100),
        heat=st.integers(0, 200).map(float),
        fixed=st.booleans(),
    ),
    max_size=12,
)


@given(candidates, st.lists(st.none() | st.integers(0, 300), min_size=4, max_size=4), st.sets(st.integers(0, 3)))
def test_a_plan_fills_no_tier_and_goes_nowhere_forbidden(
    files_: list[Candidate], room: list[int | None], closed: set[int]
) -> None:
    moves = plan(files_, room, Policy(), closed)
    by_name = {file.name: file for file in files_}
    after = {file.name: file.place for file in files_}
    for move in moves:
        file = by_name[move.name]
        assert not file.fixed
        assert move.source == file.place != move.destination
        assert move.destination not in closed
        after[move.name] = move.destination
    assert len({move.name for move in moves}) == len(moves)
    downs = [move.destination > move.source for move in moves]
    assert downs == sorted(downs, reverse=True)  # room is made before it is used
    for place, most in enumerate(room):
        if most is not None and any(move.destination == place for move in moves):
            assert sum(file.nbytes for file in files_ if after[file.name] == place) <= most
    if room == [None] * 4 and not closed:
        for file in files_:
            assert file.fixed or after[file.name] == Policy().wanted(file.heat, 4)


@given(candidates, st.lists(st.integers(0, 300), min_size=4, max_size=4))
def test_the_hottest_have_the_fastest_tier_and_a_second_round_moves_nothing(
    files_: list[Candidate], room: list[int | None]
) -> None:
    room[3] = None
    moves = {move.name: move.destination for move in plan(files_, room, Policy())}
    after = [
        Candidate(file.name, moves.get(file.name, file.place), file.nbytes, file.heat, file.fixed) for file in files_
    ]
    assert plan(after, room, Policy()) == []
    for one in after:
        for other in after:
            if not one.fixed and not other.fixed and one.nbytes == other.nbytes and one.heat > other.heat >= 100:
                assert one.place <= other.place


# Pace: counted, on a clock that only waits move.


class Waits:
    def __init__(self) -> None:
        self.now = 5.0

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50), st.integers(1, 5000))
def test_no_more_bytes_pass_than_the_rate_allows(pieces: list[int], rate: int) -> None:
    waits = Waits()
    pace = Pace(rate, clock=waits.clock, wait=waits.wait)
    for number, nbytes in enumerate(pieces, 1):
        pace.take(nbytes)
        assert sum(pieces[:number]) <= rate * (waits.now - 5.0) * (1 + 1e-9)
    assert sum(pieces) == pytest.approx(rate * (waits.now - 5.0))  # and no fewer


def test_time_that_passed_unused_is_not_saved_up() -> None:
    waits = Waits()
    pace = Pace(100, clock=waits.clock, wait=waits.wait)
    pace.take(100)
    waits.now = 1000.0
    pace.take(100)
    assert waits.now == 1001.0


def test_a_migration_asks_for_every_byte(tiers: Tiers, tmp_path: Path) -> None:
    files.make(tmp_path / "x", 100_000)
    tiers.add(tmp_path / "x", tier="nvme")
    waits = Waits()
    pace = Pace(30_000, clock=waits.clock, wait=waits.wait)
    tiers._rounds.all(pace, most=1)
    assert tiers.tier_of("x") == "hdd"
    assert waits.now - 5.0 == pytest.approx(100_000 / 30_000)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, int]]:
    """What copies asked for, at which rate; nothing is waited for."""
    asked: list[tuple[float | None, int]] = []
    monkeypatch.setattr(Pace, "take", lambda self, nbytes: asked.append((self._rate, nbytes)))
    return asked


@pytest.mark.parametrize(
    "move",
    [
        lambda tiers: tiers.migrate("x", "hdd", rate=4000),
        lambda tiers: tiers.balance(rate=4000),
        lambda tiers: tiers.balance(),
        lambda tiers: tiers.start(),
    ],
    ids=["migrate", "balance", "balance, as the manager was told", "background"],
)
def test_every_way_to_move_keeps_to_the_rate_that_was_said(
    make: Callable[..., Tiers], tmp_path: Path, taken: list[tuple[float | None, int]], move: Callable[[Tiers], object]
) -> None:
    """Background work that is faster than it may be takes the drives from those who work with them."""
    files.make(tmp_path / "x", 10_000)
    tiers = make(rate=4000)
    tiers.add(tmp_path / "x", tier="nvme")
    taken.clear()  # what is added is not held up
    move(tiers)
    files.wait_until(lambda: tiers.tier_of("x") == "hdd")
    assert taken == [(4000, 4000), (4000, 4000), (4000, 2000)]


# The thread.


def test_background_work_moves_files_and_ends(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path]
) -> None:
    tiers = make(interval=0.01, moves=1)
    for name in ("a", "b", "c"):
        tiers.add(source, name)
    tiers.touch("b", 100)
    tiers.start()
    files.wait_until(lambda: tiers.tier_of("a") == tiers.tier_of("c") == "hdd")
    assert tiers.tier_of("b") == "nvme"
    tiers.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "gpunvme-tiers"]


def test_background_work_that_is_stopped_gives_its_copy_up(
    make: Callable[..., Tiers], tmp_path: Path, directories: dict[str, Path]
) -> None:
    """At this rate the copy would take 17 minutes: closing must not wait for it."""
    files.make(tmp_path / "x", 100_000)
    tiers = make(rate=100, interval=0.01)
    tiers.add(tmp_path / "x", tier="nvme")
    tiers.start()
    files.wait_until(lambda: tiers.status().files[0].moving_to == "hdd")
    tiers.close()
    assert on_disk(directories) == {"nvme/x": (tmp_path / "x").read_bytes()}
    assert nothing_left_over(directories)


def test_a_round_has_an_end(make: Callable[..., Tiers], source: Path) -> None:
    tiers = make(moves=2)
    for number in range(5):
        tiers.add(source, f"{number}")
    assert [len(tiers.balance()) for _ in range(4)] == [2, 2, 1, 0]
    assert len(tiers.balance(moves=7)) == 0


def test_trouble_in_the_background_is_told_and_does_not_end_it(
    make: Callable[..., Tiers], source: Path, directories: dict[str, Path]
) -> None:
    tiers = make(interval=0.01)
    tiers.add(source, "x")
    (directories["hdd"] / "x").write_bytes(b"in the way")
    tiers.start()
    files.wait_until(lambda: bool(tiers.status().troubles))
    assert "not on record" in tiers.status().troubles[0]
    (directories["hdd"] / "x").unlink()
    files.wait_until(lambda: tiers.tier_of("x") == "hdd")


def test_only_one_process_makes_rounds(make: Callable[..., Tiers], source: Path) -> None:
    one, other = make(), make()
    one.add(source, "x")
    from gpunvme.tiers.owner import held

    with held(f"{one._state.path}-round", ""):
        other._turn(Pace())
    assert other.tier_of("x") == "nvme"
    other._turn(Pace())
    assert other.tier_of("x") == "hdd"


def test_bad_paces() -> None:
    for rate in (0, -1, float("nan")):
        with pytest.raises(ValueError):
            Pace(rate)
    with pytest.raises(ValueError):
        Background(print, 0, None)
