// A drive in memory for the tests of IoRun: it serves queues the way the specification says, refuses DMA outside what
// was mapped, and does to commands what a test tells it.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "files.h"
#include "io_memory.h"
#include "io_queue.h"
#include "io_run.h"
#include "io_staging.h"
#include "queue_memory.h"

namespace testing {

using gpunvme::IoMemory;
using gpunvme::IoQueue;
using gpunvme::IoRun;
using gpunvme::IoStaging;

class RamDevice {
 public:
  // What becomes of a command.
  struct Verdict {
    std::uint16_t status = 0;
    bool drop = false;  // nothing is done and nothing said
    bool hold = false;  // the same, until answer_held()
  };

  RamDevice(std::uint32_t lba_bytes, std::uint64_t blocks, std::uint32_t page_bytes = 4096, std::uint64_t first_lba = 0)
      : disk(pattern(blocks * lba_bytes, 1)), lba_bytes(lba_bytes), page_bytes(page_bytes), first_lba(first_lba) {}
  ~RamDevice() { stop_thread(); }

  // Adjoining for the device, or every page somewhere else.
  std::shared_ptr<IoMemory> map(const Memory& memory, bool scattered = false) {
    return map(memory.address(), memory.size(), scattered);
  }
  std::shared_ptr<IoMemory> map(std::uint64_t address, std::uint64_t nbytes, bool scattered) {
    std::lock_guard lock(mutex_);
    const std::uint64_t step = scattered ? page_bytes : 4096;
    const std::uint64_t first = address % step;
    std::vector<std::uint64_t> iovas;
    if (!scattered) next_iova_ += page_bytes - next_iova_ % page_bytes;
    for (std::uint64_t at = 0; at < first + nbytes; at += step) {
      if (scattered) next_iova_ += page_bytes * (2 + iovas.size() % 3);
      iovas.push_back(next_iova_);
      table_[next_iova_] = {address - first + at, step};
      next_iova_ += step;
    }
    if (scattered) return IoMemory::mapped_pages(address, nbytes, iovas, step, first);
    return IoMemory::mapped(address, nbytes, iovas.front() + first);
  }

  // Another I/O queue, in memory of its own that goes away with remove_queues().
  std::shared_ptr<IoQueue> add_queue(std::uint32_t depth, std::uint32_t prp_pages = 2) {
    auto queue = std::make_unique<Queue>(depth, prp_pages, page_bytes);
    IoQueue::Options options;
    options.sq_address = queue->shared.sq.address();
    options.cq_address = queue->shared.cq.address();
    options.depth = depth;
    options.sq_doorbell_address = queue->shared.doorbells.address();
    options.cq_doorbell_address = queue->shared.doorbells.address() + 4;
    options.id = ++last_id_;
    options.prp_address = queue->prps.address();
    for (std::uint64_t at = 0; at < queue->prps.size(); at += page_bytes) {
      options.prp_iovas.push_back(map(queue->prps.address() + at, page_bytes, true)->extent(0, 1).iova);
    }
    options.page_bytes = page_bytes;
    options.prp_pages_per_slot = prp_pages;
    const auto driver = std::make_shared<IoQueue>(options);
    std::lock_guard lock(mutex_);
    queues_.push_back(std::move(queue));
    return driver;
  }
  std::vector<std::shared_ptr<IoQueue>> add_queues(int count, std::uint32_t depth) {
    std::vector<std::shared_ptr<IoQueue>> queues;
    for (int i = 0; i < count; ++i) queues.push_back(add_queue(depth));
    return queues;
  }
  // As a controller reset does. The queues' memory is given back to the system: whoever touches it dies.
  void remove_queues() {
    std::lock_guard lock(mutex_);
    for (auto& queue : queues_) queue->forget_memory();
    gone_.insert(gone_.end(), std::make_move_iterator(queues_.begin()), std::make_move_iterator(queues_.end()));
    queues_.clear();
  }

