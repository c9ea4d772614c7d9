"""A transfer that somebody waits for, cancels, forgets: how it ends, what it says, and what it keeps alive.

First against a movement that does what a test tells it to, so that every moment can be looked at; then the real one.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import files
import gpunvme
from files import MIB
from gpunvme.transfer import Report, Transfer, format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Movement:
    """100 bytes that move when the test says so."""

    def __init__(self) -> None:
        self.moved = 0
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.stopped_by: str | None = None
        self.answers = True  # to being stopped
        self.on_wait: Callable[[], object] = lambda: None

    def end(self, error: Exception | None = None) -> None:
        self.moved = self.moved if error else 100
        self.error = error
        self.ended.set()

    def wait(self, seconds: float) -> bool:
        self.on_wait()
        return self.ended.wait(min(seconds, 0.001))

    def _stop(self, how: str, error: Exception) -> None:
        if not self.ended.is_set():
            self.stopped_by = how
            if self.answers:
                self.end(error)

    def cancel(self) -> None:
        self._stop("cancel", gpunvme.Cancelled("cancelled"))

    def expire(self) -> None:
        self._stop("expire", gpunvme.DeadlineExceeded("too late"))

    def failure(self) -> Exception | None:
        return self.error

    def report(self) -> Report:
        return Report("host", "as the test told it", 0.25, direct_bytes=self.moved)


@pytest.fixture
def movement() -> Movement:
    return Movement()


def started(movement: Movement, **options: Any) -> Transfer:
    return Transfer(movement, 100, **options)


def soon(action: Callable[[], object]) -> None:
    threading.Timer(0.02, action).start()


def test_waiting_for_a_good_end(movement: Movement) -> None:
    transfer = started(movement)
    assert not transfer.done
    assert str(transfer) == "0 B of 100 B so far by host"
    soon(movement.end)
    assert transfer.wait() is transfer
    assert transfer.done
    assert transfer.wait() is transfer
    assert str(transfer) == "100 B in 250 ms (0.0 GB/s) by host: as the test told it"
    assert repr(transfer) == f"<gpunvme.Transfer: {transfer}>"
    assert (transfer.nbytes, transfer.direct_bytes, transfer.cached_bytes) == (100, 100, 0)
    assert (transfer.buffered_bytes, transfer.bounced_bytes, transfer.seconds) == (0, 0, 0.25)
    assert (transfer.path, transfer.reason) == ("host", "as the test told it")


def test_waiting_for_a_bad_end(movement: Movement) -> None:
    """The error comes to everybody who waits, however often."""
    transfer = started(movement)
    movement.moved = 40
    movement.end(gpunvme.FileError(5, "cannot read", "name", 7))
    for _ in range(2):
        with pytest.raises(gpunvme.FileError, match="cannot read: 'name' at offset 7"):
            transfer.wait()
    assert transfer.done
    assert str(transfer) == "failed after 40 B of 100 B by host"


def test_giving_up_waiting_leaves_it_going(movement: Movement) -> None:
    transfer = started(movement)
    for seconds in (0, 0.01, -1):
        with pytest.raises(gpunvme.DeadlineExceeded, match="the transfer goes on") as caught:
            transfer.wait(timeout=seconds)
        assert isinstance(caught.value, TimeoutError)
    assert movement.stopped_by is None
    movement.end()
    assert transfer.wait(timeout=0).done


def test_a_deadline_stops_it(movement: Movement) -> None:
    transfer = started(movement, deadline=time.monotonic() + 0.02)
    with pytest.raises(gpunvme.DeadlineExceeded, match="too late"):
        transfer.wait()
    assert movement.stopped_by == "expire"
    assert transfer.done


def test_a_drive_that_does_not_answer_keeps_its_memory(movement: Movement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving the memory back while the drive may still write into it corrupts whatever comes next there."""
    monkeypatch.setattr("gpunvme.transfer._GRACE", 0.01)
    movement.answers = False
    memory = np.zeros(100)
    alive = weakref.ref(memory)
    transfer = started(movement, keep=memory, deadline=time.monotonic())
    del memory
    with pytest.raises(gpunvme.DeadlineExceeded, match="stays reserved"):
        transfer.wait()
    transfer.cancel()
    del transfer
    gc.collect()
    assert alive() is not None
    movement.end()
    Transfer(Movement(), 1).cancel()  # whoever comes next tidies up
    gc.collect()
    assert alive() is None


