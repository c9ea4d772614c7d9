"""The whole of it: the drive looked at, steps run, the drive handed from driver to driver and given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import gpunvme
from gpunvme.accept.children import Children, Step
from gpunvme.accept.drive import Drive
from gpunvme.accept.guard import Guard
from gpunvme.accept.job import Job
from gpunvme.accept.plan import CLEAR, PLAN
from gpunvme.accept.privacy import Privacy
from gpunvme.accept.result import SCHEMA, SCHEMA_VERSION, Outcome, Row
from gpunvme.doctor.pcie import pci_device
from gpunvme.doctor.system import System
from gpunvme.nvme.bind import KERNEL_DRIVER
from gpunvme.nvme.sysfs import Machine

_CUSTODY = "gpunvme.accept.steps.custody:"
_TAKE_SECONDS = 90.0
_OURS = ("left", "limits", "untouched", "uri")  # facts for the steps that follow
Show = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What a person asked for.

    Attributes
    ----------
    device
        The GPU.
    directory
        Where files may be made; empty for nowhere.
    serials
        Whether serial numbers may be in the document.
    skip
        Names of steps to be left out, or how they begin.
    """

    device: str = "cuda:0"
    directory: str = ""
    serials: bool = False
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Custody:
    """Which functions take the drive and give it back; a test has others."""

    take: str = f"{_CUSTODY}take"
    give_back: str = f"{_CUSTODY}give_back"


