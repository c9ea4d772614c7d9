"""Machines that `gpunvme doctor` is shown in tests: trees of /proc and /sys, described in a few lines each.

A text that begins with ``->`` is a symbolic link to a name within the tree. What is described is made up; the shape
follows the kernel's Documentation/ABI.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from gpunvme.doctor import Finding, Probes, System, examine
from gpunvme.doctor.mounts import mount_of, parse_mountinfo
from gpunvme.doctor.nvme_admin import AdminAnswer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Files = dict[str, str | bytes]

OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)"
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024"
STATIC = 'RegistryDwords: "RMForceStaticBar1=1"'
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            1048576              1048576              files
Max locked memory         {memlock}              {memlock}              bytes"""
INTEL = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: Intel(R) Core(TM) i9\nflags\t\t: fpu vme"
ZEN = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu vme"
GUEST = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu hypervisor lahf_lm"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
GIB = 1 << 30


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a machine's files below a folder."""
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.startswith("->"):
            path.symlink_to(root / content[2:].lstrip("/"))
        else:
            path.write_text(content + "\n")


def acs(control: int) -> bytes:
    """A bridge's configuration space, all of it, with nothing but Access Control Services."""
    config = bytearray(4096)
    struct.pack_into("<IHH", config, 0x100, 1 << 16 | 0x000D, 0x7F, control)
    return bytes(config)


def function(
    address: str,
    kind: str,
    *,
    above: str,
    link: str = "16.0 x4",
    best: str = "",
    node: int = 0,
    group: int | None = None,
    driver: str = "",
    bars: tuple[int, ...] = (16384,),
    config: bytes = b"",
) -> Files:
    """A PCI function: ``kind`` is "gpu", "nvme" or "bridge"; a link is "GT/s xLANES"; ``above`` is its parent."""
    code, vendor = {
        "gpu": ("0x030200", "0x10de"),
        "nvme": ("0x010802", "0x144d"),
        "bridge": ("0x060400", "0x1000"),
        "sound": ("0x040300", "0x10de"),
    }[kind]
    where = f"/sys/devices/{above}/{address}"
    (speed, width), (most, lanes) = link.split(" x"), (best or link).split(" x")
    files: Files = {
        f"{where}/class": code,
        f"{where}/vendor": vendor,
        f"{where}/device": "0x1234",
        f"{where}/numa_node": str(node),
        f"{where}/current_link_speed": f"{speed} GT/s PCIe",
        f"{where}/max_link_speed": f"{most} GT/s PCIe",
        f"{where}/current_link_width": width,
        f"{where}/max_link_width": lanes,
        f"{where}/config": config or bytes(64),
        f"{where}/resource": "\n".join(f"{n + 1 << 40:#x} {(n + 1 << 40) + s - 1:#x} 0x1" for n, s in enumerate(bars)),
        f"/sys/bus/pci/devices/{address}": f"->{where}",
    }
    if group is not None:
        files[f"{where}/iommu_group"] = f"->/sys/kernel/iommu_groups/{group}"
        files[f"/sys/kernel/iommu_groups/{group}/devices/{address}"] = f"->{where}"
        files[f"/sys/kernel/iommu_groups/{group}/type"] = "DMA-FQ"
    if driver:
        files[f"/sys/bus/pci/drivers/{driver}/new_id"] = ""
        files[f"{where}/driver"] = f"->/sys/bus/pci/drivers/{driver}"
    return files


def drive(name: str, address: str, *, above: str, queues: int = 33, heat: int = 40, number: str = "259:2") -> Files:
    """What the kernel's driver adds to an NVMe function: the controller, a namespace, a partition, a sensor."""
    device = f"/sys/devices/{above}/{address}"
    where = f"{device}/nvme/{name}"
    return {
        f"{where}/model": "Samsung SSD 990 PRO 2TB",
        f"{where}/serial": "S7KG",
        f"{where}/state": "live",
        f"{where}/transport": "pcie",
        f"{where}/firmware_rev": "4B2QJXD7",
        f"{where}/queue_count": str(queues),
        f"{where}/device": f"->{device}",
        f"{where}/hwmon3/temp1_input": f"{heat}850",
        f"{where}/hwmon3/temp1_max": "81850",
        f"{where}/{name}n1/queue/rotational": "0",
        f"{where}/{name}n1/queue/max_hw_sectors_kb": "2048",
        f"{where}/{name}n1/queue/logical_block_size": "512",
        f"{where}/{name}n1/queue/scheduler": "[none] mq-deadline",
        f"{where}/{name}n1/device": f"->{where}",
        f"{where}/{name}n1/{name}n1p2/partition": "2",
        f"/sys/class/nvme/{name}": f"->{where}",
        f"/sys/class/block/{name}n1": f"->{where}/{name}n1",
        f"/sys/class/block/{name}n1p2": f"->{where}/{name}n1/{name}n1p2",
        f"/sys/dev/block/{number}": f"->{where}/{name}n1/{name}n1p2",
    }


