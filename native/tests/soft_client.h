// A host for tests of the software controller, as small as one can be: memory that it maps, registers, queues. It
// shares nothing with the project's driver, so that a misunderstanding would have to be made twice to go unnoticed.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "controller.h"
#include "gpunvme/nvme_spec.h"

namespace testing {

namespace nvme = gpunvme::nvme;
using gpunvme::soft::Controller;
using gpunvme::soft::Options;

inline constexpr std::chrono::seconds kDeadline{60};

// Host memory, mapped for the controller at addresses that have nothing to do with this process's.
class ClientMemory {
 public:
  static constexpr std::uint64_t kIova = 0x7000'0000'0000;

  ClientMemory(Controller& controller, std::uint64_t nbytes) : controller_(controller), nbytes_(nbytes) {
    void* const memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    address_ = static_cast<std::byte*>(memory);
    controller.map(kIova, nbytes, address_, true, true);
  }
  ~ClientMemory() {
    controller_.unmap(kIova, nbytes_);
    munmap(address_, nbytes_);
  }
  ClientMemory(const ClientMemory&) = delete;

  // An address as the controller sees it.
  std::uint64_t allocate(std::uint64_t nbytes, std::uint64_t align = 4096) {
    next_ = (next_ + align - 1) / align * align;
    CHECK(next_ + nbytes <= nbytes_);
    const std::uint64_t iova = kIova + next_;
    next_ += nbytes;
    return iova;
  }
  template <typename T = std::byte>
  T* at(std::uint64_t iova) const {
    return reinterpret_cast<T*>(address_ + (iova - kIova));
  }

 private:
  Controller& controller_;
  std::uint64_t nbytes_;
  std::byte* address_;
  std::uint64_t next_ = 0;
};

// A queue pair: what the host keeps of it.
struct Pair {
  std::uint16_t id = 0;
  std::uint32_t entries = 0;     // of the submission queue
  std::uint32_t cq_entries = 0;  // of the completion queue
  std::uint64_t sq = 0;
  std::uint64_t cq = 0;
  std::uint32_t tail = 0;
  std::uint32_t head = 0;
  bool phase = true;
  std::uint16_t next_cid = 0;
};

class Client {
 public:
  explicit Client(Options options, std::uint64_t memory_bytes = 32 << 20)
      : options(options), controller(options), memory(controller, memory_bytes) {}

  // Threads of the controller's own, or `step` while this waits.
  void turn() {
    if (options.threads == 0) {
      controller.step();
    } else {
      std::this_thread::yield();
    }
  }
  template <typename Done>
  void until(const char* what, Done done) {
    const auto deadline = std::chrono::steady_clock::now() + kDeadline;
    while (!done()) {
      if (std::chrono::steady_clock::now() > deadline) check::fail(what, 0, "did not happen in time");
      turn();
    }
  }

  std::uint32_t read32(std::uint32_t offset) { return static_cast<std::uint32_t>(controller.read(offset, 4)); }
  std::uint32_t csts() { return read32(nvme::kRegCsts); }
  void write32(std::uint32_t offset, std::uint32_t value) { controller.write(offset, 4, value); }

  std::uint64_t page() const { return std::uint64_t{4096} << mps; }
  std::uint32_t cc() const {
    return nvme::kCcEn | mps << nvme::kCcMpsShift | 6 << nvme::kCcIosqesShift | 4 << nvme::kCcIocqesShift;
  }

  // Registers set and CC.EN written; not waited for.
  void start(std::uint32_t entries = 32, std::uint32_t cq_entries = 0) {
    mps = options.mpsmin;
    if (cq_entries == 0) cq_entries = entries;
    if (admin.sq == 0) {
      admin.sq = memory.allocate(4096 * 64, page());
      admin.cq = memory.allocate(4096 * 16, page());
    }
    begin(admin, entries, cq_entries);
    write32(nvme::kRegAqa, (entries - 1) | (cq_entries - 1) << nvme::kAqaAcqsShift);
    controller.write(nvme::kRegAsq, 8, admin.sq);
    controller.write(nvme::kRegAcq, 8, admin.cq);
    write32(nvme::kRegCc, cc());
  }
  void enable(std::uint32_t entries = 32, std::uint32_t cq_entries = 0) {
    start(entries, cq_entries);
    until("CSTS.RDY", [&] { return nvme::csts_rdy(csts()); });
  }
  void disable() {
    write32(nvme::kRegCc, 0);
    until("not CSTS.RDY", [&] { return !nvme::csts_rdy(csts()); });
  }

  void begin(Pair& pair, std::uint32_t entries, std::uint32_t cq_entries) {
    pair.entries = entries;
    pair.cq_entries = cq_entries;
    pair.tail = pair.head = 0;
    pair.phase = true;
    std::memset(memory.at(pair.cq), 0, std::size_t{cq_entries} * 16);
  }

  // ---- Queues

  void write_doorbell(std::uint64_t offset, std::uint32_t value) {
    auto* const word =
        reinterpret_cast<std::uint32_t*>(controller.doorbells().address() + (offset - nvme::kRegDoorbells));
    std::atomic_ref<std::uint32_t>(*word).store(value, std::memory_order_release);
  }
  void put(Pair& pair, nvme::Sqe sqe) {
    std::memcpy(memory.at(pair.sq + std::uint64_t{pair.tail} * 64), &sqe, 64);
    pair.tail = (pair.tail + 1) % pair.entries;
  }
  void ring(const Pair& pair) { write_doorbell(nvme::sq_tail_doorbell(pair.id, options.dstrd), pair.tail); }
  void release(const Pair& pair) { write_doorbell(nvme::cq_head_doorbell(pair.id, options.dstrd), pair.head); }

