#include "slots.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

#include "cuda_driver.h"
#include "failure.h"

namespace gpunvme {
namespace {

constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kMemory = Slots::kBlock * Slots::kBlocks;

constexpr std::size_t kPage = 4096;

}  // namespace

void Slots::allocate() {
  void* reserved = mmap(nullptr, kMemory + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) throw std::bad_alloc();
  reserved_ = static_cast<std::uint8_t*>(reserved);
  const auto address = reinterpret_cast<std::uintptr_t>(reserved_);
  memory_ = reserved_ + ((kHugePage - address % kHugePage) % kHugePage);
  // Huge pages make both the first touch and page-locking several times cheaper.
  madvise(memory_, kMemory, MADV_HUGEPAGE);
  // A forked child must not inherit pages that a GPU or a drive may still write: copy-on-write would move ours.
  madvise(memory_, kMemory, MADV_DONTFORK);
}

Slots::~Slots() {
  if (reserved_ == nullptr) return;
  if (page_locked_) {
    try {
      CudaContextScope scope(device_);
      cuda().MemHostUnregister(memory_);
    } catch (const Failure&) {
      // The context is gone, and with it what it knew of the memory.
    }
  }
  munmap(reserved_, kMemory + kHugePage);
}

std::uint8_t* Slots::acquire(int count, From from) {
  if (memory_ == nullptr) allocate();
  const std::uint32_t wanted = (1u << count) - 1;
  for (int step = 0; step + count <= kBlocks; ++step) {
    const int first = from == From::kBottom ? step : kBlocks - count - step;
    if ((used_ & (wanted << first)) == 0) {
      used_ |= wanted << first;
      return memory_ + static_cast<std::size_t>(first) * kBlock;
    }
  }
  return nullptr;
}

void Slots::release(std::uint8_t* slot, int count) {
  const auto first = static_cast<int>(static_cast<std::size_t>(slot - memory_) / kBlock);
  used_ &= ~(((1u << count) - 1) << first);
}

int Slots::free_blocks() const { return kBlocks - std::popcount(used_); }

int Slots::adjoining_blocks() const {
  int most = 0;
  for (int block = 0, run = 0; block < kBlocks; ++block) {
    run = (used_ >> block & 1u) != 0 ? 0 : run + 1;
    most = std::max(most, run);
  }
  return most;
}

void Slots::page_lock() {
  if (tried_to_lock_) return;
  CudaContextScope scope(device_);
  tried_to_lock_ = true;
  if (memory_ == nullptr) allocate();
  // Touched first, not by MADV_POPULATE_WRITE: that takes the address space's lock, which other workers' page-locking
  // then waits for; page faults do not (Linux 6.4).
  for (std::size_t at = 0; at < kMemory; at += kPage) static_cast<volatile std::uint8_t*>(memory_)[at] = 0;
  // For this GPU only: for all of them it would take longer with each.
  page_locked_ = cuda().MemHostRegister(memory_, kMemory, 0) == kCudaSuccess;
}

}  // namespace gpunvme