@dataclass
class Acceptance:
    """What came of everything so far."""

    drive: Drive
    wish: Wish
    privacy: Privacy
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def count(self, outcome: Outcome) -> int:
        """How many steps came out so."""
        return sum(row.outcome is outcome for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether everything that ran passed, and anything did."""
        return not self.interrupted and self.count(Outcome.PASSED) > 0 and not self.count(Outcome.FAILED)

    def document(self) -> dict[str, Any]:
        """Return it all, for JSON, with nothing private in it but what was asked for."""
        info = self.drive.info
        drive = {
            "model": info.model,
            "firmware": self.drive.firmware,
            "address": self.drive.address,
            "nbytes": self.drive.nbytes,
            "block_size": self.drive.block_size,
            "link": [info.function.speed, info.function.width],
            "iommu_group": info.function.iommu_group is not None,
        }
        if self.wish.serials:
            drive["serial"] = info.serial
        what = "serial numbers, as asked for; " if self.wish.serials else ""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "gpunvme": gpunvme.__version__,
            "date": datetime.now(UTC).date().isoformat(),
            "private": f"{what}no {'' if what else 'serial numbers, '}names of machine or user, paths",
            "interrupted": self.interrupted,
            "drive": self.privacy.of(drive),
            "summary": {outcome.value: self.count(outcome) for outcome in Outcome},
            "steps": [row.as_dict() for row in self.rows],
        }


def accept(
    drive: Drive,
    wish: Wish,
    *,
    plan: Sequence[Step] = PLAN,
    clear: Step = CLEAR,
    custody: Custody | None = None,
    machine: Machine | None = None,
    show: Show = lambda _: None,
) -> Acceptance:
    """Run the plan.

    Parameters
    ----------
    drive
        From `gpunvme.accept.drive.look_at`.
    wish
        What was asked for.
    plan, clear
        The steps, and the one that makes the drive empty again.
    custody
        Who takes the drive and gives it back.
    machine
        Where sysfs is.
    show
        Called with what is being done.

    Returns
    -------
    Acceptance
        Also after Ctrl-C, SIGTERM or SIGHUP: ``interrupted`` is set, and the drive was given back.
    """
    machine = machine or Machine()
    acceptance = Acceptance(drive, wish, Privacy(machine, wish.directory, serials=wish.serials))
    _Session(acceptance, custody or Custody(), machine, show).run(plan, clear)
    return acceptance


class _Session:
    def __init__(self, acceptance: Acceptance, custody: Custody, machine: Machine, show: Show) -> None:
        self._acceptance, self._custody, self._show = acceptance, custody, show
        drive, wish = acceptance.drive, acceptance.wish
        link = pci_device(System(machine.root), drive.address)
        limit = link.limit() if link is not None else None
        self._job = Job(
            address=drive.address,
            nsid=drive.nsid,
            nbytes=drive.nbytes,
            block_size=drive.block_size,
            area=drive.area,
            area_nbytes=drive.area_nbytes,
            far=drive.far,
            device=wish.device,
            directory=wish.directory,
            limits={} if limit is None else {"link": limit},
        )
        self._no_gpu = "the machine was not looked at"
        self._refused: dict[str, str] = {}  # drivers that cannot have it, and why
        self._worked: set[str] = set()  # drivers with which a step passed
        self._over = ""  # why nothing more is done to the drive
        self._written = False

    def run(self, plan: Sequence[Step], clear: Step) -> None:
        with ExitStack() as ending:
            guard = ending.enter_context(Guard(self._job, self._custody.give_back))
            children = ending.enter_context(Children())
            try:
                with _signals(_interrupt):
                    for step in plan:
                        self._step(step, children)
            except KeyboardInterrupt:
                self._acceptance.interrupted = True
            with _signals(self._wait):
                self._show("giving the drive back")
                given = guard.give_back()
                self._note(given)
            if given.outcome is Outcome.PASSED:
                self._job = self._job.with_(driver=KERNEL_DRIVER, uri="")
                self._clear(clear, children)

    def _clear(self, clear: Step, children: Children) -> None:
        if not self._written:
            return
        try:
            with _signals(_interrupt):
                self._show(clear.what)
                self._note(children.run(clear, self._job))
        except KeyboardInterrupt:
            self._acceptance.interrupted = True
            self._note(Row.skipped(clear.name, clear.what, "interrupted: what was written is still there"))

    def _note(self, row: Row) -> None:
        privacy = self._acceptance.privacy
        facts = privacy.of({name: fact for name, fact in row.facts.items() if name not in _OURS})
        self._acceptance.rows.append(
            Row(row.step, row.what, row.outcome, privacy.text(row.reason), row.seconds, row.figures, facts)
        )

    def _step(self, step: Step, children: Children) -> None:
        why_not = self._why_not(step) or self._hand_over(step, children)
        if why_not:
            self._note(Row.skipped(step.name, step.what, why_not))
            return
        self._show(f"{step.name}: {step.what}")
        written, self._written = self._written, self._written or step.driver is not None  # also if it is interrupted
        row = children.run(step, self._job)
        self._note(row)
        if step.driver is not None:
            self._written = written or not row.facts.get("untouched")
            self._remember(step.driver, row)
        if "cuda" in row.facts:
            self._no_gpu = str(row.facts["cuda"])
        if row.outcome is Outcome.FAILED and step.vital:
            self._over = f"{step.name!r} failed"
        if children.stuck:
            self._over = f"{children.stuck!r} hangs in the kernel and cannot be ended"

    def _remember(self, driver: str, row: Row) -> None:
        """Note what a step did to the drive."""
        if row.outcome is Outcome.SKIPPED:
            return
        # After a step that failed nobody knows what it had written.
        left = row.facts.get("left") if row.outcome is Outcome.PASSED else None
        self._job = self._job.with_(left=left, limits=self._job.limits | row.facts.get("limits", {}))
        if row.outcome is Outcome.PASSED:
            self._worked.add(driver)

    def _why_not(self, step: Step) -> str:
        """Return why a step is not begun, or nothing."""
        wish = self._acceptance.wish
        if any(step.name.startswith(name) for name in wish.skip):
            return "left out, as asked for"
        if step.directory and not wish.directory:
            return "no directory was named: --directory DIR"
        if step.gpu and self._no_gpu:
            return self._no_gpu
        if step.driver is not None and self._over:
            return self._over
        if step.follows and step.follows not in self._worked:
            return f"nothing was done with {step.follows}"
        return self._refused.get(step.driver or "", "")

    def _hand_over(self, step: Step, children: Children) -> str:
        """See that the driver that a step needs has the drive; return why that cannot be."""
        if step.driver is None or step.driver == self._job.driver:
            return ""
        self._show(f"handing the drive over to {step.driver}")
        if self._job.driver != KERNEL_DRIVER:
            back = Step("back", f"from {self._job.driver}", self._custody.give_back, seconds=_TAKE_SECONDS)
            row = children.run(back, self._job)
            if row.outcome is not Outcome.PASSED:
                self._note(row)
                self._over = "the drive could not be given back to the kernel's driver"
                return self._over
            self._job = self._job.with_(driver=KERNEL_DRIVER, uri="")
        if step.driver != KERNEL_DRIVER:
            wanted = self._job.with_(driver=step.driver)
            take = Step(
                f"take for {step.driver}", "from the kernel's driver", self._custody.take, seconds=_TAKE_SECONDS
            )
            row = children.run(take, wanted)
            self._note(row)
            if row.outcome is not Outcome.PASSED:
                self._refused[step.driver] = row.reason
                if row.outcome is Outcome.FAILED:
                    # Wherever it was left: the next one that needs it begins with giving it back.
                    self._job = wanted
                return row.reason
            self._job = wanted.with_(uri=str(row.facts["uri"]))
        return ""

    def _wait(self, *_: object) -> None:
        self._show("the drive is being given back: that is not interrupted")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """Have whatever ends a program call a function meanwhile: Ctrl-C, kill, a login that is gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
