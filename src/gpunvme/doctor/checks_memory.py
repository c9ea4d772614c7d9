"""Memory: how much there is, in which pages, and on which node the GPU and the drives are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.doctor.checks_kernel import count_cpus
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pcie import nvidia_gpus, nvme_controllers

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

_GIB = 2**30
_LEAST = 256 * 2**20


def check_memory(system: System) -> list[Finding]:
    """Check that there is memory for the engine's ring and for the page cache."""
    info = {}
    for line in (system.read("/proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            info[name] = int(words[0]) * 1024
    total, available = info.get("MemTotal"), info.get("MemAvailable")
    if total is None or available is None:
        return [unknown("memory", "how much", system.unreadable("/proc/meminfo"))]
    limit = memory_limit(system)
    fact = f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} GiB available"
    if limit is not None and limit < total:
        fact += f"; this control group may use {limit / _GIB:.1f} GiB"
        available = min(available, limit)
    if available < _LEAST:
        return [
            Finding(
                Level.RED,
                "memory",
                fact,
                cost="the engine's page-locked memory and a destination may not fit; the kernel may kill the process",
                fix="free memory, or raise the control group's limit (docker run --memory, Kubernetes limits.memory)",
            )
        ]
    if available < 2 * _GIB:
        return [
            Finding(
                Level.YELLOW,
                "memory",
                fact,
                cost="little stays in the page cache (it counts against the limit), so repeated reads reach the drive",
                fix="free memory, or raise the control group's limit (docker run --memory, Kubernetes limits.memory)",
            )
        ]
    return [Finding(Level.GREEN, "memory", fact)]


def memory_limit(system: System) -> int | None:
    """Return the control group's memory limit in bytes, or None if there is none."""
    group = "/"
    for line in (system.read("/proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            group = line[3:].strip() or "/"
    limits = [
        system.read_int(f"/sys/fs/cgroup{group.rstrip('/')}/memory.max"),
        system.read_int("/sys/fs/cgroup/memory.max"),
        system.read_int("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    # Version 1 writes "no limit" as a number near 2**63.
    return min((limit for limit in limits if limit is not None and limit < 2**60), default=None)


def check_huge_pages(system: System) -> list[Finding]:
    """Check whether large host destinations can be made of huge pages."""
    text = system.read("/sys/kernel/mm/transparent_hugepage/enabled")
    if text is None:
        name = "/sys/kernel/mm/transparent_hugepage/enabled"
        return [unknown("huge pages", "transparent huge pages", system.unreadable(name))]
    if "[never]" in text:
        return [
            Finding(
                Level.YELLOW,
                "huge pages",
                "transparent huge pages are off",
                cost="a new host destination faults once per 4 KiB instead of once per 2 MiB",
                fix="let programs ask for them, until the next boot",
                commands=("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",),
            )
        ]
    mode = next((word.strip("[]") for word in text.split() if word.startswith("[")), text)
    reserved = system.read_int("/proc/sys/vm/nr_hugepages")
    fact = f"transparent huge pages: {mode}" + (f"; {reserved} reserved" if reserved else "")
    return [Finding(Level.GREEN, "huge pages", fact)]


def check_numa(system: System) -> list[Finding]:
    """Check that GPU and drives are on the same memory node."""
    nodes = count_cpus(system.read("/sys/devices/system/node/online") or "")
    if nodes <= 1:
        return [Finding(Level.GREEN, "NUMA", "one memory node")] if nodes else [_no_nodes(system)]
    gpus = {gpu.address: gpu.node for gpu in nvidia_gpus(system)}
    drives = {drive.name: drive.pci.node for drive in nvme_controllers(system) if drive.pci is not None}
    places = [f"{name} on node {node}" for name, node in {**gpus, **drives}.items() if node is not None]
    fact = f"{nodes} memory nodes" + (": " + ", ".join(places) if places else "")
    gpu_nodes = {node for node in gpus.values() if node is not None}
    drive_nodes = {node for node in drives.values() if node is not None}
    if gpu_nodes and drive_nodes and not gpu_nodes & drive_nodes:
        node = min(gpu_nodes)
        return [
            Finding(
                Level.YELLOW,
                "NUMA",
                fact,
                cost="every byte between a drive and a GPU crosses the link between the sockets",
                fix=f"numactl --cpunodebind={node} --membind={node} COMMAND; or a slot of node {node} for the drive",
            )
        ]
    if len(gpu_nodes) == 1:
        node = min(gpu_nodes)
        return [
            Finding(
                Level.GREEN,
                "NUMA",
                fact,
                fix=f"for steady figures: numactl --cpunodebind={node} --membind={node} COMMAND",
            )
        ]
    return [Finding(Level.GREEN, "NUMA", fact)]


def _no_nodes(system: System) -> Finding:
    if system.exists("/sys/devices/system/cpu") and not system.exists("/sys/devices/system/node"):
        return Finding(Level.GREEN, "NUMA", "one memory node: the kernel is built without NUMA")
    return unknown("NUMA", "memory nodes", system.unreadable("/sys/devices/system/node/online"))
