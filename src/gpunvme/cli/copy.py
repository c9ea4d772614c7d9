"""``gpunvme copy``: file to file at the drives' speed, in bounded memory, replaced as a whole."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpunvme.cli.exits import CheckFailedError
from gpunvme.cli.output import Output, duration, size, speed
from gpunvme.cli.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpunvme.file import File
    from gpunvme.transfer import Transfer

CHUNK = 32 << 20
# Holes below this are copied as zeros: one long read is faster than two short ones.
SMALL_HOLE = 1 << 20


def copy(
    src: Annotated[str, typer.Argument(help="The file to read.", show_default=False)],
    dst: Annotated[str, typer.Argument(help="The file to write.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read both back and compare every byte before DST is replaced.")
    ] = False,
    fsync: Annotated[bool, typer.Option(help="Wait until DST is safe on its drive.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Copy a file; DST appears as a whole, or not at all.

    Holes stay holes and mode bits are kept. Memory used: 64 MiB.
    """
    import gpunvme
    from gpunvme.replace import Replacement

    output = Output(as_json=json)
    _refuse(src, dst, force=force)
    start = time.perf_counter()
    compared: dict[str, Any] | None = None
    with gpunvme.open(src) as source:
        with Replacement(dst, sync=fsync) as replacement:
            status = os.stat(source.fileno())
            mode = stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else 0o600
            # A private file must not be readable by others while it is copied.
            os.fchmod(replacement.file.fileno(), mode & 0o777)
            with output.progress("copy") as progress:
                done = copy_bytes(source, replacement.file, progress)
            # Writing may have taken set-user-ID away.
            os.fchmod(replacement.file.fileno(), mode)
            if verify:
                with output.progress("verify") as progress:
                    compared = compare(source, replacement.file, progress)
        seconds = time.perf_counter() - start
        nbytes = source.size
    output.document(
        {
            "source": src,
            "destination": dst,
            "nbytes": nbytes,
            "seconds": seconds,
            "synced": fsync,
            "hole_bytes": nbytes - done.read.nbytes,
            "read": done.read.as_dict(),
            "write": done.write.as_dict(),
            "verified": compared,
        }
    )
    safe = "safe on its drive" if fsync else "not waited for (--no-fsync)"
    compared_too = " with the comparison" if verify else ""
    output.line(f"{size(nbytes)} in {duration(seconds)}{compared_too} ({speed(nbytes, seconds)}), {safe}")
    facts = {"read": str(done.read), "write": str(done.write)}
    if done.read.nbytes < nbytes:
        facts["holes"] = size(nbytes - done.read.nbytes)
    if compared is not None:
        memory = compared["cached_bytes"]
        facts["verified"] = f"every byte, {size(compared['nbytes'] - memory)} read back from the drive"
        if memory:
            facts["verified"] += f", {size(memory)} that would not leave the page cache"
    output.facts(facts)


def _refuse(src: str, dst: str, *, force: bool) -> None:
    """Refuse what would destroy something, before anything is opened for writing."""
    if os.path.isdir(src):
        raise IsADirectoryError(errno.EISDIR, "copies files, and this is a directory", src)
    try:
        there = os.stat(dst)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, "the destination is a directory, name a file in it", dst)
    if os.path.samefile(src, dst):
        raise FileExistsError(errno.EEXIST, "source and destination are the same file", dst)
    if not stat.S_ISREG(there.st_mode):
        raise FileExistsError(errno.EEXIST, "the destination is not a regular file, and is left alone", dst)
    if not force:
        raise FileExistsError(errno.EEXIST, "the destination exists, --force replaces it", dst)


@dataclass
class Copied:
    """What a copy read and wrote."""

    read: Tally = field(default_factory=Tally)
    write: Tally = field(default_factory=Tally)


