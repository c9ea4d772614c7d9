"""Sweeps and single requests: a knee in the wrong place makes people tune their programs for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.bench import cases, latency, page_cache, scratch, sweep
from gpunvme.bench.destinations import HostDestination

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[cases.Subject]:
    path = tmp_path / "file"
    path.write_bytes(b"".join(scratch.random_pieces(4 * MIB)))
    to = HostDestination(2 * MIB)
    yield cases.Subject(str(path), 4 * MIB, to, to, with_fio=False)
    to.close()


def row(block: int, depth: int | None, median: float | None, contestant: str = "gpunvme") -> dict[str, Any]:
    return {"contestant": contestant, "block": block, "depth": depth, "median": median}


def test_the_knee_is_the_least_in_flight_that_reaches_nine_tenths() -> None:
    rows = [
        row(4096, 1, 1e9),
        row(4096, 64, 8.99e9),  # not enough
        row(65536, 8, 9.0e9),  # enough, the least in flight
        row(65536, 64, 10e9),
        row(1 << 20, 1, 9.5e9),
        row(4096, None, 99e9),  # a gather has no depth
        row(4096, 2, 99e9, "another"),
        row(4096, 4, None),
    ]
    assert sweep.knee(rows, "gpunvme") == {"block": 65536, "depth": 8, "median": 9.0e9, "best": 10e9}
    assert sweep.knee(rows, "nobody") is None


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(sweep.SIZES), st.sampled_from(sweep.DEPTHS)), st.floats(1, 1e11), min_size=1
    )
)
def test_no_knee_is_below_the_mark_and_none_smaller_reaches_it(rates: dict[tuple[int, int], float]) -> None:
    found = sweep.knee([row(*cell, rate) for cell, rate in rates.items()], "gpunvme")
    assert found is not None
    best = max(rates.values())
    assert found["best"] == best
    assert found["median"] == rates[found["block"], found["depth"]] >= 0.9 * best
    for (block, depth), rate in rates.items():
        if block * depth < found["block"] * found["depth"]:
            assert rate < 0.9 * best


def test_a_sweep_measures_every_cell_or_says_why_not(subject: cases.Subject) -> None:
    seen: list[dict[str, Any]] = []
    told = sweep.measure(subject, 2.0, sizes=[4 * KIB, MIB], depths=[1, 4], on_result=seen.append)
    assert told["rows"] == seen
    cells = {(row["block"], row["depth"]) for row in seen}
    assert cells == {(4 * KIB, 1), (4 * KIB, 4), (4 * KIB, None), (MIB, 1), (MIB, 4), (MIB, None)}
    ours = {(row["block"], row["depth"]): row for row in seen if row["kind"] == "ours"}
    assert ours[MIB, 4]["failure"] == "not measured: 4 MiB in flight do not fit into 2 MiB of memory"
    for cell in ((4 * KIB, 1), (4 * KIB, 4), (4 * KIB, None), (MIB, 1)):
        assert ours[cell]["median"] or "page cache" in ours[cell]["failure"] or "time was up" in ours[cell]["failure"]
    assert {row["path"] for row in ours.values() if row["median"]} <= {"host"}
    assert set(told["knees"]) == {str(row["contestant"]) for row in seen if row["depth"] is not None}


def test_a_sweep_without_time_measures_nothing_and_says_so(subject: cases.Subject) -> None:
    told = sweep.measure(subject, 0.0, sizes=[4 * KIB], depths=[1])
    assert {row["failure"] for row in told["rows"]} == {"not measured: the time was up"}
    assert told["knees"] == {"gpunvme": None}


def test_as_many_are_in_flight_as_the_depth_says(subject: cases.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpunvme

    flying, most = 0, 0
    begin, end = gpunvme.File.read_into, gpunvme.Transfer.wait

    def read_into(self: Any, *given: Any, **options: Any) -> Any:
        nonlocal flying, most
        if not options["wait"]:
            flying += 1
            most = max(most, flying)
        return begin(self, *given, **options)

    def wait(self: Any, *given: Any) -> Any:
        nonlocal flying
        flying -= 1
        return end(self, *given)

    monkeypatch.setattr(gpunvme.File, "read_into", read_into)
    monkeypatch.setattr(gpunvme.Transfer, "wait", wait)
    work = sweep.who.Random(subject.path, subject.to, 4096, sweep.who.random_offsets(subject.nbytes, 4096, 40))
    run = sweep.ours_in_flight(work, 8).run()
    assert (most, flying, run.nbytes) == (8, 0, 40 * 4096)
    sweep.who.SampleCheck(work).after()


def test_single_requests_are_timed_one_by_one(subject: cases.Subject) -> None:
    rows = latency.measure(subject, 0.8)
    for row in rows:
        assert row["failure"] or row["least"] <= row["p50"] <= row["p90"] <= row["p99"] <= row["most"]
        assert row["failure"] or (len(row["quantiles"]) == 101 and row["quantiles"] == sorted(row["quantiles"]))
    hot = {row["contestant"]: row["count"] for row in rows if row["case"] == "one request of 4 KiB, hot"}
    assert set(hot) == {"gpunvme", "pread"}
    assert min(hot.values()) > 0


def test_quantiles_are_values_that_were_seen() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [latency.quantile(ordered, share) for share in (0, 0.5, 0.9, 0.99, 1)] == [1, 50, 90, 99, 100]
    assert latency.quantile([7.0], 0.5) == 7.0


def test_wrong_bytes_have_no_latency(subject: cases.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostDestination, "fetch", lambda self, offset, nbytes: bytes(nbytes))
    rows = latency.measure(subject, 0.2)
    lands = [row for row in rows if row["kind"] != "limit"]
    assert lands
    assert all("WrongBytes" in row["failure"] or "not measured" in row["failure"] for row in lands)
    assert all(row["p50"] is None for row in lands)


def test_what_cannot_be_cold_is_not_told_as_cold(subject: cases.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, state: str, nbytes: int) -> float:
        raise page_cache.StateError("it stays in the page cache")

    monkeypatch.setattr(page_cache, "bring", refuse)
    rows = latency.measure(subject, 0.2)
    assert {row["failure"] for row in rows} == {"not measured: it stays in the page cache"}
