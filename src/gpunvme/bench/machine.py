"""What a figure was measured on: machine, file and versions. A figure without its machine says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
from typing import Any

_SIZES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


def size_text(nbytes: int) -> str:
    """Write a size as people do: ``"4 KiB"``, ``"1.5 GiB"``."""
    for unit, scale in _SIZES:
        if nbytes >= scale:
            return f"{nbytes / scale:.1f}".removesuffix(".0") + f" {unit}"
    return f"{nbytes} B"


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _first_value(path: str, key: str) -> str:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""


def memory_bytes(key: str = "MemTotal") -> int:
    """Return a figure of ``/proc/meminfo`` in bytes, 0 if it is not there."""
    value = _first_value("/proc/meminfo", key).split()
    return int(value[0]) * 1024 if value else 0


def describe_machine() -> dict[str, Any]:
    """Describe the machine: processor, CPUs of this process, memory, kernel.

    Returns
    -------
    dict
        JSON-able.
    """
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": cpus(),
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "system": platform.system(),
    }


def filesystem(path: str) -> tuple[str, str]:
    """Return the type and the source of the file system that holds a path.

    Parameters
    ----------
    path : str
        A file or a directory that exists.

    Returns
    -------
    tuple of str
        For example ``("ext4", "/dev/vda")``; empty strings where /proc does not tell.
    """
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    mounts: list[tuple[bool, int, str, str]] = []
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as lines:
            for line in lines:
                left, _, right = line.partition(" - ")
                number, point = left.split()[2], left.split()[4]
                kind, source = right.split()[:2]
                if point == "/" or real == point or real.startswith(point + "/"):
                    # Some file systems (btrfs) give files another device number than their mount.
                    mounts.append((number == wanted, len(point), kind, source))
    except (OSError, IndexError, ValueError):
        return "", ""
    return max(mounts)[2:] if mounts else ("", "")


def describe_file(path: str) -> dict[str, Any]:
    """Describe a file and the drive under it, as far as the kernel tells.

    Parameters
    ----------
    path : str
        The file.

    Returns
    -------
    dict
        JSON-able.
    """
    status = os.stat(path)
    kind, source = filesystem(path)
    return {
        "name": os.path.basename(path),
        "nbytes": status.st_size,
        "filesystem": kind,
        "source": source,
        "drive": _drive(status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev),
    }


def _drive(device: int) -> str:
    """Return the model of the drive behind a device number, or its kernel name."""
    root = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for folder in (root, os.path.join(root, "..")):
        try:
            with open(os.path.join(folder, "device", "model"), encoding="utf-8") as text:
                return text.read().strip()
        except OSError:
            continue
    return os.path.basename(os.path.realpath(root)) if os.path.exists(root) else ""


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of installed distributions; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
