"""``pci:BDF``: a controller on the PCI bus, through the kernel's VFIO.

The kernel opens the function for us and lets its IOMMU translate only what we map; registers and doorbells are memory
of this process (BAR0). The driver polls; interrupts are for who asks (`vfio_interrupts`). `vfio_group` and `iommufd`
are the two ways to open it, `pinned` is memory for machines without an IOMMU, `bind` hands a function to vfio-pci in
the first place.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, Protocol

from gpunvme.errors import TransportError, UriError
from gpunvme.nvme import vfio_interrupts
from gpunvme.nvme import vfio_uapi as uapi
from gpunvme.nvme.dma import PAGE, DmaMemory, IovaSpace
from gpunvme.nvme.gpu_memory import GpuAccess
from gpunvme.nvme.iommufd import IommufdDevice, device_node
from gpunvme.nvme.pinned import physical_addresses, pin
from gpunvme.nvme.sysfs import Function, Machine, nvme_function
from gpunvme.nvme.vfio_group import GroupDevice, LockedMemoryError
from gpunvme.transfer import format_bytes

Way = Literal["auto", "group", "iommufd"]

_DOORBELLS = 0x1000  # offset in BAR0; NVMe over PCIe Transport Specification 1.0, section 3.1.2
# PCI Local Bus Specification 3.0, section 6.2.2: the command register.
_COMMAND = 4
_COMMAND_MEMORY, _COMMAND_MASTER = 1 << 1, 1 << 2
# The lowest IOVAs stay free: address 0, and what was forgotten to be set, are faults.
_LOWEST_IOVA = 1 << 20
# Below this, copying is cheaper than pinning pages and telling the IOMMU, twice.
_WORTH_MAPPING = 64 << 10


class _Device(Protocol):
    """A device opened one way or the other."""

    fd: int
    path: str
    iova_ranges: list[tuple[int, int]]

    def map(self, address: int, nbytes: int, iova: int, writable: bool) -> None: ...

    def unmap(self, iova: int, nbytes: int) -> None: ...

    def close(self) -> None: ...


class VfioTransport:
    """The way to a controller that is bound to vfio-pci.

    Parameters
    ----------
    bdf
        Its PCI address.
    noiommu
        Drive it although no IOMMU confines it: IOVAs are physical addresses, and a wrong one overwrites whatever is
        there. Needs root.
    prefer
        ``group`` (``/dev/vfio/NUMBER``), ``iommufd`` (``/dev/vfio/devices/vfioN``), or ``auto``: by group where there
        is one, else by iommufd.
    machine
        Where sysfs and /dev are.

    Raises
    ------
    UriError
        If it is no PCI address, or ``prefer`` no way.
    TransportError
        If it is no NVMe controller, is not bound to vfio-pci, shares its IOMMU group with devices in use, or cannot be
        opened: says what to do.
    """

    gpu_access = GpuAccess("none", "VFIO gives a controller no address of GPU memory; that takes a kernel module")

    def __init__(
        self, bdf: str, *, noiommu: bool = False, prefer: Way = "auto", machine: Machine | None = None
    ) -> None:
        machine = machine or Machine()
        self._closed = False
        function = nvme_function(bdf, machine)
        self.uri = f"pci:{function.address}"
        self.maps_any_memory = not noiommu
        self.bounce_below = _WORTH_MAPPING
        _check_driver(function)
        self._noiommu = _check_mode(function, noiommu, machine)
        with ExitStack() as opened:
            self._device = _open(function, self._noiommu, prefer, machine)
            opened.callback(self._device.close)
            self.way = self._device.path
            info = uapi.DeviceInfo.new()
            uapi.call(self._device.fd, uapi.DEVICE_GET_INFO, info)
            self.can_reset = bool(info.flags & uapi.DEVICE_FLAG_RESET)
            self._space = IovaSpace((max(start, _LOWEST_IOVA), end) for start, end in self._device.iova_ranges)
            self._config = _region(self._device.fd, uapi.CONFIG_REGION)
            self._bar = Bar(self._device.fd, uapi.BAR0_REGION, f"{self.uri}: BAR0")
            opened.callback(self._bar.close)
            if self._bar.nbytes < _DOORBELLS + 8:
                raise TransportError(f"{self.uri}: BAR0 has {self._bar.nbytes} bytes, too few for an NVMe controller")
            self.doorbells: int | None = self._bar.address_of(_DOORBELLS)
            self.doorbells_nbytes = self._bar.nbytes - _DOORBELLS
            self._set_bus_master(True)
            opened.pop_all()

    # --- registers

    def read_register(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""
        self._check_open()
        if nbytes == 4:
            return self._bar.read32(offset)
        # Two reads, the lower half first: not every controller and bridge takes 64 bits at once, and what the
        # specification makes 64 bits wide does not change in between (NVM Express over PCIe, section 3.1).
        low = self._bar.read32(offset)
        return self._bar.read32(offset + 4) << 32 | low

    def write_register(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""
        self._check_open()
        self._bar.write32(offset, value & 0xFFFFFFFF)
        if nbytes == 8:
            self._bar.write32(offset + 4, value >> 32)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.uri} is closed")

    # --- memory

    def allocate(self, nbytes: int) -> DmaMemory:
        """New memory that the controller can reach, zeroed, starting at a page.

        Raises
        ------
        LockedMemoryError
            If a limit on locked memory or on mappings is reached.
        """
        # Shared, so that a fork never makes this process's pages and the controller's differ.
        try:
            memory = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE)
        except OSError as error:
            raise LockedMemoryError(f"there are no {format_bytes(nbytes)} of memory: {error.strerror}") from error
        address = _address(memory)
        if not self._noiommu:
            mapped = self.map(address, len(memory))
            return DmaMemory(address, nbytes, mapped.iovas, mapped.close, memory)
        held = pin(address, len(memory))
        try:
            iovas = physical_addresses(address, len(memory))
        except BaseException:
            os.close(held)
            raise
        return DmaMemory(address, nbytes, iovas, lambda: os.close(held), memory)

    def map(self, address: int, nbytes: int, writable: bool = True) -> DmaMemory:
        """Let the controller reach whole pages of this process's memory, until `DmaMemory.close`.

        Parameters
        ----------
        address, nbytes
            Multiples of 4096.
        writable
            Whether the controller may write to it. Memory that this process may only read must say False.

        Raises
        ------
        LockedMemoryError
            If a limit on locked memory or on mappings is reached.
        TransportError
            If this memory cannot be mapped: it is not there, read-only, or a file's.
        """
        self._check_open()
        if self._noiommu:
            raise TransportError(f"{self.uri} reaches only memory of its own: it has no IOMMU")
        iova = self._space.take(nbytes)
        try:
            self._device.map(address, nbytes, iova, writable)
        except BaseException:
            self._space.give(iova, nbytes)
            raise

        def release() -> None:
            # With the device, all of its mappings have ended.
            if not self._closed:
                self._device.unmap(iova, nbytes)
                self._space.give(iova, nbytes)

        return DmaMemory(address, nbytes, iova, release)

    # --- interrupts

    @property
    def interrupt_vectors(self) -> int:
        """How many MSI-X vectors the function has."""
        self._check_open()
        return vfio_interrupts.count_vectors(self._device.fd)

    def set_interrupts(self, events: Sequence[int]) -> None:
        """Pass interrupts on; see `InterruptTransport`."""
        self._check_open()
        vfio_interrupts.set_vectors(self._device.fd, events)

    # --- the function as a whole

    def reset(self) -> None:
        """Reset the function (FLR, or what it can), which ends all of its DMA. No queue may be in use.

        Raises
        ------
        TransportError
            If the function has no reset, or it fails.
        """
        if not self.can_reset:
            raise TransportError(f"{self.uri} has no function-level reset; only power-cycling it helps")
        try:
            uapi.call(self._device.fd, uapi.DEVICE_RESET)
        except OSError as error:
            busy = "; another device of its IOMMU group is in use" if error.errno == errno.EBUSY else ""
            raise TransportError(f"{self.uri} cannot be reset: {error.strerror}{busy}") from error
        self._set_bus_master(True)

    def _set_bus_master(self, on: bool) -> None:
        """Let the function do DMA, or not. It does none without, whatever its queues say."""
        (now,) = struct.unpack("<H", os.pread(self._device.fd, 2, self._config.offset + _COMMAND))
        wanted = now | _COMMAND_MEMORY | _COMMAND_MASTER if on else now & ~_COMMAND_MASTER
        os.pwrite(self._device.fd, struct.pack("<H", wanted), self._config.offset + _COMMAND)

    def close(self) -> None:
        """Let go of the controller. From here on it can reach no memory of ours. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self.doorbells = None
        try:
            self._set_bus_master(False)
        except OSError:
            pass  # it is gone, and so is its DMA
        self._bar.close()
        self._device.close()


