// What a run is asked to do.
#include <stdexcept>
#include <string>

#include "failure.h"
#include "io_run.h"

namespace gpunvme {

Work& IoRun::add_work(std::uint8_t opcode) {
  check_process();
  Work& work = works_.emplace_back();
  work.opcode = opcode;
  return work;
}

// Checks what is common to all works, and gets ready for the GPU.
void IoRun::accept(const Work& work) {
  bool bounces = false;
  for (const Work::Piece& piece : work.pieces) {
    if (piece.memory->kind() == IoMemory::Kind::kMapped) {
      if (piece.memory->extent(piece.offset, 1).iova % 4 != 0) bounces = true;
      continue;
    }
    bounces = true;
    if (piece.memory->kind() != IoMemory::Kind::kGpu) continue;
    if (device_ >= 0 && device_ != piece.memory->device()) {
      throw std::invalid_argument("a transfer moves memory of one GPU, not of several");
    }
    device_ = piece.memory->device();
  }
  if (bounces && staging_ == nullptr) {
    throw std::invalid_argument(
        "memory that the controller does not reach, or that is not aligned to 4 bytes, needs staging memory");
  }
  if (device_ < 0) return;
  if (lane_ == nullptr) lane_ = staging_->borrow_lane(device_);
  staging_->page_lock(device_);
  counts_.page_locked = staging_->page_locked();
  if (options_.stream) lane_->order_behind(reinterpret_cast<CUstream>(*options_.stream));
}

void IoRun::add_range(std::uint64_t lba, std::uint64_t blocks, std::shared_ptr<IoMemory> memory, std::uint64_t offset) {
  add_pieces(lba, {{std::move(memory), offset, blocks * options_.lba_bytes}});
}

void IoRun::add_gather(const std::uint64_t* lbas, std::uint64_t count, std::uint64_t blocks,
                       std::shared_ptr<IoMemory> memory, std::uint64_t offset) {
  std::lock_guard lock(mutex_);
  Work& work = add_work(options_.opcode);
  try {
    work.lbas = lbas;
    work.item_bytes = blocks * options_.lba_bytes;
    work.add_piece(std::move(memory), offset, count * work.item_bytes);
    accept(work);
    if (work.nbytes == 0) works_.pop_back();
  } catch (...) {
    works_.pop_back();
    throw;
  }
}

void IoRun::add_pieces(std::uint64_t lba, const std::vector<Span>& pieces) {
  std::lock_guard lock(mutex_);
  Work& work = add_work(options_.opcode);
  try {
    work.lba = lba;
    for (const Span& piece : pieces) work.add_piece(piece.memory, piece.offset, piece.nbytes);
    if (work.nbytes % options_.lba_bytes != 0) {
      throw std::invalid_argument("pieces of " + std::to_string(work.nbytes) +
                                  " bytes together are not whole blocks of " + std::to_string(options_.lba_bytes));
    }
    work.item_bytes = work.nbytes;
    accept(work);
    if (work.nbytes == 0) works_.pop_back();
  } catch (...) {
    works_.pop_back();
    throw;
  }
}

void IoRun::add_simple(std::uint8_t opcode, const std::array<std::uint32_t, 6>& cdw10_to_15,
                       std::optional<Span> memory) {
  std::lock_guard lock(mutex_);
  Work& work = add_work(opcode);
  try {
    work.simple = true;
    work.cdw = cdw10_to_15;
    if (memory) work.add_piece(memory->memory, memory->offset, memory->nbytes);
    work.item_bytes = work.nbytes;
    // It cannot be cut: where it must be bounced, one slot holds it.
    const bool direct = work.nbytes == 0 || work.is_direct(0, work.nbytes, options_.page_bytes);
    if (!direct && staging_ != nullptr && work.nbytes > staging_->slot_bytes()) {
      throw std::invalid_argument("a command of " + std::to_string(work.nbytes) +
                                  " bytes does not fit into a slot of staging memory");
    }
    if (options_.max_bytes != 0 && work.nbytes > options_.max_bytes) {
      throw std::invalid_argument("a command of " + std::to_string(work.nbytes) + " bytes is larger than MDTS allows");
    }
    accept(work);
  } catch (...) {
    works_.pop_back();
    throw;
  }
}

}  // namespace gpunvme
