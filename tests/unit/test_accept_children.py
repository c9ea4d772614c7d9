"""Steps in children: whatever one does, it is a row with the reason, and nothing of it stays behind.

If these fail, one driver that hangs costs a person the whole table, or a drive that nobody gives back.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from accept_steps import log_of, step
from gpunvme.accept import children as running
from gpunvme.accept.children import Children
from gpunvme.accept.job import Job
from gpunvme.accept.result import Figure, Outcome, Row

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "driver").write_text("nvme")
    return Job("0000:01:00.0", directory=str(tmp_path))


@pytest.fixture
def children() -> Iterator[Children]:
    with Children() as made:
        yield made


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_step_returns_arrives(children: Children, job: Job) -> None:
    row = children.run(step("passes"), job)
    assert (row.outcome, row.reason) == (Outcome.PASSED, "it went well")
    assert row.figures == (Figure("read", 2.5, "GB/s", 7.0, "the link"),)
    assert str(row.figures[0]) == "read 2.5 GB/s (the link 7)"
    assert row.facts == {"left": 5, "limits": {"seen": 7.0}}
    assert log_of(job.directory) == ["passes with nvme, uri '', left None"]


def test_options_and_limits_are_told(children: Children, job: Job) -> None:
    row = children.run(step("told", options=(("placement", "full"),)), replace(job, limits={"link": 7.0}))
    assert row.reason == "options {'placement': 'full'}, limits {'link': 7.0}"


def test_long_answers_arrive(children: Children, job: Job) -> None:
    assert len(children.run(step("answers_much"), job).reason) == 1_000_000


def outcome(row: Row) -> tuple[Outcome, str]:
    return row.outcome, row.reason


def test_refusals_and_errors_are_rows(children: Children, job: Job) -> None:
    assert outcome(children.run(step("skips"), job)) == (Outcome.SKIPPED, "nothing of it is here")
    assert outcome(children.run(step("raises"), job)) == (Outcome.FAILED, "ValueError: two lines")
    refused = children.run(step("refuses"), job)
    assert outcome(refused) == (Outcome.FAILED, "UnsafeDeviceError: somebody came")
    # Whoever makes the drive empty again must know that there is nothing of ours on it.
    assert refused.facts == {"untouched": True}


def test_a_step_that_does_not_exist_is_a_row(children: Children, job: Job) -> None:
    row = children.run(replace(step("passes"), function="accept_steps:nothing"), job)
    assert row.outcome is Outcome.FAILED
    assert "nothing" in row.reason


def test_crashes_are_rows_with_the_last_words(children: Children, job: Job) -> None:
    row = children.run(step("crashes"), job)
    assert outcome(row) == (Outcome.FAILED, "it crashed: SIGSEGV; it said: it is the memory's fault")
    assert children.run(step("passes"), job).outcome is Outcome.PASSED
    left = children.run(step("leaves"), job)
    assert outcome(left) == (Outcome.FAILED, "it ended with 3 and without an answer"), "words of the step before"
    # The answer came, and yet: what breaks when a controller is closed is a failure, too.
    assert outcome(children.run(step("breaks_at_the_end"), job)) == (Outcome.FAILED, "it crashed: SIGABRT")
    assert children.run(step("passes"), job).outcome is Outcome.PASSED


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of steps that were begun."""
    found: list[int] = []
    ended = running._Nursery.ended

    def noted(self: running._Nursery, seconds: float) -> int | None:
        found.append(self.child)
        return ended(self, seconds)

    monkeypatch.setattr(running._Nursery, "ended", noted)
    return found


def test_a_step_that_hangs_is_ended(children: Children, job: Job, begun: list[int]) -> None:
    row = children.run(step("hangs", seconds=1), job)
    assert outcome(row) == (Outcome.FAILED, "it hung: no answer within 1 s, it was ended")
    assert not children.stuck
    assert not is_running(begun[0])
    assert children.run(step("passes"), job).outcome is Outcome.PASSED


def test_what_a_step_started_is_ended_with_it(children: Children, job: Job) -> None:
    """And holds nothing open that the end of the step is waited for by."""
    children.run(step("hangs", seconds=1), job)
    for line in log_of(job.directory):
        if line.startswith("started"):
            # It was told to end with the step; when it does is for the kernel to say.
            give_up = time.monotonic() + 60
            while is_running(int(line.split()[1])):
                assert time.monotonic() < give_up
                time.sleep(0.02)


def test_a_step_that_does_not_end_is_ended(children: Children, job: Job) -> None:
    row = children.run(step("does_not_end", seconds=3), job)
    # Which of the two it is, is for the machine to say: whether it had answered by then.
    assert row.reason in ("it hung: done, but it did not end", "it hung: no answer within 3 s, it was ended")


def test_a_child_that_nothing_ends_is_said(
    children: Children, job: Job, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one in the kernel, where no signal reaches it.
    monkeypatch.setattr(running._Nursery, "kill", lambda _: False)
    assert children.run(step("hangs", seconds=1), job).outcome is Outcome.FAILED
    assert children.stuck == "hangs"
    monkeypatch.undo()
    assert children.run(step("passes"), job).outcome is Outcome.PASSED, "what does not need the drive goes on"


def test_nothing_is_left_behind(job: Job) -> None:
    with Children() as children:
        children.run(step("passes"), job)
        assert children._nursery is not None
        nursery = children._nursery.process.pid
        assert is_running(nursery)
    assert not is_running(nursery)


def test_interrupted_the_child_is_ended(children: Children, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    ended = running._Nursery.ended

    def interrupted(self: running._Nursery, seconds: float) -> int | None:
        if begun:
            return ended(self, seconds)
        begun.append(self.child)
        raise KeyboardInterrupt

    monkeypatch.setattr(running._Nursery, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        children.run(step("hangs"), job)
    assert not is_running(begun[0])
    assert children.run(step("passes"), job).outcome is Outcome.PASSED
