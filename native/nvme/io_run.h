// One transfer over one or more queues, moved by whichever thread calls drive().
//
// Works are cut into parts, at most one command large each; a part that is on its way is a command. What PRPs cannot
// describe goes through a bounce: a slot of staging memory that several commands may fill, and a copy. Runs may share
// queues: whichever of them is driven reaps for all.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "gpunvme/prp.h"
#include "io_queue.h"
#include "io_staging.h"
#include "io_work.h"

namespace gpunvme {

class IoRun {
 public:
  struct Options {
    std::uint32_t nsid = 1;
    std::uint32_t lba_bytes = 512;
    std::uint64_t max_bytes = 0;  // of a command's data (MDTS); 0: no limit
    std::uint32_t page_bytes = 4096;
    std::uint8_t opcode = 2;  // of ranges, gathers and pieces: 1 write, 2 read
    std::uint32_t cdw12 = 0;  // flags of theirs: FUA and the like
    double timeout = 30;      // seconds a command may take
    std::uint32_t depth = 0;  // commands in flight at most; 0: as many as the queues hold
    // A CUstream: GPU memory is touched after what is queued there when it is added.
    std::optional<std::uint64_t> stream;
    std::int64_t (*clock)() = nullptr;  // nanoseconds; null: a steady clock
  };
  enum class State {
    kRunning,
    kDone,
    kTimeout,  // commands are in quarantine (timed_out()): abort them, or reset the controller and attach()
    kStopped,  // a queue was stopped: attach()
  };
  struct Failed {
    enum class Kind { kStatus, kTimeout, kLost };
    std::uint8_t opcode;
    std::uint64_t lba;
    std::uint64_t blocks;
    std::uint16_t queue;
    std::uint16_t cid;
    std::uint16_t status;  // 15 bits
    Kind kind;
  };
  // Bytes that have arrived, by the way they came.
  struct Counts {
    std::uint64_t commands = 0;  // submitted, repeated ones too
    std::uint64_t retried = 0;
    std::uint64_t timeouts = 0;
    std::uint64_t mapped_bytes = 0;
    std::uint64_t bounced_host_bytes = 0;
    std::uint64_t bounced_gpu_bytes = 0;
    bool page_locked = false;
    double seconds = 0;
  };
  static constexpr std::uint32_t kMostTries = 4;

  IoRun(Options options, const std::vector<std::shared_ptr<IoQueue>>& queues, std::shared_ptr<IoStaging> staging);
  // Commands that are still in flight are given up, and the staging memory that they use with them.
  ~IoRun();
  IoRun(const IoRun&) = delete;
  IoRun& operator=(const IoRun&) = delete;

  // Before the first drive().
  void add_range(std::uint64_t lba, std::uint64_t blocks, std::shared_ptr<IoMemory> memory, std::uint64_t offset);
  // `count` LBAs, of `blocks` blocks each, packed in order from `offset` on. The caller keeps `lbas` until the end.
  void add_gather(const std::uint64_t* lbas, std::uint64_t count, std::uint64_t blocks,
                  std::shared_ptr<IoMemory> memory, std::uint64_t offset);
  struct Span {
    std::shared_ptr<IoMemory> memory;
    std::uint64_t offset;
    std::uint64_t nbytes;
  };
  // A range from `lba` on, into or out of many pieces of memory. Together they are whole blocks.
  void add_pieces(std::uint64_t lba, const std::vector<Span>& pieces);
  // One command as it is: flush, write zeroes, dataset management, compare, verify.
  void add_simple(std::uint8_t opcode, const std::array<std::uint32_t, 6>& cdw10_to_15, std::optional<Span> memory);

  // Submits and reaps for at most `seconds`. Says kTimeout when a command has just timed out, and when after `seconds`
  // nothing is left but commands that have. Throws Failure (kCuda) at the end of a run whose copies failed. One thread
  // at a time.
  State drive(double seconds);
  // Goes on with other queues. Those that are not among them must be stopped, their controller reset or the queues
  // deleted: commands that were in flight there are submitted again, or else fail (kLost). With no queues at all the
  // run is abandoned.
  void attach(const std::vector<std::shared_ptr<IoQueue>>& queues, bool retry);
  // Submits nothing more; drive() says kDone once everything in flight is back.
  void abandon();

