"""Who has the drive: taken for a driver of ours, given back to the kernel's."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpunvme.accept.job import Job
from gpunvme.accept.result import Result, Skipped
from gpunvme.errors import TransportError, UnsafeDeviceError
from gpunvme.nvme.bind import KERNEL_DRIVER, OWN_DRIVER, Change, bind, unbind, user_nodes
from gpunvme.nvme.module_state import module_state, why_not_loaded
from gpunvme.nvme.sysfs import Machine, group_members, namespace_names, nvme_function

_PATIENCE = 30.0  # seconds for a process that was ended to let go of the drive, and for devices to appear
_STEP = 0.05


def take(job: Job) -> Result:
    """Take the drive from the kernel's driver for `Job.driver`, and say how it can be opened."""
    machine = Machine()
    function = nvme_function(job.address, machine)
    if job.driver == OWN_DRIVER:
        if not machine.exists(f"/sys/bus/pci/drivers/{OWN_DRIVER}"):
            raise Skipped(f"the kernel module: {why_not_loaded(module_state(machine))}")
    else:
        if function.iommu_group is None:
            raise Skipped("the drive is in no IOMMU group: VT-d or AMD-Vi is off in the firmware, or in the kernel")
        others = [
            f"{each.address} ({each.kind})"
            for each in group_members(function.iommu_group, machine)
            if each.address != job.address and not each.is_bridge
        ]
        if others:
            raise Skipped(f"it shares IOMMU group {function.iommu_group} with {', '.join(others)}")
        if not machine.exists(f"/sys/bus/pci/drivers/{job.driver}"):
            why = machine.load_module(job.driver.replace("-", "_"))
            if why:
                raise Skipped(why)
    _patiently(lambda: bind(job.address, job.driver, machine=machine))
    uri = f"pci:{job.address}"
    if job.driver == OWN_DRIVER:
        uri = f"kmod:{user_nodes(job.address, machine)[0]}"
    return Result(f"from {function.driver} to {job.driver}", facts={"uri": uri})


def give_back(job: Job) -> Result:
    """Give the drive to the kernel's driver, and wait for its block device."""
    change = _patiently(lambda: unbind(job.address, timeout=_PATIENCE))
    block_device(job)
    before = f"from {change.before or 'no driver'} to" if change.changed else "it is with"
    return Result(f"{before} {change.after}")


def _patiently(change: Callable[[], Change]) -> Change:
    """Wait for whoever has the drive for a moment.

    udev looks at a block device that was closed after writing; the kernel gives back what an ended process had.
    """
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            return change()
        except UnsafeDeviceError:
            if time.monotonic() > give_up:
                raise
            time.sleep(_STEP)


def block_device(job: Job) -> str:
    """Return the block device of the namespace, when the kernel has made it.

    Raises
    ------
    TransportError
        If it does not come.
    """
    machine = Machine()
    give_up = time.monotonic() + _PATIENCE
    while time.monotonic() < give_up:
        for name in namespace_names(job.address, machine):
            device = f"/dev/{name}"
            if machine.read_int(f"/sys/class/block/{name}/nsid") == job.nsid and machine.exists(device):
                return device
        time.sleep(_STEP)
    raise TransportError(f"{job.address}: namespace {job.nsid} has no block device with {KERNEL_DRIVER}; see dmesg")
