"""Files in known states of the page cache, places to put them, and Pythons of their own for what ends or forks one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TESTS = Path(__file__).parent
PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20

_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def contents(nbytes: int, seed: int = 1) -> bytes:
    """Bytes of which no two ranges are alike."""
    return np.random.default_rng(seed).bytes(nbytes)


def make(path: Path, nbytes: int, seed: int = 1) -> bytes:
    """A file of such bytes."""
    data = contents(nbytes, seed)
    path.write_bytes(data)
    return data


class _CachestatRange(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _Cachestat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache, as the kernel tells it to anybody."""
    fd = os.open(path, os.O_RDONLY)
    try:
        asked, told = _CachestatRange(0, 0), _Cachestat()
        if _libc.syscall(_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(told), 0) == 0:
            return int(told.cached)
        return _pages_in_core(fd, os.fstat(fd).st_size)  # Linux before 6.5
    finally:
        os.close(fd)


def _pages_in_core(fd: int, nbytes: int) -> int:
    if nbytes == 0:
        return 0
    address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), "mmap failed"
    try:
        told = (ctypes.c_ubyte * pages(nbytes))()
        assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), told) == 0, "mincore failed"
        return sum(page & 1 for page in told)
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


def pages(nbytes: int) -> int:
    """Pages that a file of this size has."""
    return -(-nbytes // PAGE)


def cool(path: Path) -> None:
    """Take a file out of the page cache. Skips the test where it stays in memory, as in /dev/shm."""
    if stays_in_memory(path.parent):
        pytest.skip(f"{path.parent} is in memory: its files cannot leave the page cache (see pytest's --basetemp)")
    assert _cooled(path), f"{path} stays in the page cache: does somebody map it?"


def _cooled(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        for _ in range(50):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_pages(path) == 0:
                return True
            time.sleep(0.01)
        return False
    finally:
        os.close(fd)


@functools.cache
def stays_in_memory(directory: Path) -> bool:
    """Whether files there are in memory only, as in /dev/shm."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(bytes(PAGE))
        file.flush()
        return not _cooled(Path(file.name))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process brings about; the test's time limit is the limit."""
    while not condition():
        time.sleep(0.002)


def warm(path: Path) -> None:
    """Bring all of a file into the page cache."""
    path.read_bytes()


def heat(path: Path, pattern: str) -> None:
    """``cold``, ``hot``, ``half`` (the second half is cold) or ``alternating`` (every other 64 KiB is cold)."""
    if pattern == "hot":
        return warm(path)
    cool(path)
    size = path.stat().st_size
    step = 64 << 10
    ranges = {"cold": range(0), "half": range(0, size // 2, step), "alternating": range(0, size, 2 * step)}[pattern]
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no more than is asked for
        for offset in ranges:
            os.pread(fd, step, offset)
    finally:
        os.close(fd)
    return None


HEATS = ["cold", "hot", "half", "alternating"]


def python(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own, which can import what tests can."""
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", program, *map(str, arguments)]
    return run(command, **options)


def output(program: str, *arguments: object, **options: Any) -> str:
    """What such a program prints; it must end well."""
    return ended_well(python(program, *arguments, **options))


def run(
    command: Sequence[object], *, env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a command whose Pythons can import what tests can."""
    return subprocess.run(
        [os.fspath(part) if isinstance(part, os.PathLike) else str(part) for part in command],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of such a command."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **(more or {})}


def ended_well(child: subprocess.CompletedProcess[str]) -> str:
    """What it printed."""
    assert child.returncode == 0, f"ended with {child.returncode}\n{child.stdout}\n{child.stderr}"
    return child.stdout


@functools.cache
def no_mounts() -> str:
    """Why this process cannot mount anything where nobody else sees it; "" if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    try_it = "mount -t tmpfs none /mnt"
    child = subprocess.run([*PRIVATE_MOUNTS, "sh", "-c", try_it], capture_output=True, text=True, check=False)
    return "" if child.returncode == 0 else f"mounting needs root: {child.stderr.strip()}"


#: What is mounted by a command that starts like this is gone when the command ends.
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private")


def need_mounts() -> None:
    """Skip the test where this process may not mount."""
    if reason := no_mounts():
        pytest.skip(reason)


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """A block device that is a file. Skips the test where this process may not have one."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("a loop device needs root and losetup")
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"losetup: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
