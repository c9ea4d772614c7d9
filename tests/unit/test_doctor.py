"""`gpunvme doctor` on machines that it has never seen: trees of /proc and /sys written by the test.

A wrong line here sends a user to fix what is not broken, or hides what is.
"""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Any

import pytest

from gpunvme.cufile.library import installed_cufile
from gpunvme.doctor import Finding, Level, Probes, System, examine
from gpunvme.doctor.checks_gpu import short_address
from gpunvme.doctor.checks_kernel import check_limits, count_cpus
from gpunvme.doctor.checks_memory import memory_limit
from gpunvme.doctor.mounts import mount_of, parse_mountinfo

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}              {hard}               files
Max locked memory         8388608              8388608              bytes
"""
MEMINFO = "MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB"
OPEN_DRIVER = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)
GCC version:  gcc version 13.3.0"""


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files; a text that starts with ``->`` is a symbolic link."""
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.startswith("->"):
            path.symlink_to(content[2:])
        else:
            path.write_text(content + "\n")


def probes(
    *,
    engine: str = "",
    io_uring: str = "",
    cuda: str = "",
    devices: list[dict[str, Any]] | None = None,
    cachestat: bool = True,
    cufile: str | None = None,
) -> Probes:
    return Probes(
        engine_reason=lambda: engine,
        io_uring_reason=lambda: io_uring,
        cuda_reason=lambda: cuda,
        cuda_devices=lambda: devices or [],
        cachestat_works=lambda: cachestat,
        cufile_library=lambda: cufile,
    )


def pci(address: str, *, node: int, speed: str, width: int, max_speed: str = "", **more: str) -> dict[str, str]:
    where = f"/sys/devices/pci0000:00/{address}"
    return {
        f"{where}/numa_node": str(node),
        f"{where}/current_link_speed": f"{speed} GT/s PCIe",
        f"{where}/max_link_speed": f"{max_speed or speed} GT/s PCIe",
        f"{where}/current_link_width": str(width),
        f"{where}/max_link_width": more.pop("max_width", str(width)),
        **{f"{where}/{name}": value for name, value in more.items()},
        f"/sys/bus/pci/devices/{address}": f"->../../../devices/pci0000:00/{address}",
    }


def nvme(name: str, address: str, model: str) -> dict[str, str]:
    where = f"/sys/devices/pci0000:00/{address}/nvme/{name}"
    return {
        f"{where}/model": model,
        f"{where}/transport": "pcie",
        f"{where}/device": f"->../../../{address}",
        f"{where}/{name}n1/queue/rotational": "0",
        f"{where}/{name}n1/queue/scheduler": "[none] mq-deadline",
        f"{where}/{name}n1/device": "->..",
        f"{where}/{name}n1/{name}n1p2/partition": "2",
        f"/sys/class/nvme/{name}": f"->../../devices/pci0000:00/{address}/nvme/{name}",
        f"/sys/class/block/{name}n1p2": f"->../../devices/pci0000:00/{address}/nvme/{name}/{name}n1/{name}n1p2",
        "/sys/dev/block/259:2": f"->../../devices/pci0000:00/{address}/nvme/{name}/{name}n1/{name}n1p2",
    }


DESKTOP: dict[str, str | bytes] = {
    "/proc/sys/kernel/osrelease": "6.11.0-9-generic",
    "/proc/sys/kernel/io_uring_disabled": "0",
    "/proc/self/status": "Name:\tpython3\nSeccomp:\t0\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-15",
    "/proc/self/limits": LIMITS.format(files="1048576", hard="1048576"),
    "/proc/self/cgroup": "0::/user.slice",
    "/proc/meminfo": MEMINFO.format(total=64 << 20, available=50 << 20),
    "/proc/driver/nvidia/version": OPEN_DRIVER,
    "/proc/self/mountinfo": "30 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "/sys/devices/system/node/online": "0",
    "/boot/config-6.11.0-9-generic": "CONFIG_PCI_P2PDMA=y\nCONFIG_DMABUF_MOVE_NOTIFY=y",
    **pci("0000:01:00.0", node=-1, speed="2.5", max_speed="16.0", width=16, vendor="0x10de", **{"class": "0x030000"}),
    **pci("0000:02:00.0", node=-1, speed="16.0", width=4, vendor="0x144d", **{"class": "0x010802"}),
    **nvme("nvme0", "0000:02:00.0", "Samsung SSD 990 PRO 2TB"),
}
RTX = [{"name": "NVIDIA GeForce RTX 4090", "pci_bus_id": "00000000:01:00.0", "total": 24 << 30}]

CLOUD: dict[str, str | bytes] = {
    "/proc/sys/kernel/osrelease": "6.8.0-1021-aws",
    "/proc/sys/kernel/io_uring_disabled": "0",
    "/proc/self/status": "Name:\tpython3\nSeccomp:\t0\nCapEff:\t0\nCpus_allowed_list:\t0-1",
    "/proc/self/limits": LIMITS.format(files="65536", hard="65536"),
    "/proc/meminfo": MEMINFO.format(total=8 << 20, available=6 << 20),
    "/proc/self/mountinfo": "30 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
    "/proc/config.gz": gzip.compress(b"# CONFIG_PCI_P2PDMA is not set\n"),
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "/sys/devices/system/node/online": "0",
    "/sys/devices/virtual/block/vda/queue/rotational": "1",
    "/sys/class/block/vda": "->../../devices/virtual/block/vda",
    "/sys/dev/block/254:0": "->../../devices/virtual/block/vda",
}

CONTAINER: dict[str, str | bytes] = {
    **DESKTOP,
    "/.dockerenv": "",
    "/proc/self/status": "Name:\tpython3\nSeccomp:\t2\nCapEff:\t0\nCpus_allowed_list:\t0-15",
    "/proc/self/limits": LIMITS.format(files="256", hard="256"),
    "/proc/self/cgroup": "0::/",
    "/sys/fs/cgroup/memory.max": str(1 << 30),
    "/proc/self/mountinfo": "30 1 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/b",
}


def look(root: Path, files: Mapping[str, str | bytes], answers: Probes, direct: str = "") -> dict[str, Finding]:
    write_tree(root, files)
    system = System(root, answers)
    mount = mount_of("/data", parse_mountinfo(system.read("/proc/self/mountinfo") or ""))
    return {finding.topic: finding for finding in examine(system, "/data", mount, direct)}


def test_desktop_with_everything_is_green(tmp_path: Path) -> None:
    cufile = "/usr/lib/x86_64-linux-gnu/libcufile.so.0"
    found = look(tmp_path, DESKTOP, probes(devices=RTX, cufile=cufile))
    described = ["engine", "kernel", "io_uring", "cachestat", "memory", "NUMA", "CUDA", "CPUs", "NVMe"]
    described += ["open files", "locked memory", "huge pages", "GPU link", "file system"]
    assert {topic: found[topic].level for topic in described} == dict.fromkeys(described, Level.GREEN)
    assert "RTX 4090 (00000000:01:00.0); driver open 580.95.05" in found["CUDA"].fact
    assert "ext4 on nvme0n1 (Samsung SSD 990 PRO 2TB); O_DIRECT works" in found["file system"].fact
    assert "16.0 GT/s x4, at most 7.9 GB/s" in found["NVMe"].fact
    # An idle GPU's link is slow on purpose: only lost lanes count.
    assert found["GPU link"].fact == "0000:01:00.0: 16 of 16 PCIe lanes"


def test_cloud_machine_without_gpu_has_nothing_to_fix(tmp_path: Path) -> None:
    found = look(tmp_path, CLOUD, probes(cuda="libcuda.so.1 cannot be opened"))
    assert all(finding.level is Level.GREEN for finding in found.values()), found
    assert found["CUDA"].fact == "no NVIDIA GPU in this machine"
    assert found["NVMe"].fact == "no NVMe drive in this machine"
    assert "CPUs" not in found


def test_virtual_disk_is_not_called_rotating(tmp_path: Path) -> None:
    # virtio disks say rotational=1 whatever the host has.
    found = look(tmp_path, CLOUD, probes())
    assert "rotating" not in found["file system"].cost


def test_container_says_who_refuses_and_what_to_type(tmp_path: Path) -> None:
    answers = probes(io_uring="Operation not permitted", cuda="libcuda.so.1 cannot be opened", cachestat=False)
    found = look(tmp_path, CONTAINER, answers)
    assert found["io_uring"].level is Level.YELLOW
    assert "--security-opt seccomp=" in found["io_uring"].fix
    assert "system call 451" in found["cachestat"].fix
    assert found["CUDA"].level is Level.RED
    assert "--gpus all" in found["CUDA"].fix
    assert found["open files"].level is Level.YELLOW
    assert "limits.conf" in found["open files"].fix
    assert found["memory"].level is Level.YELLOW
    assert "1.0 GiB" in found["memory"].fact
    assert "docker run -v" in found["file system"].fix


@pytest.mark.parametrize(
    ("disabled", "fix"), [("2", "sudo sysctl kernel.io_uring_disabled=0"), ("1", "kernel.io_uring_group")]
)
def test_io_uring_switched_off_by_sysctl(tmp_path: Path, disabled: str, fix: str) -> None:
    files = {**CLOUD, "/proc/sys/kernel/io_uring_disabled": disabled}
    found = look(tmp_path, files, probes(io_uring="Operation not permitted"))
    assert found["io_uring"].level is Level.YELLOW
    assert fix in " ".join((found["io_uring"].fix, *found["io_uring"].commands))


def test_missing_engine_is_red_and_asks_it_nothing(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the engine was asked although it is not there")

    answers = Probes(lambda: "no module", never, never, never, never, lambda: None)
    found = look(tmp_path, CLOUD, answers)
    assert found["engine"].level is Level.RED
    assert found["engine"].commands == ("pip install --force-reinstall gpunvme",)


def test_gpu_without_driver_is_red(tmp_path: Path) -> None:
    files = {name: text for name, text in DESKTOP.items() if name != "/proc/driver/nvidia/version"}
    found = look(tmp_path, files, probes(cuda="libcuda.so.1 cannot be opened"))
    assert found["CUDA"].level is Level.RED
    assert "install the NVIDIA driver" in found["CUDA"].fix


def test_driver_without_uvm_names_the_module(tmp_path: Path) -> None:
    found = look(tmp_path, {**DESKTOP, "/dev/nvidia0": ""}, probes(cuda="cuInit: unknown error"))
    assert "modprobe nvidia-uvm" in found["CUDA"].fix


def test_driver_that_is_all_there_and_does_not_work(tmp_path: Path) -> None:
    files = {**DESKTOP, "/dev/nvidia0": "", "/dev/nvidia-uvm": ""}
    found = look(tmp_path, files, probes(cuda="cuInit: the driver and the library differ"))
    assert "nvidia-smi" in found["CUDA"].fix


def test_kernel_before_io_uring(tmp_path: Path) -> None:
    old = {**CLOUD, "/proc/sys/kernel/osrelease": "4.19.0-27-amd64"}
    found = look(tmp_path, old, probes(io_uring="Function not implemented"))
    assert (found["kernel"].level, found["io_uring"].level) == (Level.YELLOW, Level.YELLOW)
    assert "boot Linux 5.15 or newer" in found["kernel"].fix
    assert "boot Linux 5.15 or newer" in found["io_uring"].fix


def test_huge_pages_that_nobody_gets(tmp_path: Path) -> None:
    files = {**CLOUD, "/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}
    found = look(tmp_path, files, probes())
    assert found["huge pages"].level is Level.YELLOW
    assert found["huge pages"].commands == ("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",)


def test_rotating_drive(tmp_path: Path) -> None:
    files = {
        **CLOUD,
        "/proc/self/mountinfo": "30 1 8:0 / / rw - ext4 /dev/sda rw",
        "/sys/devices/pci0000:00/0000:00:17.0/block/sda/queue/rotational": "1",
        "/sys/class/block/sda": "->../../devices/pci0000:00/0000:00:17.0/block/sda",
        "/sys/dev/block/8:0": "->../../devices/pci0000:00/0000:00:17.0/block/sda",
    }
    found = look(tmp_path, files, probes())
    assert found["file system"].level is Level.YELLOW
    assert "rotating" in found["file system"].cost
    assert "NVMe" in found["file system"].fix


def test_drive_in_a_narrow_slot_says_what_it_costs(tmp_path: Path) -> None:
    narrow = pci("0000:02:00.0", node=-1, speed="8.0", max_speed="16.0", width=2, max_width="4")
    found = look(tmp_path, {**DESKTOP, **narrow}, probes(devices=RTX))
    assert found["NVMe"].level is Level.YELLOW
    assert found["NVMe"].cost == "at most 2.0 GB/s instead of 7.9 GB/s"


def test_gpu_that_lost_lanes(tmp_path: Path) -> None:
    few = pci("0000:01:00.0", node=-1, speed="16.0", width=8, max_width="16", vendor="0x10de")
    found = look(tmp_path, {**DESKTOP, **few}, probes(devices=RTX))
    assert found["GPU link"].level is Level.YELLOW
    assert found["GPU link"].fact == "0000:01:00.0: 8 of 16 PCIe lanes"


def test_drive_and_gpu_on_different_sockets(tmp_path: Path) -> None:
    files = {
        **DESKTOP,
        "/sys/devices/system/node/online": "0-1",
        "/sys/devices/pci0000:00/0000:01:00.0/numa_node": "1",
        "/sys/devices/pci0000:00/0000:02:00.0/numa_node": "0",
    }
    found = look(tmp_path, files, probes(devices=RTX))
    assert found["NUMA"].level is Level.YELLOW
    assert "numactl --cpunodebind=1 --membind=1" in found["NUMA"].fix
    assert "nvme0 on node 0" in found["NUMA"].fact


@pytest.mark.parametrize(
    ("mountinfo", "word"),
    [
        ("30 1 0:40 / / rw - nfs4 server:/x rw", "network"),
        ("30 1 0:40 / / rw - fuse.rclone remote: rw", "user space"),
        ("30 1 0:40 / / rw - btrfs /dev/sda rw,compress=zstd:3", "compressed"),
        ("30 1 8:0 / / rw - ext4 /dev/sda rw,data=journal", "data=journal"),
    ],
)
def test_file_systems_that_cost_something(tmp_path: Path, mountinfo: str, word: str) -> None:
    found = look(tmp_path, {**CLOUD, "/proc/self/mountinfo": mountinfo}, probes())
    assert found["file system"].level is Level.YELLOW
    assert word in found["file system"].cost


def test_refused_direct_io_is_reported(tmp_path: Path) -> None:
    found = look(tmp_path, CLOUD, probes(), direct="Invalid argument")
    assert "O_DIRECT is refused (Invalid argument)" in found["file system"].cost


def test_files_in_memory_need_no_direct_io(tmp_path: Path) -> None:
    tmpfs = {**CLOUD, "/proc/self/mountinfo": "30 1 0:40 / / rw - tmpfs tmpfs rw"}
    found = look(tmp_path, tmpfs, probes(), direct="Invalid argument")
    assert found["file system"].level is Level.GREEN


def test_quota_below_the_cpu_count_is_seen(tmp_path: Path) -> None:
    found = look(tmp_path, {**DESKTOP, "/sys/fs/cgroup/cpu.max": "200000 100000"}, probes(devices=RTX))
    assert found["CPUs"].level is Level.YELLOW
    assert "quota allows the time of 2" in found["CPUs"].fact


def test_too_little_memory_is_red(tmp_path: Path) -> None:
    files = {**CLOUD, "/proc/meminfo": MEMINFO.format(total=512 << 10, available=100 << 10)}
    assert look(tmp_path, files, probes())["memory"].level is Level.RED


def test_memory_limit_of_version_1_without_a_limit(tmp_path: Path) -> None:
    write_tree(tmp_path, {"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert memory_limit(System(tmp_path, probes())) is None


def test_old_kernel_counts_rings_as_locked_memory(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "/proc/sys/kernel/osrelease": "5.4.0-200-generic",
            "/proc/self/limits": "Limit Soft Hard\nMax locked memory    65536    65536    bytes",
        },
    )
    (finding,) = check_limits(System(tmp_path, probes()))
    assert finding.level is Level.YELLOW
    assert "ulimit -l" in finding.fix


def test_empty_machine_does_not_break_the_doctor(tmp_path: Path) -> None:
    # /proc hidden, /sys not mounted: say what is known and go on.
    found = look(tmp_path, {}, probes())
    assert found["kernel"].level is Level.YELLOW
    assert found["file system"].level is Level.YELLOW


@pytest.mark.parametrize(("text", "count"), [("0-3,8,10-11", 7), ("0", 1), ("", 0), ("x-y", 0)])
def test_cpu_lists(text: str, count: int) -> None:
    assert count_cpus(text) == count


def test_cuda_bus_ids_become_sysfs_names() -> None:
    assert short_address("00000000:0A:00.0") == "0000:0a:00.0"
    assert short_address("0000:0a:00.0") == "0000:0a:00.0"


def test_cufile_is_found_without_being_opened(tmp_path: Path) -> None:
    # Opening it can hang for ever where there is no GPU; a file that is no library proves that it is not opened.
    (tmp_path / "libcufile.so.0").write_text("not a library")
    assert installed_cufile(b"", [tmp_path]) == str(tmp_path / "libcufile.so.0")
    cache = b"junk\0libcufile.so.0\0/opt/cuda/lib/libcufile.so.0\0/lib/libc.so.6\0"
    assert installed_cufile(cache, []) == "/opt/cuda/lib/libcufile.so.0"
    assert installed_cufile(b"/lib/libcufile_rdma.so.1\0", []) is None
