"""Commands per second of one queue that a GPU drives, as its depth and the number of warps grow: JSON, and a plot.

Random 4 KiB reads out of the software controller's memory, so that its threads are the limit as late as can be. Each
lane of each warp has a command in flight, as far as there are slots. The plot wants Matplotlib (gpunvme[plot]).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import gpunvme
from gpu_queues import BLOCK, DEVICE, upload
from gpunvme import nvme
from gpunvme.bench import plots
from gpunvme.bench.contest import Contestant, Row, Run, WrongBytes
from gpunvme.memory import Buffer
from session import GIB, Session, options, size

DEPTHS = (2, 8, 32, 64, 128, 256, 512, 1024)
WARPS = (1, 2, 4, 8, 16, 32)
KERNEL = """
#include <gpunvme/device.h>
using namespace gpunvme;
// Each lane moves every 32 * warps-th block. What it reads is summed up: the first word of each block.
extern "C" __global__ void __launch_bounds__(32)
    move(const GpuQueue* queues, const long long* lbas, unsigned long long count, unsigned char* out,
         unsigned long long* sums) {
  const unsigned long long lane = blockIdx.x * 32ull + threadIdx.x;
  const unsigned long long stride = gridDim.x * 32ull;
  unsigned long long at = lane;
  unsigned long long sum = 0;
  unsigned long long bad = 0;
  const auto next = [&](Piece& piece) {
    if (at >= count) return false;
    piece = {static_cast<std::uint64_t>(lbas[at]), out + lane * 4096, 1};
    at += stride;
    return true;
  };
  const auto ended = [&](const Piece& piece, const Outcome& outcome) {
    if (!outcome.ok()) ++bad;
    sum += *reinterpret_cast<const unsigned long long*>(piece.memory);
  };
  warp_move(queues[0], kRead, kBatch, next, ended);
  atomicAdd(sums, sum);
  atomicAdd(sums + 1, bad);
}
"""


def main() -> None:
    parser = options(__doc__ or "", deadline=240, rounds=3)
    parser.add_argument("--size", type=size, default=GIB, help="of the namespace (default: 1GiB)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a run, about (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="of the controller (default: %(default)s)")
    parser.add_argument("--plot", default="gpu_queue_depths.svg", help="where the plot goes (default: %(default)s)")
    arguments = parser.parse_args()
    plots.require()
    nbytes = arguments.size // (8 if arguments.quick else 1)
    uri = f"soft:ram?size={nbytes}&lba={BLOCK}&threads={arguments.threads}&queues=4"
    rows: list[tuple[int, int, Row]] = []
    with Session("gpu_queue_depths", arguments) as session, nvme.open(uri, queues=1) as controller:
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__, "settings": uri}
        namespace = controller.namespace()
        words = np.arange(nbytes // 8, dtype=np.uint64)
        namespace.write_from(words)
        for depth in DEPTHS:
            if depth > controller.registers.cap.queue_entries:
                continue
            members = [reads(namespace, depth, warps, arguments.seconds) for warps in WARPS]
            found = session.hold(f"random 4 KiB, 1 queue of {depth} entries", members, block=BLOCK, seconds=60)
            rows += [(depth, warps, row) for warps, row in zip(WARPS, found, strict=True)]
    plot(rows, Path(arguments.plot))


def reads(namespace: nvme.Namespace, depth: int, warps: int, seconds: float) -> Contestant:
    """Read at random by so many warps, about so long."""
    rng = np.random.default_rng(depth * warps)

    def run() -> Run:
        kernel = gpunvme.gpu.compile(KERNEL).kernel("move")
        count = int(max(1000, seconds * min(3e6, 7e4 * min(depth - 1, 32 * warps))))
        lbas = rng.integers(0, namespace.blocks, count)
        places, out, sums = (Buffer.empty(n, DEVICE) for n in (8 * count, warps * 32 * BLOCK, 16))
        upload(places, lbas)
        upload(sums, np.zeros(2, np.uint64))
        with namespace.gpu_queues(DEVICE, count=1, depth=depth, timeout=20) as queues:
            kernel.launch(1, 32, queues, places, 1, out, sums, stream=0)  # the first is to warm up
            before = int(sums.numpy().view(np.uint64)[0])
            start = time.perf_counter()
            kernel.launch(warps, 32, queues, places, count, out, sums, stream=0)
            total, failed = (int(word) for word in sums.numpy().view(np.uint64))  # waits for the kernel
            taken = time.perf_counter() - start
        expected = int((lbas.astype(np.uint64) * np.uint64(BLOCK // 8)).sum())
        if failed or (total - before) % 2**64 != expected % 2**64:
            raise WrongBytes(f"{failed} of {count} reads failed, or brought other blocks")
        return Run(taken, count * BLOCK, "gpu-nvme")

    return Contestant(f"{warps} warps", "ours", run, settings=f"1 queue of {depth}", lands=False)


def plot(rows: Sequence[tuple[int, int, Row]], path: Path) -> None:
    """Draw commands per second against depth, a line for each number of warps."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for warps in WARPS:
        points = [
            (depth, row["median"] / BLOCK / 1e6) for depth, these, row in rows if these == warps and row["median"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{warps} warps")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("entries of the queue")
    axes.set_ylabel("million commands a second")
    axes.set_ylim(bottom=0)
    axes.grid(True, color="#e5e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
