#include "worker.h"

#include <pthread.h>

#include <algorithm>
#include <cerrno>

namespace gpunvme {
namespace {

constexpr int kHalf = Slots::kBlocks / 2;
// O_DIRECT pieces of 1 MiB that one worker keeps in flight where they need none of its memory.
constexpr std::size_t kMostDirectPieces = 16;

}  // namespace

void Worker::run() {
  pthread_setname_np(pthread_self(), "gpunvme");
  for (;;) {
    const std::uint64_t epoch = engine_.epoch();
    bool progress = take_back(false);
    pump();
    progress = start_something() || progress;
    if (progress) continue;
    if (!operations_.empty()) {
      take_back(true);
    } else if (engine_.stopping()) {
      return;
    } else {
      engine_.sleep(epoch);
    }
  }
}

Worker::~Worker() {
  for (auto& [device, lane] : lanes_) {
    try {
      cuda_make_current(device);
      for (CUevent event : lane.spare_events) cuda().EventDestroy(event);
      cuda().StreamDestroy(lane.stream);
    } catch (const Failure&) {
      // The driver is gone already, and these with it.
    }
  }
}

// Takes back what has finished. With `wait`, for a short time until something has.
bool Worker::take_back(bool wait) {
  DirectResult results[64];
  std::size_t count = 0;
  if (direct_ != nullptr && direct_->in_flight() > 0) {
    count = direct_->reap(results, std::size(results), std::chrono::microseconds(0));
  }
  bool progress = count > 0;
  for (std::size_t i = 0; i < count; ++i) request_done(*static_cast<Request*>(results[i].tag), results[i].result);
  progress = take_back_copies() || progress;
  if (progress || !wait) return progress;
  if (direct_ != nullptr && direct_->in_flight() > 0) {
    const bool copying =
        std::any_of(lanes_.begin(), lanes_.end(), [](auto& lane) { return !lane.second.copying.empty(); });
    const auto limit = std::chrono::microseconds(copying ? 50 : 1000);
    count = direct_->reap(results, std::size(results), limit);
    for (std::size_t i = 0; i < count; ++i) request_done(*static_cast<Request*>(results[i].tag), results[i].result);
    return count > 0;
  }
  return wait_for_copy();
}

Job::Room Worker::room(const Job& job) {
  Job::Room room;
  // For each device: what waits behind one GPU's streams is no reason to begin less for others.
  const std::size_t most = 2 * kMostDirectPieces * std::max<std::size_t>(slots_.size(), 1);
  const bool queue = operations_.size() < most && (direct_ == nullptr || direct_->room());
  const int blocks = slots(job).free_blocks();
  const std::size_t pieces = direct_ == nullptr ? 0 : direct_->in_flight();
  room.direct = queue && pieces < kMostDirectPieces && blocks > kHalf;
  room.direct_if_idle = queue && pieces < kMostDirectPieces && blocks > 0;
  room.copy =
      pumping_.size() < 2 && (job.options().device == kHost ? blocks > 0 : slots(job).adjoining_blocks() >= kHalf);
  return room;
}

bool Worker::start_something() {
  const auto jobs = engine_.jobs();
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const auto& job = jobs[(next_job_ + i) % jobs.size()];
    if (const auto piece = job->take(room(*job), index_)) {
      next_job_ = (next_job_ + i + 1) % jobs.size();
      start(job, *piece);
      return true;
    }
  }
  return false;
}

void Worker::start(std::shared_ptr<Job> job, const Piece& piece) {
  if (piece.kind == Piece::Kind::kWindow) {
    classify(*job, piece);
    job->finish_window();
    return;
  }
  Operation& operation = operations_.emplace_front();
  operation.self = operations_.begin();
  operation.job = std::move(job);
  operation.piece = piece;
  try {
    switch (piece.kind) {
      case Piece::Kind::kCached:
        return read_through_cache(operation, false);
      case Piece::Kind::kBuffered:
        return read_through_cache(operation, true);
      case Piece::Kind::kDirect:
        return read_direct(operation);
      case Piece::Kind::kGather:
        return gather(operation);
      case Piece::Kind::kWrite:
        return write(operation);
      case Piece::Kind::kWindow:
        break;
    }
  } catch (const Failure& failure) {
    fail(operation, failure);
  } catch (const std::bad_alloc&) {
    const SourceFile& file = operation.job->file(piece.extent != nullptr ? piece.extent->file : piece.gather->file);
    fail(operation, file_failure(ENOMEM, "no memory for the transfer's buffers", file.name()));
  }
}

// Stops the job. The operation ends when nothing of it is in flight any more.
void Worker::fail(Operation& operation, const Failure& failure) {
  operation.job->stop(failure);
  operation.next_request = operation.requests.size();
  std::erase(pumping_, &operation);
  if (operation.pending > 0) return;  // request_done() ends it
  if (operation.copying) {
    // Some of its copies may be queued, and its slot must outlive them.
    const auto found = lanes_.find(operation.job->options().device);
    if (found != lanes_.end()) cuda().StreamSynchronize(found->second.stream);
  }
  end(operation);
}

void Worker::end(Operation& operation) {
  if (operation.slot != nullptr) slots(*operation.job).release(operation.slot, operation.blocks);
  const std::shared_ptr<Job> job = std::move(operation.job);
  const Counts counts = operation.counts;
  operations_.erase(operation.self);
  // Last: from here on the caller may free the memory that was read into.
  job->finish(counts);
}

void Worker::acquire_slot(Operation& operation, std::uint64_t nbytes, Slots::From from) {
  Slots& slots = this->slots(*operation.job);
  if (operation.job->options().device != kHost) {
    slots.page_lock();
    if (!slots.page_locked()) operation.job->note_pageable();
  }
  const int blocks = static_cast<int>((nbytes + Slots::kBlock - 1) / Slots::kBlock);
  while ((operation.slot = slots.acquire(blocks, from)) == nullptr) {
    take_back(true);
    pump();
  }
  operation.blocks = blocks;
}

}  // namespace gpunvme