def system_files(
    cpuinfo: str, *, release: str = "6.11.0-9-generic", memlock: str = "unlimited", nodes: str = "0"
) -> Files:
    """What every machine has."""
    return {
        "/proc/sys/kernel/osrelease": release,
        "/proc/sys/kernel/io_uring_disabled": "0",
        "/proc/self/status": "Name:\tpython3\nSeccomp:\t0\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-15",
        "/proc/self/limits": LIMITS.format(memlock=memlock),
        "/proc/self/cgroup": "0::/user.slice",
        "/proc/self/mountinfo": "30 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw",
        "/proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {50 << 20} kB",
        "/proc/cpuinfo": cpuinfo,
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/nvme0n1p2 ro quiet",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "/sys/devices/system/node/online": nodes,
        "/sys/devices/system/cpu/online": "0-15",
        f"/boot/config-{release}": "CONFIG_PCI_P2PDMA=y",
        f"/lib/modules/{release}/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko.zst:",
        f"/lib/modules/{release}/build": "",
        "/dev/iommu": "",
    }


_SWITCH = "pci0000:00/0000:00:01.0/0000:01:00.0"
GPU, NVME = "0000:03:00.0", "0000:04:00.0"
GPU_PORT, NVME_PORT = "0000:02:00.0", "0000:02:01.0"

# Two sockets. On the first a switch with a GPU and nvme0; with all that a direct way asks for.
SERVER: Files = {
    **system_files(ZEN, nodes="0-1"),
    **function("0000:00:01.0", "bridge", above="pci0000:00", link="32.0 x16", group=0),
    **function("0000:01:00.0", "bridge", above="pci0000:00/0000:00:01.0", link="32.0 x16", group=1),
    **function(GPU_PORT, "bridge", above=_SWITCH, link="32.0 x16", group=2, config=acs(0)),
    **function(NVME_PORT, "bridge", above=_SWITCH, link="16.0 x4", group=3, config=acs(0)),
    **function(
        GPU, "gpu", above=f"{_SWITCH}/{GPU_PORT}", link="32.0 x16", group=4, bars=(1 << 24, 128 * GIB), driver="nvidia"
    ),
    **function(NVME, "nvme", above=f"{_SWITCH}/{NVME_PORT}", group=5, driver="nvme"),
    **drive("nvme0", NVME, above=f"{_SWITCH}/{NVME_PORT}"),
    **{f"/sys/kernel/iommu_groups/{group}/type": "identity" for group in range(6)},
    "/proc/driver/nvidia/version": OPEN_DRIVER,
    "/proc/driver/nvidia/params": STATIC,
    "/sys/module/nvme_core/parameters/multipath": "N",
    "/sys/bus/pci/drivers/vfio-pci/new_id": "",
    "/sys/module/gpunvme_absent": "",
    "/etc/cufile.json": '{"properties": {"use_pci_p2pdma": true, // as NVIDIA writes it\n"allow_compat_mode": true,}}',
}
SECOND_SOCKET: Files = {
    **function("0000:80:01.0", "bridge", above="pci0000:80", node=1, group=6),
    **function("0000:81:00.0", "nvme", above="pci0000:80/0000:80:01.0", node=1, group=7, driver="nvme"),
    **drive("nvme1", "0000:81:00.0", above="pci0000:80/0000:80:01.0", number="259:3"),
}

# Everything on the CPU's own lanes; the IOMMU is on; nothing but the GPU's driver is installed.
_ROOT = "pci0000:00"
DESKTOP: Files = {
    **system_files(ZEN, memlock="8388608"),
    **function("0000:00:01.0", "bridge", above=_ROOT, link="16.0 x16", group=0),
    **function("0000:00:02.0", "bridge", above=_ROOT, link="16.0 x4", group=1),
    **function(
        GPU, "gpu", above=f"{_ROOT}/0000:00:01.0", link="16.0 x16", group=2, bars=(1 << 24, 32 * GIB), driver="nvidia"
    ),
    **function(NVME, "nvme", above=f"{_ROOT}/0000:00:02.0", group=3, driver="nvme"),
    **drive("nvme0", NVME, above=f"{_ROOT}/0000:00:02.0"),
    "/proc/driver/nvidia/version": OPEN_DRIVER,
    "/proc/driver/nvidia/params": 'RegistryDwords: ""',
    "/sys/module/nvme_core/parameters/multipath": "Y",
}

