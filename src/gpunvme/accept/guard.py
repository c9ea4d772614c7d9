"""The process that gives the drive back: asked to, or when whoever asked for the drive is gone, killed included.

``python -m gpunvme.accept.guard FUNCTION`` reads a `Job` from standard input; on a second line, or when standard input
ends, it calls the function, prints what came of it, and ends. `Guard` is the other side.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import time
from typing import Self

from gpunvme.accept.child import answer_of
from gpunvme.accept.children import environment
from gpunvme.accept.job import Job
from gpunvme.accept.result import Outcome, Row

STEP, WHAT = "give back", "to the driver that it had"
_SECONDS = 120.0


def main(function: str) -> None:
    """Wait, then give back."""
    # Whoever ends everything in this terminal or in this login means the steps, and not this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    job = Job.decode(sys.stdin.readline())
    sys.stdin.readline()
    answer = answer_of(function, job)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)


class Guard:
    """Starts the process, before the drive is touched. A context manager; what it has not been asked for, it does then.

    Parameters
    ----------
    job
        Which drive.
    function
        ``module:function`` that gives it back.
    """

    def __init__(self, job: Job, function: str) -> None:
        self._job, self._function = job, function
        self._row: Row | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpunvme.accept.guard", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment(),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(job.encode().encode() + b"\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> Row:
        """Have the drive given back; the second time, say what came of it the first time."""
        if self._row is None:
            self._row = self._give_back()
        return self._row

    def _give_back(self) -> Row:
        started = time.monotonic()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        ready, _, _ = select.select([process.stdout], [], [], _SECONDS)
        answer = process.stdout.readline() if ready else b""
        if ready and not answer:
            # Somebody has killed it: here, then, whatever it had begun.
            answer = json.dumps(answer_of(self._function, self._job)).encode()
        seconds = time.monotonic() - started
        if not answer:
            process.kill()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        told = json.loads(answer) if answer else {"outcome": "failed", "reason": f"not within {_SECONDS:g} s"}
        reason = told["reason"]
        if told["outcome"] != "passed":
            reason += f". Look at dmesg, then: gpunvme nvme unbind {self._job.address}"
        return Row(STEP, WHAT, Outcome(told["outcome"]), reason, seconds)


if __name__ == "__main__":
    main(sys.argv[1])
