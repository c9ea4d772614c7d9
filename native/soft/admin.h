// Admin commands (Base 2.0, 5). Executed by whichever worker holds the admin queue, one at a time.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "command_data.h"
#include "device.h"
#include "feature_values.h"

namespace gpunvme::soft {

class Admin {
 public:
  // What a worker does for admin commands.
  class Worker {
   public:
    virtual ~Worker() = default;
    virtual Dma& dma() = 0;
    virtual void complete(SubmissionQueue& sq, const Completion& completion) = 0;
    virtual Counters& counters() = 0;
  };

  struct Result {
    std::uint16_t status = nvme::kStatusSuccess;
    std::uint32_t dw0 = 0;
    bool completes = true;  // false: later, or never (Asynchronous Event Request)
  };

  explicit Admin(Device& device) : device_(device), features_(device) {}

  Result execute(Worker& worker, const nvme::Sqe& sqe);

  // Queues whose deletion waits for commands in flight: the completions that are due now.
  bool deleting() const { return deleting_.load(std::memory_order_relaxed); }
  std::vector<std::uint16_t> finished_deletions();

  // As a controller reset does. While no worker runs.
  void reset();

 private:
  std::uint16_t run(Worker& worker, const nvme::Sqe& sqe, Result& result);
  std::uint16_t identify_command(Worker& worker, const nvme::Sqe& sqe);
  std::uint16_t get_log_page(Worker& worker, const nvme::Sqe& sqe);
  std::uint16_t create_cq(Worker& worker, const nvme::Sqe& sqe);
  std::uint16_t create_sq(Worker& worker, const nvme::Sqe& sqe);
  std::uint16_t delete_cq(const nvme::Sqe& sqe);
  std::uint16_t delete_sq(Worker& worker, const nvme::Sqe& sqe, Result& result);
  std::uint16_t abort(Worker& worker, const nvme::Sqe& sqe, Result& result);
  std::uint16_t queue_memory(Worker& worker, const nvme::Sqe& sqe, std::uint32_t entries, std::uint32_t entry_bytes,
                             QueueMemory& memory);
  std::uint16_t send(Worker& worker, const nvme::Sqe& sqe, const std::byte* data, std::uint64_t nbytes,
                     std::uint64_t wanted);
  void complete_held(Worker& worker, const HeldCompletion& held, std::uint16_t status);
  void delete_now(SubmissionQueue& sq);

  struct Deletion {
    SubmissionQueue* sq;
    std::uint16_t cid;
  };

  Device& device_;
  Features features_;
  CommandData data_;
  std::vector<std::byte> page_;
  std::vector<Deletion> deletions_;
  std::atomic<bool> deleting_{false};  // there are some
};

}  // namespace gpunvme::soft