  std::vector<std::pair<std::uint16_t, std::uint16_t>> timed_out() const;  // (queue, CID)
  std::vector<Failed> failures() const;
  Counts counts() const;

 private:
  // Bytes of a work that pass through a slot of staging memory.
  struct Bounce {
    std::list<Bounce>::iterator self;
    const Work* work;
    Work::Place next;  // of the parts that are not submitted yet
    std::uint64_t begin;
    std::uint64_t end;
    std::uint32_t slot;
    std::uint32_t outstanding = 0;  // parts submitted and not finished
    bool failed = false;
    CUevent event = nullptr;
  };
  // What becomes one command.
  struct Part {
    const Work* work;
    Bounce* bounce;  // or null
    Work::Place place;
    std::uint64_t nbytes;
    std::uint32_t tries;
    bool again;  // was submitted before
  };
  struct Use;
  struct Command {
    Part part;
    Use* use;
    std::uint16_t cid;
    std::int64_t deadline;
    Command* older;  // in flight in the same queue
    Command* newer;
  };
  // A queue, as this run uses it.
  struct Use {
    std::shared_ptr<IoQueue> queue;
    std::uint32_t in_flight = 0;
    std::uint64_t handed_seen = 0;
    bool unrung = false;
    Command* oldest = nullptr;
    Command* newest = nullptr;
  };
  struct Finished {
    Command* command;
    std::uint16_t status;
  };

  // Adding (io_run_add.cpp).
  Work& add_work(std::uint8_t opcode);
  void accept(const Work& work);

  // The loop (io_run.cpp).
  void check_process() const;
  bool is_done() const;
  bool a_queue_stopped() const;
  bool expire();
  bool look_after_stuck();
  bool ending() const { return !failures_.empty() || error_ != nullptr || abandoned_; }
  void leave_queue(Use& use, bool retry);
  void fail(const Command& command, std::uint16_t status, Failed::Kind kind);
  void end_unsubmitted();
  State finish();

  // Submitting (io_run_submit.cpp).
  bool submit();
  bool next_part(Part& part);
  bool send(const Part& part);
  Use* choose(std::uint32_t& slot);
  void consume(const Part& part, std::uint64_t nbytes);
  std::uint64_t describe(const Part& part, const PrpList& list, nvme::Sqe& sqe) const;
  void ring();

  // Completing (io_run_submit.cpp).
  bool reap();
  bool reap(Use& use);
  void harvest(Use& use);
  void complete(Command& command, std::uint16_t status);
  void submit_again(const Part& part, bool counts);
  void unlink(Command& command);

  // Bouncing (io_run_bounce.cpp).
  bool begin_bounce(const Part& part);
  std::uint64_t bounce_bytes(const Part& part) const;
  template <typename Each>
  void for_each_span(const Bounce& bounce, const Each& each) const;
  bool copy(Bounce& bounce, bool to_staging);
  bool take_back_copies();
  void part_done(const Part& part);
  void end_bounce(Bounce& bounce);
  void park_bounce(Bounce& bounce);

  const Options options_;
  const int lba_shift_;
  const std::uint64_t max_bytes_;  // of a command, whole blocks
  const std::uint64_t id_;
  const pid_t process_;
  const std::int64_t timeout_;  // ns
  const std::shared_ptr<IoStaging> staging_;
  std::int64_t (*const clock_)();  // ns
  const std::int64_t start_;

  mutable std::mutex mutex_;
  std::deque<Work> works_;
  std::size_t work_ = 0;  // the one that is being cut
  Work::Place place_;     // how far
  std::deque<Part> retries_;
  std::list<Bounce> bounces_;
  std::deque<Bounce*> issuing_;  // have parts to submit
  std::deque<Bounce*> copying_;  // on the GPU's stream
  std::list<Use> uses_;
  std::deque<Command> commands_;
  std::vector<Command*> spare_commands_;
  std::vector<Command*> stuck_;  // in quarantine
  std::vector<Finished> finished_;
  std::uint32_t in_flight_ = 0;  // without those that are stuck
  std::vector<Failed> failures_;
  std::exception_ptr error_;
  bool abandoned_ = false;
  std::int64_t now_ = 0;
  Counts counts_;
  int device_ = -1;
  std::unique_ptr<CopyLane> lane_;
  std::vector<std::uint32_t> parked_slots_;  // copies of theirs may be queued still
};

}  // namespace gpunvme
