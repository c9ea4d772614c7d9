"""A page cache in GPU memory: everything found, against the GPU's memory; nothing found, against a gather.

The controller is the software one, in threads of this process, on a file in the page cache. All hits: a kernel adds up
the array through the cache, by lines and by elements, and the same kernel adds up plain GPU memory of that size. All
misses: one element of each of many lines, and the same blocks by GpuQueues.gather, in the same open queues.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import gpunvme
from gpunvme import nvme
from gpunvme.bench import page_cache
from gpunvme.bench.contest import Contestant, Run, WrongBytes
from gpunvme.memory import Buffer
from session import GIB, Session, options, size

LINE = 4096
DEVICE = "cuda:0"
BLOCKS, THREADS = 2048, 256
KERNELS = """
#include <gpunvme/page_cache.h>
using namespace gpunvme;

__device__ unsigned long long sum_of(uint4 value) {
  return static_cast<unsigned long long>(value.x) + value.y + value.z + value.w;
}
__device__ unsigned long long sum_of(unsigned value) { return value; }

__device__ void finish(unsigned long long sum, unsigned long long* out) {
  for (int distance = 16; distance != 0; distance /= 2) sum += __shfl_down_sync(0xffffffff, sum, distance);
  if (threadIdx.x % 32 == 0) atomicAdd(out, sum);
}

// The bounds: what a miss needs would otherwise take so many registers that few warps are there to wait for memory.
// A warp takes a line after the other, in an order that is not the memory's.
extern "C" __global__ void __launch_bounds__(256, 4)
    by_lines(const PageCache* cache, const uint4*, unsigned long long lines, unsigned long long* out) {
  const CachedArray<uint4> array(cache);
  const unsigned long long warps = gridDim.x * blockDim.x / 32;
  unsigned long long sum = 0;
  for (unsigned long long at = (blockIdx.x * blockDim.x + threadIdx.x) / 32; at < lines; at += warps) {
    const unsigned long long first = at * 7919 % lines * 256;
    const Line<uint4> line = array.line(first);
    if (!line.ok()) continue;
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) sum += sum_of(line.data()[i * 32 + threadIdx.x % 32]);
  }
  finish(sum, out);
}

template <typename T>
__device__ void add_elements(const PageCache* cache, unsigned long long lines, unsigned long long* out) {
  const CachedArray<T> array(cache);
  const unsigned long long tiles = lines * (4096 / sizeof(T) / 32);
  const unsigned long long warps = gridDim.x * blockDim.x / 32;
  unsigned long long sum = 0;
  for (unsigned long long at = (blockIdx.x * blockDim.x + threadIdx.x) / 32; at < tiles; at += warps) {
    sum += sum_of(array[at * 7919 % tiles * 32 + threadIdx.x % 32]);
  }
  finish(sum, out);
}
extern "C" __global__ void __launch_bounds__(256, 8)
    by_elements_of_16(const PageCache* cache, const uint4*, unsigned long long lines, unsigned long long* out) {
  add_elements<uint4>(cache, lines, out);
}
extern "C" __global__ void __launch_bounds__(256, 8)
    by_elements_of_4(const PageCache* cache, const uint4*, unsigned long long lines, unsigned long long* out) {
  add_elements<unsigned>(cache, lines, out);
}

// The same elements by an ordinary loop: neighbours in order, and the line that they are in held from one to the next.
template <typename T>
__device__ void add_held_elements(const PageCache* cache, unsigned long long lines, unsigned long long* out) {
  const CachedArray<T> array(cache);
  constexpr unsigned kElements = 4096 / sizeof(T);
  const unsigned long long warps = gridDim.x * blockDim.x / 32;
  unsigned long long sum = 0;
  Line<T> held;
  for (unsigned long long at = (blockIdx.x * blockDim.x + threadIdx.x) / 32; at < lines; at += warps) {
    const unsigned long long first = at * 7919 % lines * kElements;
    for (unsigned i = 0; i < kElements / 32; ++i) {
      T value{};
      if (array.read(first + i * 32 + threadIdx.x % 32, value, held).ok()) sum += sum_of(value);
    }
  }
  held.release();
  finish(sum, out);
}
extern "C" __global__ void __launch_bounds__(256, 4)
    by_held_elements_of_16(const PageCache* cache, const uint4*, unsigned long long lines, unsigned long long* out) {
  add_held_elements<uint4>(cache, lines, out);
}
extern "C" __global__ void __launch_bounds__(256, 4)
    by_held_elements_of_4(const PageCache* cache, const uint4*, unsigned long long lines, unsigned long long* out) {
  add_held_elements<unsigned>(cache, lines, out);
}

