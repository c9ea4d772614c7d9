"""The drive by our own driver, whichever way to it: patterns, queues of several shapes, transfers of several sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpunvme import nvme
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Result
from gpunvme.doctor.finding import Level
from gpunvme.nvme.status import describe

if TYPE_CHECKING:
    from gpunvme.nvme import Controller, Namespace

_SEED = 20
_PAGE = 4096
_LARGEST = 4 * MIB  # command that is tried where a drive has no limit, or a larger one
_SHAPES = ((1, 2), (1, 3), (1, 64), (2, 1024), (4, 256), (16, 32))  # queues, entries of each


def area_of(job: Job) -> int:
    """Return the first block of the test area."""
    return job.area // job.block_size


def identify(job: Job) -> Result:
    """Bring the controller up and ask who it is, how it is, and what its namespace is like."""
    with nvme.open(job.uri) as controller:
        info, cap, namespace = controller.info, controller.registers.cap, controller.namespace(job.nsid)
        health, errors = controller.smart(), controller.error_log()
        largest = info.max_transfer_bytes(cap.page_bytes_min)
        if namespace.size != job.nbytes or namespace.block_size != job.block_size:
            raise ValueError(
                f"the kernel saw {job.nbytes} bytes in blocks of {job.block_size}, the driver {namespace.size} in "
                f"blocks of {namespace.block_size}"
            )
        facts: dict[str, Any] = {
            "model": info.mn,
            "firmware": info.fr,
            "version": str(controller.registers.vs),
            "max_transfer_bytes": largest,
            "queue_entries": cap.queue_entries,
            "io_queues": len(controller.io_queues) + controller.queues_left(),
            "page_bytes": controller.page_bytes,
            "doorbell_stride_bytes": 4 << cap.dstrd,
            "timeout_seconds": cap.to * 0.5,
            "volatile_write_cache": info.volatile_write_cache,
            "celsius": health.celsius,
            "warnings": health.warnings,
            "percentage_used": health.percentage_used,
            "media_errors": health.media_errors,
            "errors": [describe(error.status_field) for error in errors[:4]],
            "left": job.left,
        }
    limit = "no limit" if largest is None else f"{largest >> 10} KiB"
    said = f"{info.mn}, firmware {info.fr}, NVMe {facts['version']}; MDTS {limit}, {facts['io_queues']} I/O queues of "
    said += f"up to {cap.queue_entries} entries"
    if health.critical_warning:
        said += f"; {Level.RED.value}: it warns: {', '.join(health.warnings)}"
    return Result(said, facts=facts)


def write_and_compare(namespace: Namespace, data: NDArray[np.uint8], lba: int, where: str, **options: Any) -> None:
    """Write bytes, read them into other memory, compare."""
    namespace.write_from(data, lba, **options)
    compare(namespace.read(lba, len(data) // namespace.block_size).numpy(), data, where)


def patterns(job: Job) -> Result:
    """Read what the kernel wrote; write patterns that show which bit or which block went wrong; fill the area."""
    said = []
    with nvme.open(job.uri) as controller:
        namespace, first = controller.namespace(job.nsid), area_of(job)
        if job.left is not None:
            found = namespace.read(first, job.area_nbytes // job.block_size).numpy()
            compare(found, contents(job.left, job.area_nbytes), "what was on it")
            said.append(f"{job.area_nbytes >> 20} MiB that were on it were read")
        nbytes = min(job.area_nbytes, 4 * MIB)
        for value in (0x00, 0xFF, 0xAA, 0x55):
            write_and_compare(namespace, np.full(nbytes, value, np.uint8), first, f"pattern {value:02X}h")
        places = np.arange(first * job.block_size, first * job.block_size + nbytes, 8, dtype=np.uint64)
        write_and_compare(namespace, places.view(np.uint8), first, "each word its address", fua=True)
        write_and_compare(namespace, contents(_SEED, MIB), job.far // job.block_size, "near the end of the drive")
        write_and_compare(namespace, contents(_SEED, job.area_nbytes), first, "random bytes")
        namespace.flush()
    said.append("patterns, addresses, random bytes, also near the end")
    return Result("; ".join(said), facts={"left": _SEED})


def queues(job: Job) -> Result:
    """Move random blocks over queues of several numbers and depths, and compare."""
    made = []
    data = contents(_SEED + 1, min(job.area_nbytes, 2 * MIB))
    for count, wanted in _SHAPES:
        with nvme.open(job.uri, queues=count, depth=wanted) as controller:
            namespace, first = controller.namespace(job.nsid), area_of(job)
            shape = (len(controller.io_queues), min(wanted, controller.registers.cap.queue_entries))
            if shape in made:
                continue
            made.append(shape)
            write_and_compare(namespace, data, first, f"{shape[0]} queues of {shape[1]}")
            _gather(namespace, first, data, 1024, f"{shape[0]} queues of {shape[1]}, random blocks")
    return Result(", ".join(f"{count} × {depth}" for count, depth in made), facts={"shapes": made})


def _gather(namespace: Namespace, first: int, data: NDArray[np.uint8], count: int, where: str) -> None:
    blocks = len(data) // namespace.block_size
    places = np.random.default_rng(count).integers(0, blocks, count)
    rows = namespace.gather(first + places)
    compare(rows.numpy(), data.reshape(blocks, -1)[places].reshape(-1), where)


def sizes(job: Job) -> Result:
    """Move one block, a page, MDTS, a block more and many times that, from memory of any alignment; compare."""
    largest = _largest_command(job)
    # A command is as large as the controller allows, up to the largest that is tried.
    with nvme.open(job.uri, max_bytes=max(_PAGE, largest)) as controller:
        namespace, block, first = controller.namespace(job.nsid), job.block_size, area_of(job)
        wanted = [block, _PAGE, 2 * _PAGE, 3 * _PAGE, controller.max_bytes - block, controller.max_bytes]
        wanted += [controller.max_bytes + block, 3 * controller.max_bytes + block, job.area_nbytes]
        moved = sorted({nbytes // block * block for nbytes in wanted if block <= nbytes <= job.area_nbytes})
        for nbytes in moved:
            data = contents(nbytes, nbytes)
            write_and_compare(namespace, data, first, f"{nbytes} bytes")
            for skip in (0, 4, 512, 4095) if nbytes <= 16 * MIB else (0,):
                room = np.zeros(nbytes + 3 * _PAGE, np.uint8)
                start = -room.ctypes.data % _PAGE + skip
                namespace.read_into(room[start : start + nbytes], first)
                compare(room[start : start + nbytes], data, f"{nbytes} bytes at {skip} bytes behind a page")
                if room[:start].any() or room[start + nbytes :].any():
                    raise ValueError(f"{nbytes} bytes at {skip} bytes behind a page: bytes around them were written")
        most = controller.max_bytes
    return Result(
        f"{moved[0]} bytes to {moved[-1] >> 20} MiB, commands up to {most >> 10} KiB",
        facts={"sizes": moved, "max_bytes": most},
    )


def _largest_command(job: Job) -> int:
    with nvme.open(job.uri) as controller:
        return min(_LARGEST, controller.info.max_transfer_bytes(controller.page_bytes) or _LARGEST)


def fill(controller: Controller, job: Job, seed: int) -> NDArray[np.uint8]:
    """Write the test area by the driver's own queues, for others to read; return what is in it."""
    data = contents(seed, job.area_nbytes)
    namespace = controller.namespace(job.nsid)
    namespace.write_from(data, area_of(job))
    namespace.flush()
    return data
