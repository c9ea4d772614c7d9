// What the headers are compiled for: a GPU (nvcc, NVRTC), the host, or warps that a CPU runs for tests (GPUNVME_SIMT,
// native/fake_cuda/simt).
//
// GPUNVME_HD marks functions for everybody, GPUNVME_DEVICE those for kernels; compiled for the host, these are code
// for one thread. GPUNVME_NOINLINE marks what is called seldom, and would cost its callers registers. GPUNVME_WARPS is
// defined where threads are lanes of warps, on a GPU or for tests.
#pragma once

#if defined(__CUDACC__)
#define GPUNVME_HD __host__ __device__
#define GPUNVME_DEVICE __device__
#define GPUNVME_NOINLINE __noinline__
#else
#define GPUNVME_HD
#define GPUNVME_DEVICE
#define GPUNVME_NOINLINE
#endif

#if defined(__CUDACC__) || defined(GPUNVME_SIMT)
#define GPUNVME_WARPS 1
#endif
