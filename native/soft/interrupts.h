// Interrupt vectors as eventfds.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace gpunvme::soft {

class Interrupts {
 public:
  static constexpr std::uint32_t kVectors = 2048;  // as many as MSI-X knows

  Interrupts() {
    for (auto& fd : fds_) fd.store(-1, std::memory_order_relaxed);
  }
  ~Interrupts();
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;

  // `eventfd` is duplicated; -1: none. While no worker runs. Throws Failure, std::invalid_argument.
  void set(std::uint32_t vector, int eventfd);

  // The completions that this is about were stored before, and the system call orders them before the interrupt.
  void signal(std::uint16_t vector);
  std::uint64_t signalled() const { return signalled_.load(std::memory_order_relaxed); }

  // INTMS and INTMC: vectors 0 to 31, of pin-based and MSI interrupts. A masked one is signalled when it is unmasked.
  std::uint32_t masked() const { return mask_.load(std::memory_order_relaxed); }
  void mask(std::uint32_t vectors) { mask_.fetch_or(vectors); }
  void unmask(std::uint32_t vectors);
  void reset();

 private:
  void write_to(std::uint16_t vector);

  std::array<std::atomic<int>, kVectors> fds_;
  std::atomic<std::uint32_t> mask_{0};
  std::atomic<std::uint32_t> kept_{0};  // masked when they were to be signalled
  std::atomic<std::uint64_t> signalled_{0};
};

}  // namespace gpunvme::soft
