"""The steps of `gpunvme accept` that drive a controller, on the software controller: in order and out of it.

If these fail, a drive that is fine is called broken, or, worse, the other way round.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gpunvme import nvme
from gpunvme.accept.child import find
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.plan import CLEAR, FIRST, PLAN
from gpunvme.accept.result import Skipped
from gpunvme.accept.steps import driver, files, interrupts, machine, recovery, speed
from gpunvme.errors import CommandError
from gpunvme.nvme.namespace import Namespace
from gpunvme.nvme.soft import SoftTransport
from gpunvme.nvme.transport import InterruptTransport
from gpunvme.nvme.uri import parse_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gpunvme.accept.result import Result

SIZE = 32 * MIB
# One of them forks; in the child that is killed nothing but the driver runs.
pytestmark = pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    uri = f"soft:{tmp_path / 'image'}?size=32MiB&queues=9&mdts=3"
    return Job("0000:01:00.0", nbytes=SIZE, area=8 * MIB, area_nbytes=4 * MIB, far=24 * MIB, uri=uri)


def held(job: Job, nbytes: int = 4 * MIB) -> np.ndarray:
    """What the area holds."""
    with nvme.open(job.uri) as controller:
        return controller.namespace().read(job.area // 512, nbytes // 512).numpy()


def outside(job: Job) -> bool:
    """Whether anything outside of what may be written was."""
    with nvme.open(job.uri) as controller:
        everything = controller.namespace().read().numpy()
    everything[job.area : job.area + job.area_nbytes] = 0
    everything[job.far : job.far + MIB] = 0
    return bool(everything.any())


STEPS = [driver.patterns, driver.queues, driver.sizes, recovery.abort, recovery.reset, recovery.killed, speed.speed]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("block", [512, 4096])
def test_steps_pass_and_keep_to_their_place(job: Job, step: Callable[[Job], Result], block: int) -> None:
    job = replace(job, uri=f"{job.uri}&lba={block}", block_size=block, limits={"kernel IOPS": 1e6, "link": 8.0})
    result = step(job)
    assert result.seen
    with nvme.open(job.uri) as controller:
        everything = controller.namespace().read().numpy()
    if "left" in result.facts:
        # What the kernel's driver will be asked for afterwards.
        compare(everything[8 * MIB : 12 * MIB], contents(result.facts["left"], 4 * MIB), "what was left")
    everything[8 * MIB : 12 * MIB] = everything[24 * MIB : 25 * MIB] = 0
    assert not everything.any(), "something was written elsewhere"


def test_what_the_kernel_wrote_is_read_first(job: Job) -> None:
    with nvme.open(job.uri) as controller:
        driver.fill(controller, job, 11)
    assert driver.patterns(replace(job, left=11)).seen.startswith("4 MiB that were on it were read")
    with pytest.raises(ValueError, match=r"what was on it: .* bytes differ, the first at byte 0"):
        driver.patterns(replace(job, left=12))


def test_identify_tells_what_the_drive_can(job: Job) -> None:
    result = driver.identify(replace(job, left=3))
    assert result.facts["max_transfer_bytes"] == 32 << 10
    assert result.facts["io_queues"] == 9
    assert result.facts["left"] == 3, "it wrote nothing"
    assert "serial" not in " ".join(result.facts), "nobody asked for it"
    with pytest.raises(ValueError, match="the kernel saw 1048576 bytes"):
        driver.identify(replace(job, nbytes=MIB))


@pytest.mark.parametrize("step", [driver.patterns, driver.queues, driver.sizes, recovery.reset, speed.speed])
def test_wrong_bytes_are_a_failure(job: Job, step: Callable[[Job], Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one read: the drive of nobody, and yet what the table is for."""
    real = Namespace._carry

    def flipped(self: Namespace, opcode: int, *arguments: object) -> object:
        done = real(self, opcode, *arguments)  # type: ignore[arg-type]
        span = arguments[3]
        span = span[0] if isinstance(span, tuple) else span
        if opcode == 2 and span.nbytes >= 4096:  # type: ignore[attr-defined]
            memory = np.ctypeslib.as_array((__import__("ctypes").c_uint8 * span.nbytes).from_address(span.ptr))  # type: ignore[attr-defined]
            memory[span.nbytes // 2] ^= 1  # type: ignore[attr-defined]
        return done

    monkeypatch.setattr(Namespace, "_carry", flipped)
    with pytest.raises(ValueError, match=r"1 of .* bytes differ"):
        step(job)


def test_errors_of_the_drive_are_failures(job: Job) -> None:
    with pytest.raises(CommandError):
        driver.queues(replace(job, uri=job.uri + "&faults=error:0x281!@0.01&seed=1"))


def test_aborted_commands_are_tried_again_or_reported(job: Job) -> None:
    # A controller that keeps commands for a while is one that can abort them.
    result = recovery.abort(replace(job, uri=job.uri + "&faults=delay:50@0.2&seed=1"))
    assert "96 aborts asked for" in result.seen


class Interrupting(SoftTransport):
    """The software controller with its interrupts passed on, but for those in `lost`."""

    interrupt_vectors = 5
    lost: tuple[int, ...] = ()

    def set_interrupts(self, events: Sequence[int]) -> None:
        for vector, event in enumerate(events):
            if vector not in self.lost:
                self.controller.set_interrupt(vector, event)


def test_each_vector_is_seen(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Interrupting(parse_uri(job.uri)), InterruptTransport)
    monkeypatch.setattr(interrupts, "connect", lambda uri: Interrupting(parse_uri(uri)))
    result = interrupts.vectors(replace(job, left=4))
    assert (result.seen, result.facts) == ("5 of 5 vectors tried, each arrived", {"vectors": 5, "left": 4})


def test_a_vector_that_does_not_arrive_is_a_failure(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(Interrupting):
        lost = (0, 3)

    monkeypatch.setattr(interrupts, "connect", lambda uri: Lossy(parse_uri(uri)))
    monkeypatch.setattr(interrupts, "_SECONDS", 0.5)
    with pytest.raises(ValueError, match="no interrupt arrived by vector 0, 3 of 5"):
        interrupts.vectors(job)


def test_a_way_without_interrupts_leaves_them_out(job: Job) -> None:
    with pytest.raises(Skipped, match="passes no interrupts on"):
        interrupts.vectors(job)


def test_the_machine_is_described(job: Job) -> None:
    facts = machine.examine(job).facts
    assert facts["kernel"] == os.uname().release
    assert {"kernel", "IOMMU"} & {line["topic"] for line in facts["doctor"]}
    assert "file system" not in {line["topic"] for line in facts["doctor"]}, "it names a path"


def test_a_gpu_that_is_not_there_is_said(job: Job) -> None:
    reason = machine.examine(replace(job, device="cuda:99")).facts["cuda"]
    assert reason


def test_files_are_written_read_and_removed(job: Job, tmp_path: Path) -> None:
    place = tmp_path / "files"
    place.mkdir()
    result = files.host(replace(job, directory=str(place), options={"device": "cpu"}))
    assert result.figures
    assert not os.listdir(place)


@pytest.mark.parametrize("path", ["p2pdma", "cufile/nvidia-fs", "cufile/p2pdma", "cufile/compat"])
def test_paths_that_cannot_carry_files_say_why(job: Job, tmp_path: Path, path: str) -> None:
    with pytest.raises(Skipped, match=r"\w"):
        files.by_path(replace(job, directory=str(tmp_path), options={"path": path}))


def test_every_step_of_the_plan_is_there() -> None:
    names = [step.name for step in PLAN]
    assert len(set(names)) == len(names)
    assert PLAN[0] is FIRST
    for step in (*PLAN, CLEAR):
        assert callable(find(step.function)), step.name
    assert threading.active_count() >= 1
