// A function for kernels that are written in Python (gpu_kernel_numba.py): a warp reads a row of the drive.
//
// By Numba's calling convention the result goes to where the first parameter points, and 0 is returned.
#include <gpunvme/device.h>

extern "C" __device__ int read_row(unsigned* ok, long long queues, long long which, long long row, long long nbytes,
                                   long long to) {
  const gpunvme::GpuQueue& queue = reinterpret_cast<const gpunvme::GpuQueue*>(queues)[which];
  const unsigned blocks = static_cast<unsigned>(nbytes / queue.block_bytes);
  *ok = gpunvme::warp_read(queue, row * blocks, blocks, reinterpret_cast<void*>(to)).ok() ? 1 : 0;
  return 0;
}
