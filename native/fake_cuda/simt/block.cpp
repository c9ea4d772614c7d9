// Blocks: their shared memory, and the barrier of their threads.
#include <cstring>
#include <map>

#include "warp.h"

namespace simt {

namespace {

// What is in shared memory before anybody has written it.
constexpr int kFreshByte = 0xA5;

// Whose values are in a kernel's shared variables now.
std::map<std::byte*, Block*>& owners() {
  static auto* const of_sections = new std::map<std::byte*, Block*>;
  return *of_sections;
}

}  // namespace

Block::Block(const Launch& launch, Index index)
    : launch_(launch),
      index_(index),
      threads_(launch.block.x * launch.block.y * launch.block.z),
      live_(threads_),
      shared_(launch.kernel->shared_bytes, std::byte{kFreshByte}) {
  for (unsigned first = 0; first < threads_; first += kLanes) {
    warps_.emplace_back(*this, first, threads_ - first < kLanes ? threads_ - first : kLanes);
  }
}

Block::~Block() {
  const auto found = owners().find(launch_.kernel->shared);
  if (found != owners().end() && found->second == this) owners().erase(found);
}

void Block::take_shared_memory() {
  std::byte* const shared = launch_.kernel->shared;
  if (shared_.empty()) return;
  Block*& owner = owners()[shared];
  if (owner == this) return;
  if (owner != nullptr) std::memcpy(owner->shared_.data(), shared, shared_.size());
  std::memcpy(shared, shared_.data(), shared_.size());
  owner = this;
}

int Block::run(unsigned most) {
  take_shared_memory();
  const std::size_t first = random().below(static_cast<unsigned>(warps_.size()));
  for (std::size_t i = 0; i < warps_.size() && error_ == 0; ++i) warps_[(first + i) % warps_.size()].run(most);
  return error_;
}

int Block::wait_at_barrier(Lane& lane) {
  lane.at = Lane::At::kBarrier;
  if (!at_barrier_.empty()) {
    const Lane& other = *at_barrier_.front();
    if (other.barrier != lane.barrier || other.path.hash != lane.path.hash) {
      wrong("threads of a block are at two barriers:\n" + lane.describe() + "\n" + other.describe());
    }
  }
  at_barrier_.push_back(&lane);
  if (at_barrier_.size() == live_) {
    open_barrier();
  } else {
    lane.warp->wait(lane);
  }
  return static_cast<int>(lane.result);
}

void Block::open_barrier() {
  int count = 0;
  for (const Lane* const lane : at_barrier_) count += lane->value != 0 ? 1 : 0;
  const bool all = count == static_cast<int>(at_barrier_.size());
  const std::vector<Lane*> lanes = std::move(at_barrier_);
  at_barrier_.clear();
  for (Lane* const lane : lanes) {
    const Barrier what = lane->barrier;
    lane->result = static_cast<std::uint64_t>(what == Barrier::kCount ? count
                                              : what == Barrier::kAnd ? static_cast<int>(all)
                                                                      : static_cast<int>(count != 0));
    lane->warp->ready(*lane);
  }
}

void Block::lane_ended() {
  --live_;
  if (live_ != 0 && at_barrier_.size() == live_) open_barrier();
}

}  // namespace simt
