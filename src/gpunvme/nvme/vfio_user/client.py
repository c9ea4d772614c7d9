"""``vfio-user:``: a controller that another process serves on a Unix socket.

The server has the registers: they are read and written by messages. The doorbells are a page that it shares, where it
can, and queues and data are memory that we share with it. So once queues exist, commands flow without a message.
"""

from __future__ import annotations

import os

from gpunvme.errors import TransportError
from gpunvme.nvme.dma import DmaMemory
from gpunvme.nvme.gpu_memory import GpuAccess
from gpunvme.nvme.vfio_user import messages, payloads
from gpunvme.nvme.vfio_user.arenas import Arenas
from gpunvme.nvme.vfio_user.channel import close_all
from gpunvme.nvme.vfio_user.connection import Connection, Refused
from gpunvme.nvme.vfio_user.mapping import Mapping
from gpunvme.nvme.vfio_user.messages import Command
from gpunvme.nvme.vfio_user.payloads import Irq, Region

_DOORBELLS = 0x1000
_NVME_CLASS = 0x010802
_PCI_COMMAND, _PCI_CLASS = 0x04, 0x08
_MEMORY_AND_BUS_MASTER = 0x6
_MOST_REGIONS = 256
# Our queues have no interrupts, but servers look for the eventfds of some vectors all the same.
_MOST_VECTORS = 64
_RESET_SECONDS = 30.0
# What a reply of DEVICE_GET_REGION_INFO may be long: the structure, and some capabilities.
_REGION_INFO_ROOM = 4096


