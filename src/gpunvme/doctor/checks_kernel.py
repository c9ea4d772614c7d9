"""The engine, the kernel's interfaces that it uses, and the limits on this process."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gpunvme.doctor.finding import Finding, Level, unknown

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

_FEW_FILES = 1024


def check_engine(system: System) -> list[Finding]:
    """Check that the native engine can be imported."""
    reason = system.probes.engine_reason()
    if not reason:
        return [Finding(Level.GREEN, "engine", "the native engine is there")]
    return [
        Finding(
            Level.RED,
            "engine",
            f"the native engine cannot be imported: {reason}",
            cost="nothing can be read or written",
            fix="install the package again",
            commands=("pip install --force-reinstall gpunvme",),
        )
    ]


def check_kernel(system: System) -> list[Finding]:
    """Check the kernel's version against the interfaces that the engine uses."""
    release, version = system.kernel_release(), system.kernel_version()
    if version == (0, 0):
        return [unknown("kernel", f"version ({release})", system.unreadable("/proc/sys/kernel/osrelease"))]
    if version < (5, 1):
        return [
            Finding(
                Level.YELLOW,
                "kernel",
                f"Linux {release} is older than io_uring (5.1)",
                cost="threads do the O_DIRECT reads: more CPU time per byte",
                fix="boot Linux 5.15 or newer",
            )
        ]
    return [Finding(Level.GREEN, "kernel", f"Linux {release}")]


def check_io_uring(system: System) -> list[Finding]:
    """Check that an io_uring can be set up, and if not, who refuses it."""
    reason = system.probes.io_uring_reason()
    if not reason:
        return [Finding(Level.GREEN, "io_uring", "works")]
    return [
        Finding(
            Level.YELLOW,
            "io_uring",
            f"refused: {reason}",
            cost="threads do the O_DIRECT reads: the same bytes, more CPU time per byte",
            fix=_io_uring_fix(system),
            commands=("sudo sysctl kernel.io_uring_disabled=0",) if _switched_off(system) else (),
        )
    ]


def _switched_off(system: System) -> bool:
    return system.read_int("/proc/sys/kernel/io_uring_disabled") in {1, 2}


def _io_uring_fix(system: System) -> str:
    disabled = system.read_int("/proc/sys/kernel/io_uring_disabled")
    if disabled == 2:
        return "a setting of the kernel forbids it to all: allow it"
    if disabled == 1:
        return "it is for CAP_SYS_ADMIN and the group in kernel.io_uring_group: join that, or allow it to all"
    if _status(system).get("Seccomp") == "2":
        where = "this container's" if system.in_container() else "a"
        return (
            f"{where} seccomp filter blocks it: allow io_uring_setup, io_uring_enter and io_uring_register"
            " (docker run --security-opt seccomp=PROFILE.json; Kubernetes: securityContext.seccompProfile)"
        )
    if (0, 0) < system.kernel_version() < (5, 1):
        return "boot Linux 5.15 or newer"
    return ""


def check_cachestat(system: System) -> list[Finding]:
    """Check that the kernel tells how much of a file it caches."""
    if system.probes.cachestat_works():
        return [Finding(Level.GREEN, "cachestat", "works: cached ranges are known before they are read")]
    old = system.kernel_version() < (6, 5)
    return [
        Finding(
            Level.YELLOW,
            "cachestat",
            "this kernel is older than cachestat (6.5)" if old else "refused, probably by a seccomp filter",
            cost="cached ranges are found by trying to read them, and `gpunvme info` shows no cached share",
            fix="boot Linux 6.5 or newer" if old else "allow cachestat (system call 451) in the seccomp profile",
        )
    ]


def check_limits(system: System) -> list[Finding]:
    """Check this process's limits on open files and locked memory."""
    limits = parse_limits(system.read("/proc/self/limits") or "")
    findings = []
    files = limits.get("Max open files")
    if files is not None:
        soft = _count(files[0])
        few = soft is not None and soft < _FEW_FILES
        findings.append(
            Finding(
                Level.YELLOW if few else Level.GREEN,
                "open files",
                f"at most {files[0]}",
                cost="a checkpoint of many shards may not open (each shard takes two descriptors)" if few else "",
                fix=_raise_files(files[1]) if few else "",
            )
        )
    locked = limits.get("Max locked memory")
    if locked is not None:
        findings.append(_locked_memory(system, locked[0]))
    return findings


