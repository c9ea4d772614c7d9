// The buffer memory of one worker for one device: what bytes pass through on their way to a GPU, or where O_DIRECT's
// alignment forbids reading into the destination. Used by its worker's thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gpunvme {

class Slots {
 public:
  static constexpr std::size_t kBlock = 1u << 20;
  // Two pieces of 4 MiB a worker. A GPU's copy engine rests for about 3 us after each copy, which smaller pieces feel;
  // with larger ones the rings fall out of the CPU's cache (docs/performance.md).
  static constexpr int kBlocks = 8;

  explicit Slots(int device) : device_(device) {}
  ~Slots();
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  // Small and large pieces take from opposite ends, so that the large ones find adjoining blocks.
  enum class From { kBottom, kTop };
  // `count` adjoining blocks, or null when there are none free now. Throws std::bad_alloc.
  std::uint8_t* acquire(int count, From from);
  void release(std::uint8_t* slot, int count);

  int free_blocks() const;
  int adjoining_blocks() const;  // the most that acquire() would find

  // Page-locks the memory, once, in the GPU's context. Where the driver refuses, copies still work, slower; then
  // page_locked() stays false. Throws Failure (kCuda) where there is no such GPU.
  void page_lock();
  bool page_locked() const { return page_locked_; }

 private:
  void allocate();

  const int device_;
  std::uint8_t* memory_ = nullptr;
  std::uint8_t* reserved_ = nullptr;  // start of the mapping that memory_ is cut from
  std::uint32_t used_ = 0;            // one bit a block
  bool tried_to_lock_ = false;
  bool page_locked_ = false;
};

}  // namespace gpunvme
