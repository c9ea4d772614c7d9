"""Reports against what the kernel says: its counters of bytes read, its page cache, its system calls.

A report that is made up is worse than none. Nothing here asks the engine; it is only what is judged.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import files
import gpunvme
from files import MIB

SIZE = 12 * MIB


def bytes_read_from_drives() -> int:
    """By this process, all of its threads."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise AssertionError("no read_bytes in /proc/self/io")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    files.make(tmp_path / "file", SIZE)
    return tmp_path / "file"


def reading(file: gpunvme.File, offset: int, nbytes: int) -> tuple[gpunvme.Transfer, int]:
    """A read and what the kernel has counted meanwhile."""
    room = np.zeros(nbytes, np.uint8)  # touched, so that no page of it is counted
    room[:] = 1
    before = bytes_read_from_drives()
    transfer = file.read_into(room, offset)
    return transfer, bytes_read_from_drives() - before


def need_direct(transfer: gpunvme.Transfer) -> None:
    if not transfer.direct_bytes:
        pytest.skip(f"O_DIRECT does not work here: {transfer.reason}")


@pytest.mark.parametrize(("offset", "nbytes"), [(0, SIZE), (4096, 4 * MIB), (777, 5 * MIB + 3), (100, 1000)])
def test_direct_bytes_are_read_from_the_drive(place: Path, offset: int, nbytes: int) -> None:
    files.cool(place)
    with gpunvme.open(place) as file:
        transfer, counted = reading(file, offset, nbytes)
    need_direct(transfer)
    assert (transfer.direct_bytes, transfer.cached_bytes) == (nbytes, 0)
    # Whole blocks are read where the range begins and ends within one, for each piece of a MiB at most.
    assert nbytes <= counted <= nbytes + 2 * 4096 * (nbytes // MIB + 2)


def test_a_cold_read_leaves_the_page_cache_alone(place: Path) -> None:
    """Reading a model must not throw out of memory what everybody else keeps there."""
    files.cool(place)
    with gpunvme.open(place) as file:
        transfer, _ = reading(file, 0, SIZE)
        need_direct(transfer)
        assert files.cached_pages(place) == 0
        file.gather(np.arange(0, SIZE - 100, 40_000), 100)
        assert files.cached_pages(place) == 0


@pytest.mark.parametrize("nbytes", [100, 64 << 10, SIZE])
def test_cached_bytes_are_not_read_from_the_drive(place: Path, nbytes: int) -> None:
    files.warm(place)
    assert files.cached_pages(place) == files.pages(SIZE)
    with gpunvme.open(place) as file:
        transfer, counted = reading(file, 0, nbytes)
    assert (transfer.cached_bytes, transfer.direct_bytes, transfer.buffered_bytes) == (nbytes, 0, 0)
    assert counted == 0
    assert files.cached_pages(place) == files.pages(SIZE)


@pytest.mark.parametrize("heat", ["half", "alternating"])
def test_what_is_cached_is_not_read_again(place: Path, heat: str) -> None:
    files.heat(place, heat)
    cached = files.cached_pages(place) * files.PAGE
    assert 0.4 * SIZE < cached < 0.6 * SIZE
    with gpunvme.open(place) as file:
        transfer, counted = reading(file, 0, SIZE)
    need_direct(transfer)
    assert transfer.direct_bytes + transfer.cached_bytes == SIZE
    if heat == "half":
        assert transfer.cached_bytes == cached
    assert transfer.cached_bytes <= cached
    assert counted == transfer.direct_bytes
    assert files.cached_pages(place) * files.PAGE == cached


def test_small_reads_are_counted_like_large_ones(place: Path) -> None:
    """8 KiB each, every second cached."""
    files.heat(place, "alternating")
    offsets = np.arange(0, SIZE, 64 << 10) + 4096
    before = bytes_read_from_drives()
    with gpunvme.open(place) as file:
        file.gather(offsets, 8192)
        transfer = file.last_transfer
    counted = bytes_read_from_drives() - before
    assert transfer is not None
    need_direct(transfer)
    half = len(offsets) // 2 * 8192
    assert (transfer.direct_bytes, transfer.cached_bytes) == (half, half)
    assert half <= counted <= 2 * half


class Calls(NamedTuple):
    """What strace saw of a program that reads a cold file: counts by system call, and what the report said."""

    ring_setups: int
    ring_enters: int
    direct_opens: int
    direct_reads: int
    report: str


READING = """
import sys
import numpy as np
import gpunvme
{before}
with gpunvme.open(sys.argv[1]) as file:
    transfer = file.read_into(np.empty(file.size, np.uint8))
    print(transfer.direct_bytes, transfer.reason, "|", file.explain().verdicts[0].reason)
"""


def traced(place: Path, log: Path, env: dict[str, str] | None = None, before: str = "") -> Calls:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    files.cool(place)
    watch = "trace=openat,openat2,io_uring_setup,io_uring_enter,pread64,preadv2"
    command = ["strace", "-f", "-qq", "-y", "-e", watch, "-o", log, sys.executable, "-c", READING.format(before=before)]
    child = files.run([*command, place], env=env)
    if "PTRACE" in child.stderr or "ptrace" in child.stderr:
        pytest.skip(f"strace: {child.stderr.strip().splitlines()[0]}")
    report = files.ended_well(child)
    lines = log.read_text().splitlines()
    opened = [line for line in lines if "open" in line and "O_DIRECT" in line and place.name in line]
    fds = {match[1] for line in opened if (match := re.search(r"= (\d+)<", line))}
    reads = [line for line in lines if (match := re.search(r"pread(?:64|v2)\((\d+)<", line)) and match[1] in fds]
    return Calls(
        sum("io_uring_setup(" in line and not re.search(r"= -1", line) for line in lines),
        sum("io_uring_enter(" in line for line in lines),
        len(opened),
        len(reads),
        report.strip(),
    )


def test_io_uring_is_what_it_says(place: Path, tmp_path: Path) -> None:
    seen = traced(place, tmp_path / "log")
    if "io_uring" not in seen.report or "threads" in seen.report:
        pytest.skip(f"io_uring does not work here: {seen.report}")
    assert seen.report.startswith(f"{SIZE} 12.0 MiB O_DIRECT by io_uring")
    assert seen.direct_opens >= 1
    assert seen.ring_setups >= 1
    assert seen.ring_enters >= SIZE // MIB // 16
    assert seen.direct_reads == 0


def test_threads_are_what_it_says(place: Path, tmp_path: Path) -> None:
    seen = traced(place, tmp_path / "log", {"GPUNVME_IO": "threads"})
    if seen.report.startswith("0 "):
        pytest.skip(f"O_DIRECT does not work here: {seen.report}")
    assert seen.report.startswith(f"{SIZE} 12.0 MiB O_DIRECT by threads (GPUNVME_IO=threads)")
    assert "by threads (GPUNVME_IO=threads)" in seen.report.split("|")[1]
    assert seen.ring_enters == 0
    assert seen.direct_reads >= SIZE // MIB


# What container runtimes install: io_uring_setup (425) is answered with EPERM, everything else is let through.
REFUSING_IO_URING = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
instructions = b"".join(struct.pack("HBBI", *each) for each in [
    (0x20, 0, 0, 0),           # load the number of the system call
    (0x15, 0, 1, 425),         # is it io_uring_setup?
    (0x06, 0, 0, 0x00050001),  # then EPERM
    (0x06, 0, 0, 0x7FFF0000),  # else go on
])
memory = ctypes.create_string_buffer(instructions)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(memory)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(22, 2, program) != 0:
    raise SystemExit(77)
"""


def test_io_uring_refused_by_the_system(place: Path) -> None:
    files.cool(place)
    child = files.python(READING.format(before=REFUSING_IO_URING), place)
    if child.returncode == 77:
        pytest.skip("seccomp filters cannot be installed here")
    done, explained = files.ended_well(child).split("|")
    if done.startswith("0 "):
        pytest.skip(f"O_DIRECT does not work here: {done}")
    assert done.startswith(f"{SIZE} 12.0 MiB O_DIRECT by threads (io_uring_setup was refused: Operation not permitted)")
    assert "by threads (io_uring_setup was refused: Operation not permitted)" in explained
    assert "`gpunvme doctor` says who refuses it" in explained


def test_the_bytes_are_on_the_drive_after_fsync(tmp_path: Path) -> None:
    """Read back from the drive, past the page cache, by somebody else's program."""
    data = files.contents(3 * MIB + 4097)
    path = tmp_path / "written"
    with gpunvme.open(path, "w") as file:
        file.write_from(data, fsync=True)
    files.cool(path)
    assert path.read_bytes() == data
    files.cool(path)
    block = 4096
    whole = len(data) // block * block
    copied = subprocess.run(
        ["dd", f"if={path}", "iflag=direct", "bs=4096", f"count={whole // block}", "status=none"],
        capture_output=True,
        check=False,
    )
    if copied.returncode == 0:
        assert copied.stdout == data[:whole]
