"""Single requests: O_DIRECT between a file and mapped PCI memory, and the little that the processor copies."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from typing import NamedTuple

from gpunvme import _native
from gpunvme.errors import FileError, TruncatedError, file_error

PIECE = 1 << 20  # bytes of a request at most: what cannot be cancelled any more
_PAGE = 4096


class Opened:
    """A file as requests need it: a descriptor with O_DIRECT beside the file's own, until `close`.

    Parameters
    ----------
    file
        The file.
    write
        Whether it is written.

    Attributes
    ----------
    direct
        The descriptor, or -1 where O_DIRECT was refused.
    align
        What offsets and lengths are multiples of. For writes whole pages: what the page cache holds of the bytes
        beside them is written by others.
    memory_align
        What addresses are multiples of: whole blocks, though many drives take any four bytes. QEMU's controller was
        seen to move the wrong bytes into a peer's memory that begins within a block.
    """

    def __init__(self, file: _native.SourceFile, write: bool) -> None:
        self.file = file
        self.plain = file.fileno()
        self.name = os.readlink(f"/proc/self/fd/{self.plain}")
        self.align = max(file.offset_align, _PAGE) if write else max(file.offset_align, 1)
        self.memory_align = max(file.memory_align, file.offset_align, 1)
        self.direct = -1
        if not file.direct_refusal:
            flags = (os.O_RDWR if file.writable else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC
            try:
                self.direct = os.open(f"/proc/self/fd/{self.plain}", flags)
            except OSError:
                pass  # everything passes through our memory then

    def close(self) -> None:
        """Close the descriptor of its own."""
        if self.direct >= 0:
            os.close(self.direct)
            self.direct = -1


class Piece(NamedTuple):
    """Bytes of a file and where they go or come from; ``direct``: as one request of the drive's."""

    opened: Opened
    provider: str
    offset: int
    address: int
    nbytes: int
    direct: bool


class Moved(NamedTuple):
    """Bytes that were moved: by O_DIRECT, by the page cache; ``bounced`` of them through our memory."""

    direct: int = 0
    cached: int = 0
    bounced: int = 0


def cut(opened: Opened, provider: str, offset: int, address: int, nbytes: int, bounce: bool) -> Iterator[Piece]:
    """Cut a range into pieces: whole blocks, and what stands over at both ends."""
    end = offset + nbytes
    first = -(-offset // opened.align) * opened.align
    last = end // opened.align * opened.align
    if bounce or first >= last or (address + first - offset) % opened.memory_align:
        first = last = end  # nothing of it can be a request of the drive's

    def pieces(start: int, stop: int, direct: bool) -> Iterator[Piece]:
        for at in range(start, stop, PIECE):
            yield Piece(opened, provider, at, address + at - offset, min(PIECE, stop - at), direct)

    yield from pieces(first, last, True)
    yield from pieces(offset, min(first, end), False)
    yield from pieces(last, end, False)


def carry_direct(piece: Piece, write: bool) -> Moved:
    """Let the drive move a piece by itself.

    Raises
    ------
    OSError
        As the kernel answers.
    TruncatedError
        If the file ends before.
    """
    done = 0
    call = os.pwritev if write else os.preadv
    while done < piece.nbytes:
        view = (ctypes.c_char * (piece.nbytes - done)).from_address(piece.address + done)
        moved = call(piece.opened.direct, [view], piece.offset + done)
        if moved == 0:
            raise _ended(piece, done)
        done += moved
        if done % piece.opened.align and done < piece.nbytes:  # the end of the file, or a page before it
            rest = piece._replace(offset=piece.offset + done, address=piece.address + done, nbytes=piece.nbytes - done)
            more = Bounce().carry(rest, write)
            return Moved(more.direct + done, more.cached, more.bounced)
    return Moved(direct=done)


class Bounce:
    """Memory of ours that pieces pass through, which a drive can reach in any case."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PIECE + 2 * _PAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def carry(self, piece: Piece, write: bool) -> Moved:
        """Move a piece; the processor copies between this memory and the PCI memory.

        Raises
        ------
        FileError
            As the kernel answers.
        """
        try:
            return self._write(piece) if write else self._read(piece)
        except FileError:
            raise
        except OSError as error:
            raise file_error(error, "write" if write else "read", piece.opened.name, piece.offset) from None

    def _read(self, piece: Piece) -> Moved:
        opened, view = piece.opened, memoryview(self._memory)
        align = max(opened.align, _PAGE) if opened.direct >= 0 else 1
        if align > _PAGE:  # larger blocks than there is room for: by the page cache
            align = 1
        fd = opened.direct if align > 1 else opened.plain
        done = 0
        while done < piece.nbytes:
            start = piece.offset + done
            begin = start // align * align
            length = -(-(piece.offset + piece.nbytes) // align) * align - begin
            got = os.preadv(fd, [view[:length]], begin) - (start - begin)
            if got <= 0:
                raise _ended(piece, done)
            got = min(got, piece.nbytes - done)
            ctypes.memmove(piece.address + done, self._address + start - begin, got)
            done += got
        return Moved(direct=done, bounced=done) if align > 1 else Moved(cached=done, bounced=done)

    def _write(self, piece: Piece) -> Moved:
        opened, view = piece.opened, memoryview(self._memory)
        whole = opened.direct >= 0 and not (piece.offset % opened.align or piece.nbytes % opened.align)
        ctypes.memmove(self._address, piece.address, piece.nbytes)
        done = 0
        while done < piece.nbytes:
            # What O_DIRECT left over of whole blocks is none any more.
            direct = whole and done % opened.align == 0
            moved = os.pwritev(
                opened.direct if direct else opened.plain, [view[done : piece.nbytes]], piece.offset + done
            )
            if moved == 0:
                raise FileError(errno.EIO, "nothing was written", opened.name, piece.offset + done)
            done += moved
        return Moved(direct=done, bounced=done) if whole else Moved(cached=done, bounced=done)


def _ended(piece: Piece, done: int) -> TruncatedError:
    said = "the file ended before the bytes that were asked for; was it truncated?"
    return TruncatedError(errno.EIO, said, piece.opened.name, piece.offset + done)
