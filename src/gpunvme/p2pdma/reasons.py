"""Why PCI memory cannot be had, or not be reached by a drive: in words, from sysfs and the kernel's answers."""

from __future__ import annotations

import errno
import os
import re

from gpunvme import _native
from gpunvme.cufile.facts import Place, kernel_p2pdma, place_of
from gpunvme.nvme.sysfs import Machine, find_function, folder_of

# What the kernel answers where memory, drive or file system cannot do it (pin_user_pages(): EREMOTEIO without
# FOLL_PCI_P2PDMA; pci_p2pdma_map_type(): EREMOTEIO or EINVAL where there is no way between the devices).
REFUSALS = frozenset({errno.EREMOTEIO, errno.EOPNOTSUPP, errno.EINVAL, errno.EFAULT})

_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def p2pmem_folder(address: str) -> str:
    """Where sysfs describes the peer-to-peer memory of a PCI function."""
    return f"{folder_of(address)}/p2pmem"


def why_no_p2pmem(address: str, machine: Machine) -> str:
    """Why a PCI function offers no memory that can be mapped, or nothing."""
    folder = p2pmem_folder(address)
    if machine.exists(f"{folder}/allocate"):
        return ""
    function = find_function(address, machine)
    if function is None:
        return f"there is no PCI device {address}"
    if machine.exists(folder):
        return f"{address} has peer-to-peer memory, but this kernel does not map it: that takes Linux 6.2 or later"
    if kernel_p2pdma(machine.root) is False:
        return "the kernel has no P2PDMA (CONFIG_PCI_P2PDMA)"
    if function.is_nvme and function.driver != "nvme":
        return f"{address} offers no peer-to-peer memory: the kernel's nvme driver does not drive it"
    what = "it has no controller memory buffer for data" if function.is_nvme else "its driver publishes none"
    unknown = "" if kernel_p2pdma(machine.root) else ", or the kernel has no P2PDMA"
    return f"{address} offers no peer-to-peer memory: {what}{unknown}"


def why_no_file(file: _native.SourceFile, place: Place) -> str:
    """Why the kernel cannot read a file into any PCI memory, as far as it can be told beforehand, or nothing."""
    if file.direct_refusal:
        return f"it needs O_DIRECT: {file.direct_refusal}"
    if file.in_memory or place.in_memory:
        return f"there is no drive beneath {place}"
    if place.remote:
        return f"the drive is another machine's: {place}"
    if not place.drives:
        return f"no drive is seen beneath {place}"
    return ""


def refused(number: int, fd: int, provider: str, machine: Machine | None = None) -> str:
    """What it means that the kernel answered one of `REFUSALS`, for a file and whose memory it was."""
    machine = machine or Machine()
    place = place_of(fd, machine.root)
    said = f"the kernel refused it ({errno.errorcode.get(number, number)}, {os.strerror(number)})"
    drives = {drive: _function_of(drive, machine) for drive in place.drives}
    if number in (errno.EREMOTEIO, errno.EINVAL):
        for drive, address in drives.items():
            apart = _apart(address, provider, machine) if address else ""
            if apart:
                return f"{said}: {drive} {apart}"
        return f"{said}: {place} does not take memory of {provider}; `dmesg` may say more"
    if number == errno.EOPNOTSUPP:
        return f"{said}: {place} has no such requests"
    return f"{said}: the mapping of {provider} has no pages that a drive could be given"


def _function_of(drive: str, machine: Machine) -> str:
    """PCI address of a drive's controller; "" where sysfs does not tell."""
    found = _BDF.findall(machine.resolve(f"/sys/class/block/{drive}") or "")
    return found[-1] if found else ""


def _apart(address: str, provider: str, machine: Machine) -> str:
    """How two PCI functions lie, where they have no bridge in common; "" where they do or it cannot be told."""
    one, other = find_function(address, machine), find_function(provider, machine) if _BDF.fullmatch(provider) else None
    if one is None or other is None or address == provider or set(one.upstream) & set(other.upstream):
        return ""
    return (
        f"({address}) and {provider} share no PCI bridge, and the kernel does not know the host bridge between them as "
        "one that passes such accesses on: put both behind one PCIe switch"
    )
