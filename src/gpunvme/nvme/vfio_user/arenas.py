"""DMA memory for vfio-user: few large regions, handed out in small parts.

Every region of memory is shared with the server by a descriptor of its own, and servers take few of them, in multiples
of 2 MiB. So memory comes in *arenas* of megabytes, and what drivers ask for — a queue, a PRP list, a buffer — is cut
out of them, by pages.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
import weakref

from gpunvme.errors import TransportError
from gpunvme.nvme.dma import PAGE, DmaMemory, IovaSpace
from gpunvme.nvme.vfio_user import payloads
from gpunvme.nvme.vfio_user.connection import Connection
from gpunvme.nvme.vfio_user.mapping import Mapping
from gpunvme.nvme.vfio_user.messages import Command

ARENA_ALIGN = 2 << 20
MOST_ARENAS = 64
_FIRST_ARENA = 16 << 20


class Arena:
    """One region of shared memory: a memfd, mapped, with the IOVAs that the server knows it by."""

    def __init__(self, nbytes: int, iova: int) -> None:
        self.nbytes = nbytes
        self.iova = iova
        self.fd = os.memfd_create("gpunvme-dma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.close_fd = weakref.finalize(self, os.close, self.fd)  # the memory stays while anybody looks at it
        os.ftruncate(self.fd, nbytes)
        # The server has the descriptor too. If it could shrink the file, our next access would be fatal.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.mapping = Mapping(self.fd, nbytes)
        self.space = IovaSpace([(iova, iova + nbytes)])
        self.used = 0  # parts that are handed out

    def address(self, iova: int) -> int:
        """Where an IOVA of the arena is in this process."""
        return self.mapping.address + iova - self.iova


class Arenas:
    """All arenas of one connection.

    Parameters
    ----------
    connection
        The connection; it is lent the arenas.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._where = connection.where
        self.most = min(connection.capabilities.max_dma_maps, MOST_ARENAS)
        self._lock = threading.Lock()
        self._iovas = IovaSpace([(1 << 32, 1 << 47)])
        self._closed = False
        self._process = os.getpid()
        # Replaced, never changed: read by whoever answers the server, without the lock.
        self._arenas: tuple[Arena, ...] = ()
        connection.lend(self)

    def allocate(self, nbytes: int) -> DmaMemory:
        """A part of at least ``nbytes`` bytes, zeroed.

        Raises
        ------
        TransportError
            If there are too many arenas, or the server refuses another one.
        """
        nbytes = -(-nbytes // PAGE) * PAGE
        with self._lock:
            if self._closed:
                raise TransportError(f"{self._where}: closed; no memory can be shared with the server any more")
            for arena in self._arenas:
                try:
                    return self._part(arena, nbytes)
                except MemoryError:
                    continue
            return self._part(self._grow(nbytes), nbytes)

    def _part(self, arena: Arena, nbytes: int) -> DmaMemory:
        iova = arena.space.take(nbytes)
        arena.used += 1
        return DmaMemory(arena.address(iova), nbytes, iova, lambda: self._give(arena, iova, nbytes), arena.mapping)

    def _grow(self, nbytes: int) -> Arena:
        if len(self._arenas) >= self.most:
            total = sum(arena.nbytes for arena in self._arenas) >> 20
            raise TransportError(
                f"{self._where}: all {self.most} regions that can be shared with the server are in use, {total} MiB; "
                "release buffers, or transfer less at a time"
            )
        # Each arena is a share of all before it: 64 of them are enough for any amount.
        wanted = max(nbytes, _FIRST_ARENA, sum(arena.nbytes for arena in self._arenas) // 4)
        wanted = -(-wanted // ARENA_ALIGN) * ARENA_ALIGN
        iova = self._iovas.take(wanted, ARENA_ALIGN)
        try:
            arena = Arena(wanted, iova)
        except OSError as error:
            self._iovas.give(iova, wanted)
            raise TransportError(
                f"{self._where}: no {wanted >> 20} MiB of shared memory can be had: {error.strerror}"
            ) from error
        self._arenas += (arena,)
        try:
            self._map(arena)
        except BaseException:
            self._drop(arena)
            raise
        return arena

    def _map(self, arena: Arena) -> None:
        flags = payloads.DmaFlag.READ | payloads.DmaFlag.WRITE
        request = payloads.DmaMap(payloads.DMA_MAP_BYTES, flags, 0, arena.iova, arena.nbytes)
        self._connection.ask(Command.DMA_MAP, request.pack(), [arena.fd]).close()

    def _unmap(self, arena: Arena) -> None:
        request = payloads.DmaUnmap(payloads.DMA_UNMAP_BYTES, 0, arena.iova, arena.nbytes)
        self._connection.ask(Command.DMA_UNMAP, request.pack()).close()

    def _drop(self, arena: Arena) -> None:
        self._arenas = tuple(each for each in self._arenas if each is not arena)
        arena.close_fd()
        self._iovas.give(arena.iova, arena.nbytes)

    def _give(self, arena: Arena, iova: int, nbytes: int) -> None:
        if os.getpid() != self._process:
            return  # in a forked child: the memory is still the parent's
        with self._lock:
            if self._closed:
                return
            arena.mapping.discard(iova - arena.iova, nbytes)
            arena.space.give(iova, nbytes)
            arena.used -= 1
            if arena.used == 0 and len(self._arenas) > 1:
                try:
                    self._unmap(arena)
                except TransportError:
                    return  # whether the server has let go of it is unknown: its IOVAs are not used again
                self._drop(arena)

    def _find(self, iova: int, nbytes: int) -> Arena | None:
        for arena in self._arenas:
            if arena.iova <= iova and iova + nbytes <= arena.iova + arena.nbytes:
                return arena
        return None

    def read(self, iova: int, nbytes: int) -> bytes | None:
        """Bytes of a range; None if it does not lie in one arena."""
        arena = self._find(iova, nbytes)
        return None if arena is None else ctypes.string_at(arena.address(iova), nbytes)

    def write(self, iova: int, data: bytes) -> bool:
        """Change bytes of a range; whether it lies in one arena."""
        arena = self._find(iova, len(data))
        if arena is not None:
            ctypes.memmove(arena.address(iova), data, len(data))
        return arena is not None

    def close(self) -> None:
        """Take every arena back from the server, as far as it still answers."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            for arena in self._arenas:
                try:
                    self._unmap(arena)
                except TransportError:
                    break  # it is gone, or will be when the connection is
            for arena in self._arenas:
                arena.close_fd()
            self._arenas = ()
