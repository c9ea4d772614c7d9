// Reads a file into GPU memory behind a kernel on the same stream, and sums its bytes there.
//
//   nvcc -o c_read_cuda c_read_cuda.cu $(gpunvme config --cflags) -L$(dirname $(gpunvme config --library)) -lgpunvme
#include <cuda_runtime.h>
#include <gpunvme/gpunvme.h>

#include <cstdio>

__global__ void sum_bytes(const unsigned char* bytes, unsigned long long count, unsigned long long* sum) {
  unsigned long long mine = 0;
  for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    mine += bytes[i];
  }
  atomicAdd(sum, mine);
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
  if (argc != 2) return failed("usage", "c_read_cuda FILE");
  gpunvme_handle file = 0;
  uint64_t nbytes = 0;
  GPUNVME(gpunvme_init(GPUNVME_API_VERSION));
  GPUNVME(gpunvme_open(argv[1], GPUNVME_READ_ONLY, &file));
  GPUNVME(gpunvme_size(file, &nbytes));

  unsigned char* memory = nullptr;
  unsigned long long* sum = nullptr;
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreate(&stream));
  CUDA(cudaMalloc(&memory, nbytes + 1));
  CUDA(cudaMalloc(&sum, sizeof *sum));
  CUDA(cudaMemsetAsync(sum, 0, sizeof *sum, stream));

  gpunvme_handle transfer = 0;
  gpunvme_report report = {};
  GPUNVME(gpunvme_read_async(file, 0, nbytes, memory, 0, stream, GPUNVME_FOREVER, &transfer));
  GPUNVME(gpunvme_wait(transfer, GPUNVME_FOREVER, &report));
  sum_bytes<<<256, 256, 0, stream>>>(memory, nbytes, sum);
  unsigned long long result = 0;
  CUDA(cudaMemcpyAsync(&result, sum, sizeof result, cudaMemcpyDeviceToHost, stream));
  CUDA(cudaStreamSynchronize(stream));
  std::printf("%llu bytes by %s at %.1f GB/s, sum %llu\n", static_cast<unsigned long long>(report.nbytes), report.path,
              static_cast<double>(report.nbytes) / report.seconds / 1e9, result);

  CUDA(cudaFree(sum));
  CUDA(cudaFree(memory));
  CUDA(cudaStreamDestroy(stream));
  GPUNVME(gpunvme_shutdown());
  return 0;
}
