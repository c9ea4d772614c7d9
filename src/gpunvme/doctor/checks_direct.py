"""What a direct way from drive to GPU memory needs: the GPU's driver, nvidia-fs or P2PDMA, cuFile and its settings.

The `host` path needs none of it. So nothing here is worse than yellow, and there are lines only where there is both a
drive and a GPU.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from gpunvme.cufile import facts
from gpunvme.doctor.block_device import BlockDevice, device_of_mount
from gpunvme.doctor.checks_gpu import driver_version
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pairs import gpus, pairs

if TYPE_CHECKING:
    from gpunvme.doctor.mounts import Mount
    from gpunvme.doctor.system import System

_DMA_BUF_DRIVER = (515,)  # the first that exports GPU memory as a dma-buf
_SILENT_CUFILE = (1, 17)  # from here on cuFile registers handles without nvidia-fs
_MODPROBE = "/etc/modprobe.d/nvidia-static-bar1.conf"
_PARAMS = "/proc/driver/nvidia/params"


def check_gpu_driver(system: System) -> list[Finding]:
    """Check which kind of NVIDIA's kernel driver is loaded, and its version."""
    if not gpus(system):
        return []
    told = driver_version(system)
    if told is None:
        return [unknown("GPU driver", "flavour and version", system.unreadable("/proc/driver/nvidia/version"))]
    kind, _, number = told.partition(" ")
    if kind == "proprietary":
        return [
            Finding(
                Level.YELLOW,
                "GPU driver",
                told,
                cost="GPU memory has no dma-buf there: neither gpunvme's kernel module nor P2PDMA can reach it",
                fix="install the open kernel modules (Turing and newer GPUs), then reboot",
                commands=("sudo apt install nvidia-open",),
            )
        ]
    parts = tuple(int(part) for part in number.split(".") if part.isdecimal())
    if not parts:
        return [unknown("GPU driver", "version", system.unreadable("/proc/driver/nvidia/version"))]
    if parts < _DMA_BUF_DRIVER:
        return [
            Finding(
                Level.YELLOW,
                "GPU driver",
                told,
                cost="it exports no dma-bufs (515 does): GPU memory has no address that a drive reaches",
                fix="install a newer driver, then reboot",
                commands=("sudo apt install nvidia-open",),
            )
        ]
    return [Finding(Level.GREEN, "GPU driver", told)]


def check_static_bar1(system: System) -> list[Finding]:
    """Check whether NVIDIA's driver maps all GPU memory into BAR1, as P2PDMA needs it on x86."""
    if not pairs(system):
        return []
    asked = facts.static_bar1(system.root)
    if asked is None:
        return [unknown("static BAR1", "RMForceStaticBar1", system.unreadable(_PARAMS))]
    if asked:
        return [Finding(Level.GREEN, "static BAR1", "RMForceStaticBar1=1")]
    return [
        Finding(
            Level.YELLOW,
            "static BAR1",
            "RMForceStaticBar1 is not set",
            cost="GPU memory is no P2PDMA memory: cuFile needs nvidia-fs, and dma-bufs cannot be mmapped",
            fix="set the registry option (the open driver, and a BAR1 as large as the memory), then reboot",
            commands=(
                f"echo 'options nvidia NVreg_RegistryDwords=\"RMForceStaticBar1=1\"' | sudo tee {_MODPROBE}",
                "sudo update-initramfs -u && sudo reboot",
            ),
        )
    ]


def check_nvidia_fs(system: System) -> list[Finding]:
    """Check whether nvidia-fs is loaded, where nothing else can take its place."""
    if not pairs(system):
        return []
    version = facts.nvidia_fs(system.root)
    if version is not None and not re.match(r"\d", version):
        why = system.unreadable("/proc/driver/nvidia-fs/version")
        return [unknown("nvidia-fs", "loaded, version", why)]
    if version is not None:
        return [Finding(Level.GREEN, "nvidia-fs", version)]
    if facts.kernel_p2pdma(system.root) and not p2pdma_blockers(system):
        return [Finding(Level.GREEN, "nvidia-fs", "not loaded; P2PDMA takes its place")]
    return [
        Finding(
            Level.YELLOW,
            "nvidia-fs",
            "not loaded",
            cost="cuFile goes through host memory, as the host path does, and by default says nothing about it",
            fix="install and load it",
            commands=("sudo apt install nvidia-fs-dkms", "sudo modprobe nvidia-fs"),
        )
    ]


