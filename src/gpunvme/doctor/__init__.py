"""What ``gpunvme doctor`` looks at: small checks of a `System` that return `Finding`s."""

from __future__ import annotations

import errno
import os

from gpunvme.doctor.checks_gpu import check_cuda, check_gpu_link, check_gpudirect
from gpunvme.doctor.checks_kernel import (
    check_cachestat,
    check_cpus,
    check_engine,
    check_io_uring,
    check_kernel,
    check_limits,
)
from gpunvme.doctor.checks_memory import check_huge_pages, check_memory, check_numa
from gpunvme.doctor.checks_storage import check_file_system, check_nvme
from gpunvme.doctor.finding import Finding, Level
from gpunvme.doctor.mounts import Mount, real_mount_of
from gpunvme.doctor.probes import Probes
from gpunvme.doctor.system import System

__all__ = ["Finding", "Level", "Probes", "System", "examine", "examine_machine"]


def examine(system: System, path: str, mount: Mount | None, direct_reason: str) -> list[Finding]:
    """Run every check.

    Parameters
    ----------
    system
        The machine.
    path, mount, direct_reason
        The path whose file system is looked at, its mount, and why O_DIRECT is refused there (empty
        if it is not).

    Returns
    -------
    list of Finding
        In the order in which a user reads them: engine, kernel, memory, GPU, drives.
    """
    findings = check_engine(system)
    engine = findings[0].level is Level.GREEN
    findings += check_kernel(system)
    if engine:
        findings += check_io_uring(system) + check_cachestat(system)
    findings += check_limits(system) + check_memory(system) + check_huge_pages(system) + check_numa(system)
    if engine:
        cuda = check_cuda(system)
        findings += cuda
        if not system.probes.cuda_reason():
            findings += check_cpus(system) + check_gpu_link(system)
    findings += check_gpudirect(system)
    findings += check_file_system(system, path, mount, direct_reason)
    return findings + check_nvme(system)


def examine_machine(path: str) -> list[Finding]:
    """Run every check on this machine, for files under ``path``.

    Raises
    ------
    OSError
        There is no such path.
    """
    os.stat(path)
    system = System()
    mount = real_mount_of(path, system.read("/proc/self/mountinfo") or "")
    return examine(system, os.path.abspath(path), mount, direct_io_reason(path))


def direct_io_reason(path: str) -> str:
    """Try to open with O_DIRECT at ``path``, without writing anything.

    Returns
    -------
    str
        Why it was refused; empty if it works, or if it cannot be tried (a folder that we may not write).
    """
    # A file without a name, gone on close, is the only way to ask a folder.
    flags = os.O_RDWR | os.O_TMPFILE if os.path.isdir(path) else os.O_RDONLY
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC))
    except OSError:
        return ""
    try:
        os.close(os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return os.strerror(error.errno or errno.EINVAL)
    return ""
