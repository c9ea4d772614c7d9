"""Each NVMe drive of the bus and the GPU that is nearest to it: what the lines about the way between them are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpunvme.nvme.sysfs import Function, Machine, Nearness, functions, nearness

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

NVIDIA = 0x10DE
_ORDER = {"switch": 0, "host bridge": 1, "node": 2, "other node": 3}


@dataclass(frozen=True)
class Pair:
    """A drive, its nearest GPU, how near they are, and the bridges between them but not the one that they share."""

    drive: Function
    gpu: Function
    near: Nearness

    @property
    def bridges(self) -> tuple[str, ...]:
        """Addresses of the bridges that a transfer between the two passes below the one that they share."""
        mine, its = self.drive.upstream, self.gpu.upstream
        shared = 0
        if self.drive.root == self.gpu.root:
            shared = next(
                (i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its))
            )
        return mine[shared:] + its[shared:]


def machine_of(system: System) -> Machine:
    """Return the same tree as the driver's modules read it."""
    return Machine(system.root)


def drives(system: System) -> list[Function]:
    """Return the NVMe controllers of the PCI bus, whichever driver has them."""
    return [each for each in functions(machine_of(system)) if each.is_nvme]


def gpus(system: System) -> list[Function]:
    """Return the NVIDIA GPUs of the PCI bus."""
    return [each for each in functions(machine_of(system)) if each.is_display and each.vendor == NVIDIA]


def pairs(system: System) -> list[Pair]:
    """Return each drive with the GPU that is nearest to it; empty where there is no GPU or no drive."""
    found = []
    near_to = gpus(system)
    for drive in drives(system) if near_to else []:
        ways = [(nearness(drive, gpu), gpu) for gpu in near_to]
        near, gpu = min(ways, key=lambda way: (_ORDER[way[0].kind], way[0].hops))
        found.append(Pair(drive, gpu, near))
    return found


def name_of(system: System, drive: Function) -> str:
    """Return the kernel's name for a drive with its address, or the address alone."""
    names = system.names(f"/sys/bus/pci/devices/{drive.address}/nvme")
    return f"{names[0]} ({drive.address})" if names else drive.address