def p2pdma_blockers(system: System) -> list[str]:
    """Return what of this machine keeps cuFile from P2PDMA, in words; the kernel's option apart."""
    blockers = []
    version = system.kernel_version()
    if (0, 0) < version < (6, 2):
        blockers.append(f"Linux {version[0]}.{version[1]} is older than 6.2")
    if (driver_version(system) or "").startswith("proprietary"):
        blockers.append("the GPU's driver is the proprietary one")
    if not facts.static_bar1(system.root):
        blockers.append("no static BAR1")
    x86 = "vendor_id" in (system.read("/proc/cpuinfo") or "")
    types = [
        system.read(f"/sys/kernel/iommu_groups/{group}/type") for group in system.names("/sys/kernel/iommu_groups")
    ]
    if x86 and any(kind != "identity" for kind in types):
        blockers.append("the IOMMU translates (iommu=pt or off)")
    if (system.read("/sys/module/nvme_core/parameters/multipath") or "N").startswith("Y"):
        blockers.append("NVMe multipath is on (nvme_core.multipath=N)")
    return blockers


def check_p2pdma(system: System) -> list[Finding]:
    """Check whether the kernel, and what cuFile asks besides, let a drive write into GPU memory without nvidia-fs."""
    if not pairs(system):
        return []
    has = facts.kernel_p2pdma(system.root)
    if has is None:
        why = system.unreadable(f"/boot/config-{system.kernel_release()}")
        return [unknown("P2PDMA", "CONFIG_PCI_P2PDMA", f"{why}; /proc/kallsyms shows no symbols")]
    instead = facts.nvidia_fs(system.root) is not None
    if not has:
        return [
            Finding(
                Level.GREEN if instead else Level.YELLOW,
                "P2PDMA",
                "this kernel has none (CONFIG_PCI_P2PDMA)" + ("; nvidia-fs takes its place" if instead else ""),
                cost="no direct way to GPU memory without nvidia-fs",
                fix="boot a kernel with CONFIG_PCI_P2PDMA=y",
            )
        ]
    blockers = p2pdma_blockers(system)
    if blockers:
        return [
            Finding(
                Level.GREEN if instead else Level.YELLOW,
                "P2PDMA",
                f"the kernel has it, but: {'; '.join(blockers)}",
                cost="cuFile does not use it",
                fix="all of them are needed on x86; iommu=off ends the nvme path by VFIO, so choose one of the two",
            )
        ]
    return [Finding(Level.GREEN, "P2PDMA", "the kernel has it, and nothing that we can see is in its way")]


def check_cufile(system: System) -> list[Finding]:
    """Check which cuFile is installed; its library is not opened, for that can hang."""
    if not pairs(system):
        return []
    library = system.probes.cufile_library()
    if library is None:
        return [
            Finding(
                Level.YELLOW,
                "cuFile",
                "no libcufile",
                cost="no GPUDirect Storage: neither through nvidia-fs nor through P2PDMA",
                fix="install it for the CUDA that you use (-cu12 or -cu13)",
                commands=("pip install nvidia-cufile",),
            )
        ]
    version = cufile_version(library)
    if version is None:
        return [unknown("cuFile", library, "its file's name has no version")]
    fact = f"{version} ({library})"
    if tuple(int(part) for part in version.split(".")) >= _SILENT_CUFILE:
        fact += "; without nvidia-fs or P2PDMA it passes host memory and does not say so"
    return [Finding(Level.GREEN, "cuFile", fact)]


def cufile_version(library: str) -> str | None:
    """Return the version in the name of the file that a library's name leads to; None where there is none."""
    for name in (os.path.realpath(library), library):
        found = re.search(r"\.so\.(\d+\.\d+(?:\.\d+)*)$", name, re.ASCII)
        if found:
            return found[1]
    return None


