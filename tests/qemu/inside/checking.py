"""What runs in a guest: checks, one after another, whose results the tests outside read. Started by `run`.

A check is a function with `check` on top. It passes if it returns, and fails if it raises; what it returns (a dict)
goes outside with it, and so does what the kernel logged meanwhile. Unless a check expects them, faults that the IOMMU
reports fail it: QEMU's controller answers such a command with success.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpunvme.nvme.sysfs import namespace_names

SHARE = Path("/run/share")
# "DMAR: [DMA Write NO_PASID] Request device [00:08.0] fault addr 0x…", or the summary where many came at once.
FAULT = re.compile(r"DMAR: \[(DMA|INTR)|DMAR:.*fault addr|AMD-Vi: Event logged|DMAR: DRHD: handling fault")
# What no check of ours may cause in the kernel.
TROUBLE = re.compile(
    r"BUG[: ]|WARNING: |UBSAN|DMA-API: |Oops|general protection|Kernel panic|blocked for more than|nvme.*timeout"
)


@dataclass(frozen=True)
class Check:
    """A check and what it is allowed."""

    name: str
    function: Callable[[], dict[str, Any] | None]
    faults: bool
    seconds: int


CHECKS: list[Check] = []


def check(*, faults: bool = False, seconds: int = 60) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Make a function a check; ``faults``: the IOMMU is expected to report some, and must."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append(Check(function.__name__, function, faults, seconds))
        return function

    return register


class KernelLog:
    """What the kernel logs from now on (/dev/kmsg)."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> str:
        lines = []
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return "\n".join(lines)
            except BrokenPipeError:  # records were lost
                continue
            lines.append(record.decode(errors="replace").partition(";")[2].rstrip("\n"))

    def wait(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Return what is logged until a line matches, or until it takes too long."""
        give_up = time.monotonic() + seconds
        text = self.read()
        while not pattern.search(text) and time.monotonic() < give_up:
            time.sleep(0.02)
            text += "\n" + self.read()
        return text


def _too_late(*_: object) -> None:
    raise TimeoutError("the check took too long")


def _run(each: Check, log: KernelLog) -> dict[str, Any]:
    log.read()
    started = time.monotonic()
    signal.alarm(each.seconds)
    # If even the alarm is not noticed: native code that hangs.
    faulthandler.dump_traceback_later(each.seconds + 10, exit=True)
    passed, text, facts = True, "", {}
    try:
        facts = each.function() or {}
    except BaseException:  # noqa: BLE001 - whatever it is, it goes outside
        passed, text = False, traceback.format_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    dmesg = log.wait(FAULT, 3) if each.faults else log.read()
    if bool(FAULT.search(dmesg)) != each.faults:
        passed = False
        text += "the IOMMU reported no fault, and had to" if each.faults else "the IOMMU reported a fault"
    if TROUBLE.search(dmesg):
        passed = False
        text += "the kernel is in trouble"
    seconds = round(time.monotonic() - started, 3)
    return {"name": each.name, "passed": passed, "text": text, "dmesg": dmesg, "seconds": seconds, "facts": facts}


def main(programs: list[str]) -> None:
    """Run the checks of some programs of this folder, in their order."""
    signal.signal(signal.SIGALRM, _too_late)
    log = KernelLog()
    with (SHARE / "results").open("w") as results:
        for program in programs:
            first = len(CHECKS)
            importlib.import_module(program)
            for each in CHECKS[first:]:
                print(f"=== {program}: {each.name}", flush=True)
                results.write(json.dumps({"program": program, **_run(each, log)}) + "\n")
                results.flush()


# --- what checks need


def modprobe(*modules: str) -> None:
    """Load modules that are not built in."""
    for module in modules:
        if os.path.exists(f"/lib/modules/{os.uname().release}/{module}.ko"):
            subprocess.run(["modprobe", module], check=True, timeout=60)


def settle(path: str, seconds: float = 10) -> None:
    """Wait until a device file is there."""
    give_up = time.monotonic() + seconds
    while not os.path.exists(path):
        assert time.monotonic() < give_up, f"{path} did not appear"
        time.sleep(0.02)


def shell(command: str, seconds: float = 60) -> str:
    """Run a command; return what it says. Fails if it fails."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def refusal(kind: type[BaseException], function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return what the error says that a call must end in."""
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function.__qualname__} did not refuse")


def in_child(function: Callable[[], str], *, nobody: bool = False) -> str:
    """Run a function in a child, without privileges if `nobody`; return what it returns, or the error it ends in."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if nobody:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = function()
        except BaseException as error:  # noqa: BLE001 - the parent judges
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def as_nobody(function: Callable[[], str]) -> str:
    """Run a function in a child without privileges; return what it returns, or the error it ends in."""
    return in_child(function, nobody=True)


def namespace_path(address: str, nsid: int = 1) -> str:
    """Wait for the block device of a namespace of a controller that the kernel drives; return its path."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        for name in namespace_names(address):
            path = Path(f"/sys/class/block/{name}/nsid")
            if path.exists() and int(path.read_text()) == nsid and os.path.exists(f"/dev/{name}"):
                return f"/dev/{name}"
        time.sleep(0.02)
    raise AssertionError(f"{address} has no namespace {nsid}")
