"""What tests of GPU queues stand on: a controller with queues, rows that are known, kernels to look with."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emulated_gpu
import gpunvme
from gpunvme import nvme
from gpunvme.gpu.driver import Gpu
from gpunvme.memory import Buffer

EMULATED = emulated_gpu.is_wanted()
if EMULATED:
    fake = emulated_gpu.use()
# Freeing GPU memory while a kernel runs may wait for it: garbage goes between tests (conftest.py).
MARKS = [pytest.mark.usefixtures("garbage_goes_between_tests")]
if not EMULATED:
    MARKS.append(pytest.mark.gpu)
# What a program of a test begins with.
CHILD = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); import emulated_gpu\n"
CHILD += "if emulated_gpu.is_wanted(): emulated_gpu.use()\n"

# Where queues and data are: all of this holds in GPU memory, too.
PLACEMENT = os.environ.get("GPUNVME_TEST_PLACEMENT", "auto")
SIZE = 8 << 20
BLOCK = 512
GPU = "cuda:0"


class Machine:
    """A controller, its namespace, and GPU queues."""

    def __init__(
        self, data: bytes, options: str = "", driver: dict[str, Any] | None = None, device: int = 0, **queues: Any
    ) -> None:
        uri = f"soft:ram?size={SIZE}&threads=2&queues=12{options}"
        self.controller = nvme.open(uri, admin_timeout=5, **{"queues": 2, "timeout": 5, **(driver or {})})
        self.namespace = self.controller.namespace()
        self.namespace.write_from(data)
        self.queues = self.namespace.gpu_queues(device, **{"count": 2, "depth": 64, "placement": PLACEMENT, **queues})

    def inject(self, faults: str, seed: int = 1) -> None:
        self.controller.transport.controller.inject(faults, seed)

    def injected(self) -> int:
        stats = self.controller.transport.controller.stats()
        return sum(count for name, count in stats.items() if name.startswith("fault."))


def few(everywhere: Any, emulated: Any) -> Any:
    """How much of something: enough for a real GPU, or for the emulated one, which is slow."""
    return emulated if EMULATED and os.environ.get("GPUNVME_TEST_LEVEL") != "long" else everywhere


def on_gpu(array: Any) -> Buffer:
    """A copy of an array, as bytes in GPU memory."""
    gpu = Gpu(0)
    buffer, (host, _) = Buffer.empty(array.nbytes, GPU), gpu.allocate_host(array.nbytes)
    ctypes.memmove(host, array.ctypes.data, array.nbytes)
    gpu.to_gpu(buffer.ptr, host, array.nbytes, 0)
    gpu.synchronize(0)
    gpu.free_host(host)
    return buffer


class Int64s:
    """GPU memory as an array of 64-bit integers."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._buffer.__cuda_array_interface__, "shape": (self._buffer.nbytes // 8,), "typestr": "<i8"}


def allocated_bytes() -> int:
    """GPU memory that this process has; only the emulated GPU knows."""
    return fake.counters().live_allocated_bytes if EMULATED else 0


def allocations_wait_for_kernels() -> None:
    """For threads that allocate while kernels of others run, which end by themselves. Otherwise that is an error."""
    if EMULATED:
        fake.control("fake_cuda_wait_for_kernels", 1)


PRELUDE = """
#include <gpunvme/device.h>
using namespace gpunvme;
"""
FREE_SLOTS = """
// Takes all slots that there are, then gives them back. One thread a queue.
extern "C" __global__ void free_slots(const GpuQueue* queues, unsigned* slots, unsigned long long most,
                                      unsigned long long* counts) {
  const GpuQueue& queue = queues[blockIdx.x];
  unsigned* const mine = slots + blockIdx.x * most;
  Token token;
  unsigned count = 0;
  while (claim(queue, token)) mine[count++] = token.slot;
  counts[blockIdx.x] = count;
  for (unsigned i = 0; i < count; ++i) {
    token.slot = mine[i];
    finish(queue, token);
  }
}
"""


