// The software controller: an NVMe 2.0 controller in threads, seen through registers, doorbells and DMA as a drive is.
//
//   registers (controller)   what the host reads and writes; enabling, reset, shutdown
//   crew, worker             threads that poll doorbells, fetch, execute and complete
//   admin, io_commands       what commands do
//   iova_table, dma, prp     how host memory is reached
//   backend                  where blocks are kept
//
// It shares nothing with a driver but bytes in memory and registers, so that one built on it drives hardware too.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "admin.h"
#include "crew.h"
#include "device.h"
#include "registers.h"

namespace gpunvme::soft {

class Controller {
 public:
  // Starts the workers. Throws std::invalid_argument for an option, Failure for the image.
  explicit Controller(const Options& options);
  ~Controller();
  Controller(const Controller&) = delete;
  Controller& operator=(const Controller&) = delete;

  // Register access, by any thread: 4 or 8 bytes at a multiple of 4 (reads also 1 and 2, aligned). Anything else reads
  // as 0 and is not written. From 0x1000 on: doorbells.
  std::uint64_t read(std::uint64_t offset, unsigned nbytes);
  void write(std::uint64_t offset, unsigned nbytes, std::uint64_t value);

  const Doorbells& doorbells() const { return device_.doorbells; }
  std::uint64_t bar_nbytes() const;

  // Host memory for DMA. Whole pages of 4096 bytes; throws std::invalid_argument. After `unmap` nothing touches it.
  void map(std::uint64_t iova, std::uint64_t nbytes, void* address, bool readable, bool writable);
  // Memory of another device: `address` is what `device` knows it by. An emulation, see device_memory.h.
  void map_device(std::uint64_t iova, std::uint64_t nbytes, std::uint64_t address, bool readable, bool writable,
                  std::shared_ptr<DeviceMemory> device);
  void unmap(std::uint64_t iova, std::uint64_t nbytes);
  std::vector<IovaTable::Fault> dma_faults() const { return device_.iova.faults(); }

  // Interrupts of completion queues that have them enabled; -1: none. The descriptor is duplicated.
  void set_interrupt(std::uint32_t vector, int eventfd);

  // As a function-level reset of a PCI device. What is mapped stays mapped.
  void reset();

  // Another fault plan from now on; a device that was gone is back, as after a reset. Throws std::invalid_argument.
  void inject(const std::string& faults, std::uint64_t seed);

  std::map<std::string, std::uint64_t> stats() const;

  // Only with threads=0: one pass on the caller's thread; the number of commands fetched.
  unsigned step();

  // Ends the workers; the image is flushed and unlocked. Idempotent.
  void stop();

 private:
  std::uint32_t read_word(std::uint32_t offset);
  void write_word(std::uint32_t offset, std::uint32_t value);
  void write_doorbell(std::uint64_t offset, std::uint32_t value);
  void write_cc(std::uint32_t value);
  void enable();
  void disable();
  void shut_down();
  void become_ready();
  std::uint32_t status();

  struct Works {
    explicit Works(const Options& options) : device(options), admin(device), crew(device, admin) {}

    Device device;
    Admin admin;
    Crew crew;
  };

  // Left alone in a child process: its threads, its ring and its lock on the image are the parent's.
  std::unique_ptr<Works> works_;
  Device& device_;
  Admin& admin_;
  Crew& crew_;

  mutable std::mutex mutex_;  // registers and what follows
  Registers registers_;
  bool ready_ = false;
  bool starting_ = false;  // enabled, and ready at `ready_at_`
  Clock::time_point ready_at_{};
  std::uint32_t shutdown_ = nvme::kShstNormal;
  bool stopped_ = false;
  const pid_t process_;
};

}  // namespace gpunvme::soft
