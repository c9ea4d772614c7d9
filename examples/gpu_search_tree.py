"""Look keys up in a B-tree that lies on a drive: each page says where the next one is, so reads wait for each other.

A kernel of your own does it: each warp has a queue for itself, which makes a lone read as short as it can be. Needs no
NVMe hardware and no framework.

python examples/gpu_search_tree.py [KEYS [LOOKUPS]]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import gpunvme
from gpunvme import Buffer, gpu, nvme

PAGE, FANOUT, WARPS = 4096, 256, 8
count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
lookups = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000

KERNEL = """
#include <gpunvme/device.h>
using Number = unsigned long long;
constexpr unsigned kFanout = 256;  // 8-byte keys of a page, and then as many pages, or values

// One warp a block. ~0 for keys that are not there, ~1 for those that could not be looked for.
extern "C" __global__ void __launch_bounds__(32)
    look_up(const gpunvme::GpuQueue* queues, const Number* keys, Number count, Number root, Number levels,
            Number* values) {
  alignas(16) __shared__ Number page[2 * kFanout];
  gpunvme::ExclusiveQueue queue(queues[blockIdx.x]);
  const Number blocks = sizeof page / queues[blockIdx.x].block_bytes;
  for (Number i = blockIdx.x; i < count; i += gridDim.x) {
    const Number key = keys[i];
    Number next = root;
    Number found = ~0ull;
    for (Number level = 0; level < levels; ++level) {
      __syncwarp();  // all have read the last page
      if (!queue.read(next * blocks, blocks, page).ok()) {
        found = ~1ull;
        break;
      }
      unsigned smaller = 0;  // keys that are not greater
      for (unsigned at = threadIdx.x; at < kFanout; at += 32) smaller += page[at] <= key ? 1 : 0;
      for (int distance = 16; distance != 0; distance /= 2) smaller += __shfl_xor_sync(~0u, smaller, distance);
      if (smaller == 0) break;
      next = page[kFanout + smaller - 1];
      if (level + 1 == levels && page[smaller - 1] == key) found = next;
    }
    if (threadIdx.x == 0) values[i] = found;
  }
}
"""

rng = np.random.default_rng(0)
keys = np.sort(rng.choice(2**62, count, replace=False).astype(np.uint64))
values = rng.integers(0, 2**62, count, dtype=np.uint64)
others = rng.integers(0, 2**62, lookups, dtype=np.uint64)
wanted = np.where(rng.random(lookups) < 0.9, rng.choice(keys, lookups), others)


def pages_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pages of keys and what belongs to them; greater than any key where there is none."""
    pages = np.full((-(-len(first) // FANOUT), 2, FANOUT), 2**64 - 1, np.uint64)
    for which, numbers in enumerate((first, second)):
        padded = np.full(pages.shape[0] * FANOUT, 2**64 - 1, np.uint64)
        padded[: len(numbers)] = numbers
        pages[:, which] = padded.reshape(-1, FANOUT)
    return pages


tree = [pages_of(keys, values)]  # leaves first, the root last
before = 0
while len(tree[-1]) > 1:
    children = before + np.arange(len(tree[-1]), dtype=np.uint64)
    before += len(tree[-1])
    tree.append(pages_of(tree[-1][:, 0, 0], children))

with tempfile.TemporaryDirectory() as directory:
    image, wanted_path = Path(directory) / "tree.img", Path(directory) / "wanted.bin"
    np.concatenate(tree).tofile(image)
    wanted.tofile(wanted_path)
    with gpunvme.open(wanted_path) as file:
        wanted_on_gpu = file.read(0, file.size, device="cuda:0")
    found = Buffer.empty(lookups * 8, "cuda:0")
    kernel = gpu.compile(KERNEL, name="look_up.cu").kernel("look_up")
    with (
        nvme.open(f"soft:{image}?lba=4096&threads=4&queues={WARPS + 1}", queues=1) as controller,
        controller.namespace().gpu_queues("cuda:0", count=WARPS, depth=4) as queues,
    ):
        kernel.launch(WARPS, 32, queues, wanted_on_gpu, lookups, before, len(tree), found, stream=0)
        got = found.numpy().view(np.uint64)  # waits for the kernel
        print(queues)
        print(f"{lookups} look-ups of {len(tree)} reads each; {np.count_nonzero(got == 2**64 - 2)} failed")
at = np.minimum(np.searchsorted(keys, wanted), count - 1)
print("equal:", bool((got == np.where(keys[at] == wanted, values[at], np.uint64(2**64 - 1))).all()))