def check_cufile_json(system: System) -> list[Finding]:
    """Check what cuFile's configuration asks for."""
    if not pairs(system) or system.probes.cufile_library() is None:
        return []
    settings = facts.settings(system.root, system.probes.environment)
    if settings.problem:
        return [
            Finding(
                Level.YELLOW,
                "cufile.json",
                settings.problem,
                cost="cuFile may refuse to start, or use its defaults",
                fix="correct it, or remove it to have the defaults",
            )
        ]
    if not settings.place:
        if system.exists("/etc/cufile.json"):
            return [unknown("cufile.json", "/etc/cufile.json", system.unreadable("/etc/cufile.json"))]
        return [Finding(Level.GREEN, "cufile.json", "none: cuFile's defaults hold")]
    named = {
        "force_compat_mode": settings.force_compat,
        "allow_compat_mode": settings.allow_compat,
        "use_pci_p2pdma": settings.use_p2pdma,
    }
    asked = [f"{name}={str(value).lower()}" for name, value in named.items() if value is not None]
    fact = f"{settings.place}: {', '.join(asked) or 'nothing that matters here'}"
    if settings.force_compat:
        return [
            Finding(
                Level.YELLOW,
                "cufile.json",
                fact,
                cost="cuFile always goes through host memory",
                fix='set "force_compat_mode": false in its "properties"',
            )
        ]
    if facts.nvidia_fs(system.root) is None and facts.kernel_p2pdma(system.root) and not settings.use_p2pdma:
        return [
            Finding(
                Level.YELLOW,
                "cufile.json",
                fact,
                cost="cuFile does not try P2PDMA",
                fix='set "use_pci_p2pdma": true in its "properties", or load nvidia-fs',
            )
        ]
    return [Finding(Level.GREEN, "cufile.json", fact)]


def check_direct_file_system(system: System, mount: Mount | None) -> list[Finding]:
    """Check whether a direct path to GPU memory can pass the file system, and what lies below it."""
    if mount is None or not pairs(system):
        return []
    device = device_of_mount(system, mount)
    names = _devices(device) if device else []
    options = mount.options.split(",")
    below = ", ".join(names) or mount.source
    if mount.kind not in {"ext4", "xfs"} or "data=journal" in options or "data=writeback" in options:
        return [
            Finding(
                Level.YELLOW,
                "direct files",
                f"{mount.kind} on {below}" + "".join(f", {each}" for each in options if each.startswith("data=")),
                cost="cuFile goes directly on ordered ext4, XFS and some network file systems; bytes pass the host",
                fix="keep what GPUs read on ext4 (data=ordered, the default) or XFS",
            )
        ]
    parity = [each for each in names if (system.read(f"/sys/class/block/{each}/md/level") or "") in _PARITY]
    mapped = [each for each in names if each.startswith("dm-")]
    if parity:
        return [
            Finding(
                Level.YELLOW,
                "direct files",
                f"{mount.kind} on {below}; {', '.join(parity)} keeps parity",
                cost="the CPU computes parity over host memory: nothing goes from a GPU to these drives directly",
                fix="RAID 0 or single drives for what GPUs read and write",
            )
        ]
    if mapped:
        kinds = {(system.read(f"/sys/class/block/{each}/dm/uuid") or "unknown").partition("-")[0] for each in mapped}
        return [
            Finding(
                Level.YELLOW,
                "direct files",
                f"{mount.kind} on {below}; device mapper ({', '.join(sorted(kinds))})",
                cost="P2PDMA and nvidia-fs stop at device mapper (LVM, crypt, multipath): bytes pass host memory",
                fix="put the file system on the drive itself, or on md RAID 0",
            )
        ]
    return [
        Finding(Level.GREEN, "direct files", f"{mount.kind} on {below}, ordered" if mount.kind == "ext4" else below)
    ]


_PARITY = frozenset({"raid4", "raid5", "raid6"})


def _devices(device: BlockDevice) -> list[str]:
    """Return the names of a device and of everything below it."""
    return [device.name, *(name for part in device.parts for name in _devices(part))]
