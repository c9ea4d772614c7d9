"""`gpunvme doctor` on whole machines: a server, a desktop, a laptop, a guest in a cloud; each line good and bad.

A user who believes a wrong line buys the wrong board, or goes on losing what one setting would give back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import doctor_machines as machines
from doctor_machines import CLOUD, DESKTOP, GPU, LAPTOP, NVME, SERVER, health, identify, look, probes
from gpunvme.doctor import Level
from gpunvme.doctor.nvme_admin import AdminAnswer
from gpunvme.nvme import kmod_uapi

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpunvme.doctor import Finding

GREEN, YELLOW, RED = Level.GREEN, Level.YELLOW, Level.RED
KMOD = {"/sys/module/gpunvme/version": "1", "/sys/class/gpunvme/gpunvme0/dev": "240:0"}
NVME_DIR = f"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/{machines.NVME_PORT}/{NVME}/nvme/nvme0"
GPU_DIR = f"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/{machines.GPU_PORT}/{GPU}"
FS = {"/proc/driver/nvidia-fs/version": "GDS Version: 2.20.6"}


def levels(found: dict[str, list[Finding]]) -> dict[str, Level]:
    order = [GREEN, YELLOW, RED]
    return {topic: max((each.level for each in each_), key=order.index) for topic, each_ in found.items()}


def test_server_that_has_everything_has_nothing_to_fix(tmp_path: Path) -> None:
    found = look(tmp_path, {**SERVER, **KMOD, **FS, **dict.fromkeys(_group_types(), "DMA-FQ")})
    assert {topic: found[topic] for topic, level in levels(found).items() if level is not GREEN} == {}
    assert "share 0000:01:00.0, 2 bridges" in found["PCIe path"][0].fact
    assert found["BAR1"][0].fact == f"GPU {GPU}: 128 GiB"
    assert "MDTS 9" in found["drive"][0].fact
    assert "32 I/O queues, transfers up to 2048 KiB, LBA 512 bytes" in found["drive"][0].fact
    assert found["heat"][0].fact == "nvme0: 40 °C, warns at 81 °C; never throttled"
    assert "1.15.1" in found["cuFile"][0].fact
    assert found["nvidia-fs"][0].fact == "2.20.6"
    assert "/dev/gpunvme0" in found["kernel module"][0].fact


def _group_types() -> list[str]:
    return [f"/sys/kernel/iommu_groups/{group}/type" for group in range(6)]


def test_server_with_p2pdma_needs_no_nvidia_fs(tmp_path: Path) -> None:
    found = look(tmp_path, SERVER)
    assert levels(found)["P2PDMA"] is GREEN
    assert found["nvidia-fs"][0].fact == "not loaded; P2PDMA takes its place"
    assert levels(found)["cufile.json"] is GREEN
    assert [topic for topic, level in levels(found).items() if level is not GREEN] == ["kernel module"]


def test_drive_of_the_other_socket(tmp_path: Path) -> None:
    found = look(tmp_path, {**SERVER, **machines.SECOND_SOCKET})
    ways = {each.fact.split()[0]: each for each in found["PCIe path"]}
    assert ways["nvme0"].level is GREEN
    assert ways["nvme1"].level is YELLOW
    assert "of two sockets" in ways["nvme1"].fact
    assert levels(found)["P2P platform"] is GREEN  # AMD's root complex passes it


def test_desktop(tmp_path: Path) -> None:
    found = look(tmp_path, DESKTOP, probes(cufile=None, admin="/dev/nvme0 is for root only (sudo gpunvme doctor)"))
    worse = {topic for topic, level in levels(found).items() if level is not GREEN}
    assert worse == {"static BAR1", "kernel module", "nvidia-fs", "P2PDMA", "cuFile"}
    (p2pdma,) = found["P2PDMA"]
    for blocker in ("no static BAR1", "the IOMMU translates", "multipath"):
        assert blocker in p2pdma.fact
    assert "MDTS unknown (/dev/nvme0 is for root only" in found["drive"][0].fact
    assert "throttling unknown (/dev/nvme0 is for root only" in found["heat"][0].fact
    assert "RMForceStaticBar1=1" in found["static BAR1"][0].commands[0]
    assert "vfio-pci is there" in found["VFIO"][0].fact


def test_laptop(tmp_path: Path) -> None:
    found = look(tmp_path, LAPTOP)
    assert levels(found)["GPU driver"] is YELLOW
    assert found["GPU driver"][0].fact == "proprietary 550.54.14"
    assert "256 MiB" in found["BAR1"][0].fact
    assert "Secure Boot" in found["kernel module"][0].fact
    assert any("mokutil" in command for command in found["kernel module"][0].commands)
    assert "Core(TM) i9" in found["P2P platform"][0].fact
    assert levels(found)["P2P platform"] is YELLOW
    assert levels(found)["direct files"] is YELLOW
    assert "under load" in found["heat"][0].cost


def test_guest_in_a_cloud(tmp_path: Path) -> None:
    found = look(tmp_path, CLOUD)
    assert "the host has to give it one" in found["IOMMU"][0].fact
    assert "VFIO" not in found
    assert "hypervisor" in found["P2P platform"][0].cost
    assert "16 CPUs share" in found["drive"][0].cost


def test_machine_without_gpu_and_drive_hears_nothing_of_them(tmp_path: Path) -> None:
    found = look(tmp_path, machines.CLOUD_WITHOUT_GPU, probes(cuda="no libcuda", devices=[], cufile=None))
    assert set(levels(found).values()) == {GREEN}
    assert not {"PCIe path", "P2PDMA", "cuFile", "IOMMU", "VFIO", "BAR1", "heat"} & set(found)


# One change each to a server on which the line is green.
CHANGES: dict[str, tuple[dict[str, str | bytes], str, Level, str]] = {
    "acs": ({f"/sys/bus/pci/devices/{machines.NVME_PORT}/config": machines.acs(0x1D)}, "ACS", YELLOW, "0000:02:01.0"),
    "acs, not root": ({f"/sys/bus/pci/devices/{machines.NVME_PORT}/config": bytes(64)}, "ACS", YELLOW, "takes root"),
    "acs, source validation only": (
        {f"/sys/bus/pci/devices/{machines.NVME_PORT}/config": machines.acs(1)},
        "ACS",
        GREEN,
        "off",
    ),
    "uplink": ({"/sys/bus/pci/devices/0000:02:01.0/current_link_speed": "8.0 GT/s"}, "uplink", YELLOW, "0000:02:01.0"),
    "bar unreadable": ({f"{GPU_DIR}/resource": "garbage"}, "BAR1", YELLOW, "unknown"),
    "small bar": (
        {f"{GPU_DIR}/resource": f"0x0 0x0 0x0\n0x10000000 {0x10000000 + (256 << 20) - 1:#x} 0x0"},
        "BAR1",
        YELLOW,
        "shows no resizing",
    ),
    "resizable": (
        {
            f"{GPU_DIR}/resource": f"0x0 0x0 0x0\n0x10000000 {0x10000000 + (256 << 20) - 1:#x} 0x0",
            f"{GPU_DIR}/resource1_resize": "00000000003fff00",
        },
        "BAR1",
        YELLOW,
        "can be resized",
    ),
    "old driver": (
        {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  510.47.03  Release"},
        "GPU driver",
        YELLOW,
        "510.47.03",
    ),
    "no driver": ({"/proc/driver/nvidia/version": b""}, "GPU driver", YELLOW, "unknown"),
    "no static bar": (
        {"/proc/driver/nvidia/params": 'RegistryDwords: "RMForceStaticBar1=0"'},
        "static BAR1",
        YELLOW,
        "",
    ),
    "no p2pdma": ({"/boot/config-6.11.0-9-generic": "# CONFIG_PCI_P2PDMA is not set"}, "P2PDMA", YELLOW, "none"),
    "old kernel": (
        {"/proc/sys/kernel/osrelease": "6.1.0-30-amd64", "/boot/config-6.1.0-30-amd64": "CONFIG_PCI_P2PDMA=y"},
        "P2PDMA",
        YELLOW,
        "older than 6.2",
    ),
    "multipath": ({"/sys/module/nvme_core/parameters/multipath": "Y"}, "P2PDMA", YELLOW, "nvme_core.multipath=N"),
    "fs version": ({"/proc/driver/nvidia-fs/version": "?"}, "nvidia-fs", YELLOW, "unknown"),
    "compat forced": (
        {"/etc/cufile.json": '{"properties": {"force_compat_mode": true}}'},
        "cufile.json",
        YELLOW,
        "true",
    ),
    "p2pdma not asked": ({"/etc/cufile.json": "{}"}, "cufile.json", YELLOW, "nothing"),
    "json broken": ({"/etc/cufile.json": "{properties"}, "cufile.json", YELLOW, "not understood"),
    "json a list": ({"/etc/cufile.json": "[]"}, "cufile.json", YELLOW, "not understood"),
    "module of another version": ({"/sys/module/gpunvme/version": "7"}, "kernel module", YELLOW, "made for 1"),
    "module says nothing": ({"/sys/module/gpunvme/parameters": ""}, "kernel module", YELLOW, "unknown"),
    "iommu passes": ({"/sys/module/gpunvme/version": "1"}, "IOMMU", YELLOW, "identity"),
    "shared group": (
        {
            "/sys/kernel/iommu_groups/5/devices/0000:09:00.1": "->/sys/bus/pci/devices/0000:09:00.1",
            **machines.function("0000:09:00.1", "sound", above="pci0000:00"),
        },
        "VFIO",
        YELLOW,
        "shares IOMMU group 5 with 0000:09:00.1",
    ),
    "group with a bridge": (
        {"/sys/kernel/iommu_groups/5/devices/0000:02:01.0": "->/sys/bus/pci/devices/0000:02:01.0"},
        "VFIO",
        GREEN,
        "vfio-pci is loaded",
    ),
    "one group translates": ({"/sys/kernel/iommu_groups/4/type": "DMA"}, "P2PDMA", YELLOW, "the IOMMU translates"),
    "one queue too few": ({f"{NVME_DIR}/queue_count": "16"}, "drive", YELLOW, "15 I/O queues"),
    "dead": ({f"{NVME_DIR}/state": "dead"}, "drive", RED, "dead"),
    "no firmware": ({f"{NVME_DIR}/firmware_rev": b"\xff\xfe"}, "drive", GREEN, "firmware"),
    "few queues": ({f"{NVME_DIR}/queue_count": "5"}, "drive", YELLOW, "4 I/O queues"),
    "cmb": ({f"{NVME_DIR}/cmb": "cmbloc : x00000002\ncmbsz  : 0x00040219"}, "drive", GREEN, "CMB 64 MiB"),
    "cmb garbled": ({f"{NVME_DIR}/cmb": "cmbsz : many"}, "drive", GREEN, "CMB unknown"),
    "hot": ({f"{NVME_DIR}/hwmon3/temp1_input": "83000"}, "heat", RED, "83 °C"),
    "writeback": (
        {"/proc/self/mountinfo": "30 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw,data=writeback"},
        "direct files",
        YELLOW,
        "data=writeback",
    ),
    "xfs": ({"/proc/self/mountinfo": "30 1 259:2 / / rw - xfs /dev/nvme0n1p2 rw"}, "direct files", GREEN, "nvme0n1"),
    "raid 5": (
        {
            "/proc/self/mountinfo": "30 1 9:0 / / rw - xfs /dev/md0 rw",
            "/sys/devices/virtual/block/md0/md/level": "raid5",
            "/sys/devices/virtual/block/md0/slaves/nvme0n1": "->/sys/class/block/nvme0n1",
            "/sys/class/block/md0": "->/sys/devices/virtual/block/md0",
            "/sys/dev/block/9:0": "->/sys/devices/virtual/block/md0",
        },
        "direct files",
        YELLOW,
        "md0 keeps parity",
    ),
    "multipath map": (
        {
            "/proc/self/mountinfo": "30 1 253:0 / / rw - ext4 /dev/dm-0 rw",
            "/sys/devices/virtual/block/dm-0/dm/uuid": "mpath-3600",
            "/sys/devices/virtual/block/dm-0/slaves/nvme0n1": "->/sys/class/block/nvme0n1",
            "/sys/class/block/dm-0": "->/sys/devices/virtual/block/dm-0",
            "/sys/dev/block/253:0": "->/sys/devices/virtual/block/dm-0",
        },
        "direct files",
        YELLOW,
        "mpath",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_line_of_the_server_in_another_state(tmp_path: Path, name: str) -> None:
    change, topic, level, words = CHANGES[name]
    whole = {**SERVER, **change}
    for path in change:  # a name of the bus leads to the same file as one of the tree; the change comes last
        whole[path] = whole.pop(path)
    found = look(tmp_path, whole)
    assert levels(found)[topic] is level, found[topic]
    assert any(words in each.fact for each in found[topic])
    if level is not GREEN:
        assert all(each.cost and each.fix for each in found[topic] if each.level is level)


def without(files: dict[str, str | bytes], *names: str) -> dict[str, str | bytes]:
    return {path: text for path, text in files.items() if not path.startswith(names)}


LIB = "/lib/modules"
ABSENT: dict[str, tuple[str, str, str]] = {
    "headers": ("/lib/modules/6.11.0-9-generic/build", "kernel module", "headers"),
    "modules": ("/lib/modules", "kernel module", "headers"),
    "params": ("/proc/driver/nvidia/params", "static BAR1", "No such file"),
    "driver": ("/proc/driver/nvidia/version", "GPU driver", "No such file"),
    "configuration": ("/boot", "P2PDMA", "/proc/kallsyms shows no symbols"),
    "firmware": (f"{NVME_DIR}/firmware_rev", "drive", "firmware_rev: No such file"),
    "meminfo": ("/proc/meminfo", "memory", "unknown"),
    "huge pages": ("/sys/kernel/mm", "huge pages", "unknown"),
    "nodes": ("/sys/devices/system", "NUMA", "unknown"),
}


OURS = f"{LIB}/6.11.0-9-generic/updates/dkms/gpunvme.ko"
THEIRS = f"{LIB}/6.8.0-40-generic/updates/dkms/gpunvme.ko.zst"
ON = b"\x06\0\0\0\x01"
# The module is not loaded: what else is there, what the line says, and what its commands have.
MODULE: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "installed": ({OURS: ""}, "gpunvme.ko is not loaded", "sudo modprobe gpunvme"),
    "installed, Secure Boot": (
        {OURS: "", machines.SECURE_BOOT: ON, "/var/lib/shim-signed/mok/MOK.der": ""},
        "Secure Boot takes only signed modules",
        "mokutil --import /var/lib/shim-signed/mok/MOK.der",
    ),
    "installed, locked down": (
        {OURS: "", "/sys/kernel/security/lockdown": "none [integrity] confidentiality"},
        "locked down (integrity)",
        "mokutil --import /var/lib/dkms/mok.pub",
    ),
    "installed, Secure Boot without lockdown": (
        {OURS: "", machines.SECURE_BOOT: ON, "/sys/kernel/security/lockdown": "[none] integrity"},
        "gpunvme.ko is not loaded",
        "sudo modprobe gpunvme",
    ),
    "not built, signatures enforced": (
        {"/sys/module/module/parameters/sig_enforce": "Y"},
        "module.sig_enforce",
        "make deb",
    ),
    "built for another kernel": (
        {THEIRS: ""},
        "is built for 6.8.0-40-generic, and this is 6.11.0-9-generic",
        "dkms autoinstall -k 6.11.0-9-generic",
    ),
    "nothing": ({}, "gpunvme.ko is not loaded", "make deb && sudo apt install ./dist/gpunvme-dkms_*.deb"),
}


@pytest.mark.parametrize("name", MODULE)
def test_module_that_is_not_loaded_says_what_is_in_the_way(tmp_path: Path, name: str) -> None:
    change, words, command = MODULE[name]
    (finding,) = look(tmp_path, {**SERVER, **change})["kernel module"]
    assert finding.level is YELLOW
    assert words in finding.fact
    assert command in "\n".join(finding.commands)


def test_module_on_a_kernel_that_it_cannot_be_built_for(tmp_path: Path) -> None:
    (finding,) = look(tmp_path, {**SERVER, "/proc/sys/kernel/osrelease": "5.15.0-100-generic"})["kernel module"]
    assert "5.15.0-100-generic is too old" in finding.fact
    assert "6.1" in finding.fix


@pytest.mark.parametrize("name", ABSENT)
def test_what_cannot_be_read_is_unknown_and_says_why(tmp_path: Path, name: str) -> None:
    path, topic, words = ABSENT[name]
    found = look(tmp_path, without(SERVER, path))
    assert levels(found)[topic] is YELLOW
    assert words in found[topic][0].fact


def test_vfio_of_a_kernel_without_it(tmp_path: Path) -> None:
    dep = "/lib/modules/6.11.0-9-generic/modules.dep"
    bare = without(SERVER, "/sys/bus/pci/drivers/vfio-pci")
    found = look(tmp_path / "none", {**bare, dep: "kernel/fs/ext4.ko:"})
    assert "no vfio-pci" in found["VFIO"][0].fact
    assert found["VFIO"][0].commands == ("sudo apt install linux-modules-extra-6.11.0-9-generic",)
    found = look(tmp_path / "hidden", without(bare, dep))
    assert "unknown" in found["VFIO"][0].fact


def test_symbols_tell_of_p2pdma_where_the_configuration_is_hidden(tmp_path: Path) -> None:
    bare = without(SERVER, "/boot")
    many = "".join(f"0 T symbol_{i}\n" for i in range(2000))
    found = look(tmp_path / "has", {**bare, "/proc/kallsyms": many + "0 T pci_p2pdma_add_resource [kernel]"})
    assert levels(found)["P2PDMA"] is GREEN
    found = look(tmp_path / "lacks", {**bare, "/proc/kallsyms": many})
    assert "this kernel has none" in found["P2PDMA"][0].fact


@pytest.mark.parametrize(
    ("log", "level", "words"),
    [
        (health(warning=(0, 1, 1 << 2)), RED, "media errors"),
        (health(throttled=(224, 4, 90)), YELLOW, "throttled for 90 s"),
        (health(minutes=(192, 4, 2)), YELLOW, "throttled for 120 s"),
        (b"short", GREEN, "throttling unknown"),
    ],
)
def test_what_the_drive_says_of_its_health(tmp_path: Path, log: bytes, level: Level, words: str) -> None:
    (finding,) = look(tmp_path, SERVER, probes(admin=AdminAnswer(identify(), log)))["heat"]
    assert finding.level is level
    assert words in finding.fact


def test_drive_without_a_sensor_is_asked_itself(tmp_path: Path) -> None:
    bare = without(SERVER, f"{NVME_DIR}/hwmon3")
    (finding,) = look(tmp_path / "root", bare)["heat"]
    assert finding.fact.startswith("nvme0: 40 °C")
    (finding,) = look(tmp_path / "user", bare, probes(admin="for root only"))["heat"]
    assert finding.level is YELLOW
    assert "for root only" in finding.fact


def test_drive_without_mdts_has_no_limit(tmp_path: Path) -> None:
    (finding,) = look(tmp_path, SERVER, probes(admin=AdminAnswer(identify(0), health())))["drive"]
    assert "MDTS without limit" in finding.fact


@pytest.mark.parametrize(("held", "level"), [("vfio-pci", YELLOW), ("gpunvme", YELLOW), ("nvme", None)])
def test_locked_memory_matters_once_a_drive_is_ours(tmp_path: Path, held: str, level: Level | None) -> None:
    above = f"pci0000:00/0000:00:01.0/0000:01:00.0/{machines.NVME_PORT}"
    files = {**SERVER, **machines.function(NVME, "nvme", above=above, driver=held, group=5)}
    files["/proc/self/limits"] = machines.LIMITS.format(memlock="8388608")
    found = look(tmp_path, files)
    assert [each.level for each in found.get("memory for drives", [])] == ([level] if level else [])


def test_cufile_without_a_version_and_one_that_is_silent(tmp_path: Path) -> None:
    found = look(tmp_path / "none", SERVER, probes(cufile="/opt/libcufile.so.0"))
    assert "unknown" in found["cuFile"][0].fact
    found = look(tmp_path / "new", SERVER, probes(cufile="/opt/libcufile.so.1.17.0"))
    assert "does not say so" in found["cuFile"][0].fact
    assert levels(look(tmp_path / "absent", SERVER, probes(cufile=None)))["cuFile"] is YELLOW


def test_cufile_json_that_the_environment_names(tmp_path: Path) -> None:
    files = {**SERVER, "/opt/my.json": '{"properties": {"force_compat_mode": true}}'}
    found = look(tmp_path, files, probes(environment={"CUFILE_ENV_PATH_JSON": "/opt/my.json"}))
    assert "/opt/my.json" in found["cufile.json"][0].fact
    assert levels(found)["cufile.json"] is YELLOW


def test_module_version_is_the_one_that_the_module_says() -> None:
    kmod = Path(__file__).parents[2] / "kmod"
    assert "MODULE_VERSION(__stringify(GPUNVME_UAPI_VERSION))" in (kmod / "driver.c").read_text()
    assert f"#define GPUNVME_UAPI_VERSION {kmod_uapi.VERSION}\n" in (kmod / "gpunvme_uapi.h").read_text()


@pytest.mark.parametrize("check", [lambda found: found["PCIe path"], lambda found: found["P2PDMA"]])
def test_engine_that_is_missing_leaves_the_rest_out(
    tmp_path: Path, check: Callable[[dict[str, list[Finding]]], list[Finding]]
) -> None:
    found = look(tmp_path, SERVER, probes(engine="no module"))
    assert levels(found)["engine"] is RED
    with pytest.raises(KeyError):
        check(found)
