// A model that does not fit into GPU memory, layer by layer: while one is computed with, the next ones are read.
// Here a layer is a matrix of floats, and a pass is y = |A[n] y| for every layer, over and over.
//
//   nvcc -o c_layers c_layers.cu $(gpunvme config --cflags) -L$(dirname $(gpunvme config --library)) -lgpunvme
//   ./c_layers weights.bin 1024 10
#include <cuda_runtime.h>
#include <gpunvme/gpunvme.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

// One block of threads a row.
__global__ void multiply(const float* matrix, const float* in, float* out, unsigned width) {
  __shared__ float part[256];
  float sum = 0;
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
    sum += matrix[static_cast<size_t>(blockIdx.x) * width + i] * in[i];
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = fabsf(part[0]);
}

static int failed(const char* what, const char* why) {
  std::fprintf(stderr, "%s: %s\n", what, why);
  return 1;
}

#define CUDA(call)                                                              \
  do {                                                                          \
    const cudaError_t error = (call);                                           \
    if (error != cudaSuccess) return failed(#call, cudaGetErrorString(error));  \
  } while (0)
#define GPUNVME(call)                                                               \
  do {                                                                              \
    if ((call) != GPUNVME_OK) return failed(#call, gpunvme_last_error()->message);  \
  } while (0)

int main(int argc, char** argv) {
  if (argc != 4) return failed("usage", "c_layers FILE WIDTH PASSES");
  const auto width = static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10));
  const unsigned long passes = std::strtoul(argv[3], nullptr, 10);
  if (width == 0) return failed("WIDTH", "at least 1");
  gpunvme_handle file = 0;
  uint64_t nbytes = 0;
  GPUNVME(gpunvme_init(GPUNVME_API_VERSION));
  GPUNVME(gpunvme_open(argv[1], GPUNVME_READ_ONLY, &file));
  GPUNVME(gpunvme_size(file, &nbytes));

  const uint64_t layer_bytes = static_cast<uint64_t>(width) * width * sizeof(float);
  std::vector<gpunvme_extent> extents;
  for (uint64_t i = 0; (i + 1) * layer_bytes <= nbytes; ++i) extents.push_back({i, i * layer_bytes, layer_bytes, 0});
  gpunvme_handle loader = 0;
  GPUNVME(gpunvme_layer_loader_init(file, extents.data(), extents.size(), 3, 0, &loader));
  GPUNVME(gpunvme_close(file));

  float* in = nullptr;
  float* out = nullptr;
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreate(&stream));
  CUDA(cudaMalloc(&in, width * sizeof(float)));
  CUDA(cudaMalloc(&out, width * sizeof(float)));
  CUDA(cudaMemsetAsync(in, 0x3f, width * sizeof(float), stream));
  for (unsigned long pass = 0; pass < passes; ++pass) {
    for (uint64_t layer = 0; layer < extents.size(); ++layer) {
      void* matrix = nullptr;
      GPUNVME(gpunvme_layer_loader_load_layer(loader, layer, stream, GPUNVME_FOREVER, &matrix, nullptr));
      multiply<<<width, 256, 0, stream>>>(static_cast<const float*>(matrix), in, out, width);
      CUDA(cudaGetLastError());
      std::swap(in, out);
    }
  }
  CUDA(cudaStreamSynchronize(stream));  // before the loader takes its memory away
  float first = 0;
  CUDA(cudaMemcpy(&first, in, sizeof first, cudaMemcpyDeviceToHost));
  std::printf("%zu layers of %llu bytes, %lu times: y[0] = %.7g\n", extents.size(),
              static_cast<unsigned long long>(layer_bytes), passes, static_cast<double>(first));
  GPUNVME(gpunvme_layer_loader_destroy(loader));
  CUDA(cudaFree(in));
  CUDA(cudaFree(out));
  CUDA(cudaStreamDestroy(stream));
  GPUNVME(gpunvme_shutdown());
  return 0;
}
