"""The GPU: driver, CUDA, the PCIe link."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gpunvme.doctor.finding import Finding, Level
from gpunvme.doctor.pcie import nvidia_gpus, pci_device

if TYPE_CHECKING:
    from gpunvme.doctor.system import System


def driver_version(system: System) -> str | None:
    """Return the loaded NVIDIA driver's kind and version, such as ``open 580.95.05``; None if it cannot be told."""
    text = system.read("/proc/driver/nvidia/version")
    if text is None:
        return None
    first = text.splitlines()[0] if text else ""
    number = re.search(r"\s(\d+(?:\.\d+)+)\s", first + " ")
    if "Kernel Module" not in first:
        return None
    kind = "open" if "Open Kernel Module" in first else "proprietary"
    return f"{kind} {number[1]}" if number else kind


def check_cuda(system: System) -> list[Finding]:
    """Check that every GPU on the bus can be used through CUDA, and if not, why."""
    on_bus = nvidia_gpus(system)
    driver = driver_version(system)
    reason = system.probes.cuda_reason()
    if not reason:
        named = [
            f"cuda:{number} {device.get('name', 'GPU')} ({str(device.get('pci_bus_id', '?')).lower()})"
            for number, device in enumerate(system.probes.cuda_devices())
        ]
        return [Finding(Level.GREEN, "CUDA", f"{', '.join(named)}; driver {driver or 'unknown'}")]
    if not on_bus and driver is None:
        return [
            Finding(
                Level.GREEN,
                "CUDA",
                "no NVIDIA GPU in this machine",
                cost="host memory is the only destination",
            )
        ]
    return [
        Finding(
            Level.RED,
            "CUDA",
            f"{len(on_bus)} NVIDIA GPU(s) on PCI, driver {driver or 'not loaded'}, but CUDA cannot be used: {reason}",
            cost="nothing can be moved to or from the GPU",
            fix=_cuda_fix(system, driver),
        )
    ]


def _cuda_fix(system: System, driver: str | None) -> str:
    if system.in_container():
        return "start the container with its GPUs: docker run --gpus all … (needs nvidia-container-toolkit on the host)"
    if driver is None:
        return "install the NVIDIA driver (Ubuntu: sudo ubuntu-drivers install; Debian: sudo apt install nvidia-driver)"
    if not any(name.startswith("nvidia-uvm") for name in system.names("/dev")):
        return "sudo modprobe nvidia-uvm && sudo nvidia-modprobe -u -c=0"
    return "run nvidia-smi: if it fails too, the library and the kernel module differ; reboot or reinstall the driver"


def check_gpu_link(system: System) -> list[Finding]:
    """Check that each CUDA device has all of its PCIe lanes."""
    findings = []
    if system.probes.cuda_reason():
        return []
    for described in system.probes.cuda_devices():
        gpu = pci_device(system, short_address(str(described.get("pci_bus_id", ""))))
        if gpu is None or gpu.width is None or gpu.max_width is None:
            continue
        # The speed drops while a GPU is idle and says nothing; the number of lanes stays.
        fact = f"{gpu.address}: {gpu.width} of {gpu.max_width} PCIe lanes"
        if gpu.width < gpu.max_width:
            findings.append(
                Finding(
                    Level.YELLOW,
                    "GPU link",
                    fact,
                    cost=f"{gpu.width}/{gpu.max_width} of the GPU's bandwidth to the host",
                    fix="move the GPU to a slot with all lanes, or free the slot that shares them (BIOS: bifurcation)",
                )
            )
        else:
            findings.append(Finding(Level.GREEN, "GPU link", fact))
    return findings


def short_address(bus_id: str) -> str:
    """Turn CUDA's ``00000000:01:00.0`` into sysfs's ``0000:01:00.0``."""
    domain, separator, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]:0>4}{separator}{rest}"
