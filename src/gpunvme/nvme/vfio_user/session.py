"""One client of a vfio-user server: what it has mapped and asked for, and the answers to its messages."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from gpunvme.nvme.pci_config import CONFIG_BYTES, MSIX_BAR, MSIX_BAR_BYTES, PciConfig
from gpunvme.nvme.vfio_user import messages, payloads
from gpunvme.nvme.vfio_user.channel import Channel, Message, close_all
from gpunvme.nvme.vfio_user.mapping import Mapping
from gpunvme.nvme.vfio_user.messages import Command, Header, HeaderFlag, ProtocolError
from gpunvme.nvme.vfio_user.payloads import Irq, Region

_DOORBELLS = 0x1000
_PAGE = 4096
_MOST_MAPS = 4096
_SPACE = 1 << 64
# How long a client may take over the rest of a message, or over reading an answer.
MESSAGE_SECONDS = 10.0


class Controller(Protocol):
    """What is served: an NVMe controller whose registers, doorbells and DMA are ours to connect."""

    @property
    def bar_nbytes(self) -> int:
        """Size of BAR0, a power of two."""

    @property
    def doorbells_fd(self) -> int:
        """The file that holds the doorbells, BAR0 from 1000h on, as its last bytes."""

    @property
    def doorbells_nbytes(self) -> int:
        """How many bytes they have, whole pages."""

    def read(self, offset: int, nbytes: int) -> int:
        """Read 4 or 8 bytes of BAR0."""

    def write(self, offset: int, nbytes: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""

    def map(self, iova: int, nbytes: int, address: int, readable: bool = True, writable: bool = True) -> None:
        """Let the controller reach memory of this process."""

    def unmap(self, iova: int, nbytes: int) -> None:
        """Take it away. Returns when no access is in flight or can start."""

    def set_interrupt(self, vector: int, eventfd: int) -> None:
        """What to signal for an interrupt vector; -1 for nothing. The descriptor is duplicated."""

    def reset(self) -> None:
        """Reset as a PCI function is."""


class Refusal(Exception):
    """A command cannot be done; the client is told an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class _Answer(NamedTuple):
    payload: bytes = b""
    fds: Sequence[int] = ()


