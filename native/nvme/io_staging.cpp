#include "io_staging.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "failure.h"

namespace gpunvme {

CopyLane::CopyLane(int device) : device(device), process_(getpid()) {
  CudaContextScope scope(device);
  cuda_check(cuda().StreamCreate(&stream, kStreamNonBlocking), "cuStreamCreate");
}

CopyLane::~CopyLane() {
  if (process_ != getpid()) return;
  try {
    CudaContextScope scope(device);
    for (CUevent event : spare_events) cuda().EventDestroy(event);
    cuda().StreamDestroy(stream);
  } catch (const Failure&) {
    // The context is gone, and the stream with it.
  }
}

CUevent CopyLane::mark() {
  CudaContextScope scope(device);
  if (spare_events.empty()) {
    CUevent event = nullptr;
    cuda_check(cuda().EventCreate(&event, kEventDisableTiming), "cuEventCreate");
    spare_events.push_back(event);
  }
  cuda_check(cuda().EventRecord(spare_events.back(), stream), "cuEventRecord");
  const CUevent event = spare_events.back();
  spare_events.pop_back();
  return event;
}

void CopyLane::order_behind(CUstream other) {
  CudaContextScope scope(device);
  CUevent event = nullptr;
  cuda_check(cuda().EventCreate(&event, kEventDisableTiming), "cuEventCreate");
  // A wait stands for what the event was at the time: it may be recorded anew, or destroyed, right after.
  spare_events.push_back(event);
  cuda_check(cuda().EventRecord(event, other), "cuEventRecord");
  cuda_check(cuda().StreamWaitEvent(stream, event, 0), "cuStreamWaitEvent");
}

IoStaging::IoStaging(std::shared_ptr<IoMemory> memory, std::uint64_t slot_bytes)
    : memory_(std::move(memory)),
      slot_bytes_(slot_bytes),
      slots_(slot_bytes == 0 ? 0 : static_cast<std::uint32_t>(memory_->nbytes() / slot_bytes)),
      process_(getpid()) {
  if (memory_->kind() != IoMemory::Kind::kMapped) throw std::invalid_argument("staging memory is mapped memory");
  if (slot_bytes % 4096 != 0 || slots_ == 0) {
    throw std::invalid_argument("staging memory has one slot or more, of a multiple of 4096 bytes");
  }
  for (std::uint32_t slot = slots_; slot > 0; --slot) free_.push_back(slot - 1);
}

IoStaging::~IoStaging() {
  if (process_ != getpid()) return;
  unlock();
  try {
    for (const Parked& parked : parked_) {
      CudaContextScope scope(parked.lane->device);
      cuda().EventDestroy(parked.event);
    }
  } catch (const Failure&) {
    // The context is gone, and its events with it.
  }
}

void IoStaging::unlock() {
  if (process_ != getpid()) return;
  std::lock_guard lock(mutex_);
  try {
    const auto finish = [](const CopyLane& lane) {
      CudaContextScope scope(lane.device);
      cuda().StreamSynchronize(lane.stream);
    };
    for (const Parked& parked : parked_) finish(*parked.lane);
    for (const CopyLane* lane : lent_) finish(*lane);
    if (locked_on_ >= 0) {
      CudaContextScope scope(locked_on_);
      cuda().MemHostUnregister(address(0));
    }
  } catch (const Failure&) {
    // The context is gone, and what was locked in it.
  }
  locked_on_ = -1;
  tried_to_lock_ = true;
}

std::uint32_t IoStaging::free_slots() const {
  std::lock_guard lock(mutex_);
  return static_cast<std::uint32_t>(free_.size());
}

std::uint32_t IoStaging::acquire() {
  std::lock_guard lock(mutex_);
  if (free_.empty()) look_after_parked();
  if (free_.empty()) return kNone;
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

void IoStaging::release(std::uint32_t slot) {
  std::lock_guard lock(mutex_);
  free_.push_back(slot);
}

void IoStaging::give_up(std::uint32_t slot) {
  std::lock_guard lock(mutex_);
  given_up_.push_back(slot);
}

void IoStaging::reclaim() {
  std::lock_guard lock(mutex_);
  free_.insert(free_.end(), given_up_.begin(), given_up_.end());
  given_up_.clear();
}

void IoStaging::page_lock(int device) {
  std::lock_guard lock(mutex_);
  if (tried_to_lock_) return;
  tried_to_lock_ = true;
  CudaContextScope scope(device);
  const std::size_t nbytes = slots_ * slot_bytes_;
  if (cuda().MemHostRegister(address(0), nbytes, kHostRegisterPortable) == kCudaSuccess) locked_on_ = device;
}

bool IoStaging::page_locked() const {
  std::lock_guard lock(mutex_);
  return locked_on_ >= 0;
}

std::unique_ptr<CopyLane> IoStaging::borrow_lane(int device) {
  {
    std::lock_guard lock(mutex_);
    const auto found =
        std::find_if(lanes_.begin(), lanes_.end(), [device](const auto& lane) { return lane->device == device; });
    if (found != lanes_.end()) {
      std::unique_ptr<CopyLane> lane = std::move(*found);
      lanes_.erase(found);
      lent_.push_back(lane.get());
      return lane;
    }
  }
  auto lane = std::make_unique<CopyLane>(device);
  std::lock_guard lock(mutex_);
  lent_.push_back(lane.get());
  return lane;
}

void IoStaging::give_back_lane(std::unique_ptr<CopyLane> lane, std::vector<std::uint32_t> slots) {
  std::lock_guard lock(mutex_);
  std::erase(lent_, lane.get());
  CUevent event = nullptr;
  if (!slots.empty()) event = lane->mark();
  if (slots.empty()) {
    lanes_.push_back(std::move(lane));
  } else {
    parked_.push_back({std::move(lane), event, std::move(slots)});
  }
}

void IoStaging::look_after_parked() {
  for (auto parked = parked_.begin(); parked != parked_.end();) {
    CudaContextScope scope(parked->lane->device);
    if (cuda().EventQuery(parked->event) == kCudaNotReady) {
      ++parked;
      continue;
    }
    free_.insert(free_.end(), parked->slots.begin(), parked->slots.end());
    parked->lane->spare_events.push_back(parked->event);
    lanes_.push_back(std::move(parked->lane));
    parked = parked_.erase(parked);
  }
}

}  // namespace gpunvme
