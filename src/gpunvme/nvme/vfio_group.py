"""A VFIO device by its IOMMU group: ``/dev/vfio/NUMBER`` in a container, the way of every kernel that has VFIO."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from contextlib import ExitStack

from gpunvme.errors import TransportError
from gpunvme.nvme import vfio_uapi as uapi
from gpunvme.nvme.bind import find_users
from gpunvme.nvme.sysfs import Function, Machine, group_members
from gpunvme.transfer import format_bytes

_CONTAINER = "/dev/vfio/vfio"
# Where a kernel does not tell which IOVAs may be used (before 5.4): what every x86 IOMMU translates, less the window of
# message-signalled interrupts, which no IOMMU translates.
_USUAL_RANGES = [(0, 0xFEE00000), (0xFEF00000, 1 << 39)]


class LockedMemoryError(TransportError, MemoryError):
    """Memory cannot be mapped for a device: a limit is reached. The message says which, and how to raise it."""


class GroupDevice:
    """A device opened by its group.

    Attributes
    ----------
    fd
        The device.
    iova_ranges
        ``(start, end)`` of the IOVAs that may be mapped; ``end`` is the first byte behind it.

    Parameters
    ----------
    function
        Bound to vfio-pci.
    noiommu
        Whether the group has no IOMMU: then nothing can be mapped.
    machine
        Where sysfs is.
    """

    def __init__(self, function: Function, noiommu: bool, machine: Machine) -> None:
        self._machine = machine
        self._function = function
        group = function.iommu_group
        prefix = "noiommu-" if noiommu else ""
        self.path = f"/dev/vfio/{prefix}{group}"
        self.iova_ranges: list[tuple[int, int]] = []
        with ExitStack() as opened:
            self._container = open_node(_CONTAINER, machine)
            opened.callback(os.close, self._container)
            version = uapi.call(self._container, uapi.GET_API_VERSION)
            kind = uapi.NOIOMMU_IOMMU if noiommu else uapi.TYPE1V2_IOMMU
            if version != uapi.API_VERSION or not uapi.call(self._container, uapi.CHECK_EXTENSION, kind):
                need = "no-IOMMU mode" if noiommu else "IOMMU type 1 (modprobe vfio_iommu_type1)"
                raise TransportError(f"{_CONTAINER}: this kernel's VFIO, version {version}, has no {need}")
            self._group = open_node(self.path, machine)
            opened.callback(os.close, self._group)
            self._check_viable()
            self._attach(kind)
            if not noiommu:
                self.iova_ranges = self._ranges()
            self.fd = self._open_device()
            opened.pop_all()

    def _check_viable(self) -> None:
        status = uapi.GroupStatus.new()
        uapi.call(self._group, uapi.GROUP_GET_STATUS, status)
        if status.flags & uapi.GROUP_VIABLE:
            return
        mine = self._function
        assert mine.iommu_group is not None
        others = [
            f"{each.address} ({each.kind}) with {each.driver}"
            for each in group_members(mine.iommu_group, self._machine)
            if each.address != mine.address and each.driver not in (None, "vfio-pci", "pci-stub") and not each.is_bridge
        ]
        raise TransportError(
            f"{mine.address} shares IOMMU group {mine.iommu_group} with {', '.join(others) or 'devices in use'}: the "
            f"IOMMU cannot tell them apart. Take those from their drivers too (bind NVMe controllers, unbind others), "
            f"or use another slot"
        )

    def _attach(self, kind: int) -> None:
        uapi.call(self._group, uapi.GROUP_SET_CONTAINER, bytearray(ctypes.c_int32(self._container)))
        try:
            uapi.call(self._container, uapi.SET_IOMMU, kind)
        except OSError as error:
            raise TransportError(
                f"{self._function.address}: VFIO cannot use its IOMMU ({error.strerror}). If dmesg speaks of interrupt "
                f"remapping, this machine has none, and vfio_iommu_type1.allow_unsafe_interrupts=1 accepts that"
            ) from error

    def _ranges(self) -> list[tuple[int, int]]:
        data = uapi.call_with_capabilities(self._container, uapi.IOMMU_GET_INFO, uapi.Type1Info.new())
        info = uapi.Type1Info.from_buffer_copy(data)
        found = None
        if info.flags & uapi.IOMMU_INFO_CAPS:
            found = uapi.capability(data, info.cap_offset, uapi.TYPE1_CAP_IOVA_RANGE)
        if found is None:
            return list(_USUAL_RANGES)
        return [(start, last + 1) for start, last in uapi.ranges_of(data, found)]

    def _open_device(self) -> int:
        name = bytearray(self._function.address.encode() + b"\0")
        try:
            return uapi.call(self._group, uapi.GROUP_GET_DEVICE_FD, name)
        except OSError as error:
            raise TransportError(f"{self._function.address} cannot be opened: {error.strerror}; see dmesg") from error

    def map(self, address: int, nbytes: int, iova: int, writable: bool) -> None:
        """Let the device reach memory at an IOVA; all are multiples of the page size.

        Raises
        ------
        LockedMemoryError
            If a limit is reached.
        TransportError
            If this memory cannot be mapped.
        """
        flags = uapi.DMA_MAP_READ | (uapi.DMA_MAP_WRITE if writable else 0)
        try:
            wanted = uapi.Type1Map.new(flags=flags, vaddr=address, iova=iova, size=nbytes)
            uapi.call(self._container, uapi.IOMMU_MAP_DMA, wanted)
        except OSError as error:
            raise mapping_error(error, nbytes) from error

    def unmap(self, iova: int, nbytes: int) -> None:
        """Take a mapping away; when it returns, the device cannot reach the memory any more."""
        uapi.call(self._container, uapi.IOMMU_UNMAP_DMA, uapi.Type1Unmap.new(iova=iova, size=nbytes))

    def close(self) -> None:
        """Close device, group and container, in this order: with the container, every mapping ends."""
        for fd in (self.fd, self._group, self._container):
            os.close(fd)


def open_node(path: str, machine: Machine) -> int:
    """Open a device file of VFIO's or iommufd's.

    Raises
    ------
    TransportError
        If it cannot be opened; says what to do about it.
    """
    try:
        return os.open(machine.path(path), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"{path} cannot be opened: {_why_not(error, path, machine)}") from error


def _why_not(error: OSError, path: str, machine: Machine) -> str:
    if error.errno == errno.ENOENT:
        if path == _CONTAINER:
            return (
                "VFIO is not loaded (modprobe vfio-pci); in a container it must be given: docker run --device=/dev/vfio"
            )
        return "it is not there; in a container it must be given to it: docker run --device=/dev/vfio"
    if error.errno in {errno.EACCES, errno.EPERM}:
        if "noiommu" in path:
            return "without an IOMMU this takes root (CAP_SYS_RAWIO)"
        return (
            f"no permission. As root: chown {_user()} {path}; or for good, contrib/60-gpunvme.rules and the group nvme "
            f"(docs/install.md)"
        )
    if error.errno == errno.EBUSY:
        users = find_users([path], machine)
        return f"another process drives it: {', '.join(users) or 'one of another user or container'}; end it first"
    if error.errno == errno.ENODEV:
        return "the device behind it is gone"
    return error.strerror or str(error)


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


def mapping_error(error: OSError, nbytes: int) -> TransportError:
    """Return what to raise for memory that the kernel does not map."""
    what = f"{format_bytes(nbytes)} of memory cannot be mapped for the device"
    if error.errno == errno.ENOMEM:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "none" if soft == resource.RLIM_INFINITY else format_bytes(soft)
        return LockedMemoryError(
            f"{what}: more than this process may lock (limit: {limit}). Raise it: ulimit -l unlimited, or memlock in "
            f"/etc/security/limits.d; LimitMEMLOCK=infinity for a service; docker run --ulimit memlock=-1"
        )
    if error.errno == errno.ENOSPC:
        return LockedMemoryError(
            f"{what}: too many separate mappings (vfio_iommu_type1.dma_entry_limit, 65535 if not set)"
        )
    return TransportError(f"{what}: {error.strerror}")
