// Queues made and looked at by the GPU, so that the host needs to know nothing of their layout.
#include "gpunvme/device.h"

namespace gpunvme {

// One queue as the host describes it; 64 bits each. Addresses are the GPU's.
struct QueueSetup {
  std::uint64_t sq, cq, sq_doorbell, cq_doorbell, memory;
  std::uint64_t data, pages, lists;
  std::uint64_t blocks, timeout_ns;
  std::uint64_t entries, slots;
  std::uint64_t page_bytes, pages_per_slot, block_bytes, max_blocks, nsid, id;
};

}  // namespace gpunvme

// What the host has to know of the memory of a queue with so many entries and slots.
extern "C" __global__ void gpunvme_layout(unsigned entries, unsigned slots, unsigned long long* out) {
  using gpunvme::QueuePair;
  out[0] = sizeof(gpunvme::GpuQueue);
  out[1] = QueuePair::memory_bytes({entries, entries, slots});
  out[2] = offsetof(QueuePair::State, stopped);
  out[3] = offsetof(QueuePair::State, stuck);
  out[4] = offsetof(QueuePair::State, completed);  // then unknown, late, bad_head
  out[5] = sizeof(QueuePair::State);               // where the slots begin
  out[6] = sizeof(QueuePair::Slot);
  out[7] = gpunvme::WarpQueue::kStateMask;
  out[8] = gpunvme::WarpQueue::kQuarantined;
  out[9] = gpunvme::WarpQueue::kCidShift;
}

// From anew: as after the queues were created by admin commands. Their SQ and CQ are zeroed, and no kernel uses them.
extern "C" __global__ void gpunvme_set_up(const gpunvme::QueueSetup* setups, gpunvme::GpuQueue* queues,
                                          unsigned count) {
  const unsigned number = blockIdx.x * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const gpunvme::QueueSetup& from = setups[number];
  gpunvme::GpuQueue& queue = queues[number];
  const auto entries = static_cast<std::uint32_t>(from.entries);
  queue.pair.initialise({entries, entries, static_cast<std::uint32_t>(from.slots)}, reinterpret_cast<void*>(from.sq),
                        reinterpret_cast<void*>(from.cq), reinterpret_cast<void*>(from.sq_doorbell),
                        reinterpret_cast<void*>(from.cq_doorbell), reinterpret_cast<void*>(from.memory));
  queue.data = reinterpret_cast<unsigned char*>(from.data);
  queue.pages = reinterpret_cast<const std::uint64_t*>(from.pages);
  queue.lists = reinterpret_cast<const std::uint64_t*>(from.lists);
  queue.blocks = from.blocks;
  queue.timeout_ns = from.timeout_ns;
  queue.page_bytes = static_cast<std::uint32_t>(from.page_bytes);
  queue.pages_per_slot = static_cast<std::uint32_t>(from.pages_per_slot);
  queue.block_bytes = static_cast<std::uint32_t>(from.block_bytes);
  queue.max_blocks = static_cast<std::uint32_t>(from.max_blocks);
  queue.nsid = static_cast<std::uint32_t>(from.nsid);
  queue.id = static_cast<std::uint32_t>(from.id);
}

// Takes completions that came when no kernel was waiting any more. One warp a queue.
extern "C" __global__ void gpunvme_reap(const gpunvme::GpuQueue* queues) {
  while (gpunvme::reap(queues[blockIdx.x])) {
  }
}
