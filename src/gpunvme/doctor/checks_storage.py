"""The file system under a path, and the NVMe drives of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.doctor.block_device import BlockDevice, device_of_mount
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pcie import NvmeController, nvme_controllers

if TYPE_CHECKING:
    from gpunvme.doctor.mounts import Mount
    from gpunvme.doctor.system import System


def check_file_system(system: System, path: str, mount: Mount | None, direct_reason: str) -> list[Finding]:
    """Check what the file system under a path does to a read.

    Parameters
    ----------
    system
        The machine.
    path
        The path that the user asked about.
    mount
        The mount that it lies on, or None if it is not known.
    direct_reason
        Why O_DIRECT was refused there when tried; empty if it works.
    """
    if mount is None:
        return [unknown("file system", path, "its mount is not in /proc/self/mountinfo")]
    device = device_of_mount(system, mount)
    drives = device.drives() if device else []
    on = f" on {', '.join(_drive_name(drive) for drive in drives)}" if drives else f" from {mount.source}"
    fact = f"{path}: {mount.kind}{on}"
    for cost, fix in _losses(mount, drives, direct_reason):
        return [Finding(Level.YELLOW, "file system", fact, cost=cost, fix=fix)]
    if mount.in_memory:
        return [Finding(Level.GREEN, "file system", fact + "; files live in memory")]
    return [Finding(Level.GREEN, "file system", fact + "; O_DIRECT works")]


def _losses(mount: Mount, drives: list[BlockDevice], direct_reason: str) -> list[tuple[str, str]]:
    """Return what is lost here and the fix, worst first."""
    options = mount.options.split(",")
    found = []
    if mount.remote:
        found.append(("bytes come over the network, at its speed", "copy what is read often to a local drive"))
    elif mount.kind.startswith("fuse"):
        found.append(("each read goes through a process in user space", "copy what is read often to a local drive"))
    elif mount.kind == "overlay":
        found.append(
            (
                "the container's image layers: the first write to a file copies it whole",
                "keep large files on a volume: docker run -v /data:/data",
            )
        )
    if direct_reason and not mount.in_memory:
        found.append(
            (
                f"O_DIRECT is refused ({direct_reason}): every byte goes through the page cache",
                "use ext4 or XFS on a local drive",
            )
        )
    if any(option.startswith("compress") and not option.endswith("=no") for option in options):
        found.append(
            (
                "compressed files are unpacked by the CPU through the page cache, even with O_DIRECT",
                "mount without compress=, then rewrite large files; or: btrfs property set FILE compression none",
            )
        )
    if "data=journal" in options:
        found.append(("ext4 with data=journal has no O_DIRECT", "mount with data=ordered"))
    if any(drive.rotational and not drive.name.startswith("vd") for drive in drives):
        found.append(("a rotating drive: some hundred MB/s at most", "move what is read often to an NVMe drive"))
    return found


def _drive_name(drive: BlockDevice) -> str:
    return f"{drive.name} ({drive.model})" if drive.model else drive.name


def check_nvme(system: System) -> list[Finding]:
    """Check that each NVMe drive has the PCIe link that it was made for."""
    controllers = nvme_controllers(system)
    if not controllers:
        return [Finding(Level.GREEN, "NVMe", "no NVMe drive in this machine")]
    return [_nvme(controller) for controller in controllers]


def _nvme(controller: NvmeController) -> Finding:
    name = f"{controller.name} ({controller.model})"
    pci = controller.pci
    if pci is None or controller.transport != "pcie":
        return Finding(Level.GREEN, "NVMe", f"{name} over {controller.transport}")
    now, best = pci.limit(), pci.best_limit()
    if now is None or best is None:
        return Finding(Level.GREEN, "NVMe", f"{name} at {pci.address}; its link is not shown")
    link = f"{pci.speed} GT/s x{pci.width}"
    if now < best * 0.99:
        return Finding(
            Level.YELLOW,
            "NVMe",
            f"{name}: link at {link}, made for {pci.max_speed} GT/s x{pci.max_width}",
            cost=f"at most {now:.1f} GB/s instead of {best:.1f} GB/s",
            fix=f"move it to a slot with {pci.max_width} lanes at {pci.max_speed} GT/s; check link speed and"
            " bifurcation in the BIOS",
        )
    return Finding(Level.GREEN, "NVMe", f"{name}: link at {link}, at most {now:.1f} GB/s")
