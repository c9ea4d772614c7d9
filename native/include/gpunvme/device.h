// NVMe queues for GPU kernels: read and write blocks from device code.
//
//   __global__ void sum(const gpunvme::GpuQueue* queues, unsigned count, …) {
//     const gpunvme::GpuQueue& queue = queues[blockIdx.x % count];
//     const gpunvme::Outcome outcome = gpunvme::read(queue, lba, 1, mine);       // one thread for itself
//     const gpunvme::Outcome outcome = gpunvme::warp_read(queue, lba, 8, row);   // 32 threads together
//     const gpunvme::Outcome outcome = gpunvme::block_read(queue, lba, 64, tile);
//     if (!outcome.ok()) …
//
// `gpunvme.nvme.Namespace.gpu_queues` (Python) makes the queues. Any thread may call at any time: lanes that have taken
// different ways, part of a warp, more blocks than fit on the GPU. Lanes that are at one place share reservation and
// doorbell. Each call has the deadline `timeout_ns`: a command that is not answered by then is given up, and its slot
// and buffer stay reserved until the controller answers or the host has reset it.
//
// A command's data passes through its slot's buffer, which the controller reaches. Who wants to compute while a read is
// on its way uses a Token: start(), then poll() or wait(), data(), finish(). start() never waits, so that a thread that
// holds some tokens can always finish them; one that waits for a slot must hold none.
//
// C++17, for nvcc and NVRTC, sm_75 and later. For host compilers it is the same code on groups of one thread.
#pragma once

#include "gpunvme/exclusive_queue.h"
#include "gpunvme/gpu_queue.h"
#include "gpunvme/warp_transfers.h"