class Bar:
    """A base address register's memory, mapped; what VFIO does not let us map is accessed by reads and writes.

    Parameters
    ----------
    fd
        The device.
    index
        Of the region.
    what
        How errors name it.
    """

    def __init__(self, fd: int, index: int, what: str) -> None:
        region = _region(fd, index)
        if not region.size:
            raise TransportError(f"{what}: the device has no memory there")
        self.nbytes = int(region.size)
        self._fd, self._offset = fd, int(region.offset)
        self._areas: list[tuple[int, int, int, mmap.mmap]] = []  # offset, end, address
        try:
            for offset, nbytes in _mappable(fd, index, region):
                area = mmap.mmap(fd, nbytes, offset=region.offset + offset)
                self._areas.append((offset, offset + nbytes, _address(area), area))
        except OSError as error:
            self.close()
            raise TransportError(f"{what} cannot be mapped: {error.strerror}") from error

    def address_of(self, offset: int) -> int | None:
        """Return where a register lies in this process, or None if it is not mapped."""
        for start, end, address, _ in self._areas:
            if start <= offset < end:
                return address + offset - start
        return None

    # A ctypes integer is read and written by one load or store of its width.

    def read32(self, offset: int) -> int:
        """Read 4 bytes by one access."""
        self._check(offset)
        address = self.address_of(offset)
        if address is None:
            (value,) = struct.unpack("<I", os.pread(self._fd, 4, self._offset + offset))
            return int(value)
        return ctypes.c_uint32.from_address(address).value

    def write32(self, offset: int, value: int) -> None:
        """Write 4 bytes by one access."""
        self._check(offset)
        address = self.address_of(offset)
        if address is None:
            os.pwrite(self._fd, struct.pack("<I", value), self._offset + offset)
        else:
            ctypes.c_uint32.from_address(address).value = value

    def _check(self, offset: int) -> None:
        if offset % 4 or not 0 <= offset <= self.nbytes - 4:
            raise ValueError(f"there is no register at {offset:#x} of {self.nbytes:#x} bytes")

    def close(self) -> None:
        """Unmap it: nobody may use an address in it any more."""
        while self._areas:
            *_, area = self._areas.pop()
            area.close()


