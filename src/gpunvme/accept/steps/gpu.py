"""NVMe queues that kernels of the GPU drive, in each placement, on the person's own drive."""

from __future__ import annotations

import time

import numpy as np

from gpunvme import nvme
from gpunvme.accept.job import Job, compare, contents
from gpunvme.accept.result import Figure, Result, Skipped
from gpunvme.accept.steps.driver import area_of, fill
from gpunvme.errors import PathError
from gpunvme.gpu.driver import Gpu
from gpunvme.gpu.placement import candidates
from gpunvme.memory import Buffer, Device
from gpunvme.nvme import Controller

_SEED = 50
_PAGE = 4096
_ROWS = 16384
_SECONDS = 60.0


def queues(job: Job) -> Result:
    """Read in order and at random, and write, by kernels with queues in ``options["placement"]``; compare."""
    placement = str(job.options["placement"])
    with nvme.open(job.uri, queues=2) as controller:
        _check_possible(controller, job.device, placement)
        data = fill(controller, job, _SEED)
        namespace, first, each = controller.namespace(job.nsid), area_of(job), max(_PAGE, job.block_size)
        blocks, places = each // job.block_size, _places(job, each)
        with namespace.gpu_queues(job.device, placement=placement) as queues:
            said = f"{queues.count} queues of {queues.depth}, doorbells {queues.doorbell}: {queues.doorbell_reason}"
            out = Buffer.empty(job.area_nbytes, job.device)
            queues.stream(first, job.area_nbytes, out, timeout=_SECONDS)
            compare(out.numpy(), data, "what kernels read in order")
            rows = Buffer.empty(len(places) * each, job.device)
            start = time.perf_counter()
            queues.gather(first + places * blocks, rows, blocks=blocks, timeout=_SECONDS)
            seconds = time.perf_counter() - start
            compare(rows.numpy(), data.reshape(-1, each)[places].reshape(-1), "what kernels read at random")
            # Written back elsewhere: the area in the opposite order.
            turned = np.arange(job.area_nbytes // each)[::-1].copy()
            queues.scatter(first + turned * blocks, out, blocks=blocks, timeout=_SECONDS)
            reason = queues.reasons[placement]
        found = namespace.read(first, job.area_nbytes // job.block_size).numpy()
        compare(found, data.reshape(-1, each)[::-1].reshape(-1), "what kernels wrote")
        fill(controller, job, _SEED)
    iops = Figure("4 KiB", len(places) / seconds, "IOPS", **job.limit("kernel IOPS", "the kernel's"))
    return Result(f"{said}; {reason}", (iops,), {"left": _SEED})


def _check_possible(controller: Controller, device: str, placement: str) -> None:
    """Leave out what this machine cannot do; what it ought to do and does not is a failure."""
    gpu = Gpu(Device.parse(device).index)
    try:
        candidates(controller, gpu, placement)
    except PathError as why:
        raise Skipped(str(why)) from None
    finally:
        gpu.close()


def _places(job: Job, each: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    pages = job.area_nbytes // each
    return np.random.default_rng(3).integers(0, pages, min(_ROWS, pages))


def read_namespace(job: Job) -> Result:
    """Read the area into GPU memory by the host's own queues, and compare."""
    with nvme.open(job.uri) as controller:
        seed = _SEED if job.left is None else job.left
        data = fill(controller, job, seed) if job.left is None else contents(seed, job.area_nbytes)
        out = Buffer.empty(job.area_nbytes, job.device)
        done = controller.namespace(job.nsid).read_into(out, area_of(job))
        compare(out.numpy(), data, f"what {job.device} was given")
    figure = Figure("read", job.area_nbytes / done.seconds / 1e9, "GB/s", **job.limit("kernel read", "the kernel's"))
    return Result(done.reason, (figure,), {"left": seed})