class VfioUserTransport:
    """The way to a controller behind a vfio-user server.

    Parameters
    ----------
    socket_path
        The server's Unix socket.
    timeout
        How long the server may take for an answer, in seconds.

    Raises
    ------
    TransportError
        If there is no server, or it does not keep to the protocol, or serves something else than an NVMe controller.
    """

    maps_any_memory = False
    bounce_below = 0
    gpu_access = GpuAccess(
        "none", "the server reaches only memory that is shared with it by descriptor, which GPU memory is not"
    )
    bounce_reason = "a vfio-user server reaches only memory that is shared with it"

    def __init__(self, socket_path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        path = os.fspath(socket_path)
        self.uri = f"vfio-user:{path}"
        self.doorbells: int | None = None
        self.doorbells_nbytes = 0
        self._wide = True  # whether the server takes accesses of 8 bytes
        self._doorbell_page: Mapping | None = None
        self._connection = Connection(path, timeout)
        self._arenas = Arenas(self._connection)
        try:
            self._look_at_device()
            self._find_doorbells()
            self._start_device()
        except BaseException:
            self._connection.close()
            raise

    # --- getting to know the device

    def _look_at_device(self) -> None:
        with self._connection.ask(
            Command.DEVICE_GET_INFO, payloads.DeviceInfo(payloads.DEVICE_INFO_BYTES).pack()
        ) as reply:
            info = self._connection.parse(payloads.DeviceInfo.unpack, reply)
        if not info.flags & payloads.DeviceFlag.PCI:
            raise TransportError(f"{self.uri}: the server serves no PCI device; name the socket of an NVMe controller")
        if not Region.CONFIG < info.num_regions <= _MOST_REGIONS:
            raise TransportError(
                f"{self.uri}: the server's device has {info.num_regions} regions, which no PCI device has"
            )
        self._resettable = bool(info.flags & payloads.DeviceFlag.RESET)
        self._irq_kinds = info.num_irqs
        kind = self._config(_PCI_CLASS, 4) >> 8  # above the revision
        if kind != _NVME_CLASS:
            raise TransportError(
                f"{self.uri}: the server serves a PCI device of class {kind:06X}h, which is no NVMe controller "
                f"({_NVME_CLASS:06X}h); name another socket"
            )

    def _find_doorbells(self) -> None:
        request = payloads.RegionInfo(_REGION_INFO_ROOM, region=Region.BAR0)
        with self._connection.ask(Command.DEVICE_GET_REGION_INFO, request.pack()) as reply:
            info = self._connection.parse(payloads.RegionInfo.unpack, reply)
            if info.size < _DOORBELLS:
                raise TransportError(f"{self.uri}: BAR0 has {info.size} bytes, too few for a controller's registers")
            self._bar_nbytes = info.size
            if not info.flags & payloads.RegionFlag.MMAP or reply.fd_count == 0:
                return  # then doorbells are written by messages
            area = self._doorbell_area(info)
            if area is None:
                return
            fds = reply.take_fds()
            try:
                # 64-bit arithmetic, as in C: a server whose file begins with the doorbells says -1000h.
                offset = (info.offset + area.offset) & 0xFFFF_FFFF_FFFF_FFFF
                self._doorbell_page = Mapping(fds[0], area.size, offset)
            except (OSError, OverflowError) as error:
                raise TransportError(
                    f"{self.uri}: the doorbells that the server shares cannot be mapped: {error}"
                ) from error
            finally:
                close_all(fds)
        self.doorbells = self._doorbell_page.address + _DOORBELLS - area.offset
        self.doorbells_nbytes = area.offset + area.size - _DOORBELLS

    def _doorbell_area(self, info: payloads.RegionInfo) -> payloads.Area | None:
        """The part of BAR0 that can be mapped and begins with the doorbells, or before."""
        areas = info.areas if info.areas is not None else (payloads.Area(0, info.size),)
        for area in areas:
            whole_pages = area.offset % 4096 == area.size % 4096 == 0
            if whole_pages and area.offset <= _DOORBELLS and _DOORBELLS + 4096 <= area.offset + area.size <= info.size:
                return area
        return None

    def _start_device(self) -> None:
        """Let it do DMA, and give it the eventfds that it may insist on."""
        command = self._config(_PCI_COMMAND, 2) | _MEMORY_AND_BUS_MASTER
        try:
            self._write(Region.CONFIG, _PCI_COMMAND, command.to_bytes(2, "little"))
        except Refused as error:
            raise self._connection.refused("to let the device do DMA", error) from error
        if self._irq_kinds <= Irq.MSIX:
            return
        request = payloads.IrqInfo(payloads.IRQ_INFO_BYTES, kind=Irq.MSIX)
        with self._connection.ask(Command.DEVICE_GET_IRQ_INFO, request.pack()) as reply:
            info = self._connection.parse(payloads.IrqInfo.unpack, reply)
        if info.flags & payloads.IrqInfoFlag.EVENTFD:
            self._set_eventfds(min(info.number, _MOST_VECTORS))

    def _set_eventfds(self, vectors: int) -> None:
        at_once = max(1, min(self._connection.capabilities.max_msg_fds, messages.MAX_FDS))
        flags = payloads.IrqSetFlag.DATA_EVENTFD | payloads.IrqSetFlag.ACTION_TRIGGER
        # One for all: nobody waits for it.
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            for start in range(0, vectors, at_once):
                count = min(at_once, vectors - start)
                request = payloads.IrqSet(payloads.IRQ_SET_BYTES, flags, Irq.MSIX, start, count)
                self._connection.request(Command.DEVICE_SET_IRQS, request.pack(), [eventfd] * count).close()
        except Refused:
            pass  # a server that wants none does not insist on any
        finally:
            os.close(eventfd)

    # --- registers

    def read_register(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""
        if nbytes == 8 and not self._wide:
            return self.read_register(offset, 4) | self.read_register(offset + 4, 4) << 32
        try:
            return int.from_bytes(self._read(Region.BAR0, offset, nbytes), "little")
        except Refused as error:
            if nbytes == 8:  # some servers know 4 bytes only
                self._wide = False
                return self.read_register(offset, nbytes)
            raise self._connection.refused(f"a read of {nbytes} bytes at {offset:#x} of BAR0", error) from error

    def write_register(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""
        if nbytes == 8 and not self._wide:
            self.write_register(offset, 4, value & 0xFFFF_FFFF)
            self.write_register(offset + 4, 4, value >> 32)
            return
        try:
            self._write(Region.BAR0, offset, value.to_bytes(nbytes, "little"))
        except Refused as error:
            if nbytes == 8:
                self._wide = False
                self.write_register(offset, nbytes, value)
                return
            raise self._connection.refused(f"a write of {nbytes} bytes at {offset:#x} of BAR0", error) from error

    def _read(self, region: int, offset: int, nbytes: int) -> bytes:
        request = payloads.RegionAccess(offset, region, nbytes)
        with self._connection.request(Command.REGION_READ, request.pack()) as reply:
            answer = self._connection.parse(payloads.RegionAccess.unpack, reply)
        if answer[:3] != request[:3] or len(answer.data) != nbytes:
            raise TransportError(
                f"{self.uri}: asked for {nbytes} bytes at {offset:#x} of region {region}, the server answered with "
                f"{len(answer.data)} bytes at {answer.offset:#x} of region {answer.region}"
            )
        return answer.data

    def _write(self, region: int, offset: int, data: bytes) -> None:
        request = payloads.RegionAccess(offset, region, len(data), data)
        with self._connection.request(Command.REGION_WRITE, request.pack()) as reply:
            answer = self._connection.parse(payloads.RegionAccess.unpack, reply)
        if answer[:3] != request[:3]:
            raise TransportError(
                f"{self.uri}: wrote {len(data)} bytes at {offset:#x} of region {region}, the server answered to "
                f"{answer.nbytes} bytes at {answer.offset:#x} of region {answer.region}"
            )

    def _config(self, offset: int, nbytes: int) -> int:
        try:
            return int.from_bytes(self._read(Region.CONFIG, offset, nbytes), "little")
        except Refused as error:
            raise self._connection.refused(
                f"a read of {nbytes} bytes at {offset:#x} of the configuration space", error
            ) from error

    # --- memory

    def allocate(self, nbytes: int) -> DmaMemory:
        """New memory that the controller can reach, zeroed, starting at a page.

        Raises
        ------
        TransportError
            If there is no more that can be shared, or the server refuses it.
        """
        if nbytes <= 0:
            raise ValueError(f"{nbytes} bytes of memory cannot be allocated")
        return self._arenas.allocate(nbytes)

    def map(self, address: int, nbytes: int, writable: bool = True) -> DmaMemory:
        """Refuse: memory that is there already has no descriptor by which it could be shared."""
        raise TransportError(f"{self.uri}: {self.bounce_reason}; use memory from `allocate`")

    # --- the end

    def reset(self) -> None:
        """Reset the device.

        Raises
        ------
        TransportError
            If the server cannot.
        """
        if not self._resettable:
            raise TransportError(f"{self.uri}: the server cannot reset its device; start it again")
        self._connection.ask(Command.DEVICE_RESET, timeout=max(self._connection.timeout, _RESET_SECONDS)).close()
        self._start_device()

    def close(self) -> None:
        """End the connection. From here on the server can reach no memory of ours."""
        self.doorbells = None  # what is mapped stays so as long as this object: a late doorbell hits nothing else
        self._arenas.close()
        self._connection.close()
