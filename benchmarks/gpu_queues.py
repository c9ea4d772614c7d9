"""NVMe queues that a GPU drives: random 4 KiB reads, one read at a time, large sequential reads, and many ranges.

The controller is the software one, in threads of this process, on a file in the page cache: what is measured is the
protocol and the way to GPU memory, not a drive. The limit is one plain copy from page-locked memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import gpunvme
from gpunvme import nvme
from gpunvme.bench import page_cache
from gpunvme.bench.contest import Contestant, Kind, Run, WrongBytes
from gpunvme.memory import Buffer
from session import GIB, Session, options, size

BLOCK, RANGE = 4096, 64 << 10
LIMITS = "limits"
DEVICE = "cuda:0"
# A warp that reads a block, waits for it, copies it, and reads the next: from a queue that others may use, and from one
# that it has for itself.
ONE_AT_A_TIME = """
#include <gpunvme/device.h>
template <typename Read>
__device__ void one_at_a_time(const long long* lbas, unsigned long long count, unsigned long long* bad, Read&& read) {
  for (unsigned long long i = 0; i < count; ++i) {
    const gpunvme::Outcome outcome = read(lbas[i]);
    if (!outcome.ok() && threadIdx.x == 0) ++*bad;
    __syncwarp();
  }
}
extern "C" __global__ void shared(const gpunvme::GpuQueue* queues, const long long* lbas, unsigned long long count,
                                  unsigned char* out, unsigned long long* bad) {
  one_at_a_time(lbas, count, bad, [&](long long lba) { return gpunvme::warp_read(queues[0], lba, 1, out); });
}
extern "C" __global__ void exclusive(const gpunvme::GpuQueue* queues, const long long* lbas, unsigned long long count,
                                     unsigned char* out, unsigned long long* bad) {
  gpunvme::ExclusiveQueue queue(queues[0]);
  one_at_a_time(lbas, count, bad, [&](long long lba) { return queue.read(lba, 1, out); });
  if (!queue.is_exclusive() && threadIdx.x == 0) ++*bad;
}
"""
WHOSE = {"shared": "a queue that others may use", "exclusive": "a queue for itself"}


def main() -> None:
    parser = options(__doc__ or "", deadline=120, rounds=5)
    parser.add_argument("--size", type=size, default=4 * GIB, help="of the file (default: 4GiB)")
    parser.add_argument("--count", type=int, default=1_000_000, help="blocks of a gather (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="of the controller (default: %(default)s)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    count = min(arguments.count // scale, (1 << 20))
    with Session("gpu_queues", arguments) as session:
        nbytes = arguments.size // scale
        path = session.file("file", nbytes)
        uri = f"soft:{path}?lba={BLOCK}&threads={arguments.threads}&queues=16"
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__, "settings": uri}
        session.workers({LIMITS: ("ours:Limits", {})}, nbytes=GIB // scale)
        if "why_not" not in session.result["contestants"][LIMITS]:
            session.worker(LIMITS).call("prepare_gpu", nbytes=GIB // scale)
        limit = session.contestant(
            "page-locked memory to GPU", "limit", "copy_ceiling", worker=LIMITS, nbytes=GIB // scale
        )
        measure_gathers(session, path, uri, nbytes, count, limit)
        measure_latency(session, path, uri, nbytes, 20_000 // scale)
        measure_stream(session, path, uri, nbytes, limit)
        measure_many(session, path, uri, nbytes, 8_000 // scale, limit)


def measure_gathers(session: Session, path: str, uri: str, nbytes: int, count: int, limit: Contestant) -> None:
    for queues, depth, aim in ((1, 256, 2e6), (8, 256, 6e6), (8, 1023, 6e6)):
        case = f"random 4 KiB to GPU memory, {queues} queue{'s' if queues > 1 else ''} of {depth} entries"
        ours = gathers(uri, path, nbytes, queues, depth, count)
        session.hold(case, [ours, limit], lambda: page_cache.bring(path, "hot", nbytes), block=BLOCK)
        session.target_iops(case, aim)


def measure_latency(session: Session, path: str, uri: str, nbytes: int, count: int) -> None:
    for kernel, whose in WHOSE.items():
        case = f"random 4 KiB to GPU memory, one at a time, {whose}"
        ours = one_at_a_time(uri, nbytes, count, kernel)
        session.hold(case, [ours], lambda: page_cache.bring(path, "hot", nbytes), block=BLOCK)
        session.target_iops(case, 1 / 7e-6)


def measure_stream(session: Session, path: str, uri: str, nbytes: int, limit: Contestant) -> None:
    case = "the whole file to GPU memory, in order"
    members = [streams(uri, nbytes), host_path(path, nbytes), limit]
    session.hold(case, members, lambda: page_cache.bring(path, "hot", nbytes))
    session.target(case, "host path", 0.8)


def measure_many(session: Session, path: str, uri: str, nbytes: int, count: int, limit: Contestant) -> None:
    """As a checkpoint of many tensors is read: ranges of one file, each to memory of its own, in one call."""
    case = f"{count} ranges of 64 KiB to GPU memory, read_many"
    source = f"nvme+{uri}"
    members = [ranges(name, by, path, nbytes, count) for name, by in ((source, "gpu-nvme"), (source, "nvme"))]
    members += [ranges(path, "host", path, nbytes, count), limit]
    session.hold(case, members, lambda: page_cache.bring(path, "hot", nbytes))


@contextlib.contextmanager
def queues_of(uri: str, count: int, depth: int) -> Iterator[Any]:
    """Open the controller for one run: its threads would take cores from the others."""
    with (
        nvme.open(uri, queues=1) as controller,
        controller.namespace().gpu_queues(DEVICE, count=count, depth=depth) as queues,
    ):
        yield queues


def gathers(uri: str, path: str, nbytes: int, count: int, depth: int, rows: int) -> Contestant:
    """Gather blocks at random; some are compared with the file."""
    lbas = np.random.default_rng(1).integers(0, nbytes // BLOCK, rows)

    def run() -> Run:
        out = Buffer.empty(rows * BLOCK, DEVICE)
        with queues_of(uri, count, depth) as queues:
            queues.gather(lbas, out)  # pages of the controller and of the destination are touched for the first time
            start = time.perf_counter()
            done = queues.gather(lbas, out)
            seconds = time.perf_counter() - start
        compare(out, path, [(int(lbas[at]) * BLOCK, at * BLOCK, BLOCK) for at in range(0, rows, max(1, rows // 200))])
        return Run(seconds, done.nbytes, done.path)

    return Contestant("gpunvme", "ours", run, settings=f"{uri}, {count} queues of {depth}", lands=False)


def one_at_a_time(uri: str, nbytes: int, rows: int, name: str) -> Contestant:
    """Read by one warp that waits for each block."""
    lbas = np.random.default_rng(2).integers(0, nbytes // BLOCK, rows)

    def run() -> Run:
        kernel = gpunvme.gpu.compile(ONE_AT_A_TIME).kernel(name)
        out, bad, places = (Buffer.empty(n, DEVICE) for n in (BLOCK, 8, 8 * rows))
        with gpunvme.nvme.open(uri, queues=1) as controller:
            queues = controller.namespace().gpu_queues(DEVICE, count=1, depth=64)
            upload(places, lbas)
            upload(bad, np.zeros(1, np.int64))
            for _ in range(2):  # the first is to warm up
                start = time.perf_counter()
                kernel.launch(1, 32, queues, places, rows, out, bad, stream=0)
                failed = bad.numpy().view(np.uint64)[0]  # waits for the kernel
                seconds = time.perf_counter() - start
            if failed:
                raise WrongBytes(f"{failed} of {rows} reads failed")
        return Run(seconds, rows * BLOCK, "gpu-nvme")

    return Contestant("gpunvme", "ours", run, settings=f"{uri}, 1 queue, 1 warp", lands=False)


def upload(target: Buffer, array: np.ndarray[Any, Any]) -> None:
    """Bring an array to the GPU, through a file in memory: gpunvme's own way."""
    descriptor = os.memfd_create("upload")
    with os.fdopen(descriptor, "wb") as file:
        file.write(array.tobytes())
        file.flush()
        with gpunvme.open(file.fileno()) as opened:
            opened.read_into(target)


