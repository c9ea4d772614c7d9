"""The machine as the checks see it: /proc, /sys and /boot under a root, and what its probes tell."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from gpunvme.doctor.probes import Probes, native_probes


@dataclass(frozen=True)
class System:
    """A machine: the files under ``root`` that describe it, and its `Probes`.

    Parameters
    ----------
    root
        Where ``/proc``, ``/sys`` and ``/boot`` are found; a test points it at a tree of its own.
    probes
        What only running code can tell.
    """

    root: Path = Path("/")
    probes: Probes = field(default_factory=native_probes)

    def path(self, name: str) -> Path:
        """Return where an absolute path lies under the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Return a file's text without surrounding blanks, or None if it cannot be read."""
        data = self.read_bytes(name)
        return None if data is None else data.decode("utf-8", "replace").strip("\0 \n\t")

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it cannot be read."""
        try:
            return self.path(name).read_bytes()
        except (OSError, ValueError):  # a name made of a garbled file's text may hold a NUL
            return None

    def unreadable(self, name: str) -> str:
        """Return in words why a file says nothing: it is absent, forbidden, or holds nothing that is understood."""
        try:
            self.path(name).read_bytes()
        except PermissionError:
            return f"{name} is for root only (sudo gpunvme doctor)"
        except (OSError, ValueError) as error:
            return f"{name}: {getattr(error, 'strerror', None) or error}"
        return f"{name} is not understood"

    def read_int(self, name: str) -> int | None:
        """Return the number in a file, or None."""
        text = self.read(name)
        try:
            return int(text) if text else None
        except ValueError:
            return None

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder is there."""
        try:
            return self.path(name).exists()
        except (OSError, ValueError):
            return False

    def link(self, name: str) -> str | None:
        """Return the last part of where a symbolic link points, or None: how sysfs names drivers and groups."""
        try:
            return os.path.basename(os.readlink(self.path(name)))
        except (OSError, ValueError):
            return None

    def names(self, name: str) -> list[str]:
        """Return the sorted names in a folder; none if there is no such folder."""
        try:
            return sorted(os.listdir(self.path(name)))
        except (OSError, ValueError):
            return []

    def resolve(self, name: str) -> str | None:
        """Follow a symbolic link within the root; return the absolute name that it leads to, or None."""
        try:
            target = self.path(name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12
            return None
        root = self.root.resolve()
        return "/" + str(target.relative_to(root)) if target.is_relative_to(root) else None

    def kernel_release(self) -> str:
        """Return the running kernel's release, as ``uname -r`` prints it."""
        return self.read("/proc/sys/kernel/osrelease") or "unknown"

    def kernel_version(self) -> tuple[int, int]:
        """Return the running kernel's major and minor number; ``(0, 0)`` if it cannot be told."""
        head = self.kernel_release().split("-")[0].split(".")
        try:
            return int(head[0]), int(head[1])
        except (ValueError, IndexError):
            return 0, 0

    def in_container(self) -> bool:
        """Tell whether this looks like the inside of a container."""
        if self.exists("/.dockerenv") or self.exists("/run/.containerenv"):
            return True
        environment = self.read_bytes("/proc/1/environ") or b""
        groups = self.read("/proc/1/cgroup") or ""
        return b"container=" in environment or any(word in groups for word in ("docker", "kubepods", "containerd"))

    def kernel_parameters(self) -> list[str]:
        """Return the words of the kernel's command line."""
        return (self.read("/proc/cmdline") or "").split()

    def virtual(self) -> bool:
        """Tell whether this is a virtual machine: x86 processors say so."""
        return re.search(r"^flags\s*:.*\bhypervisor\b", self.read("/proc/cpuinfo") or "", re.MULTILINE) is not None
