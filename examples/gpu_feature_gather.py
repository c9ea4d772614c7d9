"""The first step of a graph neural network: for each node the mean of its neighbours' features, which are in a file.

The file may be larger than any memory: a kernel of your own indexes it like an array, and what it uses is kept on the
GPU. Needs no NVMe hardware and no framework.

python examples/gpu_feature_gather.py [NODES [BATCH]]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import gpunvme
from gpunvme import Buffer, gpu

FEATURES, FANOUT = 1024, 15
nodes = int(sys.argv[1]) if len(sys.argv) > 1 else 16_384
batch = int(sys.argv[2]) if len(sys.argv) > 2 else 2_000

KERNEL = """
#include <gpunvme/page_cache.h>
constexpr unsigned kFeatures = 1024;  // of a node: 4 KiB, a line of the cache
constexpr unsigned kWarps = 4;

// One block a node. Its warps take neighbours in turn; each holds the line of one while it adds it up.
extern "C" __global__ void __launch_bounds__(128)
    mean_of_neighbours(const gpunvme::PageCache* cache, const long long* neighbours, unsigned long long fanout,
                       float* out) {
  __shared__ float sums[kWarps][kFeatures];
  const gpunvme::CachedArray<float> features(cache);
  const unsigned warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  float sum[kFeatures / 32] = {};
  for (unsigned long long i = warp; i < fanout; i += kWarps) {
    const unsigned long long first = neighbours[blockIdx.x * fanout + i] * kFeatures;
    const gpunvme::Line<float> row = features.line(first);
    if (!row.ok()) {
      features[first];  // asks again, and keeps what went wrong for Python
      continue;
    }
    for (unsigned j = 0; j < kFeatures / 32; ++j) sum[j] += row[first + 32 * j + lane];
  }
  for (unsigned j = 0; j < kFeatures / 32; ++j) sums[warp][32 * j + lane] = sum[j];
  __syncthreads();
  for (unsigned feature = threadIdx.x; feature < kFeatures; feature += blockDim.x) {
    float total = 0;
    for (unsigned each = 0; each < kWarps; ++each) total += sums[each][feature];
    out[blockIdx.x * kFeatures + feature] = total / static_cast<float>(fanout);
  }
}
"""

rng = np.random.default_rng(0)
features = rng.random((nodes, FEATURES), np.float32)
neighbours = rng.integers(0, nodes, (batch, FANOUT))
with tempfile.TemporaryDirectory() as directory:
    path, ids_path = Path(directory) / "features.bin", Path(directory) / "neighbours.bin"
    features.tofile(path)
    neighbours.tofile(ids_path)
    with gpunvme.open(ids_path) as file:
        ids = file.read(0, file.size, device="cuda:0")
    out = Buffer.empty(batch * FEATURES * 4, "cuda:0")
    kernel = gpu.compile(KERNEL, name="mean_of_neighbours.cu").kernel("mean_of_neighbours")
    with gpu.CachedArray.open(path, np.float32, "cuda:0", capacity_bytes=features.nbytes // 4) as array:
        kernel.launch(batch, 128, array, ids, FANOUT, out, stream=0)
        means = out.numpy().view(np.float32).reshape(batch, FEATURES)  # waits for the kernel
        array.check()
        print(array)
        print(array.stats())
print("equal:", np.allclose(means, features[neighbours].mean(1), atol=1e-5))
