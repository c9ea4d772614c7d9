// What the register side and all workers of one controller share.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "counters.h"
#include "doorbells.h"
#include "events.h"
#include "faults.h"
#include "held.h"
#include "interrupts.h"
#include "iova_table.h"
#include "options.h"
#include "queues.h"

namespace gpunvme::soft {

struct Namespace {
  std::uint64_t offset;  // in the image, bytes
  std::uint64_t blocks;
};

struct Device {
  // Throws std::invalid_argument and Failure.
  explicit Device(const Options& wanted);

  const Options options;
  const std::unique_ptr<Backend> backend;
  const std::vector<Namespace> namespaces;  // of NSID 1, 2, …
  const unsigned lba_shift;
  const std::uint64_t most_bytes;  // of one command's data, by MDTS
  const bool several;              // there is more than one worker
  const std::string serial;

  Doorbells doorbells;
  Queues queues;
  IovaTable iova;
  Events events;
  Held held;
  Interrupts interrupts;
  std::deque<Counters> counters;  // one a worker

  // Changed only while no worker runs.
  std::unique_ptr<FaultPlan> faults;
  std::uint64_t page_bytes = 4096;  // CC.MPS
  std::uint32_t cc = 0;

  // Commands are fetched and completed. Set with release by the register side when everything is in place.
  std::atomic<bool> serving{false};
  std::atomic<bool> fatal{false};                // CSTS.CFS
  std::atomic<bool> gone{false};                 // pulled out: see Fault::kDeviceGone
  std::atomic<bool> write_cache;                 // there is one, and it is on
  std::atomic<std::uint32_t> waiting_queues{0};  // completion queues with a backlog
  std::array<std::atomic<std::uint64_t>, kFaults> injected{};

  void fail() {
    fatal.store(true);
    serving.store(false);
  }
  void count_fault(Fault fault) { injected[static_cast<std::size_t>(fault)].fetch_add(1, std::memory_order_relaxed); }
  std::uint64_t total(Count what) const;

  // The namespace, or null.
  const Namespace* find(std::uint32_t nsid) const {
    return nsid - 1 < namespaces.size() ? &namespaces[nsid - 1] : nullptr;
  }
};

}  // namespace gpunvme::soft