def streams(uri: str, nbytes: int) -> Contestant:
    """Read all blocks in order."""

    def run() -> Run:
        out = Buffer.empty(nbytes, DEVICE)
        with queues_of(uri, 8, 256) as queues:
            queues.stream(0, nbytes, out)
            start = time.perf_counter()
            done = queues.stream(0, nbytes, out)
            return Run(time.perf_counter() - start, done.nbytes, done.path)

    return Contestant("gpunvme", "ours", run, settings=f"{uri}, 8 queues of 256", lands=False)


def host_path(path: str, nbytes: int) -> Contestant:
    """Read the same file by the host path."""

    def run() -> Run:
        out = Buffer.empty(nbytes, DEVICE)
        with gpunvme.open(path) as file:
            file.read_into(out)
            start = time.perf_counter()
            done = file.read_into(out)
            return Run(time.perf_counter() - start, done.nbytes, done.path)

    return Contestant("host path", "peer", run, settings="gpunvme.open(...).read_into", lands=False)


def ranges(source: str, by: str, path: str, nbytes: int, count: int) -> Contestant:
    """Read many ranges at random places by one call; some are compared with the file."""
    import torch

    places = np.random.default_rng(3).permutation(nbytes // RANGE)[:count].tolist()

    def run() -> Run:
        memory = torch.empty(count * RANGE, dtype=torch.uint8, device=DEVICE).split(RANGE)
        with gpunvme.open(source, path=by) as file:
            parts = [(file, place * RANGE, part) for place, part in zip(places, memory, strict=True)]
            gpunvme.read_many(parts)  # queues are made, memory is page-locked
            start = time.perf_counter()
            done = gpunvme.read_many(parts)
            seconds = time.perf_counter() - start
        with open(path, "rb", buffering=0) as plain:
            for place, part in list(zip(places, memory, strict=True))[:: max(1, count // 50)]:
                if os.pread(plain.fileno(), RANGE, place * RANGE) != part.cpu().numpy().tobytes():
                    raise WrongBytes(f"the range at {place * RANGE} is not the file's")
        return Run(seconds, done.nbytes, done.path)

    kind: Kind = "ours" if by == "gpu-nvme" else "peer"
    return Contestant(f"gpunvme by {by}", kind, run, settings=f"path={by}", lands=False)


def compare(out: Buffer, path: str, samples: list[tuple[int, int, int]]) -> None:
    """Compare ``(offset in the file, offset in the memory, bytes)`` each."""
    got = out.numpy().reshape(-1)
    with open(path, "rb", buffering=0) as file:
        for offset, at, nbytes in samples:
            if os.pread(file.fileno(), nbytes, offset) != got[at : at + nbytes].tobytes():
                raise WrongBytes(f"the block at {offset} is not the file's")


if __name__ == "__main__":
    main()
