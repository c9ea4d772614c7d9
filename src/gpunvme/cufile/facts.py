"""What this machine says about GPUDirect Storage, read from files: nothing is opened, nothing can hang.

Each question has an answer that means "cannot be told", and it is never taken for yes.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_TRUE = frozenset({"true", "1", "yes", "on"})
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
# Filesystems whose files are elsewhere, and the bit that the driver's properties have for each of them
# (CUfileDriverStatusFlags).
_REMOTE = {"lustre": 0, "wekafs": 1, "nfs": 2, "nfs4": 2, "gpfs": 3, "beegfs": 9, "scatefs": 12, "virtiofs": 13}
_NVME, _NVMEOF, _SCSI = 4, 5, 6
# Some kernels show no symbols to ordinary users: a list shorter than this says nothing.
_SYMBOLS_AT_LEAST = 1000


def _text(root: Path, name: str) -> str | None:
    try:
        return (root / name.lstrip("/")).read_bytes().decode("utf-8", "replace").strip("\0 \n\t")
    except (OSError, ValueError):  # a name made of another file's text may hold a NUL
        return None


# --- nvidia-fs


def nvidia_fs(root: Path = _ROOT) -> str | None:
    """Version of the nvidia-fs kernel module, as it says itself; None where it is not loaded."""
    text = _text(root, "/proc/driver/nvidia-fs/version")
    if text is None:
        return "unknown" if (root / "proc/driver/nvidia-fs").is_dir() else None
    number = re.search(r"\d+(\.\d+)+", text)
    return number[0] if number else (text.splitlines() or ["unknown"])[0]


@dataclass(frozen=True, slots=True)
class KernelCounts:
    """What nvidia-fs counted, for all processes: operations begun since it was loaded."""

    reads: int
    writes: int
    counting: bool


def nvidia_fs_counts(root: Path = _ROOT) -> KernelCounts | None:
    """Counters of /proc/driver/nvidia-fs/stats; None where there are none, or they are not understood."""
    text = _text(root, "/proc/driver/nvidia-fs/stats")
    if text is None:
        return None
    # "Reads : n=12 ok=12 err=0 readMiB=4 …", and the same of writes; with the statistics off they are absent or 0.
    counts = [re.search(rf"^{name}\s*:\s*n=(\d+)", text, re.MULTILINE) for name in ("Reads", "Writes")]
    switch = re.search(r"IO stats\s*:\s*(\w+)", text)
    if counts[0] is None or counts[1] is None:
        return None
    return KernelCounts(int(counts[0][1]), int(counts[1][1]), switch is not None and switch[1].lower() == "enabled")


# --- P2PDMA


def kernel_p2pdma(root: Path = _ROOT) -> bool | None:
    """Whether the running kernel has PCI P2PDMA: by its configuration, else by its symbols; None: it does not say."""
    release = _text(root, "/proc/sys/kernel/osrelease") or "unknown"
    configuration = _text(root, f"/boot/config-{release}")
    if configuration is None:
        try:
            packed = (root / "proc/config.gz").read_bytes()
            configuration = gzip.decompress(packed).decode("utf-8", "replace")
        except (OSError, EOFError, zlib.error):
            configuration = None
    if configuration is not None:
        return re.search(r"^CONFIG_PCI_P2PDMA=y$", configuration, re.MULTILINE) is not None
    seen = 0
    try:
        with (root / "proc/kallsyms").open("rb") as lines:
            for seen, line in enumerate(lines, 1):  # noqa: B007 - read after the loop
                if b" pci_p2pdma_" in line:
                    return True
    except OSError:
        return None
    return False if seen > _SYMBOLS_AT_LEAST else None


def static_bar1(root: Path = _ROOT) -> bool | None:
    """Whether NVIDIA's driver was told to map all GPU memory, as P2PDMA needs it on x86; None: it does not say."""
    text = _text(root, "/proc/driver/nvidia/params")
    if text is None:
        return None
    return re.search(r"RMForceStaticBar1\s*=\s*(0x)?0*1\b", text, re.IGNORECASE) is not None


