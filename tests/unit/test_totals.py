"""`gpunvme.stats()` and NVTX ranges: whoever looks for a slow path by them must not look in the wrong place."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import fake_nvtx
import files
import gpunvme
from files import MIB
from gpunvme import nvtx_ranges, totals
from gpunvme.cli import main
from gpunvme.cli.stats import summed
from gpunvme.nvtx_ranges import load
from gpunvme.transfer import Report, Transfer

if TYPE_CHECKING:
    from pathlib import Path


class Ended:
    """A movement that is over."""

    def __init__(self, report: Report, failure: Exception | None = None) -> None:
        self._report, self._failure = report, failure

    def wait(self, seconds: float) -> bool:
        return True

    def cancel(self) -> None:
        pass

    expire = cancel

    def failure(self) -> Exception | None:
        return self._failure

    def report(self) -> Report:
        return self._report


REPORT = Report("some path", "as told", 0.25, direct_bytes=1, cached_bytes=20, buffered_bytes=300, bounced_bytes=321)


@pytest.fixture(autouse=True)
def from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "_counted", {})


def test_good_and_bad_ends_count_once_however_often_one_waits() -> None:
    good, bad = Transfer(Ended(REPORT), 321), Transfer(Ended(REPORT, gpunvme.FileError(5, "x", "f", 0)), 321)
    for _ in range(3):
        assert good.wait().done
        with pytest.raises(gpunvme.FileError):
            bad.wait()
    assert gpunvme.stats() == {"some path": totals.PathTotals(2, 1, 642, 2, 40, 600, 642, 0.5)}


def test_a_part_of_a_transfer_is_counted_with_the_whole() -> None:
    part = Transfer(Ended(REPORT), 321)
    part._count_with_whole()
    part.wait()
    Transfer(Ended(REPORT), 321).wait()
    assert gpunvme.stats()["some path"].transfers == 1


def test_real_reads_add_up(tmp_path: Path) -> None:
    files.make(tmp_path / "file", 3 * MIB + 17)
    with gpunvme.open(tmp_path / "file") as file:
        done = [
            file.read_into(np.zeros(size, np.uint8)) for size in (10, 4096, 3 * MIB + 17)
        ]  # the first ones are small
        with gpunvme.open(tmp_path / "copy", "w") as copy:
            done.append(copy.write_from(np.zeros(MIB, np.uint8)))
    (told,) = gpunvme.stats().values()
    assert (told.transfers, told.errors) == (4, 0)
    assert told.nbytes == told.direct_bytes + told.cached_bytes + told.buffered_bytes == 10 + 4096 + 4 * MIB + 17
    for name in ("direct_bytes", "cached_bytes", "buffered_bytes", "bounced_bytes"):
        assert getattr(told, name) == sum(getattr(transfer, name) for transfer in done)
    assert told.seconds == pytest.approx(sum(transfer.seconds for transfer in done))


class GivesWay:
    """A report in the middle of whose counting other threads have their turn."""

    path, direct_bytes, cached_bytes, buffered_bytes, bounced_bytes = "some path", 1, 20, 300, 321

    @property
    def seconds(self) -> float:
        time.sleep(0)
        return 0.25


def test_threads_lose_no_count() -> None:
    def many() -> None:
        for _ in range(300):
            totals.count(GivesWay(), failed=False)  # type: ignore[arg-type]

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpunvme.stats() == {
        "some path": totals.PathTotals(1200, 0, *(1200 * n for n in (321, 1, 20, 300, 321)), 300.0)
    }


def test_what_is_handed_out_does_not_change_afterwards() -> None:
    totals.count(REPORT, failed=False)
    told = gpunvme.stats()
    totals.count(REPORT, failed=True)
    assert (told["some path"].transfers, told["some path"].errors) == (1, 0)


def test_a_table_for_people() -> None:
    assert str(gpunvme.stats()) == "nothing was moved"
    totals.count(REPORT, failed=False)
    head, line = str(gpunvme.stats()).splitlines()
    assert head.split() == [
        "path",
        "transfers",
        "errors",
        "bytes",
        "direct",
        "cached",
        "buffered",
        "bounced",
        "seconds",
    ]
    assert line.split() == ["some", "path", "1", "0", "321", "1", "20", "300", "321", "0.250"]
    assert len(head) == len(line)


PROGRAM = """
import os, sys, gpunvme
with gpunvme.open(sys.argv[1]) as file:
    file.read(0, 1000)
    child = os.fork()
    if child == 0:
        assert gpunvme.stats() == {}, "a child counts what its parent moved"
        file.read(0, 10)
        sys.exit()  # as a process does that exits by itself
    os.waitpid(child, 0)
