#include "doorbells.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "failure.h"

namespace gpunvme::soft {

Doorbells::Doorbells(unsigned queues, unsigned dstrd) : dstrd_(dstrd) {
  const std::uint64_t pair = std::uint64_t{8} << dstrd;
  nbytes_ = ((queues + 1) * pair + 4095) / 4096 * 4096;
  ids_ = static_cast<std::uint32_t>(nbytes_ / pair);
  fd_ = memfd_create("nvme-doorbells", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd_ < 0) throw file_failure(errno, "cannot make memory for doorbells", "memfd");
  void* memory = MAP_FAILED;
  // Sealed: whoever is given the descriptor cannot take the memory away from under the workers.
  if (ftruncate(fd_, static_cast<off_t>(nbytes_)) == 0 &&
      fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
    memory = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  }
  if (memory == MAP_FAILED) {
    const int error = errno;
    close(fd_);
    throw file_failure(error, "cannot make memory for doorbells", "memfd");
  }
  address_ = static_cast<std::byte*>(memory);
  for (std::uint32_t id = 0; id < ids_; ++id) {
    sq_tail(id).store(kUntouched, std::memory_order_relaxed);
    cq_head(id).store(kUntouched, std::memory_order_relaxed);
  }
}

Doorbells::~Doorbells() {
  munmap(address_, nbytes_);
  close(fd_);
}

bool Doorbells::write(std::uint64_t offset, std::uint32_t value) {
  const std::uint64_t stride = std::uint64_t{4} << dstrd_;
  if (offset % stride != 0 || offset + 4 > nbytes_) return false;
  // Release: the entries that the driver wrote before are visible to the worker that sees this value.
  atomic(address_of(offset / stride)).store(value, std::memory_order_release);
  return true;
}

std::uint32_t Doorbells::read(std::uint64_t offset) {
  if (offset % 4 != 0 || offset + 4 > nbytes_) return 0;
  return atomic(reinterpret_cast<std::uint32_t*>(address_ + offset)).load(std::memory_order_relaxed);
}

}  // namespace gpunvme::soft
