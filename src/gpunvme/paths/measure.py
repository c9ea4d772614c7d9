"""Paths measured against each other over a small part of the very file, in the page cache and out of it."""

from __future__ import annotations

import os
import time

from gpunvme import _native
from gpunvme.errors import Error
from gpunvme.many import carry
from gpunvme.memory import Buffer, Device, Span
from gpunvme.paths import measured
from gpunvme.paths.base import Order, Part, Path
from gpunvme.paths.measured import Rates, Record

# Large enough for the drive's speed to show, and short: a second or two on a slow drive.
_SAMPLE = 256 << 20
_SMALLEST = 8 << 20  # below it, starting costs more than moving
_ROUNDS = 2
_HOT_AT_LEAST, _COLD_AT_MOST = 0.99, 0.01
_TIMEOUT = 30.0  # seconds for one read


def key(file: _native.SourceFile, device: Device) -> str:
    """What a measurement depends on: GPU, drive, file system, kernel driver, cuFile and how it is configured."""
    from gpunvme.cufile import facts, library
    from gpunvme.cufile.cuda import context

    where = facts.place_of(file.fileno())
    installed = os.environ.get("GPUNVME_LIBCUFILE") or library.library_file() or ""
    try:
        information = os.stat(installed)
        stamp = f"{information.st_size}@{information.st_mtime_ns}"
    except OSError:
        stamp = "?"
    asked = facts.settings()
    return "|".join(
        [
            f"gpu={context(device.index).uuid.hex()}",
            f"device={os.fstat(file.fileno()).st_dev}:{','.join(where.drives) or where.source}",
            f"filesystem={where.kind}",
            f"direct={not file.direct_refusal}",
            f"kernel={os.uname().release}",
            f"driver={facts.nvidia_driver()}/{_native.cuda_version()}",
            f"nvidia-fs={facts.nvidia_fs()}",
            f"libcufile={os.path.basename(installed)}:{stamp}",
            f"settings={asked.force_compat},{asked.allow_compat},{asked.use_p2pdma}",
        ]
    )


def measure(file: _native.SourceFile, device: Device, host: Path, rival: Path) -> Record | str:
    """Measure two paths, and keep the result on disk.

    Reads only. The part of the file that is read is in the page cache afterwards if it was before.

    Returns
    -------
    Record or str
        The result; or why there is none.
    """
    nbytes = min(_SAMPLE, file.size()) & ~0xFFFFF
    if nbytes < _SMALLEST:
        return f"the file is too small to measure paths with ({file.size()} bytes)"
    fd = file.fileno()
    before = _cached(fd, nbytes)
    try:
        buffer = Buffer.empty(nbytes, device)
        rates: dict[str, Rates] = {}
        for path in (host, rival):
            name, _ = _read(path, file, device, buffer.span.part(0, 1 << 20))  # threads, rings and drivers come up
            hot = _best(path, file, device, buffer.span) if _warm(fd, nbytes) else None
            cold = None
            if _cool(fd, nbytes):
                cold = _best(path, file, device, buffer.span, fd)
            rates[name] = Rates(hot, cold)
    except Error as error:
        return f"measuring failed: {error}"
    finally:
        if before is not None and before > _COLD_AT_MOST:
            _warm(fd, nbytes)
    record = Record(rates, nbytes, time.time())
    measured.keep(key(file, device), record)
    return record


def _read(path: Path, file: _native.SourceFile, device: Device, span: Span) -> tuple[str, float]:
    order = Order(False, device, 0, _TIMEOUT)
    part = Part(file, 0, span)
    movement = path.begin(order)
    transfer = carry(movement, order, span.nbytes, part, True, None, lambda: movement.add([part]))
    return transfer.path, transfer.seconds


def _best(path: Path, file: _native.SourceFile, device: Device, span: Span, cool: int | None = None) -> float | None:
    """The better rate of some rounds; ``cool`` is the descriptor by which the file is made cold before each."""
    rates = []
    for _ in range(_ROUNDS):
        if cool is not None and not _cool(cool, span.nbytes):
            break
        _, seconds = _read(path, file, device, span)
        rates.append(span.nbytes / max(seconds, 1e-9))
    return max(rates, default=None)


def _cached(fd: int, nbytes: int) -> float | None:
    cached = _native.cached_bytes(fd, 0, nbytes)
    return None if cached is None else cached / nbytes


def _warm(fd: int, nbytes: int) -> bool:
    step = 8 << 20
    scratch = bytearray(step)
    for at in range(0, nbytes, step):
        os.preadv(fd, [memoryview(scratch)[: min(step, nbytes - at)]], at)
    cached = _cached(fd, nbytes)
    return cached is None or cached >= _HOT_AT_LEAST


def _cool(fd: int, nbytes: int) -> bool:
    for _ in range(3):  # pages on their way through the kernel's per-CPU lists survive a first try
        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
        cached = _cached(fd, nbytes)
        if cached is not None and cached <= _COLD_AT_MOST:
            return True
    return False
