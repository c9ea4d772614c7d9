// What a worker counts of what it does. Written by that worker alone, read by anyone.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace gpunvme::soft {

enum class Count : std::uint8_t {
  kCommands,       // I/O commands fetched
  kAdminCommands,  // admin commands fetched
  kReads,          // Read commands completed without an error
  kWrites,         // Write commands completed without an error
  kFlushes,        // Flush commands completed without an error
  kFsyncs,         // times the image was asked to make data durable
  kErrors,         // commands that ended with an error that was not injected
  kCopiedBytes,    // between memory, or the page cache, and the host's memory
  kMappedBytes,    // of these, copied out of a mapping of the image
  kUringBytes,     // read by io_uring into the host's memory
  kReadBlocks512,  // data units of the SMART log
  kWrittenBlocks512,
  kQueueFullWaits,  // times a submission queue had to wait because its completion queue was full
  kIdlePasses,
};
inline constexpr std::size_t kCounts = 14;
inline constexpr std::array<const char*, kCounts> kCountNames = {
    "commands",         "admin_commands", "reads",        "writes",      "flushes",        "fsyncs",
    "errors",           "copied_bytes",   "mapped_bytes", "uring_bytes", "read_512_units", "written_512_units",
    "queue_full_waits", "idle_passes"};

// On cache lines of its own: its neighbour belongs to another worker.
class alignas(64) Counters {
 public:
  // No read-modify-write: there is one writer.
  void add(Count what, std::uint64_t amount = 1) {
    std::atomic<std::uint64_t>& value = values_[static_cast<std::size_t>(what)];
    value.store(value.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }
  std::uint64_t get(std::size_t what) const { return values_[what].load(std::memory_order_relaxed); }

 private:
  std::array<std::atomic<std::uint64_t>, kCounts> values_{};
};

}  // namespace gpunvme::soft