  // Serves each queue once; how many commands it saw or answered.
  int step() {
    std::lock_guard lock(mutex_);
    int progress = 0;
    for (auto& queue : queues_) progress += serve(*queue);
    return progress;
  }
  // Answers what was held back, as an Abort makes a controller do.
  void answer_held(std::uint16_t status) {
    std::lock_guard lock(mutex_);
    for (auto& queue : queues_) {
      for (const Sqe& sqe : queue->held) queue->controller.post(sqe.cid, status);
      queue->held.clear();
    }
  }
  void start_thread() {
    thread_.start([this] {
      while (!ending_) {
        if (step() == 0) std::this_thread::yield();
      }
    });
  }
  void stop_thread() {
    ending_ = true;
    thread_.finish();
  }

  Bytes disk;
  const std::uint32_t lba_bytes;
  const std::uint32_t page_bytes;
  const std::uint64_t first_lba;
  std::uint64_t max_bytes = 0;  // MDTS; 0: none
  std::function<Verdict(const Sqe&)> judge = [](const Sqe&) { return Verdict{}; };
  std::uint64_t commands = 0;
  std::uint64_t most_bytes = 0;
  std::size_t most_waiting = 0;
  std::vector<Sqe> seen;

 private:
  struct Queue {
    Queue(std::uint32_t depth, std::uint32_t prp_pages, std::uint32_t page_bytes)
        : shared(depth, depth),
          prps(std::uint64_t{std::min(depth - 1, IoQueue::kMostSlots)} * prp_pages * page_bytes),
          controller(shared) {}
    void forget_memory() {
      for (const Memory* memory : {&shared.sq, &shared.cq, &shared.doorbells, &prps}) {
        mprotect(reinterpret_cast<void*>(memory->address()), memory->size(), PROT_NONE);
      }
    }
    QueueMemory shared;
    Memory prps;
    Controller controller;
    std::vector<Sqe> waiting;
    std::vector<Sqe> held;
  };
  struct Mapping {
    std::uint64_t address;
    std::uint64_t nbytes;
  };

  int serve(Queue& queue) {
    int progress = 0;
    while (const auto sqe = queue.controller.fetch()) {
      queue.waiting.push_back(*sqe);
      ++progress;
    }
    most_waiting = std::max(most_waiting, queue.waiting.size());
    while (!queue.waiting.empty() && !queue.controller.is_full()) {
      const std::size_t which = random_.below(queue.waiting.size());
      const Sqe sqe = queue.waiting[which];
      queue.waiting.erase(queue.waiting.begin() + static_cast<std::ptrdiff_t>(which));
      ++commands;
      seen.push_back(sqe);
      const Verdict verdict = judge(sqe);
      if (verdict.hold) queue.held.push_back(sqe);
      if (verdict.drop || verdict.hold) continue;
      queue.controller.post(sqe.cid, verdict.status != 0 ? verdict.status : execute(sqe));
      ++progress;
      if (random_.one_in(4)) break;
    }
    return progress;
  }

  std::uint16_t execute(const Sqe& sqe) {
    CHECK_EQ(sqe.nsid, 1u);
    const std::uint64_t lba = (sqe.cdw10 | std::uint64_t{sqe.cdw11} << 32) - first_lba;
    const std::uint64_t nbytes = ((sqe.cdw12 & 0xffff) + std::uint64_t{1}) * lba_bytes;
    if (sqe.opcode == 0 || sqe.opcode == 9) return 0;
    if (lba * lba_bytes + nbytes > disk.size()) return 0x80 | 1 << 14;
    std::uint8_t* at = disk.data() + lba * lba_bytes;
    if (sqe.opcode == 8) {
      std::memset(at, 0, nbytes);
      return 0;
    }
    CHECK(max_bytes == 0 || nbytes <= max_bytes);
    most_bytes = std::max(most_bytes, nbytes);
    bool same = true;
    for_each_data(sqe, nbytes, [&](std::uint8_t* memory, std::uint64_t count) {
      if (sqe.opcode == 2) std::memcpy(memory, at, count);
      if (sqe.opcode == 1) std::memcpy(at, memory, count);
      if (sqe.opcode == 5) same = same && std::memcmp(at, memory, count) == 0;
      at += count;
    });
    return same ? 0 : 0x285 | 1 << 14;
  }

