// Bytes that pass through staging memory, and the copies between it and where they belong.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "failure.h"
#include "io_run.h"

namespace gpunvme {

// How far a bounce that begins at the part goes: to where commands can reach memory directly again, a slot's worth at
// most. What was cut before, and a command as it is, stays as it is.
std::uint64_t IoRun::bounce_bytes(const Part& part) const {
  if (part.again || part.work->simple) return part.nbytes;
  const Work& work = *part.work;
  const std::uint64_t block = options_.lba_bytes;
  const std::uint64_t slot = staging_->slot_bytes() / block * block;
  const std::uint64_t most = std::min(slot, work.nbytes - part.place.at);
  std::uint64_t nbytes = block;
  while (nbytes < most) {
    const Work::Piece& piece = work.piece_at(part.place.at + nbytes);
    if (piece.memory->kind() == IoMemory::Kind::kMapped) {
      if (work.is_direct(part.place.at + nbytes, block, options_.page_bytes)) break;
      nbytes += block;
    } else {
      // All of the piece has to be bounced.
      const std::uint64_t end = piece.begin + piece.nbytes - part.place.at;
      nbytes = std::min(most, (end + block - 1) / block * block);
    }
  }
  return nbytes;
}

// Puts the part, and what follows it, into a slot of staging memory. False if none is free now.
bool IoRun::begin_bounce(const Part& part) {
  if (staging_ == nullptr) {
    error_ = std::make_exception_ptr(
        std::invalid_argument("pieces of memory that do not adjoin in whole pages need staging memory"));
    return true;
  }
  const std::uint64_t nbytes = bounce_bytes(part);
  const std::uint32_t slot = staging_->acquire();
  if (slot == IoStaging::kNone) return false;
  Bounce& bounce = bounces_.emplace_back();
  bounce.self = std::prev(bounces_.end());
  bounce.work = part.work;
  bounce.next = part.place;
  bounce.begin = part.place.at;
  bounce.end = part.place.at + nbytes;
  bounce.slot = slot;
  consume(part, nbytes);
  if (!part.work->writes() || copy(bounce, true)) issuing_.push_back(&bounce);
  return true;
}

// each(memory, offset in it, staging memory, bytes)
template <typename Each>
void IoRun::for_each_span(const Bounce& bounce, const Each& each) const {
  const Work::Piece* piece = &bounce.work->piece_at(bounce.begin);
  for (std::uint64_t at = bounce.begin; at < bounce.end; ++piece) {
    const std::uint64_t end = std::min(bounce.end, piece->begin + piece->nbytes);
    each(*piece->memory, piece->offset + (at - piece->begin), staging_->address(bounce.slot) + (at - bounce.begin),
         end - at);
    at = end;
  }
}

// True if the copy is done, false if it is on its way on the GPU's stream, or failed.
bool IoRun::copy(Bounce& bounce, bool to_staging) {
  bool on_gpu = false;
  try {
    for_each_span(bounce, [&](const IoMemory& memory, std::uint64_t offset, std::uint8_t* staging, std::uint64_t n) {
      const std::uint64_t address = memory.address() + offset;
      if (memory.kind() != IoMemory::Kind::kGpu) {
        auto* const there = reinterpret_cast<std::uint8_t*>(address);
        std::memcpy(to_staging ? staging : there, to_staging ? there : staging, n);
        counts_.bounced_host_bytes += n;
        return;
      }
      on_gpu = true;
      if (to_staging) {
        cuda_check(cuda().MemcpyDtoHAsync(staging, address, n, lane_->stream), "cuMemcpyDtoHAsync");
      } else {
        cuda_check(cuda().MemcpyHtoDAsync(address, staging, n, lane_->stream), "cuMemcpyHtoDAsync");
      }
      counts_.bounced_gpu_bytes += n;
    });
    if (!on_gpu) return true;
    bounce.event = lane_->mark();
    copying_.push_back(&bounce);
  } catch (const Failure&) {
    if (error_ == nullptr) error_ = std::current_exception();
    park_bounce(bounce);
  }
  return false;
}

// Copies of one stream pass in order.
bool IoRun::take_back_copies() {
  bool any = false;
  while (!copying_.empty()) {
    Bounce& bounce = *copying_.front();
    const CUresult state = cuda().EventQuery(bounce.event);
    if (state == kCudaNotReady) break;
    any = true;
    copying_.pop_front();
    lane_->spare_events.push_back(bounce.event);
    if (state != kCudaSuccess) {
      if (error_ == nullptr) {
        error_ = std::make_exception_ptr(cuda_failure(cuda_error_text("cuEventQuery after a copy", state)));
      }
      park_bounce(bounce);
    } else if (bounce.work->writes() && !ending()) {
      issuing_.push_back(&bounce);
    } else {
      end_bounce(bounce);
    }
  }
  return any;
}

// A part is finished with, for good or ill.
void IoRun::part_done(const Part& part) {
  if (part.bounce == nullptr) return;
  Bounce& bounce = *part.bounce;
  if (--bounce.outstanding != 0) return;
  if (bounce.next.at != bounce.end && !ending()) return;
  const bool whole = bounce.next.at == bounce.end && !bounce.failed;
  if (whole && bounce.work->reads() && !copy(bounce, false)) return;
  std::erase(issuing_, &bounce);
  end_bounce(bounce);
}

void IoRun::end_bounce(Bounce& bounce) {
  staging_->release(bounce.slot);
  bounces_.erase(bounce.self);
}

// Ends a bounce some of whose copies may be queued: its slot is free when the stream has come past them.
void IoRun::park_bounce(Bounce& bounce) {
  parked_slots_.push_back(bounce.slot);
  bounces_.erase(bounce.self);
}

}  // namespace gpunvme
