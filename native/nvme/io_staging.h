// Memory that the controller reaches, for bytes on their way to or from memory that it does not.
//
// It is shared by runs and cut into slots of one size. Runs into GPU memory should have one of their own: their slots
// may wait for long behind the caller's stream, and what runs there may wait for other transfers.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_driver.h"
#include "io_memory.h"

namespace gpunvme {

// A stream of our own on one GPU, and events for it. Used by one run at a time.
struct CopyLane {
  explicit CopyLane(int device);  // throws Failure (kCuda)
  ~CopyLane();
  CopyLane(const CopyLane&) = delete;
  CopyLane& operator=(const CopyLane&) = delete;

  // Later copies come after what is queued on `stream` now.
  void order_behind(CUstream stream);
  // An event behind all copies so far; give it back to `spare_events` when it has passed.
  CUevent mark();

  const int device;
  CUstream stream = nullptr;
  std::vector<CUevent> spare_events;

 private:
  const pid_t process_;
};

class IoStaging {
 public:
  static constexpr std::uint32_t kNone = 0xffffffff;

  // `memory` is mapped; `slot_bytes` a multiple of 4096.
  IoStaging(std::shared_ptr<IoMemory> memory, std::uint64_t slot_bytes);
  ~IoStaging();
  IoStaging(const IoStaging&) = delete;
  IoStaging& operator=(const IoStaging&) = delete;

  std::uint64_t slot_bytes() const { return slot_bytes_; }
  std::uint32_t slots() const { return slots_; }
  std::uint32_t free_slots() const;
  const IoMemory& memory() const { return *memory_; }
  std::uint64_t offset(std::uint32_t slot) const { return slot * slot_bytes_; }
  std::uint8_t* address(std::uint32_t slot) const {
    return reinterpret_cast<std::uint8_t*>(memory_->address() + offset(slot));
  }

  // kNone if none is free now.
  std::uint32_t acquire();
  void release(std::uint32_t slot);
  // A slot that the controller may still write. It is free again after reclaim(), which is for after a reset.
  void give_up(std::uint32_t slot);
  void reclaim();

  // Page-locks the memory for all GPUs, once. Where the driver refuses, copies still work, slower.
  void page_lock(int device);
  bool page_locked() const;
  // Lets CUDA forget the memory, when all copies from and to it have ended: before it is unmapped, while runs that are
  // over may still be kept. It is not locked again.
  void unlock();

  std::unique_ptr<CopyLane> borrow_lane(int device);
  // `slots` are free when what is queued on the lane has passed.
  void give_back_lane(std::unique_ptr<CopyLane> lane, std::vector<std::uint32_t> slots);

 private:
  struct Parked {
    std::unique_ptr<CopyLane> lane;
    CUevent event;
    std::vector<std::uint32_t> slots;
  };
  // Expects the mutex to be held.
  void look_after_parked();

  const std::shared_ptr<IoMemory> memory_;
  const std::uint64_t slot_bytes_;
  const std::uint32_t slots_;
  const pid_t process_;
  mutable std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::vector<std::uint32_t> given_up_;
  std::vector<std::unique_ptr<CopyLane>> lanes_;
  std::vector<Parked> parked_;
  std::vector<const CopyLane*> lent_;
  int locked_on_ = -1;  // the GPU whose context page-locked the memory
  bool tried_to_lock_ = false;
};

}  // namespace gpunvme
