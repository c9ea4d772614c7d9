// The kernels that come with the package, for the emulated GPU: the same source that nvcc compiles.
#include "simt/cuda.h"

SIMT_KERNELS_BEGIN
#include "all.cu"
SIMT_KERNELS_END(SIMT_KERNEL(gpunvme_cache_layout), SIMT_KERNEL(gpunvme_cache_set_up),
                 SIMT_KERNEL(gpunvme_cache_gather_found), SIMT_KERNEL(gpunvme_cache_gather_missed),
                 SIMT_KERNEL(gpunvme_cache_pin), SIMT_KERNEL(gpunvme_cache_unpin), SIMT_KERNEL(gpunvme_cut),
                 SIMT_KERNEL(gpunvme_layout), SIMT_KERNEL(gpunvme_set_up), SIMT_KERNEL(gpunvme_reap),
                 SIMT_KERNEL(gpunvme_gather), SIMT_KERNEL(gpunvme_scatter), SIMT_KERNEL(gpunvme_stream))
