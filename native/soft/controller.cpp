#include "controller.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

namespace gpunvme::soft {
namespace {

constexpr std::uint64_t kSmallestBar = 16 << 10;

}  // namespace

Controller::Controller(const Options& options)
    : works_(std::make_unique<Works>(options)),
      device_(works_->device),
      admin_(works_->admin),
      crew_(works_->crew),
      registers_(options),
      process_(getpid()) {}

Controller::~Controller() {
  if (getpid() == process_) {
    stop();
  } else {
    (void)works_.release();
  }
}

std::uint64_t Controller::bar_nbytes() const {
  return std::max(kSmallestBar, std::bit_ceil(nvme::kRegDoorbells + device_.doorbells.nbytes()));
}

// ---- Registers

std::uint64_t Controller::read(std::uint64_t offset, unsigned nbytes) {
  const std::uint64_t all_ones = nbytes < 8 ? (std::uint64_t{1} << 8 * nbytes) - 1 : ~std::uint64_t{0};
  if (device_.gone.load()) return all_ones;
  const bool known_size = nbytes == 1 || nbytes == 2 || nbytes == 4 || nbytes == 8;
  if (!known_size || offset % std::min(nbytes, 4u) != 0 || offset + nbytes > bar_nbytes()) return 0;
  const std::lock_guard lock(mutex_);
  const auto word = static_cast<std::uint32_t>(offset & ~std::uint64_t{3});
  std::uint64_t value = read_word(word);
  if (nbytes == 8) value |= std::uint64_t{read_word(word + 4)} << 32;
  return value >> 8 * (offset % 4) & all_ones;
}

std::uint32_t Controller::read_word(std::uint32_t offset) {
  if (offset >= nvme::kRegDoorbells) return device_.doorbells.read(offset - nvme::kRegDoorbells);
  switch (offset) {
    case nvme::kRegCsts:
      return status();
    case nvme::kRegIntms:
    case nvme::kRegIntmc:
      return device_.interrupts.masked();
    default:
      return registers_.read(offset);
  }
}

std::uint32_t Controller::status() {
  become_ready();
  return (ready_ ? nvme::kCstsRdy : 0) | (device_.fatal.load() ? nvme::kCstsCfs : 0) |
         shutdown_ << nvme::kCstsShstShift;
}

void Controller::write(std::uint64_t offset, unsigned nbytes, std::uint64_t value) {
  if (device_.gone.load()) return;
  if ((nbytes != 4 && nbytes != 8) || offset % 4 != 0 || offset + nbytes > bar_nbytes()) return;
  for (unsigned done = 0; done < nbytes; done += 4) {
    const auto word = static_cast<std::uint32_t>(value >> 8 * done);
    if (offset + done >= nvme::kRegDoorbells) {
      write_doorbell(offset + done - nvme::kRegDoorbells, word);
    } else {
      const std::lock_guard lock(mutex_);
      write_word(static_cast<std::uint32_t>(offset + done), word);
    }
  }
}

void Controller::write_doorbell(std::uint64_t offset, std::uint32_t value) {
  if (!device_.doorbells.write(offset, value)) {
    device_.events.log_error(nvme::kCidNone, nvme::kCidNone, nvme::kStatusInvalidField, 0, 0);
    device_.events.raise(nvme::kEventError, nvme::kEventErrorInvalidDoorbellRegister, nvme::kLogError);
  }
  crew_.wake();
}

void Controller::write_word(std::uint32_t offset, std::uint32_t value) {
  switch (offset) {
    case nvme::kRegCc:
      write_cc(value);
      break;
    case nvme::kRegIntms:
      device_.interrupts.mask(value);
      break;
    case nvme::kRegIntmc:
      device_.interrupts.unmask(value);
      break;
    default:
      registers_.write(offset, value);
      break;
  }
}

void Controller::write_cc(std::uint32_t value) {
  const std::uint32_t before = registers_.cc();
  registers_.write(nvme::kRegCc, value);
  const std::uint32_t now = registers_.cc();
  if (nvme::cc_shn(now) != nvme::kCcShnNone && nvme::cc_shn(before) == nvme::kCcShnNone) shut_down();
  if (nvme::cc_en(before) && !nvme::cc_en(now)) disable();
  if (!nvme::cc_en(before) && nvme::cc_en(now)) enable();
  if (nvme::cc_en(before) && nvme::cc_en(now) && before != now) {
    // The sizes of I/O queue entries may also be said after enabling, before the first queue is made.
    const Crew::Pause pause(crew_);
    device_.cc = now;
  }
}

void Controller::enable() {
  const Crew::Pause pause(crew_);
  if (registers_.refusal() != nullptr || stopped_) {
    device_.fatal.store(true);
    return;
  }
  device_.cc = registers_.cc();
  device_.page_bytes = nvme::cc_page_bytes(registers_.cc());
  QueueMemory submissions;
  QueueMemory completions;
  const std::uint32_t sq_entries = nvme::aqa_asqs(registers_.aqa()) + 1;
  const std::uint32_t cq_entries = nvme::aqa_acqs(registers_.aqa()) + 1;
  submissions.reset(registers_.asq(), sq_entries, sizeof(nvme::Sqe));
  completions.reset(registers_.acq(), cq_entries, sizeof(nvme::Cqe));
  CompletionQueue& cq = device_.queues.cq(0);
  device_.queues.start_cq(cq, std::move(completions), cq_entries);
  cq.interrupts = true;  // the admin queue's are always enabled, on vector 0
  device_.queues.start_sq(device_.queues.sq(0), cq, std::move(submissions), sq_entries);
  shutdown_ = nvme::kShstNormal;
  starting_ = true;
  const std::chrono::milliseconds late = device_.faults->ready_delay();
  if (late.count() > 0) device_.count_fault(Fault::kShortReady);
  // Later than CAP.TO is never: drivers have given up by then.
  ready_at_ =
      late > std::chrono::milliseconds(500) * device_.options.to ? Clock::time_point::max() : Clock::now() + late;
  become_ready();
}

void Controller::become_ready() {
  if (!starting_ || Clock::now() < ready_at_) return;
  starting_ = false;
  ready_ = true;
  // Release: workers that see this see the admin queues.
  device_.serving.store(true, std::memory_order_release);
}

// A controller reset: when this returns, nothing is in flight and no host memory is touched.
void Controller::disable() {
  device_.serving.store(false);
  const Crew::Pause pause(crew_);
  device_.queues.reset();
  device_.held.clear();
  device_.events.reset();
  device_.interrupts.reset();
  device_.waiting_queues.store(0);
  device_.fatal.store(false);
  admin_.reset();
  ready_ = false;
  starting_ = false;
  if (nvme::cc_shn(registers_.cc()) == nvme::kCcShnNone) shutdown_ = nvme::kShstNormal;
}

void Controller::shut_down() {
  {
    const Crew::Pause pause(crew_);
    device_.serving.store(false);
  }
  if (!stopped_ && !device_.backend->read_only()) device_.backend->flush();
  shutdown_ = nvme::kShstComplete;
}

void Controller::reset() {
  if (device_.gone.load()) return;
  const std::lock_guard lock(mutex_);
  registers_.reset();
  disable();
}

// ---- Everything else

void Controller::map(std::uint64_t iova, std::uint64_t nbytes, void* address, bool readable, bool writable) {
  device_.iova.map(iova, nbytes, address, readable, writable);
}

void Controller::map_device(std::uint64_t iova, std::uint64_t nbytes, std::uint64_t address, bool readable,
                            bool writable, std::shared_ptr<DeviceMemory> device) {
  if (device == nullptr) throw std::invalid_argument("memory of a device is mapped with the device");
  device_.iova.map(iova, nbytes, reinterpret_cast<void*>(address), readable, writable, std::move(device));
}

void Controller::unmap(std::uint64_t iova, std::uint64_t nbytes) { device_.iova.unmap(iova, nbytes); }

void Controller::set_interrupt(std::uint32_t vector, int eventfd) {
  const Crew::Pause pause(crew_);
  device_.interrupts.set(vector, eventfd);
}

void Controller::inject(const std::string& faults, std::uint64_t seed) {
  auto plan = std::make_unique<FaultPlan>(faults, seed);
  const std::lock_guard lock(mutex_);
  if (device_.gone.exchange(false)) {
    registers_.reset();
    disable();
  }
  const Crew::Pause pause(crew_);
  device_.faults = std::move(plan);
}

std::map<std::string, std::uint64_t> Controller::stats() const {
  std::map<std::string, std::uint64_t> result;
  for (std::size_t i = 0; i < kCounts; ++i) result[kCountNames[i]] = device_.total(static_cast<Count>(i));
  result["dma_faults"] = device_.iova.refused();
  result["device_copies"] = device_.iova.device_copies();
  result["device_copied_bytes"] = device_.iova.device_bytes();
  result["device_copy_errors"] = device_.iova.device_errors();
  result["interrupts"] = device_.interrupts.signalled();
  for (std::size_t i = 0; i < kFaults; ++i) {
    result["fault." + std::string(fault_name(static_cast<Fault>(i)))] =
        device_.injected[i].load(std::memory_order_relaxed);
  }
  return result;
}

unsigned Controller::step() {
  if (device_.options.threads != 0) {
    throw std::invalid_argument("step() is for a controller with threads=0; this one has workers of its own");
  }
  return crew_.step();
}

void Controller::stop() {
  if (getpid() != process_) return;
  const std::lock_guard lock(mutex_);
  if (stopped_) return;
  stopped_ = true;
  crew_.stop();
  device_.serving.store(false);
  ready_ = false;
  starting_ = false;
  if (!device_.backend->read_only()) device_.backend->flush();
  device_.backend->close();
}

}  // namespace gpunvme::soft