def all_slots_are_free(queues: Any) -> bool:
    """Whether nothing that ran on the queues has kept a slot."""
    most = min(queues.depth, 1024)
    slots, counts = Buffer.empty(queues.count * most * 4, GPU), Buffer.empty(queues.count * 8, GPU)
    launch(FREE_SLOTS, "free_slots", queues.count, 1, queues, slots, most, counts)
    return bool((counts.numpy().view(np.uint64) == most - 1).all())


@contextlib.contextmanager
def machine(data: bytes, options: str = "", **queues: Any) -> Iterator[Machine]:
    made = Machine(data, options, **queues)
    with made.controller:
        yield made


def rows_of(data: bytes, lbas: Any, blocks: int, block: int = BLOCK) -> bytes:
    return b"".join(data[int(lba) * block : (int(lba) + blocks) * block] for lba in lbas)


def some_lbas(namespace: Any, count: int, blocks: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, namespace.blocks - blocks + 1, count)


def launch(source: str, name: str, grid: Any, block: Any, *arguments: Any) -> None:
    gpunvme.gpu.compile(PRELUDE + source).kernel(name).launch(grid, block, *arguments, stream=0)
    Gpu(0).synchronize(0)  # the tests allocate and load, which a kernel that runs may keep waiting


DIVERGED = """
// Every third lane reads, every fifth writes, some do nothing, and each reads another size.
extern "C" __global__ void run(const GpuQueue* queues, unsigned long long count, unsigned char* out,
                               unsigned long long* fates, unsigned long long threads) {
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  if (me >= threads) return;
  const GpuQueue& queue = queues[me % count];
  Outcome outcome{Fate::kDone, 0, 0};
  if (me % 3 == 0) {
    outcome = read(queue, me, 1 + me % 4, out + me * 2048ull);
  } else if (me % 5 == 1) {
    outcome = read(queue, me + 7, 4, out + me * 2048ull);
  }
  fates[me] = static_cast<unsigned long long>(outcome.fate) << 32 | outcome.status;
}
"""

LONE = """
// Each warp reads or writes one command after the other; all its lanes say how each ended.
extern "C" __global__ void lone(const GpuQueue* queues, unsigned long long count, unsigned char* memory,
                                unsigned long long* fates, unsigned long long rounds, unsigned long long blocks,
                                unsigned long long writes) {
  const unsigned warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const GpuQueue& queue = queues[warp % count];
  for (unsigned long long round = 0; round < rounds; ++round) {
    const unsigned long long number = warp * rounds + round;
    unsigned char* const mine = memory + number * blocks * 512;
    const Outcome outcome = writes != 0 ? warp_write(queue, number * blocks, blocks, mine)
                                        : warp_read(queue, number * blocks, blocks, mine);
    fates[number * 32 + threadIdx.x % 32] = static_cast<unsigned long long>(outcome.fate) << 32 | outcome.status;
  }
}
"""


def lone(queues: Any, memory: Buffer, warps: int, rounds: int, blocks: int, writes: bool = False) -> Any:
    """How each command ended; a row a warp."""
    fates = Buffer.empty(warps * rounds * 32 * 8, GPU)
    launch(LONE, "lone", warps, 32, queues, queues.count, memory, fates, rounds, blocks, int(writes))
    ended = fates.numpy().view(np.uint64).reshape(warps, rounds, 32)
    assert (ended == ended[:, :, :1]).all()  # all lanes are told the same
    return ended[:, :, 0]


HUNG = """
extern "C" __global__ void run(const GpuQueue* queues, volatile unsigned* go_on) {
  while (*go_on == 0) __nanosleep(1000);
}
"""
SERVER = """
import sys
from gpunvme.nvme.soft import soft_controller
from gpunvme.nvme.uri import parse_uri
from gpunvme.nvme.vfio_user.server import serve
serve(sys.argv[2], soft_controller(parse_uri(sys.argv[1])), mmap_doorbells=sys.argv[3] == "map",
      ready=lambda: print("ready", flush=True))
"""


@contextlib.contextmanager
def served(path: Path, doorbells: str = "map") -> Iterator[str]:
    uri = f"soft:ram?size={SIZE}&threads=2&queues=12"
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, uri, str(path), doorbells], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout:
        try:
            assert child.stdout.readline() == "ready\n"
            yield f"vfio-user:{path}"
        finally:
            child.kill()
