// One transfer: what is to be moved, what was moved and how, and how it ended.
//
// Segments are added, possibly while earlier ones already move, and sealed. Workers take windows of it (file ranges
// that nobody has looked at yet) and pieces (ranges whose way is decided). A job is done when it is sealed and all
// was moved, or when it was stopped and everything in flight has come back; then nobody touches its memory any more.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda_driver.h"
#include "failure.h"
#include "source_file.h"

namespace gpunvme {

inline constexpr int kHost = -1;  // device number of host memory

// `nbytes` of file number `file` at `offset` go to, or come from, memory at `address`.
struct Segment {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t address = 0;
};

// A range of one file that one run of segments covers, in order, without overlap and (almost) without gaps.
struct Extent {
  std::uint32_t file = 0;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  const Segment* segments = nullptr;
  std::size_t count = 0;
  CUevent event = nullptr;  // behind what the caller's stream had queued when this was added
  // The segments that meet [from, to) are [first, last).
  struct Overlap {
    const Segment* first;
    const Segment* last;
  };
  Overlap overlap(std::uint64_t from, std::uint64_t to) const;
  // Bytes of [from, to) that segments want: all but the gaps.
  std::uint64_t wanted(std::uint64_t from, std::uint64_t to) const;
};

// Many small reads of one size, packed in order at `address`.
struct Gather {
  static constexpr std::uint64_t kMostBytes = 512u << 10;  // larger reads are segments

  std::uint32_t file = 0;
  const std::int64_t* offsets = nullptr;  // kept by the caller until the job is done
  std::uint64_t count = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t address = 0;
  std::uint64_t dense = 0;  // a region with more hits than this is populated and copied from the mapping
  std::uint64_t file_size = 0;
  CUevent event = nullptr;
  // Residency of each region of the file: 0 not asked yet, else 1 + Residency. Empty: ask for each read.
  std::unique_ptr<std::atomic<std::uint8_t>[]> regions;
};

struct Piece {
  enum class Kind : std::uint8_t { kWindow, kCached, kDirect, kBuffered, kWrite, kGather };
  Kind kind = Kind::kWindow;
  const Extent* extent = nullptr;
  Gather* gather = nullptr;
  std::uint64_t begin = 0;  // file offsets; for a gather, indices
  std::uint64_t end = 0;
  CUevent event() const { return extent != nullptr ? extent->event : gather->event; }
};

// What was done for a piece. Bytes of the file that were moved to their destination, by the way they came.
struct Counts {
  std::uint64_t direct = 0;    // O_DIRECT
  std::uint64_t cached = 0;    // out of the page cache (reads), into it (writes)
  std::uint64_t buffered = 0;  // through the page cache, which had to read them first
  std::uint64_t bounced = 0;   // through a worker's slots, whichever way they came
  std::uint64_t mapped = 0;    // of the cached ones, copied out of a mapping
  Counts& operator+=(const Counts& other);
  std::uint64_t total() const { return direct + cached + buffered; }
};

class Engine;

class Job : public std::enable_shared_from_this<Job> {
 public:
  enum class Direction { kRead, kWrite };

  struct Options {
    Direction direction = Direction::kRead;
    int device = kHost;
    // CUstream of the caller: what is added moves after the work that was queued there by then.
    std::optional<std::uint64_t> stream;
    std::optional<std::chrono::duration<double>> timeout;
  };

  // Throws Failure (kCuda).
  static std::shared_ptr<Job> make(Options options);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  std::uint32_t add_file(std::shared_ptr<SourceFile> file);
  // Ranges must lie inside their files. Throws Failure if the job was stopped already. One thread adds.
  void add(std::vector<Segment> segments);
  void add_gather(std::uint32_t file, const std::int64_t* offsets, std::uint64_t count, std::uint64_t nbytes,
                  std::uint64_t address);
  void seal();
  void stop(const Failure& failure);

  bool done() const;
  // False if it is not done by then.
  bool wait_for(std::chrono::duration<double> limit);
  std::optional<Failure> failure() const;
  Counts counts() const;
  double seconds() const;    // from creation to done, or to now
  unsigned workers() const;  // how many took part
  bool used_io_uring() const { return used_io_uring_.load(std::memory_order_relaxed); }
  bool used_io_threads() const { return used_io_threads_.load(std::memory_order_relaxed); }
  bool used_pageable() const { return used_pageable_.load(std::memory_order_relaxed); }
  pid_t process() const { return process_; }
  std::uint64_t id() const { return id_; }

  // For workers.
  struct Room {
    bool direct = false;          // can start an O_DIRECT piece
    bool direct_if_idle = false;  // the same, if no cached piece waits for the memory
    bool copy = false;            // can copy a cached piece or a gather
  };
  std::optional<Piece> take(const Room& room, unsigned worker);
  // `takes_one`: the worker that pushes has room for one of them, so that nobody need be woken for it.
  void push(const std::vector<Piece>& pieces, bool takes_one);
  // The taker of a piece is finished with it.
  void finish(const Counts& counts);
  // The taker of a window has pushed its pieces.
  void finish_window();
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  const Options& options() const { return options_; }
  SourceFile& file(std::uint32_t number) const;
  void note_io(bool io_uring) { (io_uring ? used_io_uring_ : used_io_threads_).store(true, std::memory_order_relaxed); }
  void note_pageable() { used_pageable_.store(true, std::memory_order_relaxed); }

 private:
  explicit Job(Options options);
  CUevent record_event();
  // Expects the mutex to be held.
  void add_extents(const std::vector<Segment>& segments, CUevent event);
  bool end_if_idle();
  // Expects the mutex not to be held.
  void announce(std::size_t pieces);
  void detach();

  const Options options_;
  const pid_t process_;
  const std::uint64_t id_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::vector<CUevent> events_;  // used by add() and add_gather() only, which one thread calls

  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::deque<std::shared_ptr<SourceFile>> files_;
  std::deque<std::vector<Segment>> segments_;
  std::deque<Extent> extents_;
  std::deque<Gather> gathers_;
  std::deque<Piece> windows_;
  std::deque<Piece> direct_;
  std::deque<Piece> copies_;
  std::size_t taken_ = 0;    // windows and pieces that a worker holds
  std::size_t looking_ = 0;  // windows of these
  bool sealed_ = false;
  bool done_ = false;
  std::chrono::steady_clock::time_point end_;
  std::optional<Failure> failure_;
  Counts counts_;
  std::uint64_t participants_ = 0;  // one bit a worker
  std::atomic<bool> stopped_{false};
  std::atomic<bool> used_io_uring_{false};
  std::atomic<bool> used_io_threads_{false};
  std::atomic<bool> used_pageable_{false};
  std::weak_ptr<Engine> engine_;
};

}  // namespace gpunvme