def _region(fd: int, index: int) -> uapi.RegionInfo:
    region = uapi.RegionInfo.new(index=index)
    uapi.call(fd, uapi.DEVICE_GET_REGION_INFO, region)
    return region


def _mappable(fd: int, index: int, region: uapi.RegionInfo) -> list[tuple[int, int]]:
    """Return offset and size of the parts of a region that may be mapped: the MSI-X table may be left out."""
    if not region.flags & uapi.REGION_FLAG_MMAP:
        return []
    if region.flags & uapi.REGION_FLAG_CAPS:
        data = uapi.call_with_capabilities(fd, uapi.DEVICE_GET_REGION_INFO, uapi.RegionInfo.new(index=index))
        first = uapi.RegionInfo.from_buffer_copy(data).cap_offset
        sparse = uapi.capability(data, first, uapi.REGION_CAP_SPARSE_MMAP)
        if sparse is not None:
            return [(offset, nbytes) for offset, nbytes in uapi.ranges_of(data, sparse) if nbytes]
    return [(0, int(region.size))]


def _address(memory: mmap.mmap) -> int:
    # The view goes at once: a mapping with views cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _check_driver(function: Function) -> None:
    # Variants of vfio-pci for certain devices have names like mlx5_vfio_pci.
    if function.driver is not None and "vfio" in function.driver:
        return
    raise TransportError(
        f"{function.address} is with {f'the driver {function.driver}' if function.driver else 'no driver'}, not "
        f"vfio-pci. As root: gpunvme nvme bind {function.address}"
    )


def _check_mode(function: Function, noiommu: bool, machine: Machine) -> bool:
    """Return whether the function really has no IOMMU; refuse what was not asked for."""
    group = function.iommu_group
    # Without an IOMMU, vfio-pci makes a group of its own (vfio_noiommu_group_alloc).
    without = group is None or machine.read(f"/sys/kernel/iommu_groups/{group}/name") == "vfio-noiommu"
    if without and not noiommu:
        raise TransportError(
            f"{function.address} is behind no IOMMU: driven from user space it could write to all memory. Switch the "
            f"IOMMU on (VT-d or AMD-Vi in the firmware, intel_iommu=on), or accept it: pci:{function.address}?noiommu=1"
        )
    if noiommu and not without:
        raise TransportError(
            f"{function.address} is behind an IOMMU: leave noiommu=1 out, and it is confined to memory meant for it"
        )
    return without


def _open(function: Function, noiommu: bool, prefer: Way, machine: Machine) -> _Device:
    if prefer not in {"auto", "group", "iommufd"}:
        raise UriError(f"{prefer!r} is no way to open a VFIO device; valid: auto, group, iommufd")
    node = device_node(function.address, machine)
    by_group = machine.exists(f"/dev/vfio/{'noiommu-' if noiommu else ''}{function.iommu_group}")
    if prefer == "iommufd" or (prefer == "auto" and not by_group and node is not None and not noiommu):
        if noiommu:
            raise TransportError(f"{function.address}: without an IOMMU only via=group works")
        if node is None:
            raise TransportError(
                f"{function.address} cannot be opened by iommufd: this kernel has no /dev/vfio/devices or /dev/iommu "
                f"(CONFIG_VFIO_DEVICE_CDEV and CONFIG_IOMMUFD, Linux 6.6; modprobe iommufd)"
            )
        return IommufdDevice(function, node, machine)
    return GroupDevice(function, noiommu, machine)
