"""In a guest with an IOMMU: `gpunvme accept`, on drives that must be left alone, and on one that is empty.

0000:00:08.0 is empty, and has memory of its own; 0000:00:09.0 has a partition table, 0000:00:0a.0 one byte of data.
GUEST_MODULE, if it is set, is the kernel module, built for this kernel.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from checking import SHARE, check, modprobe, namespace_path

from gpunvme.cli.app import run
from gpunvme.nvme.sysfs import find_function

EMPTY, TABLE, DATA = "0000:00:08.0", "0000:00:09.0", "0000:00:0a.0"
OUTPUT = Path("/run/accept.txt")
MIB = 1 << 20


def start(*arguments: str) -> int:
    """Start `gpunvme accept` in a process of its own, forked: importing it anew takes a while in here."""
    process = os.fork()
    if process:
        return process
    try:
        with OUTPUT.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        status = run(["accept", *arguments])
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(77)


def end_of(process: int) -> tuple[int, str]:
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), OUTPUT.read_text()


def accept(*arguments: str) -> tuple[int, str]:
    return end_of(start(*arguments))


def signalled(number: int) -> tuple[int, str]:
    """Send a signal when the drive is with vfio-pci."""
    process = start(EMPTY, "--erase", EMPTY, "--skip", "machine", "--skip", "kernel", "--skip", "p2pdma")
    give_up = time.monotonic() + 200
    try:
        while driver() != "vfio-pci":
            assert time.monotonic() < give_up, f"it is with {driver()}: {OUTPUT.read_text()}"
            time.sleep(0.02)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    os.kill(process, number)
    return end_of(process)


def data_on_it() -> bool:
    with Path(namespace_path(EMPTY)).open("rb") as disk:
        return bool(disk.read().strip(b"\0"))


def driver() -> str | None:
    return find_function(EMPTY).driver


@check(seconds=90)
def what_is_not_empty_is_refused() -> None:
    modprobe("nvme")
    for address, said in ((TABLE, "holds a partition table (MBR)"), (DATA, f"holds data at byte {11 * MIB + 77}")):
        namespace_path(address)
        status, text = accept(address, "--erase", address)
        assert (status, said in text, "Traceback" in text) == (7, True, False), text
        assert find_function(address).driver == "nvme"


@check(seconds=400)
def everything_is_tried_and_the_drive_is_empty_again() -> dict[str, object]:
    if "GUEST_MODULE" in os.environ:
        subprocess.run(["insmod", os.environ["GUEST_MODULE"]], check=True, timeout=60)
    namespace_path(EMPTY)
    status, text = accept(EMPTY, "--erase", EMPTY, "--json", str(SHARE / "accept.json"))
    (SHARE / "accept.txt").write_text(text)
    assert driver() == "nvme", text
    assert status == 0, text
    assert not data_on_it(), "something was left on it"
    document = (SHARE / "accept.json").read_text()
    assert "PRIVATE0815" not in document + text, "the serial number is in there"
    return {step["step"]: step["outcome"] for step in json.loads(document)["steps"]}


@check(seconds=400)
def killed_it_is_given_back_all_the_same() -> None:
    status, text = signalled(signal.SIGKILL)
    assert status == -signal.SIGKILL, text
    give_up = time.monotonic() + 100
    while driver() != "nvme":
        assert time.monotonic() < give_up, f"it is with {driver()}"
        time.sleep(0.05)
    namespace_path(EMPTY)
