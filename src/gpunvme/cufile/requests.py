"""Requests as cuFile takes them: a range cut into pieces, and pieces carried one by one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from gpunvme.cufile import library
from gpunvme.cufile.handles import Handle
from gpunvme.errors import CufileError, Error, FileError, TruncatedError

# Large enough that a request's own cost does not show, small enough that all threads have some.
PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One request: ``nbytes`` at ``file_offset``, and at ``address`` in GPU memory.

    ``registered`` is where the registration begins that the memory lies in; 0 where there is none.
    """

    handle: Handle
    address: int
    registered: int
    file_offset: int
    nbytes: int

    @property
    def base(self) -> int:
        """The address that cuFile is given.

        Of memory that is not registered it takes the request's size for the length, as was seen of 1.15 in
        compatibility mode, so that nothing but the request's own address will do.
        """
        return self.registered or self.address

    @property
    def base_offset(self) -> int:
        """Where the request is, counted from ``base``."""
        return self.address - self.base

    @property
    def aligned(self) -> bool:
        """Whether its place in the file is whole blocks, as the direct ways want it."""
        return (self.file_offset | self.nbytes) % self.handle.align == 0

    def rest(self, done: int) -> Piece:
        """What is left of it."""
        return Piece(self.handle, self.address + done, self.registered, self.file_offset + done, self.nbytes - done)


def cut(handle: Handle, address: int, registered: int, file_offset: int, nbytes: int) -> Iterator[Piece]:
    """Cut a range into pieces: an unaligned head, whole blocks, an unaligned tail.

    The whole blocks can go directly; one unaligned byte would send all of them the other way.

    Parameters
    ----------
    handle, file_offset
        The file, and where in it.
    address, registered
        Where in memory, and where its registration begins; 0: it has none.
    nbytes
        How much.
    """
    end = file_offset + nbytes
    first = min(-(-file_offset // handle.align) * handle.align, end)
    last = max(end // handle.align * handle.align, first)
    bounds = [file_offset, first, last, end]
    for start, stop in itertools.pairwise(bounds):
        for at in range(start, stop, PIECE_BYTES):
            yield Piece(handle, address + at - file_offset, registered, at, min(PIECE_BYTES, stop - at))


def clear_of(pieces: Iterable[Piece], taken: Collection[int]) -> Iterator[Piece]:
    """Pieces of unregistered memory, made short where they begin at the address of somebody's registration.

    cuFile would hold such a request against the length of that registration, which is a block at least.
    """
    for piece in pieces:
        block = piece.handle.align
        if piece.address in taken and piece.nbytes > block:
            yield Piece(piece.handle, piece.address, 0, piece.file_offset, block)
            yield piece.rest(block)
        else:
            yield piece


def located(error: Exception, piece: Piece) -> Exception:
    """The same error, with the file and the offset."""
    if isinstance(error, FileError):
        return type(error)(error.errno or 0, error.strerror or str(error), piece.handle.name, piece.file_offset)
    if isinstance(error, CufileError):
        return CufileError(f"{error}: {piece.handle.name!r} at offset {piece.file_offset}", error.code)
    return error


class Counted:
    """What was asked of cuFile; added to by many threads, each with one of its own, and summed at the end."""

    __slots__ = ("bodies", "buffered_bytes", "direct_bytes", "edge_bytes", "edges")

    def __init__(self) -> None:
        self.bodies = self.edges = 0
        self.direct_bytes = self.buffered_bytes = self.edge_bytes = 0

    def add(self, piece: Piece, nbytes: int) -> None:
        """Count a request that moved so much."""
        if piece.aligned:
            self.bodies += 1
        else:
            self.edges += 1
            self.edge_bytes += nbytes
        if piece.handle.direct:
            self.direct_bytes += nbytes
        else:
            self.buffered_bytes += nbytes

    def merge(self, other: Counted) -> None:
        """Add another one's counts."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def carry_now(piece: Piece, write: bool, counted: Counted, done: int = 0) -> None:
    """Carry a piece, of which so much is done already, by synchronous requests until nothing is left.

    Raises
    ------
    TruncatedError
        If the file ends before it.
    FileError, CufileError, CudaError
        If cuFile fails, or makes no progress.
    """
    function = "write" if write else "read"
    while done < piece.nbytes:
        rest = piece.rest(done)
        try:
            got = library.moved(
                function, rest.nbytes, rest.handle.number, rest.base, rest.nbytes, rest.file_offset, rest.base_offset
            )
        except Error as error:
            raise located(error, rest) from None
        counted.add(rest, got)
        if got == 0:
            raise no_progress(rest, write)
        done += got


def no_progress(piece: Piece, write: bool) -> Exception:
    """Make the error of a count of nothing."""
    if write:
        return located(CufileError("cuFile wrote nothing, and gave no error"), piece)
    return TruncatedError(0, "the file ended early", piece.handle.name, piece.file_offset)


class Refused(Exception):
    """cuFile takes no such requests here; nothing of them is in flight."""
