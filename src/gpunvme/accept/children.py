"""Steps in children, each with a deadline: one that hangs or dies is a line of the table, and not the end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Any, Self

from gpunvme.accept.job import Job
from gpunvme.accept.result import Figure, Outcome, Row

_START_SECONDS = 120.0  # for everything to be imported
_END_SECONDS = 15.0  # from its being killed to its end
_SAID_BYTES = 2000


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes
    ----------
    name, what
        How it is called, and what it does, in a few words.
    function
        ``module:function``, which takes a `Job` and returns a `Result`.
    driver
        Which of the kernel's drivers must have the drive; None if it does not matter.
    seconds
        Its deadline.
    gpu, directory
        Whether it needs a GPU, or a directory.
    vital
        Whether nothing more may be written if it fails.
    follows
        A driver with which a step must have passed before.
    options
        For the function, in `Job.options`.
    """

    name: str
    what: str
    function: str
    driver: str | None = None
    seconds: float = 60.0
    gpu: bool = False
    directory: bool = False
    vital: bool = False
    follows: str = ""
    options: tuple[tuple[str, Any], ...] = ()


def environment() -> dict[str, str]:
    """Return the environment of children: they find the package, and whatever else this process does."""
    # No threads of NumPy's: there is to be nothing that a fork could break.
    alone = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class _Nursery:
    """The other side of `gpunvme.accept.child`: a process that forks for each step."""

    def __init__(self) -> None:
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            # A session of its own: Ctrl-C is for the parent, which knows what there is to be given back.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpunvme.accept.child", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                start_new_session=True,
                env=environment(),
            )
        except BaseException:
            self.said.close()
            raise
        self._heard = b""
        self.child = 0  # of the step that is running

    def begin(self, function: str, job: Job, answer: str) -> bool:
        """Have a step begun; whether it was."""
        assert self.process.stdin is not None
        self.said.truncate(0)
        with contextlib.suppress(BrokenPipeError):  # it died: its end is heard next
            self.process.stdin.write(f"{function}\n{job.encode()}\n{answer}\n".encode())
            self.process.stdin.flush()
        word, number = self._event(_START_SECONDS)
        self.child = number if word == "began" else 0
        return self.child != 0

    def ended(self, seconds: float) -> int | None:
        """Return the exit status of the step, or None if it did not end in time."""
        word, number = self._event(seconds)
        if word != "ended":
            return None
        self.child = 0
        return number

    def _event(self, seconds: float) -> tuple[str, int]:
        assert self.process.stdout is not None
        give_up = time.monotonic() + seconds
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, give_up - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not part:
                return "", 0
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        word, _, number = line.decode().partition(" ")
        return word, int(number)

    def kill(self) -> bool:
        """End the step, and what it started; whether that worked: a process that hangs in the kernel stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)
        return self.ended(_END_SECONDS) is not None

    def last_words(self) -> str:
        """Return the last line that the step printed."""
        self.said.seek(max(0, self.said.seek(0, os.SEEK_END) - _SAID_BYTES))
        lines = self.said.read().strip(b"\0").decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End it, and a step that it still has (`child.end_with`)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait(_END_SECONDS)
        self.process.stdout.close()
        self.said.close()


class Children:
    """Runs steps, one at a time. A context manager: none is left behind.

    Attributes
    ----------
    stuck
        The name of a step whose child could not be ended, or an empty string. What it holds cannot be had any more.
    """

    def __init__(self) -> None:
        self.stuck = ""
        self._nursery: _Nursery | None = None
        self._answers = tempfile.TemporaryDirectory(prefix="gpunvme-accept-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        self._answers.cleanup()

    def _let_go(self) -> None:
        nursery, self._nursery = self._nursery, None
        if nursery is not None:
            nursery.close()

    def run(self, step: Step, job: Job) -> Row:
        """Run a step and return what came of it. Whatever interrupts this ends the child."""
        answer = os.path.join(self._answers.name, "answer")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(answer)
        nursery = self._nursery = self._nursery or _Nursery()
        started = time.monotonic()
        try:
            begun = nursery.begin(step.function, job.with_(options=dict(step.options)), answer)
            status = nursery.ended(step.seconds) if begun else None
        except BaseException:
            if nursery.child:
                nursery.kill()
            self._let_go()
            raise
        seconds = time.monotonic() - started
        told = _told(answer)
        words = nursery.last_words()
        if status is None:
            if nursery.child and not nursery.kill():
                self.stuck = step.name
            if not begun or self.stuck:
                self._let_go()
        if not begun:
            reason = "its process could not be started"
        elif status is None:
            reason = "done, but it did not end" if told else f"no answer within {step.seconds:g} s, it was ended"
            reason = f"it hung: {reason}"
        elif status < 0:
            reason = f"it crashed: {signal.Signals(-status).name}"
        elif status or told is None:
            reason = f"it ended with {status}" + ("" if told else " and without an answer")
        else:
            return _row(step, told, seconds)
        return Row(step.name, step.what, Outcome.FAILED, reason + (f"; it said: {words}" if words else ""), seconds)


def _told(answer: str) -> dict[str, Any] | None:
    """Return a step's answer, or None if there is none, or not all of it."""
    try:
        with open(answer) as file:
            told: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    return told


def _row(step: Step, told: dict[str, Any], seconds: float) -> Row:
    figures = tuple(Figure(**figure) for figure in told.get("figures", ()))
    outcome = Outcome(told["outcome"])
    return Row(step.name, step.what, outcome, told["reason"], seconds, figures, told.get("facts", {}))
