"""What a drive of one's own needs: the IOMMU and VFIO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.doctor.checks_kernel import locked_memory
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pairs import drives, gpus, machine_of, name_of
from gpunvme.nvme.sysfs import group_members

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

_ENOUGH_LOCKED = 1 << 30


def check_iommu(system: System) -> list[Finding]:
    """Check that an IOMMU keeps a drive in user space to the memory that was mapped for it."""
    if not drives(system):
        return []
    groups = system.names("/sys/kernel/iommu_groups")
    if not groups:
        if not system.exists("/sys/bus/pci/devices"):
            return [unknown("IOMMU", "groups", system.unreadable("/sys/kernel/iommu_groups"))]
        amd = "AuthenticAMD" in (system.read("/proc/cpuinfo") or "")
        switch = "amd_iommu=on" if amd else "intel_iommu=on"
        return [
            Finding(
                Level.YELLOW,
                "IOMMU",
                "none" + (" (a virtual machine: the host has to give it one)" if system.virtual() else ""),
                cost="the nvme path cannot take a drive by VFIO; without an IOMMU it could write to all memory",
                fix=f"firmware: switch VT-d or AMD-Vi on; kernel command line: {switch}",
            )
        ]
    kinds = {system.read(f"/sys/kernel/iommu_groups/{group}/type") for group in groups}
    named = sorted(kind for kind in kinds if kind)
    fact = f"{len(groups)} groups, {'/'.join(named) if named else 'type unknown (needs Linux 5.11)'}"
    if "identity" in kinds and system.exists("/sys/module/gpunvme"):
        return [
            Finding(
                Level.YELLOW,
                "IOMMU",
                fact + ": devices reach all memory",
                cost="gpunvme's kernel module opens for root only, and a drive that it holds could write anywhere",
                fix="remove iommu=pt from the kernel's command line (/etc/default/grub, then update-grub and reboot)",
            )
        ]
    return [Finding(Level.GREEN, "IOMMU", fact)]


def check_vfio(system: System) -> list[Finding]:
    """Check that vfio-pci can take a drive, and which drives have their IOMMU group to themselves."""
    found = drives(system)
    if not found or not system.names("/sys/kernel/iommu_groups"):
        return []  # the line about the IOMMU says it
    findings = []
    release = system.kernel_release()
    if system.exists("/sys/bus/pci/drivers/vfio-pci"):
        fact = "vfio-pci is loaded"
    else:
        known = [system.read(f"/lib/modules/{release}/{name}") for name in ("modules.dep", "modules.builtin")]
        if all(text is None for text in known):
            return [unknown("VFIO", "vfio-pci", system.unreadable(f"/lib/modules/{release}/modules.dep"))]
        if not any("vfio-pci.ko" in (text or "") for text in known):
            return [
                Finding(
                    Level.YELLOW,
                    "VFIO",
                    f"this kernel has no vfio-pci ({release})",
                    cost="the nvme path cannot drive a drive of this machine",
                    fix="install the kernel's extra modules (Ubuntu), or boot a kernel with CONFIG_VFIO_PCI",
                    commands=(f"sudo apt install linux-modules-extra-{release}",),
                )
            ]
        fact = "vfio-pci is there; `gpunvme nvme bind` loads it"
    interface = "iommufd" if system.exists("/dev/iommu") else "groups"
    held = [name_of(system, each) for each in found if each.driver == "vfio-pci"]
    fact += f", by {interface}" + (f"; holds {', '.join(held)}" if held else "")
    for drive in found:
        if drive.iommu_group is None:
            findings.append(unknown("VFIO", name_of(system, drive), "it is in no IOMMU group"))
            continue
        others = [
            each.address
            for each in group_members(drive.iommu_group, machine_of(system))
            if each.address != drive.address and not each.is_bridge
        ]
        if others:
            findings.append(
                Finding(
                    Level.YELLOW,
                    "VFIO",
                    f"{name_of(system, drive)} shares IOMMU group {drive.iommu_group} with {', '.join(others)}",
                    cost="VFIO can take it only together with the others of its group",
                    fix="use another slot, or switch ACS on in the firmware, so that the group is the drive's alone",
                )
            )
    return findings or [Finding(Level.GREEN, "VFIO", fact)]


def check_locked_for_drives(system: System) -> list[Finding]:
    """Check the limit on locked memory against what a drive in user space maps."""
    nbytes = locked_memory(system)
    ours = [each for each in drives(system) if each.driver in {"vfio-pci", "gpunvme"}]
    if nbytes is None or not ours or nbytes >= _ENOUGH_LOCKED:
        return []
    where = " and GPU memory" if gpus(system) else ""
    return [
        Finding(
            Level.YELLOW,
            "memory for drives",
            f"at most {nbytes / 2**20:g} MiB may be locked, and {len(ours)} drives are held for user space",
            cost=f"queues, buffers{where} that are mapped for a drive count: larger transfers are refused or staged",
            fix="raise memlock: * - memlock unlimited in /etc/security/limits.conf, then log in again",
        )
    ]
