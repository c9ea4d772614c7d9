// One worker: looks at doorbells, fetches commands, executes them, posts completions. Its unit of work is a pass over
// all queues; a thread makes passes (crew.h), or a test does, one at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "admin.h"
#include "device.h"
#include "io_commands.h"

namespace gpunvme::soft {

class Worker final : public Admin::Worker {
 public:
  // Worker number `number` of `count`.
  Worker(Device& device, Admin& admin, IovaTable::Reader& reader, Counters& counters, unsigned number, unsigned count);

  // One pass; the number of commands fetched. Between go_online and go_offline.
  unsigned pass();
  // All of the checks that a pass without work makes a few of: invalid doorbells of any queue.
  void look_everywhere();

  void go_online() {
    reader_.go_online();
    is_fresh_ = true;
  }
  // Nothing is in flight and no host memory is touched until go_online.
  void go_offline();
  bool offline() const { return reader_.offline(); }
  bool waits_for_drive() { return io_.ring().in_flight() > 0; }

  Dma& dma() override { return dma_; }
  Counters& counters() override { return counters_; }
  void complete(SubmissionQueue& sq, const Completion& completion) override;

 private:
  static constexpr std::uint32_t kBatch = 16;
  // Completions that are worth taking a contended lock for: their entries fill a cache line.
  static constexpr std::uint32_t kPostTogether = 64 / sizeof(nvme::Cqe);
  // At every so manieth pass without work of its own a worker looks at the others' queues, and at some of those also
  // takes a command that is alone: whose it is would have taken it by then.
  static constexpr std::uint32_t kPassesPerHelp = 4;
  static constexpr std::uint32_t kPassesPerLone = 4 * kPassesPerHelp;
  // As long as there is a backlog, and for so many passes after, it looks every time.
  static constexpr std::uint32_t kPassesOfHelp = 64;

  unsigned serve(SubmissionQueue& sq, bool takes_lone = true);
  unsigned help();
  std::uint32_t fetch(SubmissionQueue& sq);
  bool copy_entries(const SubmissionQueue& sq, std::uint32_t head, std::uint32_t done, std::uint32_t count);
  bool accept_tail(SubmissionQueue& sq, std::uint32_t tail, std::uint32_t head);
  void look_ahead(std::uint32_t i, std::uint32_t count) const;
  void execute(SubmissionQueue& sq, const nvme::Sqe& sqe);
  void execute_together(SubmissionQueue& sq, std::uint32_t count);
  void execute_admin(SubmissionQueue& sq, const nvme::Sqe& sqe);
  bool begin_faults(SubmissionQueue& sq, Decision& decision);

  // Completions, in queue_worker_completions.cpp.
  void finish(SubmissionQueue& sq, const Completion& completion, const Decision& decision);
  void finish_badly(SubmissionQueue& sq, const Completion& completion, Decision decision);
  void post(SubmissionQueue& sq, const Completion& completion);
  bool post_together(SubmissionQueue& sq, std::span<const Completion> completions, bool waits);
  void post_locked(SubmissionQueue& sq, const Completion& completion);
  bool write_entry(CompletionQueue& cq, const Completion& completion, std::uint16_t sq_head, Decision decision = {});
  bool copy_entry(std::uint64_t iova, const std::uint32_t (&words)[4], Decision decision);
  void queue_up(CompletionQueue& cq, const Completion& completion);
  void signal(CompletionQueue& cq);
  bool refresh_head(CompletionQueue& cq);
  bool refresh_head_locked(CompletionQueue& cq);
  void drain_backlogs();
  void release_held();
  void reap(bool wait);
  void chores();
  void look_around(std::uint32_t id);
  void check_untouched(std::atomic_ref<std::uint32_t> doorbell, std::uint32_t id);
  void report_doorbell(std::uint8_t information, std::uint32_t id);
  void announce();

  Device& device_;
  Admin& admin_;
  IovaTable::Reader& reader_;
  Counters& counters_;
  Dma dma_;
  IoCommands io_;
  const unsigned number_;
  const unsigned count_;
  const bool several_;
  const bool uses_ring_;
  std::uint32_t looked_at_ = 0;
  std::uint32_t passes_ = 0;   // without work of its own
  std::uint32_t helping_ = 0;  // passes for which it goes on looking every time
  bool is_fresh_ = true;       // it was away: nobody may have looked
  std::vector<FileRing::Finished> finished_;
  alignas(64) nvme::Sqe batch_[kBatch];
};

}  // namespace gpunvme::soft