  // Memory at an IOVA. What is not mapped fails the test.
  std::uint8_t* memory_at(std::uint64_t iova, std::uint64_t nbytes) {
    const auto after = table_.upper_bound(iova);
    CHECK(after != table_.begin());
    const auto& [base, mapping] = *std::prev(after);
    CHECK(iova + nbytes <= base + mapping.nbytes);
    return reinterpret_cast<std::uint8_t*>(mapping.address + (iova - base));
  }

  template <typename Each>
  void for_each_data(const Sqe& sqe, std::uint64_t nbytes, const Each& each) {
    const auto data = [&](std::uint64_t iova, std::uint64_t count) {
      for (std::uint64_t done = 0; done < count;) {
        const std::uint64_t part = std::min(count - done, 4096 - (iova + done) % 4096);
        each(memory_at(iova + done, part), part);
        done += part;
      }
    };
    const std::uint64_t first = std::min(nbytes, page_bytes - sqe.prp1 % page_bytes);
    CHECK_EQ(sqe.prp1 % 4, 0u);
    data(sqe.prp1, first);
    std::uint64_t left = nbytes - first;
    if (left == 0) return;
    if (left <= page_bytes) {
      CHECK_EQ(sqe.prp2 % page_bytes, 0u);
      return data(sqe.prp2, left);
    }
    for (std::uint64_t at = sqe.prp2; left > 0; at += 8) {
      std::uint64_t entry = 0;
      std::memcpy(&entry, memory_at(at, 8), 8);
      CHECK_EQ(entry % page_bytes, 0u);
      if (at % page_bytes == page_bytes - 8 && left > page_bytes) {
        at = entry;
        std::memcpy(&entry, memory_at(at, 8), 8);
      }
      const std::uint64_t count = std::min<std::uint64_t>(left, page_bytes);
      data(entry, count);
      left -= count;
    }
  }

  std::recursive_mutex mutex_;
  check::Random random_{17};
  std::map<std::uint64_t, Mapping> table_;
  std::uint64_t next_iova_ = std::uint64_t{1} << 40;
  std::uint16_t last_id_ = 0;
  std::vector<std::unique_ptr<Queue>> queues_;
  std::vector<std::unique_ptr<Queue>> gone_;
  std::atomic<bool> ending_{false};
  Threads thread_;
};

// Drives a run to its end, the device stepped in between.
inline IoRun::State drive(IoRun& run, RamDevice& device) {
  for (;;) {
    const IoRun::State state = run.drive(0);
    if (state != IoRun::State::kRunning) return state;
    device.step();
  }
}

// A clock that goes when a test says so.
inline std::int64_t& test_clock() {
  static std::int64_t now = 0;
  return now;
}

// The same with that clock: time passes when nothing else happens any more.
inline IoRun::State drive_in_time(IoRun& run, RamDevice& device) {
  int quiet = 0;
  for (;;) {
    const IoRun::State state = run.drive(0);
    if (state != IoRun::State::kRunning) return state;
    quiet = device.step() != 0 ? 0 : quiet + 1;
    if (quiet > 3) test_clock() += 1'000'000;
  }
}

inline IoRun::Options run_options(const RamDevice& device, std::uint8_t opcode = 2) {
  IoRun::Options options;
  options.lba_bytes = device.lba_bytes;
  options.max_bytes = device.max_bytes;
  options.page_bytes = device.page_bytes;
  options.opcode = opcode;
  return options;
}

}  // namespace testing
