// How one worker reaches memory: by the IOVA table, remembering the mapping of its latest access.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "iova_table.h"

namespace gpunvme::soft {

class Dma {
 public:
  explicit Dma(IovaTable& table) : table_(table) {}

  // Takes the newest snapshot. Called at the start of a worker's pass, never while addresses from before are in use
  // that the worker has announced to be done with.
  void refresh() {
    const IovaTable::Snapshot* const newest = table_.snapshot();
    // By generation: another snapshot may have been made at the address of one that is gone.
    if (newest->generation != generation_) {
      snapshot_ = newest;
      generation_ = newest->generation;
      last_ = nullptr;
    }
  }
  std::uint64_t generation() const { return generation_; }

  // The host memory at `iova`, and how much of it is contiguous from there (up to `nbytes`). Null: it is a device's
  // (see is_device), or refused, and recorded.
  std::byte* at(std::uint64_t iova, std::uint64_t nbytes, bool write, std::uint64_t* available) {
    if (last_ == nullptr || iova - last_->iova >= last_->nbytes) [[unlikely]] {
      if (!find(iova, nbytes, write)) return nullptr;
    }
    if (!(write ? last_->cpu_writes : last_->cpu_reads)) [[unlikely]] {
      is_device_ = last_->device != nullptr;
      if (!is_device_) table_.refuse(iova, nbytes, write);
      return nullptr;
    }
    const std::uint64_t offset = iova - last_->iova;
    *available = std::min(nbytes, last_->nbytes - offset);
    return last_->address + offset;
  }

  // Whether all of the range is in the mapping of the latest access.
  bool contains(std::uint64_t iova, std::uint64_t nbytes) const {
    return last_ != nullptr && iova >= last_->iova && nbytes <= last_->nbytes &&
           iova - last_->iova <= last_->nbytes - nbytes;
  }

  // After `at` returned null: the memory is a device's; nothing was refused.
  bool is_device() const { return is_device_; }

  // A piece of memory, host's or device's, that is contiguous in its mapping. Good until the worker announces that it
  // is done with this pass.
  struct Piece {
    const IovaTable::Mapping* mapping;
    std::uint64_t iova;
    std::uint64_t nbytes;
  };
  // What is at `iova`, up to `nbytes` of it. False: refused, and recorded.
  bool find(std::uint64_t iova, std::uint64_t nbytes, bool write, Piece& piece);
  // Copies a piece to or from memory of the worker's own. False: a device's copy failed, which is recorded.
  bool read(const Piece& piece, void* to);
  bool write(const Piece& piece, const void* from);

  // Copies memory, host's or device's; false: refused or failed, and recorded.
  bool read(std::uint64_t iova, void* to, std::uint64_t nbytes) {
    auto* target = static_cast<std::byte*>(to);
    while (nbytes > 0) {
      std::uint64_t available = 0;
      const std::byte* const from = at(iova, nbytes, false, &available);
      if (from == nullptr) return is_device_ && read_pieces(iova, target, nbytes);
      std::memcpy(target, from, available);
      target += available;
      iova += available;
      nbytes -= available;
    }
    return true;
  }
  // To memory of a device, in one copy.
  bool write(std::uint64_t iova, const void* from, std::uint64_t nbytes);

 private:
  bool read_pieces(std::uint64_t iova, std::byte* to, std::uint64_t nbytes);

  bool find(std::uint64_t iova, std::uint64_t nbytes, bool write) {
    last_ = snapshot_->find(iova);
    if (last_ == nullptr) {
      // It may have been mapped after this pass began: the doorbell that led here was rung after that, and was read
      // with acquire, so that the newer snapshot is visible now.
      refresh();
      last_ = snapshot_->find(iova);
    }
    if (last_ == nullptr) {
      is_device_ = false;
      table_.refuse(iova, nbytes, write);
    }
    return last_ != nullptr;
  }

  IovaTable& table_;
  const IovaTable::Snapshot* snapshot_ = nullptr;
  std::uint64_t generation_ = 0;
  const IovaTable::Mapping* last_ = nullptr;
  bool is_device_ = false;
};

}  // namespace gpunvme::soft
