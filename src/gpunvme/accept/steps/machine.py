"""What the machine is, by the doctor: for whoever reads the table without having seen it."""

from __future__ import annotations

import os
import re
from typing import Any

from gpunvme.accept.job import Job
from gpunvme.accept.result import Result
from gpunvme.doctor import Finding, Level, System, checks
from gpunvme.doctor.finding import unknown
from gpunvme.errors import Error
from gpunvme.memory import Device

# The lines about drives, GPUs and the way between them; those about files name paths.
_TOPICS = (
    *("engine", "kernel", "io_uring", "limits", "NUMA", "CUDA", "GPU link", "GPU driver", "BAR1", "static BAR1"),
    *("PCIe path", "uplink", "ACS", "P2P platform", "IOMMU", "VFIO", "memory for drives", "kernel module"),
    *("nvidia-fs", "P2PDMA", "cuFile", "drive", "heat"),
)


def examine(job: Job) -> Result:
    """Ask the doctor, and CUDA."""
    system = System()
    findings: list[Finding] = []
    for topic, check in checks(system, "/", None, "").items():
        if topic not in _TOPICS:
            continue
        try:
            findings += check()
        except (Error, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            findings.append(unknown(topic, "everything", f"the check failed: {type(error).__name__}: {error}"))
    bad = [finding for finding in findings if finding.level is Level.RED]
    warned = sum(finding.level is Level.YELLOW for finding in findings)
    facts: dict[str, Any] = {
        "kernel": system.kernel_release(),
        "architecture": os.uname().machine,
        "processor": _processor(system),
        "virtual": system.virtual(),
        "iommu_groups": len(system.names("/sys/kernel/iommu_groups")),
        "gpus": [str(each.get("name", "")) for each in system.probes.cuda_devices()]
        if not system.probes.cuda_reason()
        else [],
        "cuda": _why_no_gpu(system, job.device),
        "doctor": [{"level": each.level.value, "topic": each.topic, "fact": each.fact} for each in findings],
    }
    gpus = ", ".join(facts["gpus"]) or "no GPU that CUDA shows"
    said = f"Linux {facts['kernel']}, {facts['processor']}, {gpus}, {facts['iommu_groups']} IOMMU groups; "
    said += f"the doctor: {len(bad)} red lines, {warned} yellow"
    return Result("; ".join([said, *(f"{each.topic}: {each.fact}" for each in bad)]), facts=facts)


def _why_no_gpu(system: System, device: str) -> str:
    """Return why no step can use the GPU, or nothing."""
    reason = system.probes.cuda_reason()
    if reason:
        return reason
    index, count = Device.parse(device).index, len(system.probes.cuda_devices())
    return "" if index < count else f"there is no {device}: CUDA shows {count} device(s), counted from 0"


def _processor(system: System) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", system.read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1].strip() if match else "unknown"
