// What the controller may reach by DMA: a table from I/O virtual addresses to this process's memory, or to that of
// another device (device_memory.h), as an IOMMU's.
//
// Workers look things up without locks: they read an immutable snapshot. Whoever unmaps publishes a new snapshot and
// waits until every worker has announced that it is done with what it did by older ones. An access that the table does
// not allow is refused and recorded; it never reaches memory.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device_memory.h"

namespace gpunvme::soft {

class IovaTable {
 public:
  static constexpr std::uint64_t kPage = 4096;  // mappings begin and end at multiples of this

  struct Mapping {
    std::uint64_t iova;
    std::uint64_t nbytes;
    std::byte* address;  // of this process, or of `device`
    bool readable;       // by the controller
    bool writable;
    std::shared_ptr<DeviceMemory> device;  // null: memory of this process

    // The same for its CPU, which touches no memory of a device. Members of their own: they are looked at all the time.
    bool cpu_reads = readable && device == nullptr;
    bool cpu_writes = writable && device == nullptr;
  };

  struct Snapshot {
    std::uint64_t generation = 1;
    std::vector<Mapping> mappings;  // by IOVA, not overlapping

    const Mapping* find(std::uint64_t iova) const;
  };

  struct Fault {
    std::uint64_t iova;
    std::uint64_t nbytes;
    bool write;  // the controller would have written
  };

  // One worker's side of the promise that unmapped memory is not touched any more.
  class alignas(64) Reader {
   public:
    static constexpr std::uint64_t kOffline = ~std::uint64_t{0};

    // Everything done by snapshots older than `generation` is finished. Release: those accesses come before this.
    void announce(std::uint64_t generation) {
      if (announced_.load(std::memory_order_relaxed) != generation) {
        announced_.store(generation, std::memory_order_release);
      }
    }
    // A reader that is offline holds no snapshot and need not be waited for.
    void go_offline() { announced_.store(kOffline, std::memory_order_release); }
    // Sequentially consistent with the load of the snapshot that follows: either who publishes a new one sees this
    // reader, or this reader sees the new one.
    void go_online() { announced_.store(0, std::memory_order_seq_cst); }
    bool offline() const { return announced() == kOffline; }
    std::uint64_t announced() const { return announced_.load(std::memory_order_seq_cst); }

   private:
    std::atomic<std::uint64_t> announced_{kOffline};
  };

  IovaTable();
  ~IovaTable();
  IovaTable(const IovaTable&) = delete;
  IovaTable& operator=(const IovaTable&) = delete;

  // Readers are made before the table is used by several threads.
  Reader& add_reader();

  // Throws std::invalid_argument: not page-aligned, empty, wraps around, or overlaps what is mapped.
  void map(std::uint64_t iova, std::uint64_t nbytes, void* address, bool readable, bool writable,
           std::shared_ptr<DeviceMemory> device = nullptr);
  // Removes every mapping inside the range. Returns when no access to it is in flight or can start. Throws
  // std::invalid_argument where nothing is mapped there, or where a mapping would be split.
  void unmap(std::uint64_t iova, std::uint64_t nbytes);

  // Acquire: the mapping's memory is as its owner left it. Sequentially consistent: see Reader::go_online.
  const Snapshot* snapshot() const { return current_.load(std::memory_order_seq_cst); }

  void refuse(std::uint64_t iova, std::uint64_t nbytes, bool write);
  std::uint64_t refused() const { return refused_.load(std::memory_order_relaxed); }
  std::vector<Fault> faults() const;  // the latest kFaultsKept, of copies that failed, too

  // Copies from or to memory of a device, and those that failed.
  void count_copy(std::uint64_t nbytes) {
    device_copies_.fetch_add(1, std::memory_order_relaxed);
    device_bytes_.fetch_add(nbytes, std::memory_order_relaxed);
  }
  void copy_failed(std::uint64_t iova, std::uint64_t nbytes, bool write);
  std::uint64_t device_copies() const { return device_copies_.load(std::memory_order_relaxed); }
  std::uint64_t device_bytes() const { return device_bytes_.load(std::memory_order_relaxed); }
  std::uint64_t device_errors() const { return device_errors_.load(std::memory_order_relaxed); }

  static constexpr std::size_t kFaultsKept = 256;

 private:
  void publish(std::vector<Mapping> mappings);
  void record(std::uint64_t iova, std::uint64_t nbytes, bool write);
  std::uint64_t oldest_announced() const;
  void reclaim();

  std::mutex mutex_;
  std::atomic<const Snapshot*> current_;
  std::deque<std::unique_ptr<const Snapshot>> retired_;  // oldest first
  std::deque<Reader> readers_;                           // a deque: readers are known by address

  mutable std::mutex faults_mutex_;
  std::deque<Fault> faults_;
  std::atomic<std::uint64_t> refused_{0};
  std::atomic<std::uint64_t> device_copies_{0};
  std::atomic<std::uint64_t> device_bytes_{0};
  std::atomic<std::uint64_t> device_errors_{0};
};

}  // namespace gpunvme::soft
