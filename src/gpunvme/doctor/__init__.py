"""What ``gpunvme doctor`` looks at: small checks of a `System` that return `Finding`s."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.mounts import Mount, real_mount_of
from gpunvme.doctor.probes import Probes
from gpunvme.doctor.system import System
from gpunvme.errors import Error

__all__ = ["Finding", "Level", "Probes", "System", "checks", "examine", "examine_machine"]

Check = Callable[[], list[Finding]]
_MISTAKES = (
    ArithmeticError,
    AttributeError,
    Error,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def checks(system: System, path: str, mount: Mount | None, direct_reason: str) -> dict[str, Check]:
    """Return every check of this machine, by the topic of its first line.

    Parameters
    ----------
    system
        The machine.
    path, mount, direct_reason
        The path whose file system is looked at, its mount, and why O_DIRECT is refused there (empty
        if it is not).

    Returns
    -------
    dict
        In the order in which a user reads them: engine, kernel, memory, GPU, the way to it, drives. Without the
        engine, what needs it is left out: the driver's modules do.
    """
    from gpunvme.doctor import checks_gpu, checks_kernel, checks_memory, checks_storage

    found: dict[str, Check] = {
        "engine": lambda: checks_kernel.check_engine(system),
        "kernel": lambda: checks_kernel.check_kernel(system),
    }
    engine = not system.probes.engine_reason()
    if engine:
        found["io_uring"] = lambda: checks_kernel.check_io_uring(system)
        found["cachestat"] = lambda: checks_kernel.check_cachestat(system)
    found["limits"] = lambda: checks_kernel.check_limits(system)
    found["memory"] = lambda: checks_memory.check_memory(system)
    found["huge pages"] = lambda: checks_memory.check_huge_pages(system)
    found["NUMA"] = lambda: checks_memory.check_numa(system)
    if engine:
        found["CUDA"] = lambda: checks_gpu.check_cuda(system)
        if not system.probes.cuda_reason():
            found["CPUs"] = lambda: checks_kernel.check_cpus(system)
            found["GPU link"] = lambda: checks_gpu.check_gpu_link(system)
        found |= _direct_checks(system, mount)
    found["file system"] = lambda: checks_storage.check_file_system(system, path, mount, direct_reason)
    found["NVMe"] = lambda: checks_storage.check_nvme(system)
    if engine:
        from gpunvme.doctor import checks_nvme

        found["drive"] = lambda: checks_nvme.check_drives(system)
        found["heat"] = lambda: checks_nvme.check_heat(system)
    return found


def _direct_checks(system: System, mount: Mount | None) -> dict[str, Check]:
    """Return the checks of the way from a drive straight to a GPU."""
    from gpunvme.doctor import checks_access, checks_direct, checks_module, checks_pcie

    return {
        "GPU driver": lambda: checks_direct.check_gpu_driver(system),
        "BAR1": lambda: checks_pcie.check_bar1(system),
        "static BAR1": lambda: checks_direct.check_static_bar1(system),
        "PCIe path": lambda: checks_pcie.check_pcie_path(system),
        "uplink": lambda: checks_pcie.check_uplink(system),
        "ACS": lambda: checks_pcie.check_acs(system),
        "P2P platform": lambda: checks_pcie.check_platform(system),
        "IOMMU": lambda: checks_access.check_iommu(system),
        "VFIO": lambda: checks_access.check_vfio(system),
        "memory for drives": lambda: checks_access.check_locked_for_drives(system),
        "kernel module": lambda: checks_module.check_kernel_module(system),
        "nvidia-fs": lambda: checks_direct.check_nvidia_fs(system),
        "P2PDMA": lambda: checks_direct.check_p2pdma(system),
        "cuFile": lambda: checks_direct.check_cufile(system),
        "cufile.json": lambda: checks_direct.check_cufile_json(system),
        "direct files": lambda: checks_direct.check_direct_file_system(system, mount),
    }


def examine(system: System, path: str, mount: Mount | None, direct_reason: str) -> list[Finding]:
    """Run every check, see `checks`; one that fails has a line that says so, and the others go on."""
    findings: list[Finding] = []
    for topic, check in checks(system, path, mount, direct_reason).items():
        try:
            findings += check()
        except _MISTAKES as error:  # a doctor that dies tells nothing; what failed is named
            findings.append(unknown(topic, "everything", f"the check failed: {type(error).__name__}: {error}"))
    return findings


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
