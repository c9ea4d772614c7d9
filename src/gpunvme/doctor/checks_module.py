"""gpunvme's own kernel module, which gives GPU memory an address that a drive reaches: there, or why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpunvme.doctor.finding import Finding, Level, unknown
from gpunvme.doctor.pairs import machine_of, pairs
from gpunvme.nvme.kmod_uapi import VERSION
from gpunvme.nvme.module_state import module_state

if TYPE_CHECKING:
    from gpunvme.doctor.system import System
    from gpunvme.nvme.module_state import ModuleState

_COST = "the nvme and gpu-nvme paths bring bytes to a GPU through host memory: VFIO cannot map GPU memory"
_MAKE = "make deb && sudo apt install ./dist/gpunvme-dkms_*.deb"


def check_kernel_module(system: System) -> list[Finding]:
    """Check that the module is loaded in the version that this package knows; if not, what is in the way."""
    state = module_state(machine_of(system))
    if state.loaded:
        return [_loaded(system, state)]
    if not pairs(system):
        return []
    return [_installed(state) if state.installed else _absent(state)]


def _loaded(system: System, state: ModuleState) -> Finding:
    if state.version is None:
        return unknown("kernel module", "version", system.unreadable("/sys/module/gpunvme/version"))
    devices = [f"/dev/{name}" for name in system.names("/sys/class/gpunvme")]
    fact = f"gpunvme.ko {state.version}, {', '.join(devices) if devices else 'holds no drive'}"
    if state.fits:
        return Finding(Level.GREEN, "kernel module", fact)
    return Finding(
        Level.YELLOW,
        "kernel module",
        f"{fact}; this package is made for {VERSION}",
        cost="kmod: URIs are refused",
        fix="install and load the module that came with this package",
        commands=(_MAKE, "sudo rmmod gpunvme && sudo modprobe gpunvme"),
    )


def _installed(state: ModuleState) -> Finding:
    """The module was built for this kernel, and is not loaded."""
    if state.only_signed:
        key = state.key or "/var/lib/dkms/mok.pub"
        return Finding(
            Level.YELLOW,
            "kernel module",
            f"{state.installed} is not loaded; {state.only_signed}",
            cost=_COST,
            fix="enrol the key that DKMS signs with, reboot, and confirm it in the blue screen before the kernel",
            commands=(f"sudo mokutil --import {key}",),
        )
    return Finding(
        Level.YELLOW,
        "kernel module",
        f"{state.installed} is not loaded",
        cost=_COST,
        fix="load it; it was never tried with GPU memory",
        commands=("sudo modprobe gpunvme",),
    )


def _absent(state: ModuleState) -> Finding:
    """There is no module for this kernel."""
    if state.too_old:
        return Finding(
            Level.YELLOW,
            "kernel module",
            f"gpunvme.ko is not loaded, and Linux {state.release} is too old for it",
            cost=_COST,
            fix="boot Linux 6.1 or newer",
        )
    if not state.headers:
        return Finding(
            Level.YELLOW,
            "kernel module",
            f"gpunvme.ko is not loaded, and the headers of {state.release} to build it are missing",
            cost=_COST,
            fix="install the headers, then build and load it",
            commands=(f"sudo apt install linux-headers-{state.release}", _MAKE, "sudo modprobe gpunvme"),
        )
    if state.others:
        return Finding(
            Level.YELLOW,
            "kernel module",
            f"gpunvme.ko is built for {', '.join(state.others)}, and this is {state.release}",
            cost=_COST,
            fix="have DKMS build it for this kernel, or boot one of those",
            commands=(f"sudo dkms autoinstall -k {state.release}", "sudo modprobe gpunvme"),
        )
    if state.only_signed:
        return Finding(
            Level.YELLOW,
            "kernel module",
            f"gpunvme.ko is not loaded; {state.only_signed}",
            cost=_COST,
            fix="let DKMS build and sign it, and enrol its key at the next boot",
            commands=(_MAKE, "sudo mokutil --import /var/lib/dkms/mok.pub"),
        )
    return Finding(
        Level.YELLOW,
        "kernel module",
        "gpunvme.ko is not loaded",
        cost=_COST,
        fix="build and load it (docs/install.md); it was never tried with GPU memory",
        commands=(_MAKE, "sudo modprobe gpunvme"),
    )
