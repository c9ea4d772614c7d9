#include "iova_table.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace gpunvme::soft {
namespace {

std::string describe(std::uint64_t iova, std::uint64_t nbytes) {
  char text[64];
  std::snprintf(text, sizeof text, "IOVA 0x%llx, %llu bytes", static_cast<unsigned long long>(iova),
                static_cast<unsigned long long>(nbytes));
  return text;
}

void check_range(std::uint64_t iova, std::uint64_t nbytes) {
  if (nbytes == 0 || iova % IovaTable::kPage != 0 || nbytes % IovaTable::kPage != 0) {
    throw std::invalid_argument(describe(iova, nbytes) + ": mappings are whole pages of 4096 bytes");
  }
  if (iova + (nbytes - 1) < iova)
    throw std::invalid_argument(describe(iova, nbytes) + ": it ends past the last address");
}

}  // namespace

const IovaTable::Mapping* IovaTable::Snapshot::find(std::uint64_t iova) const {
  auto after = std::upper_bound(mappings.begin(), mappings.end(), iova,
                                [](std::uint64_t wanted, const Mapping& mapping) { return wanted < mapping.iova; });
  if (after == mappings.begin()) return nullptr;
  const Mapping& mapping = *--after;
  return iova - mapping.iova < mapping.nbytes ? &mapping : nullptr;
}

IovaTable::IovaTable() : current_(new Snapshot) {}

IovaTable::~IovaTable() { delete current_.load(std::memory_order_relaxed); }

IovaTable::Reader& IovaTable::add_reader() { return readers_.emplace_back(); }

void IovaTable::publish(std::vector<Mapping> mappings) {
  const Snapshot* const old = current_.load(std::memory_order_relaxed);
  auto next = std::make_unique<Snapshot>();
  next->generation = old->generation + 1;
  next->mappings = std::move(mappings);
  // Release: a worker that sees the snapshot sees what is in it. Sequentially consistent: see Reader::go_online.
  current_.store(next.release(), std::memory_order_seq_cst);
  retired_.emplace_back(old);
}

std::uint64_t IovaTable::oldest_announced() const {
  std::uint64_t oldest = Reader::kOffline;
  for (const Reader& reader : readers_) oldest = std::min(oldest, reader.announced());
  return oldest;
}

void IovaTable::reclaim() {
  // A snapshot was replaced by the one of the next generation: who has announced that has let go of it.
  const std::uint64_t oldest = oldest_announced();
  while (!retired_.empty() && retired_.front()->generation < oldest) retired_.pop_front();
}

void IovaTable::map(std::uint64_t iova, std::uint64_t nbytes, void* address, bool readable, bool writable,
                    std::shared_ptr<DeviceMemory> device) {
  check_range(iova, nbytes);
  if (reinterpret_cast<std::uintptr_t>(address) % kPage != 0) {
    throw std::invalid_argument(describe(iova, nbytes) + ": the memory does not begin at a page");
  }
  const std::lock_guard lock(mutex_);
  std::vector<Mapping> mappings = current_.load(std::memory_order_relaxed)->mappings;
  const auto place =
      std::lower_bound(mappings.begin(), mappings.end(), iova,
                       [](const Mapping& mapping, std::uint64_t wanted) { return mapping.iova < wanted; });
  const bool hits_next = place != mappings.end() && place->iova - iova < nbytes;
  const bool hits_previous = place != mappings.begin() && iova - std::prev(place)->iova < std::prev(place)->nbytes;
  if (hits_next || hits_previous) {
    throw std::invalid_argument(describe(iova, nbytes) + ": some of it is mapped already; unmap that first");
  }
  mappings.insert(place, {iova, nbytes, static_cast<std::byte*>(address), readable, writable, std::move(device)});
  publish(std::move(mappings));
  reclaim();
}

void IovaTable::unmap(std::uint64_t iova, std::uint64_t nbytes) {
  check_range(iova, nbytes);
  const std::lock_guard lock(mutex_);
  std::vector<Mapping> mappings = current_.load(std::memory_order_relaxed)->mappings;
  const std::size_t before = mappings.size();
  const std::uint64_t last = iova + nbytes - 1;
  for (const Mapping& mapping : mappings) {
    const std::uint64_t mapping_last = mapping.iova + mapping.nbytes - 1;
    const bool touches = mapping.iova <= last && mapping_last >= iova;
    const bool inside = mapping.iova >= iova && mapping_last <= last;
    if (touches && !inside) {
      throw std::invalid_argument(describe(iova, nbytes) + ": it would split the mapping of " +
                                  describe(mapping.iova, mapping.nbytes) + "; unmap what was mapped");
    }
  }
  std::erase_if(mappings, [&](const Mapping& mapping) { return mapping.iova >= iova && mapping.iova <= last; });
  if (mappings.size() == before) throw std::invalid_argument(describe(iova, nbytes) + ": nothing is mapped there");
  publish(std::move(mappings));
  const std::uint64_t generation = current_.load(std::memory_order_relaxed)->generation;
  // Workers that poll get there within microseconds; one that waits for a drive takes as long as the drive.
  for (int round = 0; oldest_announced() < generation; ++round) {
    if (round < 1000) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  reclaim();
}

void IovaTable::refuse(std::uint64_t iova, std::uint64_t nbytes, bool write) {
  refused_.fetch_add(1, std::memory_order_relaxed);
  record(iova, nbytes, write);
}

void IovaTable::copy_failed(std::uint64_t iova, std::uint64_t nbytes, bool write) {
  device_errors_.fetch_add(1, std::memory_order_relaxed);
  record(iova, nbytes, write);
}

void IovaTable::record(std::uint64_t iova, std::uint64_t nbytes, bool write) {
  const std::lock_guard lock(faults_mutex_);
  if (faults_.size() == kFaultsKept) faults_.pop_front();
  faults_.push_back({iova, nbytes, write});
}

std::vector<IovaTable::Fault> IovaTable::faults() const {
  const std::lock_guard lock(faults_mutex_);
  return {faults_.begin(), faults_.end()};
}

}  // namespace gpunvme::soft