def _raise_files(hard: str) -> str:
    most = _count(hard)
    if most is None or most >= 4096:
        return "ulimit -n 4096"
    return "raise nofile in /etc/security/limits.conf (systemd: LimitNOFILE=4096), then log in again"


def _locked_memory(system: System, soft: str) -> Finding:
    """Judge RLIMIT_MEMLOCK: the CUDA driver's page-locked memory is not counted, old kernels' io_uring is."""
    size = _count(soft)
    text = "unlimited" if size is None else f"{size / 2**20:g} MiB"
    counted = (0, 0) < system.kernel_version() < (5, 12)
    if counted and size is not None and size < 2**20 and not _may_lock_anything(system):
        return Finding(
            Level.YELLOW,
            "locked memory",
            f"at most {text}, and this kernel counts io_uring's rings",
            cost="io_uring may be refused; threads then do the O_DIRECT reads",
            fix="ulimit -l 8192, or raise memlock in /etc/security/limits.conf (Docker: --ulimit memlock=-1)",
        )
    return Finding(Level.GREEN, "locked memory", f"at most {text}; CUDA's page-locked memory does not count against it")


def locked_memory(system: System) -> int | None:
    """Return how many bytes this process may lock; None if there is no limit for it, or it is not known."""
    limits = parse_limits(system.read("/proc/self/limits") or "").get("Max locked memory")
    return None if limits is None or _may_lock_anything(system) else _count(limits[0])


def _may_lock_anything(system: System) -> bool:
    """Tell whether the process has CAP_IPC_LOCK (bit 14), which lifts the limit."""
    try:
        return bool(int(_status(system).get("CapEff", "0"), 16) >> 14 & 1)
    except ValueError:
        return False


def check_cpus(system: System) -> list[Finding]:
    """Check how many CPUs this process may use: the engine starts one worker each, at most eight."""
    allowed = count_cpus(_status(system).get("Cpus_allowed_list", ""))
    if not allowed:
        return []
    quota = _cpu_quota(system)
    usable = min(allowed, quota) if quota else allowed
    fact = f"{allowed} may be used" + (f", but a quota allows the time of {quota:g}" if usable < allowed else "")
    if usable >= 8:
        return [Finding(Level.GREEN, "CPUs", fact)]
    return [
        Finding(
            Level.YELLOW,
            "CPUs",
            fact,
            cost="the engine works best with 8; below that, copying cached bytes is what limits a GPU's link",
            fix="give the process 8 CPUs (taskset, docker run --cpus, Kubernetes resources.limits.cpu)",
        )
    ]


def _cpu_quota(system: System) -> float | None:
    words = (system.read("/sys/fs/cgroup/cpu.max") or "max").split()
    try:
        return int(words[0]) / int(words[1])
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def count_cpus(text: str) -> int:
    """Count the CPUs in a list such as ``0-3,8,10-11``; 0 if it makes no sense."""
    total = 0
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            return 0
        total += int(last or first) - int(first) + 1
    return total


def parse_limits(text: str) -> dict[str, tuple[str, str]]:
    """Return the soft and the hard limit of each line of ``/proc/self/limits``."""
    limits = {}
    for line in text.splitlines()[1:]:
        parts = re.split(r"\s{2,}", line.strip())
        if len(parts) >= 3:
            limits[parts[0]] = (parts[1], parts[2])
    return limits


def _count(text: str) -> int | None:
    """Return a limit as a number, or None for ``unlimited``."""
    return int(text) if text.isdecimal() else None


def _status(system: System) -> dict[str, str]:
    """Return the lines of ``/proc/self/status`` by name."""
    pairs = (line.split(":", 1) for line in (system.read("/proc/self/status") or "").splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}
