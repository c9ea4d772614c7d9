"""The way between drives and GPUs: what they share, what is in between, and how much of the GPU peers can reach."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gpunvme.doctor.acs import redirects
from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pairs import gpus, machine_of, name_of, pairs
from gpunvme.nvme.sysfs import Function, find_function, folder_of

if TYPE_CHECKING:
    from gpunvme.doctor.system import System

_MIB, _GIB = 2**20, 2**30
_ZEN = 0x17  # the first AMD family whose root complex the kernel lets peers pass (drivers/pci/p2pdma.c)
_SMALL_BAR = 256 * _MIB


def check_pcie_path(system: System) -> list[Finding]:
    """Check how each drive's bytes would reach its nearest GPU."""
    found = []
    for pair in pairs(system):
        names = f"{name_of(system, pair.drive)} and GPU {pair.gpu.address}"
        if not pair.drive.root or not pair.gpu.root:
            found.append(unknown("PCIe path", names, "sysfs does not lead to their host bridge"))
        elif pair.near.kind == "switch":
            found.append(
                Finding(
                    Level.GREEN, "PCIe path", f"{names} share {pair.near.through}, {pair.near.hops} bridges in between"
                )
            )
        elif pair.near.kind == "host bridge":
            fact = f"{names} share no switch, only host bridge {pair.near.through}"
            found.append(Finding(Level.GREEN, "PCIe path", fact))
        else:
            sockets = "of one socket" if pair.near.kind == "node" else "of two sockets"
            found.append(
                Finding(
                    Level.YELLOW,
                    "PCIe path",
                    f"{names} are below different host bridges {sockets}",
                    cost="a direct transfer crosses the CPU's fabric, or is refused",
                    fix="move the drive to a slot below the GPU's switch or host bridge (gpunvme nvme topology)",
                )
            )
    return found


def check_uplink(system: System) -> list[Finding]:
    """Check that no bridge above a drive carries less than the drive's own link."""
    found = []
    machine = machine_of(system)
    for pair in pairs(system):
        own = _rate(pair.drive)
        if own is None:
            continue
        for address in pair.drive.upstream:
            bridge = find_function(address, machine)
            rate = _rate(bridge) if bridge else None
            if rate is not None and rate < own * 0.99:
                found.append(
                    Finding(
                        Level.YELLOW,
                        "uplink",
                        f"{name_of(system, pair.drive)} is below {address}, whose link is slower than its own",
                        cost=f"at most {rate / own:.0%} of the drive's link",
                        fix="move the drive to a slot above that bridge; check its slot and bifurcation (BIOS)",
                    )
                )
                break
    return found


def _rate(function: Function) -> float | None:
    """Return what a link carries, in 10^9 bits per second, near enough to compare links by."""
    if function.speed is None or function.width is None:
        return None
    return function.speed * (0.8 if function.speed < 8 else 128 / 130) * function.width


def check_acs(system: System) -> list[Finding]:
    """Check that no bridge between a drive and a GPU below one switch sends their transfers up to the root."""
    redirecting: set[str] = set()
    hidden: set[str] = set()
    looked_at: set[str] = set()
    for pair in pairs(system):
        if pair.near.kind != "switch":
            continue  # they pass the root anyway
        for address in pair.bridges:
            looked_at.add(address)
            answer = redirects(system.read_bytes(f"{folder_of(address)}/config") or b"")
            if answer is None:
                hidden.add(address)
            elif answer:
                redirecting.add(address)
    if redirecting:
        listed = ";".join(sorted(redirecting))
        return [
            Finding(
                Level.YELLOW,
                "ACS",
                f"on between drive and GPU, at {', '.join(sorted(redirecting))}",
                cost="peer-to-peer transfers go up to the root instead of through the switch; P2PDMA refuses them",
                fix="a parameter of the kernel's; drives and GPUs then share IOMMU groups, which VFIO minds",
                commands=(_kernel_parameter(f"pci=disable_acs_redir={listed}"),),
            )
        ]
    if hidden:
        return [unknown("ACS", f"{len(hidden)} bridges", system_reason(system, min(hidden)))]
    return [Finding(Level.GREEN, "ACS", f"off at {len(looked_at)} bridges")] if looked_at else []


def system_reason(system: System, address: str) -> str:
    """Return why a bridge's configuration space does not show its extended capabilities."""
    name = f"{folder_of(address)}/config"
    data = system.read_bytes(name)
    if data is not None and len(data) <= 256:
        return f"only {len(data)} bytes of {name} are shown; all of it takes root (sudo gpunvme doctor)"
    return system.unreadable(name)


def _kernel_parameter(parameter: str) -> str:
    """Return the command that adds a parameter for GRUB, as Debian and Ubuntu have it."""
    return (
        f"echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {parameter}\"' | sudo tee -a /etc/default/grub"
        " && sudo update-grub && sudo reboot"
    )


def check_platform(system: System) -> list[Finding]:
    """Check whether this kind of machine lets peers talk to each other through its root complex."""
    through_root = [pair for pair in pairs(system) if pair.near.kind != "switch"]
    if not through_root:
        return []
    text = system.read("/proc/cpuinfo")
    if text is None:
        return [unknown("P2P platform", "CPU", system.unreadable("/proc/cpuinfo"))]
    vendor = _cpu(text, "vendor_id")
    if system.virtual():
        return [
            Finding(
                Level.YELLOW,
                "P2P platform",
                "a virtual machine whose drive and GPU share no switch that it can see",
                cost="whether peers reach each other is the hypervisor's choice; most clouds do not let them",
                fix="measure before relying on it: gpunvme doctor --probe, and gpunvme bench by each path",
            )
        ]
    family = _cpu(text, "cpu family")
    if vendor == "AuthenticAMD" and family.isdecimal() and int(family) >= _ZEN:
        return [
            Finding(Level.GREEN, "P2P platform", f"AMD family {int(family):#x}: the kernel lets peers pass the root")
        ]
    return [
        Finding(
            Level.YELLOW,
            "P2P platform",
            f"{_cpu(text, 'model name') or vendor or 'a nameless CPU'}: drive and GPU meet at its root complex",
            cost="the kernel allows peer-to-peer there only for host bridges of its list; some are slow at it",
            fix="sudo dmesg | grep -i p2p shows what it said; slots below one switch avoid the question",
        )
    ]


def _cpu(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def check_bar1(system: System) -> list[Finding]:
    """Check how much of each GPU's memory others on the bus can reach."""
    found = []
    for gpu in gpus(system):
        where = folder_of(gpu.address)
        # BAR1 is behind 32-bit BAR0: the first BAR that is as large as one for memory.
        size = max(gpu.bars[1:4], default=0)
        if not size:
            found.append(unknown("BAR1", f"GPU {gpu.address}", system.unreadable(f"{where}/resource")))
            continue
        if size > _SMALL_BAR:
            found.append(Finding(Level.GREEN, "BAR1", f"GPU {gpu.address}: {size / _GIB:g} GiB"))
            continue
        resizable = system.read(f"{where}/resource1_resize")
        can = "can be resized" if resizable else "shows no resizing"
        found.append(
            Finding(
                Level.YELLOW,
                "BAR1",
                f"GPU {gpu.address}: {size / _MIB:g} MiB, {can}",
                cost="other devices and the host reach only that window of GPU memory: no static BAR1, no P2PDMA",
                fix="BIOS: Above 4G Decoding on, Re-Size BAR Support on, CSM off; then a driver that uses it (≥ 465)",
            )
        )
    return found
