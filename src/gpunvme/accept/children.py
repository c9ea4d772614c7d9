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

_END_SECONDS = 15.0  # from its answer to its end, and from its being killed to its end
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
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class _Child:
    """One child, which waits for its order."""

    def __init__(self) -> None:
        self.pipe, write = os.pipe()
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        try:
            # A session of its own: Ctrl-C is for the parent, which knows what there is to be given back.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpunvme.accept.child", str(os.getpid()), str(write)],
                stdin=subprocess.PIPE,
                stdout=self.said,
                stderr=self.said,
                pass_fds=(write,),
                start_new_session=True,
                env=environment(),
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(write)

    def order(self, function: str, job: Job) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its end tells
            self.process.stdin.write(f"{function}\n{job.encode()}\n".encode())
            self.process.stdin.close()

    def answer(self, seconds: float) -> bytes | None:
        """Return its answer, what there is of one if it ended, or None if there was none in time."""
        give_up = time.monotonic() + seconds
        data = b""
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, give_up - time.monotonic()))
            if not ready:
                return None
            part = os.read(self.pipe, 65536)
            if not part:
                break
            data += part
        return data

    def ended(self, seconds: float) -> bool:
        """Wait for its end; whether it came."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> bool:
        """End it, and what it started; whether that worked: a process that hangs in the kernel stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.ended(_END_SECONDS)

    def last_words(self) -> str:
        """Return the last line that it printed."""
        self.said.seek(max(0, self.said.seek(0, os.SEEK_END) - _SAID_BYTES))
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        os.close(self.pipe)
        self.said.close()
        if hasattr(self, "process") and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class Children:
    """Runs steps, one at a time. A context manager: none is left behind.

    The next child prepares itself while a step runs.

    Attributes
    ----------
    stuck
        The name of a step whose child could not be ended, or an empty string. What it holds cannot be had any more.
    """

    def __init__(self) -> None:
        self.stuck = ""
        self._waiting: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.kill()
            waiting.close()

    def run(self, step: Step, job: Job) -> Row:
        """Run a step and return what came of it. Whatever interrupts this ends the child."""
        child, self._waiting = self._waiting or _Child(), None
        started = time.monotonic()
        try:
            child.order(step.function, job.with_(options=dict(step.options)))
            self._waiting = _Child()
            answer = child.answer(step.seconds)
            return self._row(step, child, answer, time.monotonic() - started)
        finally:
            if child.process.poll() is None and not child.kill():
                self.stuck = step.name
            child.close()

    def _row(self, step: Step, child: _Child, answer: bytes | None, seconds: float) -> Row:
        def failed(reason: str) -> Row:
            words = child.last_words()
            return Row(
                step.name, step.what, Outcome.FAILED, f"{reason}; it said: {words}" if words else reason, seconds
            )

        if answer is None:
            return failed(f"it hung: no answer within {step.seconds:g} s, it was ended")
        in_time = child.ended(_END_SECONDS)
        status = child.process.returncode
        if in_time and status < 0:
            return failed(f"it crashed: {signal.Signals(-status).name}")
        try:
            told = json.loads(answer)
            figures = tuple(Figure(**figure) for figure in told.get("figures", ()))
            outcome, reason, facts = Outcome(told["outcome"]), str(told["reason"]), dict(told.get("facts", {}))
        except (ValueError, KeyError, TypeError):
            return failed(f"it ended with {status} and without an answer")
        if not in_time:
            return failed("it hung: done, but it did not end")
        if status:
            return failed(f"it ended with {status}")
        return Row(step.name, step.what, outcome, reason, seconds, figures, facts)
