"""A VFIO device by its own character device and iommufd: ``/dev/vfio/devices/vfioN`` and ``/dev/iommu`` (Linux 6.6)."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import ExitStack

from gpunvme.errors import TransportError
from gpunvme.nvme import vfio_uapi as uapi
from gpunvme.nvme.sysfs import Function, Machine, folder_of
from gpunvme.nvme.vfio_group import mapping_error, open_node

_IOMMU = "/dev/iommu"


def device_node(address: str, machine: Machine) -> str | None:
    """Return the character device of a function that is bound to vfio-pci; None where the kernel has none."""
    names = machine.names(f"{folder_of(address)}/vfio-dev")
    node = f"/dev/vfio/devices/{names[0]}" if names else None
    return node if node and machine.exists(node) and machine.exists(_IOMMU) else None


class IommufdDevice:
    """A device bound to an iommufd, with an I/O address space of its own. As `GroupDevice`."""

    def __init__(self, function: Function, node: str, machine: Machine) -> None:
        self._function = function
        self.path = node
        with ExitStack() as opened:
            self.fd = open_node(node, machine)
            opened.callback(os.close, self.fd)
            self._iommu = open_node(_IOMMU, machine)
            opened.callback(os.close, self._iommu)
            self._bind()
            space = uapi.IoasAlloc.new()
            uapi.call(self._iommu, uapi.IOAS_ALLOC, space)
            self._space = space.out_ioas_id
            self._attach()
            # Only now: what the device's IOMMU reserves narrows the space.
            self.iova_ranges = self._ranges()
            opened.pop_all()

    def _bind(self) -> None:
        try:
            uapi.call(self.fd, uapi.DEVICE_BIND_IOMMUFD, uapi.BindIommufd.new(iommufd=self._iommu))
        except OSError as error:
            why = error.strerror
            if error.errno in {errno.EBUSY, errno.EINVAL}:
                why = "another process drives it, or another device of its IOMMU group is with another driver"
            raise TransportError(f"{self._function.address} cannot be opened by {self.path}: {why}") from error

    def _attach(self) -> None:
        try:
            uapi.call(self.fd, uapi.DEVICE_ATTACH_IOMMUFD_PT, uapi.AttachIommufd.new(pt_id=self._space))
        except OSError as error:
            raise TransportError(
                f"{self._function.address}: iommufd cannot use its IOMMU ({error.strerror})"
            ) from error

    def _ranges(self) -> list[tuple[int, int]]:
        count = 64
        while True:
            array = (uapi.IovaRange * count)()
            asked = uapi.IoasIovaRanges.new(ioas_id=self._space, num_iovas=count, allowed_iovas=ctypes.addressof(array))
            try:
                uapi.call(self._iommu, uapi.IOAS_IOVA_RANGES, asked)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                count = asked.num_iovas
                continue
            return [(entry.start, entry.last + 1) for entry in array[: asked.num_iovas]]

    def map(self, address: int, nbytes: int, iova: int, writable: bool) -> None:
        """Let the device reach memory at an IOVA. As `GroupDevice.map`."""
        flags = uapi.IOAS_MAP_FIXED_IOVA | uapi.IOAS_MAP_READABLE | (uapi.IOAS_MAP_WRITEABLE if writable else 0)
        wanted = uapi.IoasMap.new(flags=flags, ioas_id=self._space, user_va=address, length=nbytes, iova=iova)
        try:
            uapi.call(self._iommu, uapi.IOAS_MAP, wanted)
        except OSError as error:
            raise mapping_error(error, nbytes) from error

    def unmap(self, iova: int, nbytes: int) -> None:
        """Take a mapping away."""
        uapi.call(self._iommu, uapi.IOAS_UNMAP, uapi.IoasUnmap.new(ioas_id=self._space, iova=iova, length=nbytes))

    def close(self) -> None:
        """Close the device, which ends its DMA, then its address space."""
        os.close(self.fd)
        os.close(self._iommu)
