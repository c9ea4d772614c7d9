#include "io_queue.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <mutex>
#include <stdexcept>
#include <string>

namespace gpunvme {
namespace {

const IoQueue::Options& checked(const IoQueue::Options& options) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("an I/O queue " + what); };
  if (options.depth < 2 || options.depth > 65536) refuse("has 2 to 65536 entries");
  if (!std::has_single_bit(options.page_bytes) || options.page_bytes < 4096) {
    refuse("works in pages of a power of two, at least 4096");
  }
  if (options.sq_address == 0 || options.sq_address % 64 != 0) refuse("needs an SQ aligned to 64 bytes");
  if (options.cq_address == 0 || options.cq_address % 16 != 0) refuse("needs a CQ aligned to 16 bytes");
  if (options.sq_doorbell_address == 0 || options.sq_doorbell_address % 4 != 0 || options.cq_doorbell_address == 0 ||
      options.cq_doorbell_address % 4 != 0) {
    refuse("needs doorbells aligned to 4 bytes");
  }
  const std::uint64_t slots = std::min(options.depth - 1, IoQueue::kMostSlots);
  if (options.prp_pages_per_slot > 0 && (options.prp_address == 0 || options.prp_address % 8 != 0)) {
    refuse("needs memory for PRP lists, aligned to 8 bytes");
  }
  if (options.prp_iovas.size() < slots * options.prp_pages_per_slot) {
    refuse("of " + std::to_string(slots) + " slots needs " + std::to_string(options.prp_pages_per_slot) +
           " pages of PRP memory for each, not " + std::to_string(options.prp_iovas.size()) + " for all");
  }
  return options;
}

}  // namespace

IoQueue::IoQueue(Options options) : options_(checked(options)), process_(getpid()) {
  const QueuePair::Shape shape{options_.depth, options_.depth, std::min(options_.depth - 1, kMostSlots)};
  memory_.reset(new (std::align_val_t{kApart}) std::uint8_t[QueuePair::memory_bytes(shape)]);
  tags_ = std::make_unique<Tag[]>(shape.slots);
  pair_.initialise(shape, reinterpret_cast<void*>(options_.sq_address), reinterpret_cast<void*>(options_.cq_address),
                   reinterpret_cast<void*>(options_.sq_doorbell_address),
                   reinterpret_cast<void*>(options_.cq_doorbell_address), memory_.get());
}

void IoQueue::stop() {
  // A forked child has the parent's queues but not its threads, and the lock may be held for ever.
  if (process_ != getpid()) return;
  pair_.stop();
  std::lock_guard alone(users_);
}

std::uint32_t IoQueue::in_flight() const {
  std::uint32_t count = 0;
  pair_.for_each_in_flight([&](std::uint16_t, bool) { ++count; });
  return count;
}

std::vector<std::uint16_t> IoQueue::quarantined() const {
  std::vector<std::uint16_t> cids;
  pair_.for_each_in_flight([&](std::uint16_t cid, bool quarantined) {
    if (quarantined) cids.push_back(cid);
  });
  return cids;
}

}  // namespace gpunvme