sys.exit(7)
"""


def test_the_command_tells_what_every_process_moved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files.make(tmp_path / "file", 5000)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "file")]
    assert main(["stats", "--json", "--", *command]) == 7
    told = capfd.readouterr()
    assert told.out == ""
    document = json.loads(told.err)
    assert document["exit_status"] == 7
    assert sorted(process["paths"]["host"]["nbytes"] for process in document["processes"]) == [10, 1000]
    assert document["paths"]["host"]["nbytes"] == 1010
    assert main(["stats", "--", *command]) == 7
    assert "2 processes moved bytes" in capfd.readouterr().err


def test_a_command_that_moves_nothing_and_one_that_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--", sys.executable, "-c", "import gpunvme; print('theirs')"]) == 0
    told = capfd.readouterr()
    assert told.out == "theirs\n"
    assert "nothing was moved" in told.err
    assert main(["stats", "--", "/nonexistent/command"]) == 2
    assert main(["stats", "--", "sh", "-c", "kill -9 $$"]) == 137


def test_sums_of_processes() -> None:
    one = {"paths": {"a": {**dict.fromkeys(totals.PathTotals.__slots__, 1)}}}
    assert summed([one, one, {"paths": {}}]) == {"a": totals.PathTotals(*[2] * 8)}
    assert summed([]) == {}


# ---- NVTX


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> fake_nvtx.Notes:
    return fake_nvtx.use(monkeypatch)


def test_a_range_lasts_as_long_as_its_transfer(seen: fake_nvtx.Notes) -> None:
    first, second = Transfer(Ended(REPORT), 1 << 20), Transfer(Ended(REPORT, gpunvme.Cancelled("x")), 5)
    # Making the second may have found that the first has ended.
    assert [call for call in seen.calls if call[0] == "start"] == [
        ("start", "transfer of 1.0 MiB", "gpunvme"),
        ("start", "transfer of 5 B", "gpunvme"),
    ]
    with pytest.raises(gpunvme.Cancelled):
        second.wait()
    first.wait()
    first.wait()
    assert len(seen.lasted()) == 2


def test_a_small_read_is_a_mark(seen: fake_nvtx.Notes, tmp_path: Path) -> None:
    files.make(tmp_path / "file", 100)
    with gpunvme.open(tmp_path / "file") as file:
        file.read()
    marked = [("mark", "transfer of 100 B by host", "gpunvme")]
    assert seen.calls == marked or [call[0] for call in seen.calls] == ["start", "end"]


def test_a_range_around_work_ends_with_it_whatever_happens(seen: fake_nvtx.Notes) -> None:
    with nvtx_ranges.during("good"):
        pass
    with pytest.raises(KeyError), nvtx_ranges.during("bad"):
        raise KeyError
    assert seen.lasted() == ["good", "bad"]


def test_nothing_is_made_of_ranges_that_nobody_wants() -> None:
    assert nvtx_ranges.ranges is None
    with nvtx_ranges.during("nothing"):
        pass


def test_nvtx_is_not_touched_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    for value in (None, "", "0"):
        monkeypatch.delenv("GPUNVME_NVTX", raising=False)
        if value is not None:
            monkeypatch.setenv("GPUNVME_NVTX", value)
        assert load() is None
    monkeypatch.setenv("GPUNVME_NVTX", "1")
    with pytest.warns(RuntimeWarning, match="pip install nvtx"):
        assert load() is None
