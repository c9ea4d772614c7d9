"""PCI devices and their links, from sysfs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

# Bytes per second of one lane after line coding, before packet headers; keyed by transfers per second.
_LANE_GBPS = {"2.5": 0.25, "5.0": 0.5, "5": 0.5, "8.0": 0.985, "16.0": 1.969, "32.0": 3.938, "64.0": 7.563}


@dataclass(frozen=True)
class PciDevice:
    """A PCI device: its address, node and link as sysfs shows them; what is unknown is None."""

    address: str
    node: int | None
    speed: str | None
    max_speed: str | None
    width: int | None
    max_width: int | None

    def limit(self) -> float | None:
        """Return what the link carries now at most, in GB/s."""
        return _gbps(self.speed, self.width)

    def best_limit(self) -> float | None:
        """Return what the device's own link could carry at most, in GB/s."""
        return _gbps(self.max_speed, self.max_width)


def pci_device(system: System, address: str) -> PciDevice | None:
    """Describe the PCI device at an address such as ``0000:01:00.0``, or None if it is not there."""
    where = f"/sys/bus/pci/devices/{address.lower()}"
    if not system.exists(where):
        return None
    node = system.read_int(f"{where}/numa_node")
    return PciDevice(
        address=address.lower(),
        node=node if node is not None and node >= 0 else None,
        speed=_transfers(system.read(f"{where}/current_link_speed")),
        max_speed=_transfers(system.read(f"{where}/max_link_speed")),
        # A device without a PCIe link says width 0 or 255.
        width=_lanes(system.read_int(f"{where}/current_link_width")),
        max_width=_lanes(system.read_int(f"{where}/max_link_width")),
    )


def nvidia_gpus(system: System) -> list[PciDevice]:
    """Return the NVIDIA display and 3D controllers on the PCI bus, whether or not a driver has them."""
    found = []
    for address in system.names("/sys/bus/pci/devices"):
        where = f"/sys/bus/pci/devices/{address}"
        if system.read(f"{where}/vendor") == "0x10de" and (system.read(f"{where}/class") or "").startswith("0x03"):
            device = pci_device(system, address)
            if device is not None:
                found.append(device)
    return found


@dataclass(frozen=True)
class NvmeController:
    """An NVMe controller: its name, model, transport, and PCI device where it has one."""

    name: str
    model: str
    transport: str
    pci: PciDevice | None


def nvme_controllers(system: System) -> list[NvmeController]:
    """Return the NVMe controllers that the kernel drives."""
    found = []
    for name in system.names("/sys/class/nvme"):
        where = f"/sys/class/nvme/{name}"
        device = system.resolve(f"{where}/device")
        found.append(
            NvmeController(
                name=name,
                model=system.read(f"{where}/model") or "unknown model",
                transport=system.read(f"{where}/transport") or "unknown transport",
                pci=pci_device(system, os.path.basename(device)) if device else None,
            )
        )
    return found


def _transfers(text: str | None) -> str | None:
    """Return the number in ``16.0 GT/s PCIe``."""
    first = text.split()[0] if text else ""
    return first if first.replace(".", "").isdecimal() else None


def _lanes(width: int | None) -> int | None:
    return width if width is not None and 0 < width <= 32 else None


def _gbps(speed: str | None, width: int | None) -> float | None:
    lane = _LANE_GBPS.get(speed) if speed else None
    return lane * width if lane is not None and width is not None else None
