"""Steps that `gpunvme accept` runs in tests: in children, so this module is found by its name.

A folder, `Job.directory`, is the machine: ``driver`` says who has the drive, ``log`` what was done, in order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpunvme.accept.children import Step
from gpunvme.accept.job import Job
from gpunvme.accept.result import Figure, Result, Skipped
from gpunvme.accept.session import Custody
from gpunvme.errors import UnsafeDeviceError

CUSTODY = Custody("accept_steps:take", "accept_steps:give_back")


def step(name: str, driver: str | None = None, **more: object) -> Step:
    """A step that the function of the same name does."""
    return Step(name, f"what {name} does", f"accept_steps:{name}", driver, **more)  # type: ignore[arg-type]


def driver_of(folder: Path | str) -> str:
    return (Path(folder) / "driver").read_text()


def log_of(folder: Path | str) -> list[str]:
    log = Path(folder) / "log"
    return log.read_text().splitlines() if log.exists() else []


def _note(job: Job, what: str) -> None:
    with (Path(job.directory) / "log").open("a") as log:
        log.write(what + "\n")


def _wait_for_ever() -> None:
    while True:
        time.sleep(1000)


# --- custody


def take(job: Job) -> Result:
    _note(job, f"take {job.driver}")
    if job.driver == "absent":
        raise Skipped("there is no driver absent")
    (Path(job.directory) / "driver").write_text(job.driver)
    if job.driver == "breaks":
        raise OSError("taken, and then it broke")
    return Result(f"to {job.driver}", facts={"uri": f"pci:{job.address}"})


def give_back(job: Job) -> Result:
    _note(job, "give back")
    (Path(job.directory) / "driver").write_text("nvme")
    return Result("to nvme")


# --- steps


def passes(job: Job) -> Result:
    _note(job, f"passes with {driver_of(job.directory)}, uri {job.uri!r}, left {job.left}")
    return Result("it went well", (Figure("read", 2.5, "GB/s", 7.0, "the link"),), {"left": 5, "limits": {"seen": 7.0}})


def told(job: Job) -> Result:
    return Result(f"options {job.options}, limits {job.limits}")


def says(job: Job) -> Result:
    return Result(os.environ["ACCEPT_SAYS"])


def skips(job: Job) -> Result:
    raise Skipped("nothing of it is here")


def raises(job: Job) -> Result:
    raise ValueError("two\nlines")


def refuses(job: Job) -> Result:
    raise UnsafeDeviceError("somebody came")


def hangs(job: Job) -> Result:
    _note(job, f"hangs {os.getpid()} with {driver_of(job.directory)}")
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    _note(job, f"started {started.pid}")
    _wait_for_ever()
    raise AssertionError


def crashes(job: Job) -> Result:
    os.write(2, b"first line\nit is the memory's fault\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leaves(job: Job) -> Result:
    os._exit(3)


def does_not_end(job: Job) -> Result:
    threading.Thread(target=_wait_for_ever).start()  # which the interpreter waits for
    return Result("it went well")


def breaks_at_the_end(job: Job) -> Result:
    import atexit

    atexit.register(os.kill, os.getpid(), signal.SIGABRT)
    return Result("it went well")


def answers_much(job: Job) -> Result:
    return Result("x" * 1_000_000)


def machine(job: Job) -> Result:
    return Result("", facts={"cuda": "there is no GPU"})


def clears(job: Job) -> Result:
    _note(job, f"clears with {driver_of(job.directory)}")
    return Result("empty again")
