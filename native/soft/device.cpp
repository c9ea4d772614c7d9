#include "device.h"

#include <bit>
#include <cstdio>

namespace gpunvme::soft {
namespace {

const Options& checked(const Options& options) {
  check(options);
  FaultPlan(options.faults, options.seed);
  return options;
}

std::vector<Namespace> divide(const Options& options, std::uint64_t size) {
  const std::uint64_t blocks = size / options.lba_bytes / options.namespaces;
  std::vector<Namespace> namespaces;
  for (unsigned i = 0; i < options.namespaces; ++i) {
    namespaces.push_back({i * blocks * options.lba_bytes, blocks});
  }
  return namespaces;
}

std::string make_serial(const Options& options, std::uint64_t identity) {
  if (!options.serial.empty()) return options.serial;
  char text[21];
  std::snprintf(text, sizeof text, "SOFT%016llX", static_cast<unsigned long long>(identity));
  return text;
}

}  // namespace

Device::Device(const Options& wanted)
    : options(checked(wanted)),
      backend(Backend::open(options)),
      namespaces(divide(options, backend->size())),
      lba_shift(static_cast<unsigned>(std::countr_zero(options.lba_bytes))),
      most_bytes(options.mdts == 0 ? ~std::uint64_t{0} : std::uint64_t{4096} << options.mpsmin << options.mdts),
      several(options.threads > 1),
      serial(make_serial(options, backend->identity())),
      doorbells(options.queues, options.dstrd),
      queues(options.queues, doorbells),
      faults(std::make_unique<FaultPlan>(options.faults, options.seed)),
      write_cache(options.vwc) {}

std::uint64_t Device::total(Count what) const {
  std::uint64_t sum = 0;
  for (const Counters& one : counters) sum += one.get(static_cast<std::size_t>(what));
  return sum;
}

}  // namespace gpunvme::soft
