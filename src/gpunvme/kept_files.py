"""What gpunvme keeps on a machine beside its own package, and where: caches, records, and what root installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# What `make deb`, `make -C kmod` and people's own hands leave (docs/install.md).
_SYSTEM = {
    "the udev rule": ("usr/lib/udev/rules.d/60-gpunvme.rules", "etc/udev/rules.d/60-gpunvme.rules"),
    "the unit that binds drives": (
        *("usr/lib/systemd/system/gpunvme-bind@.service", "etc/systemd/system/gpunvme-bind@.service"),
        *("etc/systemd/system/*.wants/gpunvme-bind@*.service", "etc/systemd/system/gpunvme-bind@*.d"),
        "etc/default/gpunvme-bind",
    ),
    "the kernel module's sources": ("usr/src/gpunvme-*", "var/lib/dkms/gpunvme"),
    "the kernel module": ("lib/modules/*/updates/**/gpunvme.ko*", "lib/modules/*/extra/gpunvme.ko*"),
}


@dataclass(frozen=True)
class Kept:
    """A file or folder, and what it is. ``there``: whether it is there now."""

    path: Path
    what: str

    @property
    def there(self) -> bool:
        """Whether it is there now; a link that leads nowhere is."""
        return os.path.lexists(self.path)


def cache_directory() -> Path:
    """Folder of everything that can be removed at any time: it is measured, compiled or logged anew."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpunvme"


def kept_files(root: Path = Path("/")) -> list[Kept]:
    """List what this user's programs keep, whether it is there or not, and what is installed on the system.

    Parameters
    ----------
    root
        Where the system is; a test points it at a tree of its own.
    """
    from gpunvme.cufile.facts import settings
    from gpunvme.gpu.compile import cubin_directory
    from gpunvme.paths import measured
    from gpunvme.tiers.names import PRIVATE

    found = [
        Kept(measured.place(), "what paths were measured to reach"),
        Kept(cubin_directory(), "kernels that NVRTC compiled"),
    ]
    logs = os.environ.get("CUFILE_LOGFILE_PATH") or settings().log_directory or cache_directory() / "cufile.log"
    found.append(Kept(Path(logs), "cuFile's log"))
    for text in filter(None, os.environ.get("GPUNVME_TIERS", "").split(os.pathsep)):
        name, _, directory = text.partition("=")
        found.append(Kept(Path(directory) / PRIVATE, f"tier {name}'s marker, and the record of which file is where"))
    for what, patterns in _SYSTEM.items():
        for pattern in patterns:
            found += [Kept(path, what) for path in sorted(root.glob(pattern))]
    return found
