// The kernels that come with gpunvme, as one module.
#include "cache.cu"
#include "cuts.cu"
#include "queues.cu"
#include "rows.cu"
#include "stream.cu"
