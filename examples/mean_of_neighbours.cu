// What a layer of a graph neural network begins with: for each node, the mean of its neighbours' feature vectors. The
// features are on a drive, too many for any memory, and the kernel itself reads those that it needs.
//
// One block of threads a node. Its warps read neighbours in turn, each into a row of its own.
#include <gpunvme/device.h>

constexpr unsigned kFeatures = 1024;  // of a node: 4 KiB
constexpr unsigned kWarps = 8;

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    mean_of_neighbours(const gpunvme::GpuQueue* queues, unsigned long long queue_count, const long long* neighbours,
                       unsigned long long fanout, float* out, unsigned long long* failed) {
  __shared__ float rows[kWarps][kFeatures];
  const unsigned warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  const unsigned long long node = blockIdx.x;
  const gpunvme::GpuQueue& queue = queues[(node * kWarps + warp) % queue_count];
  const unsigned blocks = sizeof rows[0] / queue.block_bytes;  // of the drive, to a row

  float sum[kFeatures / 32] = {};
  for (unsigned long long i = warp; i < fanout; i += kWarps) {
    const long long id = neighbours[node * fanout + i];
    const gpunvme::Outcome outcome = gpunvme::warp_read(queue, id * blocks, blocks, rows[warp]);
    if (!outcome.ok()) {
      if (lane == 0) atomicAdd(failed, 1ull);
      continue;
    }
    for (unsigned j = 0; j < kFeatures / 32; ++j) sum[j] += rows[warp][32 * j + lane];
    __syncwarp();  // all have read the row before the next one comes
  }
  for (unsigned j = 0; j < kFeatures / 32; ++j) rows[warp][32 * j + lane] = sum[j];
  __syncthreads();
  for (unsigned feature = threadIdx.x; feature < kFeatures; feature += blockDim.x) {
    float total = 0;
    for (unsigned each = 0; each < kWarps; ++each) total += rows[each][feature];
    out[node * kFeatures + feature] = total / static_cast<float>(fanout);
  }
}