  // The next completion, if there is one; `give_back`: ring its doorbell.
  std::optional<nvme::Cqe> poll(Pair& pair, bool give_back = true) {
    auto* const entry = memory.at(pair.cq + std::uint64_t{pair.head} * 16);
    const std::uint64_t high =
        std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(entry + 8)).load(std::memory_order_acquire);
    if ((high >> 48 & 1) != (pair.phase ? 1u : 0u)) return std::nullopt;
    nvme::Cqe cqe;
    std::memcpy(&cqe, entry, 8);
    std::memcpy(reinterpret_cast<std::byte*>(&cqe) + 8, &high, 8);
    if (++pair.head == pair.cq_entries) {
      pair.head = 0;
      pair.phase = !pair.phase;
    }
    if (give_back) release(pair);
    return cqe;
  }
  nvme::Cqe wait(Pair& pair) {
    std::optional<nvme::Cqe> cqe;
    until("a completion", [&] { return (cqe = poll(pair)).has_value(); });
    return *cqe;
  }
  std::uint16_t submit(Pair& pair, nvme::Sqe sqe) {
    sqe.cid = pair.next_cid++;
    put(pair, sqe);
    ring(pair);
    return sqe.cid;
  }
  // One command from start to end.
  nvme::Cqe run(Pair& pair, const nvme::Sqe& sqe) {
    const std::uint16_t cid = submit(pair, sqe);
    const nvme::Cqe cqe = wait(pair);
    CHECK_EQ(cqe.cid, cid);
    CHECK_EQ(cqe.sq_id, pair.id);
    return cqe;
  }
  // SCT << 8 | SC of one command.
  std::uint16_t code(Pair& pair, const nvme::Sqe& sqe) {
    return nvme::status_code(nvme::cqe_status(run(pair, sqe).status));
  }

  nvme::Sqe create_cq_command(std::uint16_t id, std::uint32_t entries, std::uint64_t address) const {
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kAdminCreateIoCq;
    sqe.prp1 = address;
    sqe.cdw10 = id | (entries - 1) << 16;
    sqe.cdw11 = nvme::kCreateQueuePc;
    return sqe;
  }
  nvme::Sqe create_sq_command(std::uint16_t id, std::uint32_t entries, std::uint64_t address, std::uint16_t cq) const {
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kAdminCreateIoSq;
    sqe.prp1 = address;
    sqe.cdw10 = id | (entries - 1) << 16;
    sqe.cdw11 = nvme::kCreateQueuePc | std::uint32_t{cq} << 16;
    return sqe;
  }
  nvme::Sqe delete_command(std::uint8_t opcode, std::uint16_t id) const {
    nvme::Sqe sqe{};
    sqe.opcode = opcode;
    sqe.cdw10 = id;
    return sqe;
  }
  Pair create(std::uint16_t id, std::uint32_t entries = 16, std::uint32_t cq_entries = 0) {
    if (cq_entries == 0) cq_entries = entries;
    Pair pair;
    pair.id = id;
    pair.sq = memory.allocate(std::uint64_t{entries} * 64, page());
    pair.cq = memory.allocate(std::uint64_t{cq_entries} * 16, page());
    begin(pair, entries, cq_entries);
    CHECK_EQ(code(admin, create_cq_command(id, cq_entries, pair.cq)), nvme::kStatusSuccess);
    CHECK_EQ(code(admin, create_sq_command(id, entries, pair.sq, id)), nvme::kStatusSuccess);
    return pair;
  }

  // Reads and writes; PRP2 as given.
  nvme::Sqe io(std::uint8_t opcode, std::uint64_t lba, std::uint32_t blocks, std::uint64_t prp1, std::uint64_t prp2 = 0,
               std::uint32_t nsid = 1) const {
    nvme::Sqe sqe{};
    sqe.opcode = opcode;
    sqe.nsid = nsid;
    sqe.prp1 = prp1;
    sqe.prp2 = prp2;
    sqe.cdw10 = static_cast<std::uint32_t>(lba);
    sqe.cdw11 = static_cast<std::uint32_t>(lba >> 32);
    sqe.cdw12 = blocks - 1;
    return sqe;
  }
  nvme::Sqe identify_command(std::uint8_t cns, std::uint32_t nsid, std::uint64_t to, std::uint8_t csi = 0) const {
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kAdminIdentify;
    sqe.nsid = nsid;
    sqe.prp1 = to;
    sqe.cdw10 = cns;
    sqe.cdw11 = std::uint32_t{csi} << 24;
    return sqe;
  }
  nvme::Sqe log_command(std::uint8_t log, std::uint32_t nbytes, std::uint64_t to, bool retain = false) const {
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kAdminGetLogPage;
    sqe.nsid = nvme::kNsidAll;
    sqe.prp1 = to;
    sqe.cdw10 = log | (retain ? nvme::kLogRetainEvent : 0) | (nbytes / 4 - 1) << 16;
    return sqe;
  }
  std::uint64_t stat(const std::string& name) const { return controller.stats().at(name); }

  Options options;
  Controller controller;
  ClientMemory memory;
  Pair admin;
  std::uint32_t mps = 0;
};

inline Options in_memory(std::uint64_t nbytes = 16 << 20) {
  Options options;
  options.size = nbytes;
  options.threads = 0;
  return options;
}

inline void fill(std::byte* to, std::size_t nbytes, std::uint64_t seed) {
  for (std::size_t i = 0; i < nbytes; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    to[i] = static_cast<std::byte>(seed >> 56);
  }
}

}  // namespace testing