# The proprietary driver, a small BAR1, Secure Boot, an Intel CPU, a warm drive, a btrfs.
LAPTOP: Files = {
    **DESKTOP,
    **system_files(INTEL, memlock="8388608"),
    **function(
        GPU, "gpu", above=f"{_ROOT}/0000:00:01.0", link="16.0 x8", group=2, bars=(1 << 24, 256 << 20), driver="nvidia"
    ),
    **drive("nvme0", NVME, above=f"{_ROOT}/0000:00:02.0", heat=75),
    SECURE_BOOT: b"\x06\0\0\0\x01",
    "/proc/driver/nvidia/version": CLOSED_DRIVER,
    "/proc/self/mountinfo": "30 1 0:40 / / rw - btrfs /dev/nvme0n1p2 rw,compress=zstd:3",
}

# A GPU and a drive given to a guest, each below a port of its own, without an IOMMU; few queues.
CLOUD: Files = {
    **{name: text for name, text in DESKTOP.items() if "iommu" not in name and name != "/proc/self/mountinfo"},
    **system_files(GUEST),
    **drive("nvme0", NVME, above=f"{_ROOT}/0000:00:02.0", queues=9),
}
CLOUD_WITHOUT_GPU: Files = {
    **system_files(GUEST),
    "/proc/self/mountinfo": "30 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
    "/sys/devices/virtual/block/vda/queue/rotational": "1",
    "/sys/class/block/vda": "->/sys/devices/virtual/block/vda",
    "/sys/dev/block/254:0": "->/sys/devices/virtual/block/vda",
}
MACHINES = {"server": SERVER, "desktop": DESKTOP, "laptop": LAPTOP, "cloud": CLOUD, "plain": CLOUD_WITHOUT_GPU}


def health(**fields: tuple[int, int, int]) -> bytes:
    """A health log: 313 kelvin, and ``name=(offset, size, value)``."""
    log = bytearray(512)
    log[1:3] = (313).to_bytes(2, "little")
    for offset, nbytes, value in fields.values():
        log[offset : offset + nbytes] = value.to_bytes(nbytes, "little")
    return bytes(log)


def identify(mdts: int = 9) -> bytes:
    """Identify Controller with nothing but MDTS."""
    data = bytearray(4096)
    data[77] = mdts
    return bytes(data)


def probes(**answers: Any) -> Probes:
    """What only running code can tell; by default all is well, root looks, and one GPU is there."""
    told: dict[str, Any] = {
        "engine": "",
        "io_uring": "",
        "cuda": "",
        "devices": [{"name": "NVIDIA H100", "pci_bus_id": f"00000000:{GPU[5:]}"}],
        "cachestat": True,
        "cufile": "/usr/lib/x86_64-linux-gnu/libcufile.so.1.15.1",
        "admin": AdminAnswer(identify(), health()),
        "environment": {},
        **answers,
    }
    return Probes(
        engine_reason=lambda: told["engine"],
        io_uring_reason=lambda: told["io_uring"],
        cuda_reason=lambda: told["cuda"],
        cuda_devices=lambda: told["devices"],
        cachestat_works=lambda: told["cachestat"],
        cufile_library=lambda: told["cufile"],
        nvme_admin=lambda device: told["admin"],
        environment=told["environment"],
    )


def look(root: Path, files: Mapping[str, str | bytes], answers: Probes | None = None) -> dict[str, list[Finding]]:
    """What the doctor finds on a machine, by topic."""
    write_tree(root, files)
    found: dict[str, list[Finding]] = {}
    for finding in diagnose(root, answers):
        found.setdefault(finding.topic, []).append(finding)
    return found


def diagnose(root: Path, answers: Probes | None = None) -> list[Finding]:
    """What the doctor finds in a tree that is there."""
    system = System(root, answers or probes())
    mount = mount_of("/data", parse_mountinfo(system.read("/proc/self/mountinfo") or ""))
    return examine(system, "/data", mount, "")
