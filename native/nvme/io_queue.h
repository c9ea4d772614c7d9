// One I/O queue of a controller: the queue pair, the memory for its commands' PRP lists, and who is using it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <shared_mutex>
#include <vector>

#include "gpunvme/prp.h"
#include "gpunvme/queue_pair.h"

namespace gpunvme {

class IoQueue {
 public:
  struct Options {
    std::uint64_t sq_address = 0;
    std::uint64_t cq_address = 0;
    std::uint32_t depth = 0;  // entries of SQ and CQ
    std::uint64_t sq_doorbell_address = 0;
    std::uint64_t cq_doorbell_address = 0;
    std::uint16_t id = 0;
    std::uint64_t prp_address = 0;         // one block of memory,
    std::vector<std::uint64_t> prp_iovas;  // an IOVA for each controller page of it
    std::uint32_t page_bytes = 4096;       // CC.MPS
    std::uint32_t prp_pages_per_slot = 0;
  };
  static constexpr std::uint32_t kMostSlots = 1023;

  explicit IoQueue(Options options);
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;

  // Every run leaves the queue. Nobody touches the queue's memory (SQ, CQ, doorbells, PRP lists) once this has
  // returned.
  void stop();
  bool stopped() const { return pair_.stopped(); }
  std::uint16_t id() const { return options_.id; }
  std::uint32_t page_bytes() const { return options_.page_bytes; }
  const QueuePair& pair() const { return pair_; }

  // Who uses the queue holds this while it does; stop() waits for it.
  //
  // stop() sets the queue pair's flag first and then takes the lock alone. A run looks at the flag with the lock held,
  // each time around its loop: either it sees the flag, or stop() waits for it to come to its next look.
  std::shared_lock<std::shared_mutex> enter() { return std::shared_lock(users_); }

  PrpList prp_list(std::uint32_t slot) const {
    const std::uint64_t first = std::uint64_t{slot} * options_.prp_pages_per_slot;
    return {reinterpret_cast<std::uint64_t*>(options_.prp_address + first * options_.page_bytes),
            options_.prp_iovas.data() + first, options_.prp_pages_per_slot};
  }

  // The run that has the slot, or had it last, and what it wrote down for it.
  struct Tag {
    std::atomic<std::uint64_t> run{0};
    std::atomic<void*> command{nullptr};  // the run's own
  };
  Tag& tag(std::uint32_t slot) { return tags_[slot]; }

  // Completions that were reaped by another run than theirs. Written by the reaper.
  std::atomic<std::uint64_t>& handed() { return handed_; }

  std::uint32_t in_flight() const;  // with those in quarantine
  std::vector<std::uint16_t> quarantined() const;
  pid_t process() const { return process_; }

 private:
  struct AlignedDelete {
    void operator()(std::uint8_t* memory) const { ::operator delete[](memory, std::align_val_t{kApart}); }
  };

  const Options options_;
  const pid_t process_;
  std::unique_ptr<std::uint8_t[], AlignedDelete> memory_;
  std::unique_ptr<Tag[]> tags_;
  QueuePair pair_;
  std::shared_mutex users_;
  alignas(kApart) std::atomic<std::uint64_t> handed_{0};
};

}  // namespace gpunvme