extern "C" __global__ void __launch_bounds__(256)
    plain(const PageCache*, const uint4* memory, unsigned long long lines, unsigned long long* out) {
  const unsigned long long warps = gridDim.x * blockDim.x / 32;
  unsigned long long sum = 0;
  for (unsigned long long at = (blockIdx.x * blockDim.x + threadIdx.x) / 32; at < lines; at += warps) {
    const uint4* const line = memory + at * 7919 % lines * 256;
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) sum += sum_of(line[i * 32 + threadIdx.x % 32]);
  }
  finish(sum, out);
}
extern "C" __global__ void zero(unsigned long long* out) { *out = 0; }
"""


def main() -> None:
    parser = options(__doc__ or "", deadline=120, rounds=5)
    parser.add_argument("--size", type=size, default=4 * GIB, help="of the file (default: 4GiB)")
    parser.add_argument("--hot", type=size, default=GIB, help="of the part that is found (default: 1GiB)")
    parser.add_argument("--count", type=int, default=1_000_000, help="lines that are missed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="of the controller (default: %(default)s)")
    arguments = parser.parse_args()
    scale = 8 if arguments.quick else 1
    nbytes, hot, count = arguments.size // scale, arguments.hot // scale, arguments.count // scale
    with Session("gpu_cache", arguments) as session:
        path = session.file("file", nbytes)
        uri = f"soft:{path}?lba={LINE}&threads={arguments.threads}&queues=16"
        session.result["contestants"]["gpunvme"] = {"version": gpunvme.__version__, "settings": uri}
        page_cache.bring(path, "hot", nbytes)
        with queues_of(uri) as queues:
            measure_hits(session, queues, hot)
            measure_misses(session, queues, count)


@contextlib.contextmanager
def queues_of(uri: str) -> Iterator[Any]:
    """Open the controller, and queues for the GPU."""
    with (
        nvme.open(uri, queues=1) as controller,
        controller.namespace().gpu_queues(DEVICE, count=8, depth=256) as queues,
    ):
        yield queues


def measure_hits(session: Session, queues: Any, nbytes: int) -> None:
    program = gpunvme.gpu.compile(KERNELS)
    with queues.cached_array(np.uint8, length=nbytes, capacity_bytes=nbytes) as array:
        queues.stream(0, nbytes, memory := Buffer.empty(nbytes, DEVICE))
        indices = np.arange(0, nbytes, LINE)
        array.gather(indices, Buffer.empty(len(indices), DEVICE))
        loads = array.stats()["loads"]
        limit = Contestant(
            "GPU memory", "limit", adding(program, "plain", array, memory, nbytes), "the same without a cache", False
        )
        ways = {
            "everything found, by lines": "by_lines",
            "everything found, by elements of 16 bytes": "by_elements_of_16",
            "everything found, by elements of 4 bytes": "by_elements_of_4",
            "everything found, by elements of 16 bytes in order, the line held": "by_held_elements_of_16",
            "everything found, by elements of 4 bytes in order, the line held": "by_held_elements_of_4",
        }
        for case, kernel in ways.items():
            run = adding(program, kernel, array, memory, nbytes)
            ours = Contestant("gpunvme", "ours", run, f"{array}", lands=False)
            session.hold(case, [ours, limit])
            session.target(case, "limit", 0.3)
        if array.stats()["loads"] != loads:
            raise WrongBytes("lines were read that had to be there")
        array.check()


def adding(program: Any, name: str, array: Any, memory: Buffer, nbytes: int) -> Callable[[], Run]:
    """Add everything up; the sums of all ways are the same."""
    kernel, zero, out = program.kernel(name), program.kernel("zero"), Buffer.empty(8, DEVICE)
    plain = program.kernel("plain")

    def total(which: Any, times: int) -> tuple[int, float]:
        zero.launch(1, 1, out, stream=0)
        out.numpy()
        start = time.perf_counter()
        for _ in range(times):
            which.launch(BLOCKS, THREADS, array, memory, nbytes // LINE, out, stream=0)
        result = int(out.numpy().view(np.uint64)[0])  # waits for the kernels
        return result, time.perf_counter() - start

    expected, _ = total(plain, 1)
    times = 10  # so that a launch costs nothing

    def run() -> Run:
        result, seconds = total(kernel, times)
        if result != expected * times % 2**64:
            raise WrongBytes(f"{name} adds up to another sum")
        return Run(seconds, nbytes * times, "gpu-nvme")

    return run


def measure_misses(session: Session, queues: Any, count: int) -> None:
    case = "nothing found, 4 KiB lines at random"
    blocks = queues.namespace.blocks
    count = min(count, blocks)
    lines = np.random.default_rng(1).permutation(blocks)[:count]
    rows, elements = Buffer.empty(count * LINE, DEVICE), Buffer.empty(count * 8, DEVICE)
    with queues.cached_array(np.uint64, capacity_bytes=count * LINE // 4) as array:
        queues.gather(lines, rows)  # pages are touched for the first time
        expected = rows.numpy().reshape(count, LINE)[:, :8].tobytes()

        def gather() -> Run:
            start = time.perf_counter()
            done = queues.gather(lines, rows)
            return Run(time.perf_counter() - start, done.nbytes, done.path)

        def miss() -> Run:
            array.clear()
            start = time.perf_counter()
            array.gather(lines * (LINE // 8), elements)
            seconds = time.perf_counter() - start
            if array.stats()["loads"] != count or elements.numpy().tobytes() != expected:
                raise WrongBytes("other lines were read than were asked for")
            return Run(seconds, count * LINE, "gpu-nvme")

        ours = Contestant("gpunvme", "ours", miss, f"{array}", lands=False)
        peer = Contestant("gather", "peer", gather, "GpuQueues.gather of the same blocks", lands=False)
        session.hold(case, [ours, peer], block=LINE)
        session.target(case, "gather", 0.9)


if __name__ == "__main__":
    main()