def test_memory_is_let_go_at_the_end(movement: Movement) -> None:
    memory = np.zeros(100)
    alive = weakref.ref(memory)
    transfer = started(movement, keep=memory)
    del memory
    gc.collect()
    assert alive() is not None
    movement.end()
    transfer.wait()
    gc.collect()
    assert alive() is None


def test_cancelling(movement: Movement) -> None:
    transfer = started(movement)
    soon(transfer.cancel)
    with pytest.raises(gpunvme.Cancelled):
        transfer.wait()
    transfer.cancel()  # nothing is left to cancel
    with pytest.raises(gpunvme.Cancelled):
        transfer.wait()


def test_cancelling_what_is_done_changes_nothing(movement: Movement) -> None:
    transfer = started(movement)
    movement.end()
    transfer.cancel()
    assert transfer.wait().done
    transfer.cancel()
    assert transfer.wait().done


def test_progress_rises_and_ends_with_everything(movement: Movement) -> None:
    seen: list[tuple[int, int]] = []
    transfer = started(movement, progress=lambda done, total: seen.append((done, total)))

    def move() -> None:
        movement.moved += 10
        if movement.moved >= 100:
            movement.end()

    movement.on_wait = move
    transfer.wait()
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)
    assert seen.count((100, 100)) == 1
    assert len(seen) > 5


def test_progress_does_not_end_with_everything_when_it_failed(movement: Movement) -> None:
    seen: list[tuple[int, int]] = []
    transfer = started(movement, progress=lambda done, total: seen.append((done, total)))
    movement.end(gpunvme.CudaError("gone"))
    with pytest.raises(gpunvme.CudaError):
        transfer.wait()
    assert (100, 100) not in seen


class WrongError(Exception):
    pass


