// One thread of the engine. Its loop: take back what has finished, start what there is room for, wait for the rest.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <vector>

#include "direct_io.h"
#include "engine.h"
#include "job.h"
#include "mapped_copy.h"
#include "slots.h"

namespace gpunvme {

class Worker {
 public:
  Worker(Engine& engine, unsigned index) : engine_(engine), index_(index) {}
  ~Worker();
  void run();

 private:
  struct Operation;

  // One O_DIRECT request of an operation. The aligned range [from, from + nbytes) contains the wanted one.
  struct Request {
    Operation* operation = nullptr;
    SourceFile* file = nullptr;
    std::uint64_t from = 0;
    std::uint32_t nbytes = 0;
    std::uint8_t* address = nullptr;
    std::uint64_t wanted_begin = 0;
    std::uint64_t wanted_end = 0;
    std::uint8_t* deliver = nullptr;  // copy the wanted bytes there (null: they are in place)
    int bounce = -1;                  // the small bounce buffer that `address` is in; null address: one is needed
  };

  // One piece on its way.
  struct Operation {
    std::shared_ptr<Job> job;
    Piece piece;
    std::uint8_t* slot = nullptr;
    int blocks = 0;
    std::uint64_t slot_begin = 0;  // the file offset of the slot's first byte
    std::deque<Request> requests;  // a deque: requests are known to the kernel by address
    std::size_t next_request = 0;  // the first one not yet started
    std::size_t pending = 0;       // started and not finished
    CUevent event = nullptr;
    bool in_place = false;  // requests deliver by themselves, the slot only helps
    bool copying = false;   // copies between its slot and a GPU may be queued
    Counts counts;
    std::list<Operation>::iterator self;
  };

  // This worker's side of one GPU.
  struct Lane {
    CUstream stream = nullptr;
    bool batches = true;  // the driver takes many copies in one call
    std::vector<CUevent> spare_events;
    std::deque<Operation*> copying;  // in the order of the stream
    // Jobs' events that the stream was ordered behind; by job too, since an event's address may come again.
    std::set<std::pair<std::uint64_t, CUevent>> ordered;
  };

  // The loop (worker.cpp).
  bool take_back(bool wait);
  bool start_something();
  Job::Room room(const Job& job);
  void start(std::shared_ptr<Job> job, const Piece& piece);
  void fail(Operation& operation, const Failure& failure);
  void end(Operation& operation);
  void acquire_slot(Operation& operation, std::uint64_t nbytes, Slots::From from);
  Slots& slots(const Job& job) { return slots_.try_emplace(job.options().device, job.options().device).first->second; }

  // Reading (worker_read.cpp).
  void classify(Job& job, const Piece& window);
  void read_through_cache(Operation& operation, bool may_block);
  void read_direct(Operation& operation);
  void read_done(Operation& operation);

  // Gathering (worker_gather.cpp).
  void gather(Operation& operation);
  bool gather_cached(Operation& operation, SourceFile& file, std::uint64_t offset, std::uint64_t nbytes,
                     std::uint8_t* to, std::vector<MappedRange>& mapped);
  void gather_direct(Operation& operation, SourceFile& file, std::uint64_t offset, std::uint64_t nbytes,
                     std::uint8_t* to);

  // Writing (worker_write.cpp).
  void write(Operation& operation);
  void write_out(Operation& operation, const std::uint8_t* data);

  // O_DIRECT (worker_direct.cpp).
  DirectQueue& direct();
  void begin_requests(Operation& operation);
  void pump();
  void request_done(Request& request, int result);

  // GPU (worker_gpu.cpp).
  Lane& lane(const Operation& operation);
  void copy_to_device(Operation& operation);
  void copy_from_device(Operation& operation);
  void copy_segments(Operation& operation, Lane& lane, bool to_device);
  void begin_copying(Operation& operation, Lane& lane);
  bool take_back_copies();
  bool wait_for_copy();

  Engine& engine_;
  const unsigned index_;
  // Of each device, the host included. Those of a GPU's jobs may wait behind a stream of the caller's for long, and
  // what runs there may be waiting for jobs of another GPU, or of the host: these have their own, and go on.
  std::map<int, Slots> slots_;
  std::unique_ptr<DirectQueue> direct_;
  std::list<Operation> operations_;
  std::deque<Operation*> pumping_;  // have requests that are not started yet
  std::map<int, Lane> lanes_;
  // Small bounce buffers for gathers that O_DIRECT cannot read in place.
  static constexpr std::size_t kBounce = 64u << 10;
  struct AlignedDelete {
    void operator()(std::uint8_t* memory) const { ::operator delete[](memory, std::align_val_t{4096}); }
  };
  std::unique_ptr<std::uint8_t[], AlignedDelete> bounce_memory_;
  std::vector<int> free_bounces_;
  std::vector<char> gap_ = std::vector<char>(8192);  // where the bytes between near segments go
  std::size_t next_job_ = 0;
};

}  // namespace gpunvme
