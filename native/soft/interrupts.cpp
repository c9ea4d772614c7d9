#include "interrupts.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <string>

#include "failure.h"

namespace gpunvme::soft {

Interrupts::~Interrupts() {
  for (auto& fd : fds_) {
    if (fd.load(std::memory_order_relaxed) >= 0) close(fd.load(std::memory_order_relaxed));
  }
}

void Interrupts::set(std::uint32_t vector, int eventfd) {
  if (vector >= kVectors) {
    throw std::invalid_argument("interrupt vector " + std::to_string(vector) + ": there are " +
                                std::to_string(kVectors));
  }
  int copy = -1;
  if (eventfd >= 0) {
    copy = fcntl(eventfd, F_DUPFD_CLOEXEC, 3);
    if (copy < 0) throw file_failure(errno, "cannot use the interrupt's eventfd", "eventfd");
  }
  const int old = fds_[vector].exchange(copy);
  if (old >= 0) close(old);
}

void Interrupts::signal(std::uint16_t vector) {
  if (vector < 32 && (mask_.load() >> vector & 1) != 0) {
    kept_.fetch_or(1u << vector);
    // Unmasked since? Then one of the two sees the other, and the interrupt is not lost.
    if ((mask_.load() >> vector & 1) != 0) return;
    kept_.fetch_and(~(1u << vector));
  }
  write_to(vector);
}

void Interrupts::unmask(std::uint32_t vectors) {
  mask_.fetch_and(~vectors);
  const std::uint32_t kept = kept_.fetch_and(~vectors) & vectors;
  for (std::uint16_t vector = 0; vector < 32; ++vector) {
    if ((kept >> vector & 1) != 0) write_to(vector);
  }
}

void Interrupts::write_to(std::uint16_t vector) {
  const int fd = fds_[vector].load(std::memory_order_relaxed);
  if (fd < 0) return;
  const std::uint64_t one = 1;
  // A counter that is full has not been read for 2^64 interrupts: one more would change nothing.
  if (write(fd, &one, sizeof one) == sizeof one) signalled_.fetch_add(1, std::memory_order_relaxed);
}

void Interrupts::reset() {
  mask_.store(0);
  kept_.store(0);
}

}  // namespace gpunvme::soft
