// The doorbells: BAR0 from 0x1000 on, memory that drivers of this and other processes write to and workers poll.
//
// A doorbell in memory cannot say that it was written, only what it holds. Those of queues that do not exist hold
// kUntouched, so that a write to one of them is seen all the same; a doorbell's value when read is not specified (NVMe
// over PCIe 1.0, 3.1.2).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace gpunvme::soft {

class Doorbells {
 public:
  static constexpr std::uint32_t kUntouched = 0xFFFFFFFF;

  // For queue ids 0 to `queues`, 4 << `dstrd` bytes apart. Throws Failure where there is no memory for them.
  Doorbells(unsigned queues, unsigned dstrd);
  ~Doorbells();
  Doorbells(const Doorbells&) = delete;
  Doorbells& operator=(const Doorbells&) = delete;

  int fd() const { return fd_; }
  std::byte* address() const { return address_; }
  std::uint64_t nbytes() const { return nbytes_; }  // a multiple of 4096
  // Queue ids whose doorbells are in this memory: more than there may be queues, because pages are whole.
  std::uint32_t ids() const { return ids_; }

  std::uint32_t* sq_tail_address(std::uint32_t queue) { return address_of(std::uint64_t{2} * queue); }
  std::uint32_t* cq_head_address(std::uint32_t queue) { return address_of(std::uint64_t{2} * queue + 1); }
  std::atomic_ref<std::uint32_t> sq_tail(std::uint32_t queue) { return atomic(sq_tail_address(queue)); }
  std::atomic_ref<std::uint32_t> cq_head(std::uint32_t queue) { return atomic(cq_head_address(queue)); }

  // A write by way of the register file: `offset` from 0x1000. False: there is no doorbell there.
  bool write(std::uint64_t offset, std::uint32_t value);
  std::uint32_t read(std::uint64_t offset);

 private:
  static std::atomic_ref<std::uint32_t> atomic(std::uint32_t* doorbell) {
    return std::atomic_ref<std::uint32_t>(*doorbell);
  }
  std::uint32_t* address_of(std::uint64_t index) {
    return reinterpret_cast<std::uint32_t*>(address_ + (index << (2 + dstrd_)));
  }

  unsigned dstrd_;
  std::uint64_t nbytes_ = 0;
  std::uint32_t ids_ = 0;
  int fd_ = -1;
  std::byte* address_ = nullptr;
};

}  // namespace gpunvme::soft