def data_ranges(fd: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has data, as ``(begin, end)``; what lies between are holes.

    A file system that knows no holes has one range, the whole file.
    """
    begin = end = 0
    while end < nbytes:
        try:
            data = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                break
            data = end if error.errno == errno.EINVAL else _raise(error)
        try:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), nbytes)
        except OSError as error:
            hole = nbytes if error.errno == errno.EINVAL else _raise(error)
        if data - end >= SMALL_HOLE or begin == end:
            if end > begin:
                yield begin, end
            begin = data
        end = hole
    if end > begin:
        yield begin, end


def _raise(error: OSError) -> int:
    raise error


def _chunks(fd: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut the data of a file into pieces of at most CHUNK, as ``(offset, nbytes)``."""
    for begin, end in data_ranges(fd, nbytes):
        for offset in range(begin, end, CHUNK):
            yield offset, min(CHUNK, end - offset)


def copy_bytes(source: File, destination: File, progress: Callable[[int, int], None] | None = None) -> Copied:
    """Copy all of a file: one buffer is written while the other is read.

    Parameters
    ----------
    source, destination
        Open files; the destination is empty.
    progress
        Called with the bytes written and the bytes of the file.

    Returns
    -------
    Copied
        What both sides did.
    """
    done = Copied()
    nbytes = source.size
    os.ftruncate(destination.fileno(), nbytes)
    buffers = [memoryview(mmap.mmap(-1, max(1, min(CHUNK, nbytes)))) for _ in range(2)]
    running: list[Transfer] = []
    try:
        writing: Transfer | None = None
        for number, (offset, length) in enumerate(_chunks(source.fileno(), nbytes)):
            part = buffers[number % 2][:length]
            reading = source.read_into(part, offset, wait=False)
            running = [reading] if writing is None else [reading, writing]
            done.read.add(reading.wait())
            if writing is not None:
                _written(done, writing.wait(), offset, nbytes, progress)
            writing = destination.write_from(part, offset, wait=False)
            running = [writing]
        if writing is not None:
            _written(done, writing.wait(), nbytes, nbytes, progress)
    except BaseException:
        for transfer in running:
            transfer.cancel()
        raise
    return done


def _written(
    done: Copied, transfer: Transfer, reached: int, nbytes: int, progress: Callable[[int, int], None] | None
) -> None:
    done.write.add(transfer)
    if progress is not None:
        progress(reached, nbytes)


def compare(source: File, copied: File, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Compare every byte of two files, the copy as its drive has it.

    Parameters
    ----------
    source, copied
        Open files.
    progress
        Called with the bytes compared and the bytes of the file.

    Returns
    -------
    dict
        How the copy was read back.

    Raises
    ------
    CheckFailedError
        They differ; the message says where.
    """
    nbytes = source.size
    if copied.size != nbytes:
        raise CheckFailedError(f"the copy has {copied.size} bytes, the source has {nbytes}")
    # Without this the page cache would be compared, not what arrived on the drive.
    os.fsync(copied.fileno())
    os.posix_fadvise(copied.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    back = Tally()
    buffers = [mmap.mmap(-1, max(1, min(CHUNK, nbytes))) for _ in range(2)]
    for offset in range(0, nbytes, CHUNK):
        length = min(CHUNK, nbytes - offset)
        parts = [memoryview(buffer)[:length] for buffer in buffers]
        reads = [file.read_into(part, offset, wait=False) for file, part in zip((source, copied), parts, strict=True)]
        try:
            reads[0].wait()
            back.add(reads[1].wait())
        except BaseException:
            for transfer in reads:
                transfer.cancel()
            raise
        if not _equal(buffers[0], buffers[1], length):
            where = offset + _first_difference(parts[0], parts[1])
            raise CheckFailedError(f"the copy differs from the source at byte {where}; nothing was replaced")
        if progress is not None:
            progress(offset + length, nbytes)
    return back.as_dict()


def _first_difference(one: memoryview, other: memoryview) -> int:
    return next(index for index, (left, right) in enumerate(zip(one, other, strict=True)) if left != right)


def _equal(one: mmap.mmap, other: mmap.mmap, nbytes: int) -> bool:
    """Compare memory with memcmp; comparing memoryviews goes byte by byte."""
    left, right = ((ctypes.c_char * nbytes).from_buffer(buffer) for buffer in (one, other))
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return bool(memcmp(ctypes.addressof(left), ctypes.addressof(right), nbytes) == 0)
