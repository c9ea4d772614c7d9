"""What the kernel knows about NVMe controllers and their neighbours: PCI functions, IOMMU groups, block devices.

It is read from files below a root that a test can replace. `list_controllers` and `topology` are what a person wants to
see; `bind`, `safety` and `vfio` stand on the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gpunvme.errors import TransportError, UriError

# Class codes: PCI Code and ID Assignment Specification 1.15. 01h mass storage, 08h non-volatile memory, 02h NVMe I/O.
NVME_CLASS = 0x010802
_CLASS_NAMES = {0x0106: "SATA", 0x0108: "NVM", 0x0200: "Ethernet", 0x0300: "VGA", 0x0302: "3D", 0x0604: "PCI bridge"}
_MODPROBE_SECONDS = 60
_DISPLAY = 0x03
_BRIDGE = 0x06

_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII | re.IGNORECASE)
_NAMESPACE = re.compile(r"nvme(\d+)(c\d+)?n(\d+)")


@dataclass(frozen=True)
class Machine:
    """A machine as ``/sys``, ``/proc`` and ``/dev`` below a root show it, and what changes it."""

    root: Path = Path("/")

    def path(self, name: str) -> Path:
        """Return where an absolute path lies below the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Return a file's text without surrounding blanks, or None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip("\0 \n\t")
        except OSError:
            return None

    def read_bytes(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it cannot be read."""
        try:
            return self.path(name).read_bytes()
        except OSError:
            return None

    def read_int(self, name: str) -> int | None:
        """Return the number in a file (decimal, or hexadecimal behind ``0x``), or None."""
        try:
            return int(self.read(name) or "", 0)
        except ValueError:
            return None

    def names(self, name: str) -> list[str]:
        """Return the sorted names in a folder; none if there is no such folder."""
        try:
            return sorted(os.listdir(self.path(name)))
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder is there."""
        return os.path.exists(self.path(name))  # Path.exists raises where a name is too long

    def link(self, name: str) -> str | None:
        """Return the last part of where a symbolic link points, or None: how sysfs names drivers and groups."""
        try:
            return os.path.basename(os.readlink(self.path(name)))
        except OSError:
            return None

    def resolve(self, name: str) -> str | None:
        """Follow a symbolic link within the root; return the absolute name that it leads to, or None."""
        try:
            target = self.path(name).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12
            return None
        root = self.root.resolve()
        return "/" + str(target.relative_to(root)) if target.is_relative_to(root) else None

    def write(self, name: str, text: str) -> None:
        """Write to a file of sysfs, which must be there, by one ``write``.

        Raises
        ------
        OSError
            As the kernel answers.
        """
        fd = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def load_module(self, module: str) -> str:
        """Load a kernel module by modprobe(8); return why it did not work, or nothing."""
        program = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            return f"modprobe is not installed (apt-get install kmod), and the module {module} is not loaded"
        try:
            done = subprocess.run(
                [program, module],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_MODPROBE_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        said = done.stderr.strip() or f"status {done.returncode}"
        return "" if done.returncode == 0 else f"modprobe {module}: {said}"


def parse_bdf(text: str) -> str:
    """Return a PCI address as sysfs writes it: ``01:00.0`` becomes ``0000:01:00.0``.

    Raises
    ------
    UriError
        If it is none.
    """
    match = _BDF.fullmatch(text.strip())
    if match is None:
        raise UriError(f"{text!r} is no PCI address; one looks like 0000:01:00.0 (see `gpunvme nvme list`)")
    domain, bus, device, function = match.groups()
    return f"{int(domain or '0', 16):04x}:{bus}:{device}.{function}".lower()


@dataclass(frozen=True)
class Function:
    """One PCI function. What sysfs does not tell is None.

    Attributes
    ----------
    address
        Such as ``0000:01:00.0``.
    class_code
        24 bits: class, subclass, programming interface.
    driver
        Name of the kernel driver that has it.
    iommu_group
        Number of its IOMMU group; None without an IOMMU.
    node
        NUMA node.
    speed, max_speed
        Of the link, in 10^9 transfers per second and lane.
    width, max_width
        Lanes of the link.
    bars
        Bytes of each base address register; 0 where there is none.
    upstream
        Addresses of the PCI bridges between the root and the function, from the root.
    root
        The host bridge, such as ``pci0000:00``.
    """

    address: str
    vendor: int | None
    device: int | None
    class_code: int
    driver: str | None
    iommu_group: int | None
    node: int | None
    speed: float | None
    max_speed: float | None
    width: int | None
    max_width: int | None
    bars: tuple[int, ...]
    upstream: tuple[str, ...]
    root: str

    @property
    def is_nvme(self) -> bool:
        """Whether it is an NVMe controller for I/O."""
        return self.class_code == NVME_CLASS

    @property
    def is_display(self) -> bool:
        """Whether it is a GPU."""
        return self.class_code >> 16 == _DISPLAY

    @property
    def is_bridge(self) -> bool:
        """Whether it is a bridge."""
        return self.class_code >> 16 == _BRIDGE

    @property
    def kind(self) -> str:
        """What it is, in a word or two."""
        name = "NVMe" if self.is_nvme else _CLASS_NAMES.get(self.class_code >> 8)
        return name or f"class {self.class_code:06x}h"


def folder_of(address: str) -> str:
    """Return where sysfs describes a PCI function."""
    return f"/sys/bus/pci/devices/{address}"


def find_function(address: str, machine: Machine | None = None) -> Function | None:
    """Describe the PCI function at an address as `parse_bdf` returns it, or return None if there is none."""
    machine = machine or Machine()
    where = folder_of(address)
    code = machine.read_int(f"{where}/class")
    if code is None:
        return None
    real = machine.resolve(where) or where
    parts = [part for part in real.split("/") if part]
    group = machine.link(f"{where}/iommu_group")
    node = machine.read_int(f"{where}/numa_node")
    return Function(
        address=address,
        vendor=machine.read_int(f"{where}/vendor"),
        device=machine.read_int(f"{where}/device"),
        class_code=code,
        driver=machine.link(f"{where}/driver"),
        iommu_group=int(group) if group is not None and group.isdecimal() else None,
        node=node if node is not None and node >= 0 else None,
        speed=_transfers(machine.read(f"{where}/current_link_speed")),
        max_speed=_transfers(machine.read(f"{where}/max_link_speed")),
        width=_lanes(machine.read_int(f"{where}/current_link_width")),
        max_width=_lanes(machine.read_int(f"{where}/max_link_width")),
        bars=_bars(machine.read(f"{where}/resource") or ""),
        upstream=tuple(part for part in parts[:-1] if _BDF.fullmatch(part)),
        root=next((part for part in parts if re.fullmatch(r"pci[0-9a-f]+:[0-9a-f]+", part)), ""),
    )


def _transfers(text: str | None) -> float | None:
    """Return the number in ``16.0 GT/s PCIe``."""
    match = re.match(r"(\d+(?:\.\d+)?) GT/s", text or "")
    return float(match[1]) if match else None


def _lanes(width: int | None) -> int | None:
    # A function without a PCIe link says 0 or 255.
    return width if width is not None and 0 < width <= 32 else None


def _bars(resource: str) -> tuple[int, ...]:
    """Return the sizes of the six BARs: sysfs writes "start end flags" a line."""
    sizes = []
    for line in resource.splitlines()[:6]:
        try:
            start, end, *_ = (int(word, 16) for word in line.split())
        except ValueError:
            start = end = 0
        sizes.append(end - start + 1 if end > start else 0)
    return tuple(sizes)


def nvme_function(bdf: str, machine: Machine | None = None) -> Function:
    """Describe the NVMe controller at a PCI address.

    Raises
    ------
    UriError
        If it is no PCI address.
    TransportError
        If nothing is there, or no NVMe controller.
    """
    machine = machine or Machine()
    address = parse_bdf(bdf)
    function = find_function(address, machine)
    if function is None or not function.is_nvme:
        found = ", ".join(each.function.address for each in list_controllers(machine)) or "none"
        what = "there is no PCI function" if function is None else f"no NVMe controller but {function.kind}"
        raise TransportError(f"{address}: {what}. NVMe controllers of this machine: {found}")
    return function


def functions(machine: Machine | None = None) -> list[Function]:
    """Describe every PCI function of the machine."""
    machine = machine or Machine()
    found = (find_function(address, machine) for address in machine.names("/sys/bus/pci/devices"))
    return [function for function in found if function is not None]


def group_members(group: int, machine: Machine | None = None) -> list[Function]:
    """Describe the PCI functions of an IOMMU group: they cannot be told apart by the IOMMU."""
    machine = machine or Machine()
    names = machine.names(f"/sys/kernel/iommu_groups/{group}/devices")
    found = (find_function(address, machine) for address in names)
    return [function for function in found if function is not None]


@dataclass(frozen=True)
class BlockDevice:
    """A namespace of a controller that the kernel drives, as a block device."""

    name: str
    nsid: int | None
    nbytes: int
    block_size: int


@dataclass(frozen=True)
class ControllerInfo:
    """An NVMe controller on the PCI bus.

    ``name``, ``model``, ``serial``, ``state`` and ``namespaces`` are known only while the kernel's own driver has it.
    """

    function: Function
    name: str | None
    model: str | None
    serial: str | None
    state: str | None
    namespaces: tuple[BlockDevice, ...]


def controller_name(address: str, machine: Machine | None = None) -> str | None:
    """Return the name, such as ``nvme0``, that the kernel's driver gave to a controller; None if it has it not."""
    names = (machine or Machine()).names(f"{folder_of(address)}/nvme")
    return names[0] if names else None


def namespace_names(address: str, machine: Machine | None = None) -> list[str]:
    """Return the names of the block devices, such as ``nvme0n1``, of a controller that the kernel drives.

    With multipath the controller's folder holds hidden paths (``nvme0c1n1``); the block device is their head
    (``nvme0n1``), which other controllers may share.
    """
    machine = machine or Machine()
    name = controller_name(address, machine)
    found = set()
    for entry in machine.names(f"{folder_of(address)}/nvme/{name}") if name else []:
        match = _NAMESPACE.fullmatch(entry)
        if match:
            found.add(f"nvme{match[1]}n{match[3]}")
    return sorted(found, key=lambda entry: [int(number) for number in re.findall(r"\d+", entry)])


def list_controllers(machine: Machine | None = None) -> list[ControllerInfo]:
    """Describe every NVMe controller on the PCI bus, whichever driver has it."""
    machine = machine or Machine()
    found = []
    for function in functions(machine):
        if not function.is_nvme:
            continue
        name = controller_name(function.address, machine)
        where = f"{folder_of(function.address)}/nvme/{name}"
        found.append(
            ControllerInfo(
                function=function,
                name=name,
                model=machine.read(f"{where}/model") if name else None,
                serial=machine.read(f"{where}/serial") if name else None,
                state=machine.read(f"{where}/state") if name else None,
                namespaces=tuple(_block_device(each, machine) for each in namespace_names(function.address, machine)),
            )
        )
    return found


def _block_device(name: str, machine: Machine) -> BlockDevice:
    where = f"/sys/class/block/{name}"
    return BlockDevice(
        name=name,
        nsid=machine.read_int(f"{where}/nsid"),
        nbytes=512 * (machine.read_int(f"{where}/size") or 0),  # in sectors of 512 bytes, whatever the block size
        block_size=machine.read_int(f"{where}/queue/logical_block_size") or 512,
    )


@dataclass(frozen=True)
class Nearness:
    """How bytes get from one function to another without passing through memory.

    ``through`` is the last bridge that both have in common, or the host bridge; ``hops`` is how many bridges lie
    between them. ``kind`` is "switch" (peer-to-peer transfers stay below a switch or port), "host bridge" (they pass
    through the CPU's root complex), "node" (two host bridges of one NUMA node) or "other node".
    """

    controller: str
    gpu: str
    kind: str
    through: str
    hops: int


@dataclass(frozen=True)
class Topology:
    """NVMe controllers, GPUs, and how near they are to each other."""

    controllers: tuple[ControllerInfo, ...]
    gpus: tuple[Function, ...]
    pairs: tuple[Nearness, ...]


def nearness(controller: Function, gpu: Function) -> Nearness:
    """Tell how near two functions are."""
    common = 0
    for mine, its in zip(controller.upstream, gpu.upstream, strict=False):
        if mine != its:
            break
        common += 1
    hops = len(controller.upstream) + len(gpu.upstream) - 2 * common
    if common and controller.root == gpu.root:
        kind, through = "switch", controller.upstream[common - 1]
    elif controller.root == gpu.root:
        kind, through = "host bridge", controller.root
    else:
        kind, through = ("node" if controller.node == gpu.node else "other node"), ""
    return Nearness(controller.address, gpu.address, kind, through, hops)


def topology(machine: Machine | None = None) -> Topology:
    """Describe the machine's NVMe controllers and GPUs, and each pair's way."""
    machine = machine or Machine()
    controllers = list_controllers(machine)
    gpus = [function for function in functions(machine) if function.is_display]
    return Topology(
        controllers=tuple(controllers),
        gpus=tuple(gpus),
        pairs=tuple(nearness(each.function, gpu) for each in controllers for gpu in gpus),
    )
