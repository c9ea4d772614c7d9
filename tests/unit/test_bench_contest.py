"""A benchmark that lets one contestant spoil another's figures, or counts wrong bytes, misleads whoever reads it."""

from __future__ import annotations

import time

import pytest

from gpunvme.bench import contest
from gpunvme.bench.contest import Contestant, Kind, Outcome, Row, Run


def contestant(name: str, seen: list[str], *, kind: Kind = "peer", seconds: float = 1.0) -> Contestant:
    def run() -> Run:
        seen.append(name)
        return Run(seconds, 1000)

    return Contestant(name, kind, run)


def hold(contestants: list[Contestant], **changed: object) -> list[Outcome]:
    given: dict[str, object] = {"before": lambda: None, "rounds": 3, "seconds": 60.0, "warm_up": False}
    return contest.hold(contestants, **(given | changed))  # type: ignore[arg-type]


def test_rounds_interleave_and_rotate_so_that_drift_and_a_bad_neighbour_hit_everybody_alike() -> None:
    seen: list[str] = []
    hold([contestant(name, seen) for name in "abc"])
    assert "".join(seen) == "abcbcacab"


def test_the_state_of_the_page_cache_is_prepared_before_every_single_run() -> None:
    seen: list[str] = []

    def before() -> float:
        seen.append("prepared")
        return 0.25

    outcomes = hold([contestant("a", seen), contestant("b", seen)], before=before, rounds=1)
    assert seen == ["prepared", "a", "prepared", "b"]
    assert [outcome.row("case", 1)["resident_before"] for outcome in outcomes] == [0.25, 0.25]


def test_the_warm_up_run_is_kept_apart_from_the_figures() -> None:
    times = iter([9.0, 1.0, 1.0, 1.0])
    (outcome,) = hold([Contestant("a", "ours", lambda: Run(next(times), 9))], warm_up=True)
    row = outcome.row("case", 1)
    assert (row["first"], row["median"], row["rounds"]) == (1.0, 9.0, 3)


def test_a_broken_contestant_loses_its_own_figures_only() -> None:
    calls: list[str] = []

    def breaks() -> Run:
        calls.append("broken")
        if len(calls) == 2:
            raise RuntimeError("the peer's library crashed")
        return Run(1.0, 1000)

    broken, sound = hold([Contestant("broken", "peer", breaks), contestant("sound", [])])
    assert broken.row("case", 1)["failure"] == "RuntimeError: the peer's library crashed"
    assert broken.row("case", 1)["median"] is None, "figures from before it broke are not presented as its speed"
    assert len(calls) == 2, "it is not asked again"
    assert sound.row("case", 1)["rounds"] == 3


def test_ctrl_c_is_not_a_contestants_failure() -> None:
    def interrupted() -> Run:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold([Contestant("a", "ours", interrupted)])


def test_wrong_bytes_are_a_failure_and_not_a_record() -> None:
    class Finds:
        def before(self) -> None:
            pass

        def after(self) -> None:
            raise contest.WrongBytes("what arrived is not what the file holds")

    fast, limit = hold(
        [contestant("fast", []), Contestant("limit", "limit", lambda: Run(1.0, 1), lands=False)], check=Finds()
    )
    assert "not what the file holds" in fast.failure
    assert fast.row("case", 1)["median"] is None
    assert not limit.failure, "who delivers nowhere is not checked"


def test_a_slow_case_stops_after_its_first_full_round_so_that_the_whole_run_ends() -> None:
    def slow() -> Run:
        time.sleep(0.02)
        return Run(0.02, 1)

    outcomes = hold([Contestant(name, "peer", slow) for name in "ab"], rounds=100, seconds=0.05, warm_up=True)
    rounds = [len(outcome.runs) for outcome in outcomes]
    assert rounds == [rounds[0]] * 2, "each has as many runs as the others"
    assert 1 <= rounds[0] < 10


def test_rates_are_medians_with_their_spread() -> None:
    times = iter([1.0, 2.0, 4.0])
    (outcome,) = hold([Contestant("a", "ours", lambda: Run(next(times), 400))])
    row = outcome.row("case", 100)
    assert (row["low"], row["median"], row["high"]) == (100.0, 200.0, 400.0)


def test_what_a_transfer_says_of_its_path_is_reported() -> None:
    class Transfer:
        path = "host"
        reason = "from the page cache"

    run = contest.timed(Transfer, 1)
    assert (run.path, run.reason) == ("host", "from the page cache")


def row(case: str, kind: Kind, median: float | None) -> Row:
    return {"case": case, "kind": kind, "median": median, "contestant": f"{kind} {median}"}


def test_the_best_peer_is_the_fastest_one_that_finished_in_the_same_case() -> None:
    rows = [row("a", "peer", 1.0), row("a", "peer", 3.0), row("a", "peer", None), row("b", "peer", 9.0)]
    found = contest.best(rows, "a", "peer")
    assert found is not None
    assert found["median"] == 3.0
    assert contest.best(rows, "a", "limit") is None
    assert contest.cases(rows) == ["a", "b"]
