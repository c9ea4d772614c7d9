// A queue of the software controller as the host makes it for a GPU: queue pair, buffers, PRP lists.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gpunvme/device.h"
#include "soft_client.h"

namespace testing {

inline constexpr std::uint32_t kDeviceBlock = 512;

struct DeviceQueue {
  // Enables the controller, and makes queue 1 of it. `pages_per_slot` pages of 4096 bytes are what a command may have.
  DeviceQueue(Client& client, std::uint32_t entries, std::uint32_t pages_per_slot, std::uint64_t timeout_ns) {
    client.enable();
    pair = client.create(1, entries);
    std::memset(client.memory.at(pair.sq), 0, entries * 64);
    const std::uint32_t slots = entries - 1;
    const std::uint64_t data = client.memory.allocate(std::uint64_t{slots} * pages_per_slot * 4096);
    const std::uint64_t list = client.memory.allocate(std::uint64_t{slots} * 4096);
    for (std::uint32_t slot = 0; slot < slots; ++slot) {
      for (std::uint32_t page = 0; page < pages_per_slot; ++page) {
        pages.push_back(data + (std::uint64_t{slot} * pages_per_slot + page) * 4096);
        if (page != 0) client.memory.at<std::uint64_t>(list + slot * 4096)[page - 1] = pages.back();
      }
      lists.push_back(list + slot * 4096);
    }
    state.resize(gpunvme::QueuePair::memory_bytes({entries, entries, slots}) / gpunvme::kApart);
    auto* const doorbells = reinterpret_cast<char*>(client.controller.doorbells().address());
    queue.pair.initialise({entries, entries, slots}, client.memory.at(pair.sq), client.memory.at(pair.cq),
                          doorbells + 8, doorbells + 12, state.data());
    queue.data = client.memory.at<unsigned char>(data);
    queue.pages = pages.data();
    queue.lists = lists.data();
    queue.blocks = client.options.size / kDeviceBlock;
    queue.timeout_ns = timeout_ns;
    queue.page_bytes = 4096;
    queue.pages_per_slot = pages_per_slot;
    queue.block_bytes = kDeviceBlock;
    queue.max_blocks = pages_per_slot * 4096 / kDeviceBlock;
    queue.nsid = 1;
    queue.id = 1;
  }
  DeviceQueue(const DeviceQueue&) = delete;

  struct alignas(gpunvme::kApart) Unit {
    char bytes[gpunvme::kApart];
  };
  Pair pair;
  std::vector<std::uint64_t> pages;
  std::vector<std::uint64_t> lists;
  std::vector<Unit> state;
  gpunvme::GpuQueue queue{};
};

struct DeviceSetting {
  std::string faults = {};
  std::uint32_t entries = 16;
  std::uint32_t pages_per_slot = 1;
  std::uint64_t timeout_ns = 20'000'000'000;
  std::uint64_t seed = 1;
};

// A controller with 4 MiB of blocks and two threads, and a queue of it.
struct DeviceMachine {
  static constexpr std::uint64_t kBytes = 4 << 20;

  explicit DeviceMachine(const DeviceSetting& setting)
      : client(options(setting), 64 << 20),
        device(client, setting.entries, setting.pages_per_slot, setting.timeout_ns) {}
  static Options options(const DeviceSetting& setting) {
    Options options = in_memory(kBytes);
    options.threads = 2;
    options.faults = setting.faults;
    options.seed = setting.seed;
    return options;
  }

  Client client;
  DeviceQueue device;
  gpunvme::GpuQueue& queue = device.queue;
};

}  // namespace testing