# --- cufile.json


@dataclass(frozen=True, slots=True)
class Settings:
    """What cufile.json and the environment ask of cuFile; None: nothing, so that its own default holds."""

    place: str
    problem: str = ""
    force_compat: bool | None = None
    allow_compat: bool | None = None
    use_p2pdma: bool | None = None
    log_directory: str = ""


def settings(root: Path = _ROOT, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration that libcufile will read: ``CUFILE_ENV_PATH_JSON``, else /etc/cufile.json."""
    environ = os.environ if environ is None else environ
    place = environ.get("CUFILE_ENV_PATH_JSON") or "/etc/cufile.json"
    text = _text(root, place) if place.startswith("/") else _text(Path(), os.path.abspath(place))
    problem, properties, logging = "", {}, {}
    if text is not None:
        try:
            parsed = json.loads(_without_comments(text))
            properties, logging = parsed.get("properties", {}), parsed.get("logging", {})
            if not isinstance(properties, dict) or not isinstance(logging, dict):
                raise ValueError("properties and logging are objects")
        except (ValueError, AttributeError, RecursionError) as error:
            problem, properties, logging = f"{place} is not understood: {error}", {}, {}
    elif "CUFILE_ENV_PATH_JSON" in environ:
        problem = f"{place}, which CUFILE_ENV_PATH_JSON names, cannot be read"

    def asked(variable: str, *names: str) -> bool | None:
        if variable in environ:
            return environ[variable].strip().lower() in _TRUE
        found = [properties[name] for name in names if isinstance(properties.get(name), bool)]
        return found[0] if found else None

    directory = logging.get("dir")
    return Settings(
        place if text is not None else "",
        problem,
        asked("CUFILE_FORCE_COMPAT_MODE", "force_compat_mode"),
        asked("CUFILE_ALLOW_COMPAT_MODE", "allow_compat_mode"),
        asked("CUFILE_USE_PCIP2PDMA", "use_pci_p2pdma"),
        directory if isinstance(directory, str) else "",
    )


def _without_comments(text: str) -> str:
    """Blank out ``// …`` outside strings, as NVIDIA's own cufile.json has them, and commas before a closing bracket."""
    text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda match: match[1] or "", text)
    return re.sub(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', lambda match: match[1] or "", text)


# --- where a file is


@dataclass(frozen=True, slots=True)
class Place:
    """The file system and the drives that an open file is on; ``drives`` is empty where sysfs does not lead to any."""

    kind: str
    source: str
    options: str
    drives: tuple[str, ...]
    transports: frozenset[str]
    device: str = ""  # major:minor of the block device that the file system is on; "" where the kernel tells none

    @property
    def in_memory(self) -> bool:
        """Whether there is no drive at all."""
        return self.kind in _IN_MEMORY

    @property
    def remote(self) -> bool:
        """Whether another machine has the bytes."""
        return self.kind in _REMOTE

    @property
    def rdma(self) -> str:
        """Why the bytes may come by RDMA from another machine; "" where nothing says so."""
        if "proto=rdma" in self.options or "rdma" in self.options.split(","):
            return f"{self.kind} of {self.source}, mounted with RDMA"
        if self.transports & {"rdma", "tcp", "fc"}:
            return f"NVMe over {'/'.join(sorted(self.transports))}"
        return f"{self.kind} of {self.source}" if self.kind in _REMOTE else ""

    @property
    def status_bit(self) -> int | None:
        """Bit of the driver's status flags that says whether cuFile goes directly to it; None: not known which."""
        if self.kind in _REMOTE:
            return _REMOTE[self.kind]
        if self.transports == {"pcie"}:
            return _NVME
        if self.transports and self.transports <= {"rdma", "tcp", "fc"}:
            return _NVMEOF
        if self.drives and all(drive.startswith("sd") for drive in self.drives):
            return _SCSI
        return None

    def __str__(self) -> str:
        on = ", ".join(self.drives) or self.source or "an unknown device"
        return f"{self.kind or 'an unknown file system'} on {on}"


def place_of(fd: int, root: Path = _ROOT) -> Place:
    """Find out where an open file is."""
    information = os.fstat(fd)
    number = information.st_rdev if stat.S_ISBLK(information.st_mode) else information.st_dev
    kind = source = options = ""
    mount = re.search(r"^mnt_id:\s*(\d+)", _text(root, f"/proc/self/fdinfo/{fd}") or "", re.MULTILINE)
    for line in (_text(root, "/proc/self/mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        if mount and head.split(" ", 1)[0] == mount[1] and len(tail.split()) >= 2:
            kind, source, *rest = tail.split()
            options = ",".join([head.split()[5], *rest])
    if stat.S_ISBLK(information.st_mode):
        kind, source, options = "block device", "", ""
    name = f"{os.major(number)}:{os.minor(number)}"
    if os.major(number) == 0 and source.startswith("/dev/"):  # btrfs numbers its files' devices by itself
        try:
            device = os.stat(source).st_rdev
            name = f"{os.major(device)}:{os.minor(device)}"
        except OSError:
            pass
    drives = tuple(sorted(_drives(root, root / "sys/dev/block" / name)))
    transports = frozenset(_transport(root, drive) for drive in drives) - {""}
    mounted = os.major(number) != 0 and not stat.S_ISBLK(information.st_mode)
    return Place(kind, source, options, drives, transports, name if mounted else "")


def missing_from_udev(place: Place, root: Path = _ROOT) -> str:
    """What cuFile will not find about a file system in udev's database, and what to do; "" where nothing is missing.

    cuFile 1.15 asks libudev for ID_FS_USAGE of the device, and registers no file on it where there is no answer
    (HANDLE_NOT_REGISTERED), compatibility mode or not. Containers have no such database of their own.
    """
    if not place.device:
        return ""
    entry = f"/run/udev/data/b{place.device}"
    if re.search(r"^E:ID_FS_USAGE=.", _text(root, entry) or "", re.MULTILINE):
        return ""
    return (
        f"udev's database does not have the file system of {place} (ID_FS_USAGE in {entry}); in a container, mount the "
        "host's: docker run -v /run/udev:/run/udev:ro"
    )


def _drives(root: Path, link: Path) -> set[str]:
    """Names of the whole drives beneath a block device: of a partition, a volume, a RAID."""
    try:
        device = link.resolve(strict=True)
    except OSError:
        return set()
    if (device / "partition").exists():
        device = device.parent
    beneath = device / "slaves"
    below = sorted(beneath.iterdir()) if beneath.is_dir() else []
    if not below:
        return {device.name}
    return {drive for each in below for drive in _drives(root, each)}


def _transport(root: Path, drive: str) -> str:
    """``pcie``, ``rdma``, ``tcp``, ``fc`` for an NVMe drive's controller, else ""."""
    if not drive.startswith("nvme"):
        return ""
    for place in (f"/sys/block/{drive}/device/transport", f"/sys/block/{drive}/device/device/transport"):
        if text := _text(root, place):
            return text
    return ""


# --- the machine, asked once


@functools.cache
def p2pdma() -> bool | None:
    """`kernel_p2pdma` of this machine: its list of symbols is long."""
    return kernel_p2pdma()


@functools.cache
def boot_id() -> str:
    """What is different after every boot."""
    return _text(_ROOT, "/proc/sys/kernel/random/boot_id") or ""


@functools.cache
def nvidia_driver() -> str:
    """Version of the NVIDIA kernel driver, or "unknown"."""
    text = _text(_ROOT, "/proc/driver/nvidia/version") or ""
    number = re.search(r"\s(\d+(?:\.\d+)+)\s", text)
    return number[1] if number else "unknown"
