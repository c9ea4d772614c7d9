"""fio beside us, where it is installed: the yardstick that people who measure drives know."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

from gpunvme.bench.contest import Contestant, Kind, Run

_LIMIT_SECONDS = 60.0


class FioError(Exception):
    """fio did not run, or its answer holds no reads; the message is its own."""


@dataclass(frozen=True, slots=True)
class Job:
    """One fio job that reads a file.

    Attributes
    ----------
    path : str
        The file.
    nbytes : int
        How much of its start takes part.
    block : int
        Bytes per request.
    random : bool
        Random places, or one after the other.
    engine : {"io_uring", "psync", "mmap"}
        fio's ioengine. io_uring reads O_DIRECT, the others through the page cache.
    depth : int
        Requests in flight per job (io_uring).
    jobs : int
        How many threads.
    seconds : float or None
        Run for this long, or once through when None.
    """

    path: str
    nbytes: int
    block: int
    random: bool
    engine: Literal["io_uring", "psync", "mmap"]
    depth: int = 1
    jobs: int = 1
    seconds: float | None = None

    def arguments(self) -> list[str]:
        """Return fio's command line.

        The page cache is left as the case has prepared it (fio drops it by default), and nothing is ever written.
        """
        given = [
            "--name=gpunvme",
            f"--filename={self.path.replace(':', chr(92) + ':')}",
            f"--rw={'randread' if self.random else 'read'}",
            f"--bs={self.block}",
            f"--size={self.nbytes}",
            f"--ioengine={self.engine}",
            f"--direct={int(self.engine == 'io_uring')}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.jobs}",
            "--thread",
            "--group_reporting",
            "--readonly",
            "--invalidate=0",
            "--output-format=json",
        ]
        if not self.random and self.jobs > 1:
            share = self.nbytes // self.jobs // self.block * self.block
            given[4] = f"--size={share}"
            given.append(f"--offset_increment={share}")
        if self.random:
            given.append("--norandommap")
        if self.seconds is not None:
            given += ["--time_based", f"--runtime={max(1, round(self.seconds * 1000))}ms"]
        return given


def version() -> str | None:
    """Return fio's version, or None where it is not installed."""
    program = shutil.which("fio")
    if program is None:
        return None
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip().removeprefix("fio-")


def parse(text: str) -> Run:
    """Read fio's JSON.

    Parameters
    ----------
    text : str
        What fio wrote; warnings before the JSON are skipped.

    Returns
    -------
    Run
        The seconds and bytes that fio counted itself, without its start and its end.

    Raises
    ------
    FioError
        If it holds no finished reads.
    """
    start = text.find("{")
    try:
        answer: dict[str, Any] = json.loads(text[start:]) if start >= 0 else {}
        job = answer["jobs"][0]
        nbytes, milliseconds = int(job["read"]["io_bytes"]), float(job["read"]["runtime"])
        rate = float(job["read"]["bw_bytes"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise FioError(f"fio's answer cannot be read: {text[:200]!r}") from error
    if job.get("error"):
        raise FioError(f"fio reports error {job['error']}")
    if nbytes == 0 or milliseconds == 0 or rate == 0:
        raise FioError("fio finished before it could measure anything")
    return Run(nbytes / rate, nbytes)


def run(job: Job) -> Run:
    """Run a job and return what fio measured.

    Raises
    ------
    FioError
        If fio fails, is not installed, or takes longer than a minute.
    """
    program = shutil.which("fio")
    if program is None:
        raise FioError("fio is not installed")
    try:
        done = subprocess.run(
            [program, *job.arguments()], capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FioError(f"fio did not finish within {_LIMIT_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise FioError((done.stderr or done.stdout).strip()[:300] or f"fio ended with status {done.returncode}")
    return parse(done.stdout)


def contestant(job: Job, kind: Kind) -> Contestant:
    """Let fio take part in a contest. It reads into a small buffer of its own, which flatters it."""
    in_words = f"fio {job.engine}" + (" O_DIRECT" if job.engine == "io_uring" else "")
    how = f"depth {job.depth}" if job.engine == "io_uring" else f"{job.jobs} threads"
    return Contestant(
        f"{in_words}, {how}",
        kind,
        lambda: run(job),
        settings=" ".join(job.arguments()[2:]),
        lands=False,
        warms_up=False,
    )