class Session:
    """A client's conversation with the server, from VERSION to its end.

    Parameters
    ----------
    channel
        The connection.
    controller
        What is served.
    config
        Its PCI configuration space.
    mmap_doorbells
        Whether the client is offered to map the doorbells.
    report
        Called with a line of text for people about what was refused.
    """

    def __init__(
        self,
        channel: Channel,
        controller: Controller,
        config: PciConfig,
        *,
        mmap_doorbells: bool,
        report: Callable[[str], object],
    ) -> None:
        self._channel = channel
        self._controller = controller
        self._config = config
        self._mmap_doorbells = mmap_doorbells
        self._report = report
        self._negotiated = False
        self._maps: dict[int, Mapping] = {}  # by IOVA
        self._eventfds: dict[int, int] = {}  # by vector
        self._msix_bar = bytearray(MSIX_BAR_BYTES)
        self._handlers: dict[int, Callable[[Message], _Answer]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._device_reset,
        }

    # --- messages

    def take_message(self) -> None:
        """Take one message, which has begun to come, and answer it.

        Raises
        ------
        ProtocolError, TooLate, ClosedByPeer
            If there is no going on with this client.
        """
        with self._channel.receive(time.monotonic() + MESSAGE_SECONDS) as message:
            if message.is_reply:
                raise ProtocolError("a reply came where none was due")
            answer, error = _Answer(), 0
            try:
                answer = self._handle(message)
            except Refusal as refusal:
                error = refusal.errno
            except ProtocolError:
                if not self._negotiated:
                    raise
                error = errno.EINVAL
            except OSError as failure:
                error = failure.errno or errno.EIO
            except Exception as failure:  # noqa: BLE001  # what the controller cannot do ends a command, not the server
                self._report(f"{messages.command_name(message.header.command)} failed: {failure}")
                error = errno.EIO
            if error:
                name = messages.command_name(message.header.command)
                self._report(f"{name} refused: {os.strerror(error)}")
            if message.wants_reply:
                flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
                header = Header(message.header.id, message.header.command, 0, int(flags), error)
                self._channel.send(header, answer.payload, answer.fds, deadline=time.monotonic() + MESSAGE_SECONDS)

    def _handle(self, message: Message) -> _Answer:
        if not self._negotiated:
            return self._version(message)
        handler = self._handlers.get(message.header.command)
        if handler is None:
            raise Refusal(errno.EOPNOTSUPP)
        return handler(message)

    def _version(self, message: Message) -> _Answer:
        if message.header.command != Command.VERSION:
            raise ProtocolError("the first message is not VERSION")
        version = messages.Version.unpack(message.payload)
        if version.major != messages.MAJOR:
            raise ProtocolError(f"the client speaks version {version.major}.{version.minor} of vfio-user, we speak 0.1")
        self._negotiated = True
        ours = messages.Capabilities(
            max_msg_fds=messages.MAX_FDS,
            max_data_xfer_size=min(version.capabilities.max_data_xfer_size, messages.DEFAULT_MAX_DATA),
            max_dma_maps=min(version.capabilities.max_dma_maps, _MOST_MAPS),
        )
        # Only what the client has named, and not longer: QEMU has no room for more than it has sent.
        return _Answer(messages.Version(messages.MAJOR, min(version.minor, messages.MINOR), ours, version.named).pack())

    # --- the device

    def _device_info(self, message: Message) -> _Answer:
        request = payloads.DeviceInfo.unpack(message.payload)
        _check_room(request.argsz, payloads.DEVICE_INFO_BYTES)
        flags = payloads.DeviceFlag.RESET | payloads.DeviceFlag.PCI
        return _Answer(payloads.DeviceInfo(payloads.DEVICE_INFO_BYTES, flags, payloads.REGIONS, payloads.IRQS).pack())

    def _device_reset(self, message: Message) -> _Answer:
        self._controller.reset()
        self._config.reset()
        return _Answer()

    def _region_info(self, message: Message) -> _Answer:
        request = payloads.RegionInfo.unpack(message.payload)
        _check_room(request.argsz, payloads.REGION_INFO_BYTES)
        if request.region >= payloads.REGIONS:
            raise Refusal(errno.EINVAL)
        size = self._region_size(request.region)
        access = payloads.RegionFlag.READ | payloads.RegionFlag.WRITE if size else 0
        info = payloads.RegionInfo(payloads.REGION_INFO_BYTES, access, request.region, size=size)
        if request.region != Region.BAR0 or not self._mmap_doorbells:
            return _Answer(info.pack())
        fd, nbytes = self._controller.doorbells_fd, self._controller.doorbells_nbytes
        # The doorbells are the last bytes of their file: where would the region's byte 0 be?
        start = (os.fstat(fd).st_size - nbytes - _DOORBELLS) % _SPACE
        area = payloads.Area(_DOORBELLS, nbytes)
        info = info._replace(flags=access | payloads.RegionFlag.MMAP, offset=start, areas=(area,))
        payload = info.pack_with_areas(request.argsz)
        # Who has no room for the areas asks again; the descriptor comes with the answer that has them.
        return _Answer(payload, [fd] if len(payload) > payloads.REGION_INFO_BYTES else [])

    def _region_size(self, index: int) -> int:
        sizes = {Region.BAR0: self._controller.bar_nbytes, MSIX_BAR: MSIX_BAR_BYTES, Region.CONFIG: CONFIG_BYTES}
        return sizes.get(index, 0)

    # --- access to regions

    def _region_read(self, message: Message) -> _Answer:
        access = payloads.RegionAccess.unpack(message.payload)
        self._check_access(access)
        if access.region == Region.CONFIG:
            data = self._config.read(access.offset, access.nbytes)
        elif access.region == MSIX_BAR:
            data = bytes(self._msix_bar[access.offset : access.offset + access.nbytes])
        else:
            data = self._read_bar0(access.offset, access.nbytes)
        return _Answer(access._replace(data=data).pack())

    def _read_bar0(self, offset: int, count: int) -> bytes:
        if count == 8 and offset % 8 == 0 and offset < _DOORBELLS:
            return self._controller.read(offset, 8).to_bytes(8, "little")
        # Anything else by the dwords that hold it.
        start, end = offset // 4 * 4, -(-(offset + count) // 4) * 4
        data = b"".join(self._controller.read(at, 4).to_bytes(4, "little") for at in range(start, end, 4))
        return data[offset - start :][:count]

    def _region_write(self, message: Message) -> _Answer:
        access = payloads.RegionAccess.unpack(message.payload)
        self._check_access(access)
        if len(access.data) != access.nbytes:
            raise Refusal(errno.EINVAL)
        if access.region == Region.CONFIG:
            self._config.write(access.offset, access.data)
        elif access.region == MSIX_BAR:
            self._msix_bar[access.offset : access.offset + access.nbytes] = access.data
        else:
            self._write_bar0(access.offset, access.data)
        return _Answer(access._replace(data=b"").pack())

    def _write_bar0(self, offset: int, data: bytes) -> None:
        if len(data) == 8 and offset % 8 == 0 and offset < _DOORBELLS:
            self._controller.write(offset, 8, int.from_bytes(data, "little"))
            return
        if offset % 4 or len(data) % 4:
            raise Refusal(errno.EINVAL)  # less than a dword of a register cannot be written (Base 2.0, 3.1.3)
        for at in range(0, len(data), 4):
            self._controller.write(offset + at, 4, int.from_bytes(data[at : at + 4], "little"))

    def _check_access(self, access: payloads.RegionAccess) -> None:
        if access.nbytes > messages.DEFAULT_MAX_DATA:
            raise Refusal(errno.E2BIG)
        if access.nbytes == 0 or access.offset + access.nbytes > self._region_size(access.region):
            raise Refusal(errno.EINVAL)

    # --- memory

    def _dma_map(self, message: Message) -> _Answer:
        request = payloads.DmaMap.unpack(message.payload)
        _check_room(request.argsz, payloads.DMA_MAP_BYTES)
        readable = bool(request.flags & payloads.DmaFlag.READ)
        writable = bool(request.flags & payloads.DmaFlag.WRITE)
        pages = request.address % _PAGE == request.size % _PAGE == request.offset % _PAGE == 0
        if not pages or request.size == 0 or request.address + request.size > _SPACE or not (readable or writable):
            raise Refusal(errno.EINVAL)
        if request.offset + request.size > _SPACE >> 1:
            raise Refusal(errno.EINVAL)
        if any(
            iova < request.address + request.size and request.address < iova + mapping.nbytes
            for iova, mapping in self._maps.items()
        ):
            raise Refusal(errno.EEXIST)
        if len(self._maps) >= _MOST_MAPS:
            raise Refusal(errno.ENOSPC)
        if message.fd_count != 1:
            # Memory without a descriptor would have to be read and written by messages, which we do not do.
            raise Refusal(errno.EINVAL if message.fd_count else errno.EOPNOTSUPP)
        fds = message.take_fds()
        try:
            mapping = Mapping(fds[0], request.size, request.offset, writable=writable)
        finally:
            close_all(fds)
        try:
            self._controller.map(request.address, request.size, mapping.address, readable, writable)
        except BaseException:
            mapping.close()
            raise
        self._maps[request.address] = mapping
        return _Answer()

    def _dma_unmap(self, message: Message) -> _Answer:
        request = payloads.DmaUnmap.unpack(message.payload)
        _check_room(request.argsz, payloads.DMA_UNMAP_BYTES)
        if request.flags == payloads.UnmapFlag.ALL and request.address == request.size == 0:
            self._unmap_all()
            return _Answer(request.pack())
        if request.flags:
            raise Refusal(errno.EOPNOTSUPP)
        mapping = self._maps.get(request.address)
        if mapping is None or mapping.nbytes != request.size:
            raise Refusal(errno.ENOENT)
        self._unmap(request.address)
        return _Answer(request.pack())

    def _unmap(self, iova: int) -> None:
        mapping = self._maps[iova]
        del self._maps[iova]
        try:
            # First this: when the controller says that it is done with it, nobody touches the memory any more.
            self._controller.unmap(iova, mapping.nbytes)
        except BaseException:
            mapping.keep()
            raise
        mapping.close()

    def _unmap_all(self) -> None:
        for iova in list(self._maps):
            self._unmap(iova)

    # --- interrupts

    def _irq_info(self, message: Message) -> _Answer:
        request = payloads.IrqInfo.unpack(message.payload)
        _check_room(request.argsz, payloads.IRQ_INFO_BYTES)
        if request.kind >= payloads.IRQS:
            raise Refusal(errno.EINVAL)
        count = self._config.vectors if request.kind == Irq.MSIX else 0
        flags = payloads.IrqInfoFlag.EVENTFD if count else 0
        return _Answer(payloads.IrqInfo(payloads.IRQ_INFO_BYTES, flags, request.kind, count).pack())

    def _set_irqs(self, message: Message) -> _Answer:
        request = payloads.IrqSet.unpack(message.payload)
        _check_room(request.argsz, payloads.IRQ_SET_BYTES)
        vectors = range(request.start, request.start + request.number)
        last = self._config.vectors if request.kind == Irq.MSIX else 0
        if request.kind >= payloads.IRQS or vectors.stop > last:
            raise Refusal(errno.EINVAL)
        flag = payloads.IrqSetFlag
        if request.flags == flag.DATA_EVENTFD | flag.ACTION_TRIGGER:
            self._set_eventfds(vectors, message)
        elif request.flags == flag.DATA_NONE | flag.ACTION_TRIGGER:
            if not vectors:
                self._clear_interrupts()
            self._trigger(vectors)
        elif request.flags == flag.DATA_BOOL | flag.ACTION_TRIGGER:
            if len(request.data) < request.number:
                raise Refusal(errno.EINVAL)
            self._trigger([vector for vector, chosen in zip(vectors, request.data, strict=False) if chosen])
        else:
            raise Refusal(errno.EINVAL)  # MSI-X vectors are masked in their table, not by messages
        return _Answer()

    def _set_eventfds(self, vectors: range, message: Message) -> None:
        if message.fd_count not in (0, len(vectors)):
            raise Refusal(errno.EINVAL)
        fds = message.take_fds()
        try:
            # Anything else might make the controller wait when it is written to.
            if not all(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]" for fd in fds):
                raise Refusal(errno.EINVAL)
            for vector in vectors:
                self._controller.set_interrupt(vector, fds[0] if fds else -1)
                self._forget_eventfd(vector)
                if fds:
                    self._eventfds[vector] = fds.pop(0)
        finally:
            close_all(fds)

    def _trigger(self, vectors: range | list[int]) -> None:
        for vector in vectors:
            eventfd = self._eventfds.get(vector, -1)
            # One that has no room for another count is signalled already.
            if eventfd >= 0 and _writable(eventfd):
                os.eventfd_write(eventfd, 1)

    def _forget_eventfd(self, vector: int) -> None:
        eventfd = self._eventfds.pop(vector, -1)
        if eventfd >= 0:
            os.close(eventfd)

    def _clear_interrupts(self) -> None:
        for vector in list(self._eventfds):
            self._controller.set_interrupt(vector, -1)
            self._forget_eventfd(vector)

    # --- the end

    def close(self) -> None:
        """The client is gone: nothing of it stays, and the next one finds a controller that was reset."""
        self._channel.close()
        try:
            self._controller.reset()  # first: from here on nothing is read from the client's memory or written to it
        finally:
            self._config.reset()
            self._unmap_all()
            self._clear_interrupts()


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _check_room(argsz: int, needed: int) -> None:
    if argsz < needed:
        raise Refusal(errno.EINVAL)
