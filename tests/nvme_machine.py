"""Machines that are not there: a tree of /sys, /proc and /dev written by a test, and a kernel that answers writes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpunvme.nvme.sysfs import Machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
BDF = "0000:01:00.0"


class Tree:
    """Writes the files of a machine below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("/sys/bus/pci/devices", "/sys/class/block", "/proc", "/dev", "/sys/bus/pci/drivers"):
            self.folder(name)
        self.file("/proc/self/mountinfo", "")

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def folder(self, name: str) -> None:
        self.path(name).mkdir(parents=True, exist_ok=True)

    def file(self, name: str, text: str | bytes) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())

    def link(self, name: str, target: str) -> None:
        """A symbolic link to an absolute name within the tree."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(self.path(target))

    def pci(
        self,
        address: str = BDF,
        *,
        code: str = "0x010802",
        driver: str | None = "nvme",
        group: int | None = 12,
        above: str = "pci0000:00/0000:00:01.0",
        node: int = 0,
        resource: str = "0x00000000fe800000 0x00000000fe803fff 0x0000000000140204",
    ) -> None:
        """A PCI function, by default an NVMe controller that the kernel drives."""
        where = f"/sys/devices/{above}/{address}"
        self.file(f"{where}/class", code)
        self.file(f"{where}/vendor", "0x144d")
        self.file(f"{where}/device", "0xa80a")
        self.file(f"{where}/numa_node", str(node))
        self.file(f"{where}/current_link_speed", "16.0 GT/s PCIe")
        self.file(f"{where}/max_link_speed", "32.0 GT/s PCIe")
        self.file(f"{where}/current_link_width", "4")
        self.file(f"{where}/max_link_width", "4")
        self.file(f"{where}/driver_override", "(null)")
        self.file(f"{where}/resource", "\n".join([resource, *["0x0 0x0 0x0"] * 12]))
        self.link(f"/sys/bus/pci/devices/{address}", where)
        if driver is not None:
            self.folder(f"/sys/bus/pci/drivers/{driver}")
            self.link(f"{where}/driver", f"/sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.folder(f"/sys/kernel/iommu_groups/{group}/devices")
            self.link(f"{where}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
            self.link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", where)

    def controller(self, address: str = BDF, name: str = "nvme0", entries: tuple[str, ...] = ("nvme0n1",)) -> None:
        """What the kernel's driver adds to a function: the controller and its namespaces' entries."""
        where = f"/sys/bus/pci/devices/{address}/nvme/{name}"
        self.file(f"{where}/model", "Samsung SSD 990 PRO 2TB")
        self.file(f"{where}/serial", "S7KG")
        self.file(f"{where}/state", "live")
        for entry in entries:
            self.folder(f"{where}/{entry}")

    def block(self, name: str, number: str, data: bytes = bytes(MIB), nsid: int | None = None) -> None:
        """A block device, with its device file."""
        where = f"/sys/class/block/{name}"
        self.file(f"{where}/dev", number)
        self.file(f"{where}/size", str(len(data) // 512))
        self.file(f"{where}/queue/logical_block_size", "512")
        self.folder(f"{where}/holders")
        if nsid is not None:
            self.file(f"{where}/nsid", str(nsid))
        self.file(f"/dev/{name}", data)

    def partition(self, disk: str, name: str, number: str) -> None:
        self.block(name, number)
        self.file(f"/sys/class/block/{name}/partition", "1")
        self.file(f"/sys/class/block/{disk}/{name}/partition", "1")

    def holder(self, below: str, above: str) -> None:
        self.folder(f"/sys/class/block/{below}/holders/{above}")

    def mounts(self, *lines: str, process: str = "self") -> None:
        self.file(f"/proc/{process}/mountinfo", "\n".join(lines))

    def process(self, number: int, name: str, *open_files: str, mounts: str = "mnt:[1]") -> None:
        self.file(f"/proc/{number}/comm", name)
        self.folder(f"/proc/{number}/fd")
        for at, target in enumerate(open_files):
            self.path(f"/proc/{number}/fd/{at}").symlink_to(target)
        self.folder(f"/proc/{number}/ns")
        self.path(f"/proc/{number}/ns/mnt").symlink_to(mounts)


def simple(root: Path, data: bytes = bytes(MIB)) -> Tree:
    """A machine with one NVMe drive at `BDF`, nvme0n1, that nobody uses."""
    tree = Tree(root)
    tree.pci()
    tree.controller()
    tree.block("nvme0n1", "259:0", data, nsid=1)
    tree.folder("/proc/self/ns")
    tree.path("/proc/self/ns/mnt").symlink_to("mnt:[1]")
    return tree


@dataclass(frozen=True)
class Kernel(Machine):
    """A machine whose sysfs does what is written to it, and notes it.

    ``refuse`` are drivers that do not take a function; ``before`` is called before each write with its name and text.
    """

    refuse: frozenset[str] = frozenset()
    writes: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda _name, _text: None

    def write(self, name: str, text: str) -> None:
        self.before(name, text)
        self.writes.append((name, text))
        if not self.path(name).parent.exists():
            raise FileNotFoundError(2, "No such file or directory")
        if name.endswith("/driver_override"):
            self.path(name).write_text(text.strip() or "(null)")
        elif name.endswith("/driver/unbind"):
            self._detach(text)
        elif name.endswith("/drivers_probe"):
            self._probe(text)

    def load_module(self, module: str) -> str:
        self.loaded.append(module)
        driver = module.replace("_", "-")
        if driver == "vfio-pci":
            self.path(f"/sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        return ""

    def _detach(self, address: str) -> None:
        where = self.path(f"/sys/bus/pci/devices/{address}")
        (where / "driver").unlink()
        for node in self.path("/dev").glob("nvme0n1*"):
            node.unlink()

    def _probe(self, address: str) -> None:
        where = self.path(f"/sys/bus/pci/devices/{address}")
        override = self.read(f"/sys/bus/pci/devices/{address}/driver_override")
        driver = "nvme" if override in ("(null)", "") else override
        folder = self.path(f"/sys/bus/pci/drivers/{driver}")
        if driver in self.refuse or not folder.exists():
            raise OSError(22, "Invalid argument")
        (where / "driver").symlink_to(folder)
        if driver == "vfio-pci":
            group = os.path.basename(os.readlink(where / "iommu_group"))
            self.path("/dev/vfio").mkdir(exist_ok=True)
            self.path(f"/dev/vfio/{group}").touch()