@pytest.mark.parametrize("error", [WrongError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_callback_comes_out_and_stops_it(movement: Movement, error: type[BaseException]) -> None:
    def fail(done: int, total: int) -> None:
        raise error

    transfer = started(movement, progress=fail)
    with pytest.raises(error):
        transfer.wait()
    assert movement.stopped_by == "cancel"
    assert transfer.done
    with pytest.raises(gpunvme.Cancelled):
        transfer.wait()


def test_ctrl_c_stops_it(movement: Movement) -> None:
    transfer = started(movement)

    def interrupt() -> None:
        movement.on_wait = lambda: None
        raise KeyboardInterrupt

    movement.on_wait = interrupt
    with pytest.raises(KeyboardInterrupt):
        transfer.wait()
    assert movement.stopped_by == "cancel"
    assert transfer.done


def test_what_follows_the_end_follows_it_once(movement: Movement) -> None:
    calls: list[bool] = []
    transfer = started(movement, on_done=calls.append)
    assert not transfer.done
    assert calls == []
    movement.end()
    threads = [threading.Thread(target=transfer.wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert transfer.done
    assert calls == [True]


@pytest.mark.parametrize("failed", [False, True])
def test_what_follows_the_end_follows_it_although_nobody_waits(movement: Movement, failed: bool) -> None:
    """A file whose write failed is cut back even if the program has forgotten the transfer."""
    calls: list[bool] = []
    started(movement, on_done=calls.append)
    gc.collect()
    movement.end(gpunvme.Cancelled("") if failed else None)
    Transfer(Movement(), 1).cancel()
    assert calls == [not failed]


def test_an_error_in_what_follows_is_the_transfers(movement: Movement) -> None:
    def fail(success: bool) -> None:
        raise gpunvme.FileError(28, "fsync")

    transfer = started(movement, on_done=fail)
    movement.end()
    with pytest.raises(gpunvme.FileError, match="fsync"):
        transfer.wait()


def test_awaiting(movement: Movement) -> None:
    async def use() -> Transfer:
        transfer = started(movement)
        asyncio.get_running_loop().call_later(0.02, movement.end)  # the loop runs meanwhile
        return await transfer

    assert asyncio.run(use()).done


def test_awaiting_what_fails_and_what_takes_too_long(movement: Movement) -> None:
    async def use() -> None:
        transfer = started(movement)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(transfer, 0.02)
        assert not transfer.done
        assert movement.stopped_by is None
        transfer.cancel()
        with pytest.raises(gpunvme.Cancelled):
            await transfer

    asyncio.run(use())


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * MIB, "5.0 MiB"), (3 << 30, "3.0 GiB"), (7 << 40, "7.0 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(5e-6, "5 µs"), (0.0123, "12 ms"), (1.5, "1.50 s"), (75, "75.00 s")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


# The real movement.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    files.make(tmp_path / "file", 48 * MIB + 5)
    files.cool(tmp_path / "file")
    return tmp_path / "file"


def test_several_transfers_at_once(place: Path) -> None:
    data = place.read_bytes()
    files.heat(place, "alternating")
    with gpunvme.open(place) as file:
        rooms = [bytearray(4 * MIB) for _ in range(11)]
        transfers = [file.read_into(room, number * 4 * MIB + 3, wait=False) for number, room in enumerate(rooms)]

        async def all_of_them() -> list[Transfer]:
            return list(await asyncio.gather(*transfers))

        assert asyncio.run(all_of_them()) == transfers
    for number, room in enumerate(rooms):
        assert room == data[number * 4 * MIB + 3 :][: 4 * MIB]


def test_progress_of_a_real_read(place: Path) -> None:
    seen: list[tuple[int, int]] = []
    with gpunvme.open(place) as file:
        for nbytes in (48 * MIB, 100, 0):
            for _ in range(2):  # cold and hot
                seen.clear()
                file.read_into(bytearray(nbytes), 0, progress=lambda done, total: seen.append((done, total)))
                assert seen == sorted(seen)
                assert seen[-1] == (nbytes, nbytes)


def test_a_real_read_cancelled(place: Path) -> None:
    with gpunvme.open(place) as file:
        for _ in range(10):
            files.cool(place)
            room = np.zeros(48 * MIB, np.uint8)
            transfer = file.read_into(room, wait=False)
            transfer.cancel()
            try:
                transfer.wait()
            except gpunvme.Cancelled:
                pass
            assert transfer.done
            before = room.copy()
            time.sleep(0.005)
            assert (room == before).all()  # nobody writes there any more


def test_a_deadline_that_has_passed(place: Path) -> None:
    with gpunvme.open(place) as file, pytest.raises(gpunvme.DeadlineExceeded):
        file.read_into(np.empty(48 * MIB, np.uint8), timeout=0.0)
    with gpunvme.open(place) as file, pytest.raises(gpunvme.DeadlineExceeded):
        gpunvme.read_many([(file, 0, np.empty(48 * MIB, np.uint8))], timeout=0.0)


def test_transfers_that_are_dropped_do_no_harm(place: Path) -> None:
    """Memory that is freed under a running read is taken by others, and then overwritten."""
    with gpunvme.open(place) as file:
        for _ in range(5):
            files.cool(place)
            file.read_into(np.empty(8 * MIB, np.uint8), 3, wait=False)
            others = [np.full(8 * MIB, 7, np.uint8) for _ in range(3)]
            file.read_into(bytearray(MIB), 20 * MIB)
            assert all((other == 7).all() for other in others)
