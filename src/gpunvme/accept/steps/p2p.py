"""P2PDMA of the kernel's: the drive's own transfers straight into and out of another device's memory."""

from __future__ import annotations

import gpunvme
from gpunvme.accept.job import MIB, Job, compare, contents
from gpunvme.accept.result import Figure, Result, Skipped
from gpunvme.accept.steps.custody import block_device
from gpunvme.accept.steps.kernel import claimed
from gpunvme.errors import PathError
from gpunvme.memory import Buffer
from gpunvme.nvme.sysfs import Machine, functions
from gpunvme.p2pdma import reasons
from gpunvme.p2pdma.mappings import mapping_of
from gpunvme.paths.choose import explain_memory

_NBYTES = 4 * MIB


def controller_memory(job: Job) -> Result:
    """Read into the memory of every device that offers some (p2pmem), write from it, compare."""
    if job.left is None:
        raise Skipped("what is on the drive is not known: a step before it failed")
    machine = Machine()
    offering = [each.address for each in functions(machine) if not reasons.why_no_p2pmem(each.address, machine)]
    if not offering:
        raise Skipped(reasons.why_no_p2pmem(job.address, machine))
    said, refused, figures = [], [], []
    wanted = contents(job.left, job.area_nbytes)[:_NBYTES]
    for address in offering:
        with gpunvme.P2pMemory(address, len(wanted)) as memory, claimed(job) as target:
            mapping = mapping_of(memory.span)
            assert mapping is not None
            source = target.file._file
            verdict = next(each for each in explain_memory(source, mapping) if each.path == "p2pdma")
            if not verdict.usable:
                refused.append(f"{address}: {verdict.reason}")
                continue
            done = target.file.read_into(memory, job.area)
            _check_direct(done, address)
            compare(memory.numpy().copy(), wanted, f"what the memory of {address} was given")
            _check_direct(target.file.write_from(memory, job.area), address)
            target.flush()
            compare(target.file.read(job.area, len(wanted)).numpy(), wanted, f"what was written from {address}")
            said.append(f"{address}: {done.reason}")
            speed = len(wanted) / done.seconds / 1e9
            figures.append(Figure("read", speed, "GB/s", **job.limit("kernel read", "raw O_DIRECT")))
    if not said:
        raise Skipped("; ".join(refused))
    return Result("; ".join(said + refused), tuple(figures), {"left": job.left})


def _check_direct(done: gpunvme.Transfer, address: str) -> None:
    if done.path != "p2pdma" or done.bounced_bytes:
        raise PathError(f"memory of {address} was to be reached directly: {done}")


def gpu_memory(job: Job) -> Result:
    """Read the drive straight into GPU memory that the driver lets be mapped; compare."""
    if job.left is None:
        raise Skipped("what is on the drive is not known: a step before it failed")
    with gpunvme.open(block_device(job)) as file:
        return read_by_path(file, "p2pdma", job, job.area, job.area_nbytes, job.left)


def read_by_path(file: gpunvme.File, path: str, job: Job, offset: int, nbytes: int, seed: int) -> Result:
    """Read a range of a file by one path, and compare; left out, with its reason, where the path cannot carry it."""
    verdict = next(each for each in file.explain(job.device) if each.path == path)
    if not verdict.usable:
        raise Skipped(verdict.reason)
    with gpunvme.open(file.name, path=path) as forced:
        out = Buffer.empty(nbytes, job.device)
        done = forced.read_into(out, offset)
        compare(out.numpy(), contents(seed, nbytes), f"what {job.device} was given by {path}")
    speed = Figure("read", nbytes / done.seconds / 1e9, "GB/s", **job.limit("kernel read", "raw O_DIRECT"))
    return Result(done.reason, (speed,), {"left": seed})
