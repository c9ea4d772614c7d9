#include "options.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {
namespace {

void within(const char* name, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": it may be " + std::to_string(least) +
                              " to " + std::to_string(most));
}

}  // namespace

void check(const Options& options) {
  if (options.lba_bytes != 512 && options.lba_bytes != 4096) {
    throw std::invalid_argument("lba=" + std::to_string(options.lba_bytes) + ": it may be 512 or 4096");
  }
  within("mdts", options.mdts, 0, 16);
  within("queues", options.queues, 1, 1023);
  within("dstrd", options.dstrd, 0, 15);
  within("threads", options.threads, 0, 64);
  within("mqes", options.mqes, 2, nvme::kQueueEntriesMost);
  within("mpsmin", options.mpsmin, 0, 8);
  within("mpsmax", options.mpsmax, options.mpsmin, 15);
  within("namespaces", options.namespaces, 1, 1024);
  within("to", options.to, 1, 255);
  if (!options.path && options.size == 0) {
    throw std::invalid_argument("a controller in memory needs size=, for example size=64MiB");
  }
  if (!options.path && options.read_only) {
    throw std::invalid_argument("read_only is for images; memory that cannot be written would hold nothing");
  }
  const bool printable =
      std::all_of(options.serial.begin(), options.serial.end(), [](char c) { return c >= 0x20 && c < 0x7F; });
  if (options.serial.size() > 20 || !printable) {
    throw std::invalid_argument("serial=" + options.serial + ": it may be up to 20 printable ASCII characters");
  }
}

std::string describe_bytes(std::uint64_t nbytes) {
  static constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(nbytes);
  int unit = 0;
  for (; value >= 1024 && unit < 6; ++unit) value /= 1024;
  if (unit == 0) return std::to_string(nbytes) + " bytes";
  char text[80];
  std::snprintf(text, sizeof text, "%.1f %s (%llu bytes)", value, kUnits[unit],
                static_cast<unsigned long long>(nbytes));
  return text;
}

}  // namespace gpunvme::soft
