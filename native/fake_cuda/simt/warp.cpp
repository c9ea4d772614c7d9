#include "warp.h"

#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace simt {

namespace {

// Of the lanes that are at one place, all go on together, or now and then a part of them.
constexpr std::uint32_t kPartOneIn = 4;
// Lanes are told who is with them when all others of the warp wait; now and then before.
constexpr std::uint32_t kEarlyOneIn = 32;
// Before how many accesses another lane has its turn.
constexpr std::uint32_t kTurnOneIn = 12;

Lane* current = nullptr;

Lane& me() {
  if (current == nullptr) wrong("a function of device code was called outside of a kernel");
  return *current;
}

std::uint32_t bit(unsigned number) { return 1u << number; }
unsigned lowest(std::uint32_t bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }

std::uint32_t random_bit(std::uint32_t bits) {
  for (unsigned skip = random().below(static_cast<unsigned>(__builtin_popcount(bits))); skip != 0; --skip) {
    bits &= bits - 1;
  }
  return lowest(bits);
}

Path path_from(const Lane& lane, void* frame) {
  Path path;
  path.hash = 0xcbf29ce484222325;
  unsigned depth = 0;
  // A frame begins with the caller's, and where it goes on (x86-64 and AArch64 with frame pointers).
  for (auto** at = static_cast<void**>(frame); lane.fiber.holds(at); at = static_cast<void**>(at[0])) {
    path.hash = (path.hash ^ reinterpret_cast<std::uintptr_t>(at[1])) * 0x100000001b3;
    if (depth < Path::kKept) path.callers[depth++] = at[1];
    if (at[0] <= static_cast<void*>(at)) break;
  }
  return path;
}

const char* name_of(Collective what) {
  switch (what) {
    case Collective::kSync:
      return "__syncwarp";
    case Collective::kBallot:
      return "__ballot_sync";
    case Collective::kAny:
      return "__any_sync";
    case Collective::kAll:
      return "__all_sync";
    case Collective::kMatch:
      return "__match_any_sync";
    case Collective::kShuffle:
      return "__shfl_sync";
    case Collective::kShuffleUp:
      return "__shfl_up_sync";
    case Collective::kShuffleDown:
      return "__shfl_down_sync";
    case Collective::kShuffleXor:
      return "__shfl_xor_sync";
  }
  return "?";
}

std::string hexadecimal(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

std::string text_of(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

bool same_call(const Lane& one, const Lane& other) {
  return one.what == other.what && one.mask == other.mask && one.path.hash == other.path.hash;
}

void lane_main(void* argument) {
  auto& lane = *static_cast<Lane*>(argument);
  {
    // A copy of the parameters for this lane, as on a GPU each has its own.
    const std::function<void()>& call = lane.warp->block().launch().call;
    call();
  }
  lane.warp->ended(lane);
  for (;;) lane.fiber.leave();
}

}  // namespace

void wrong(const std::string& what) {
  std::fprintf(stderr, "fake libcuda: %s\n", what.c_str());
  std::abort();
}

std::string Lane::describe() const {
  std::string text = "lane " + std::to_string(number) + " (thread " + text_of(index) + " of block " +
                     text_of(warp->block().index()) + ") ";
  switch (at) {
    case At::kReady:
      return text + "runs";
    case At::kEnded:
      return text + "has ended";
    case At::kActiveMask:
      text += "is at __activemask()";
      break;
    case At::kBarrier:
      text += "is at __syncthreads()";
      break;
    case At::kCollective:
      text += std::string("is at ") + name_of(what) + "(" + hexadecimal(mask) + ")";
      break;
  }
  text += std::string(" in ") + place.function + ", " + place.file + ":" + std::to_string(place.line);
  for (void* const caller : path.callers) {
    Dl_info info{};
    if (caller == nullptr || dladdr(caller, &info) == 0) break;
    text += std::string("\n    called from ") + info.dli_fname + "+" +
            hexadecimal(reinterpret_cast<std::uintptr_t>(caller) - reinterpret_cast<std::uintptr_t>(info.dli_fbase));
  }
  return text;
}

// --- warps

Warp::Warp(Block& block, unsigned first_thread, unsigned lanes)
    : block_(block), exists_(lanes == kLanes ? ~0u : bit(lanes) - 1), ready_(exists_) {
  const Index& size = block.launch().block;
  for (unsigned number = 0; number < lanes; ++number) {
    const unsigned thread = first_thread + number;
    Lane& lane = lanes_.emplace_back();
    lane.warp = this;
    lane.number = number;
    lane.index = {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
    lane.fiber.start(&lane_main, &lane);
  }
}

void Warp::run(unsigned most) {
  for (unsigned turn = 0; turn < most && block_.error() == 0; ++turn) {
    if (asking_ != 0 && (ready_ == 0 || random().one_in(kEarlyOneIn))) tell_active();
    if (ready_ == 0) {
      for (const Lane& lane : lanes_) {
        // Who waits at a collective waits for lanes that wait, too.
        if (lane.at == Lane::At::kCollective) deadlock();
      }
      return;
    }
    current = &lane(random_bit(ready_));
    ++turns();
    current->fiber.enter();
    current = nullptr;
  }
}

// Some lanes that are at one __activemask() go on, and know of each other.
void Warp::tell_active() {
  const std::uint64_t where = lane(random_bit(asking_)).path.hash;
  std::uint32_t together = 0;
  for (std::uint32_t left = asking_; left != 0; left &= left - 1) {
    if (lane(lowest(left)).path.hash == where) together |= left & (~left + 1);
  }
  if (random().one_in(kPartOneIn)) {
    const std::uint32_t part = together & random().next();
    if (part != 0) together = part;
  }
  asking_ &= ~together;
  for (std::uint32_t left = together; left != 0; left &= left - 1) {
    lane(lowest(left)).result = together;
    ready(lane(lowest(left)));
  }
}

std::uint32_t Warp::active_mask(Lane& lane) {
  asking_ |= bit(lane.number);
  lane.at = Lane::At::kActiveMask;
  wait(lane);
  return static_cast<std::uint32_t>(lane.result);
}

std::uint64_t Warp::meet(Lane& lane) {
  lane.at = Lane::At::kCollective;
  if ((lane.mask & bit(lane.number)) == 0) wrong(lane.describe() + "\nwhose mask does not name it");
  for (std::uint32_t left = lane.mask & exists_; left != 0; left &= left - 1) {
    const Lane& other = this->lane(lowest(left));
    // Each waits for the other, at another place: neither ever comes.
    const bool waits = other.at == Lane::At::kCollective && (other.mask & bit(lane.number)) != 0;
    if (waits && !same_call(lane, other)) {
      wrong("lanes that name each other do not do the same:\n" + lane.describe() + "\n" + other.describe());
    }
  }
  if (complete(lane)) {
    turn();
  } else {
    wait(lane);
  }
  return lane.result;
}

// If all that the lane waits for have come, they go on.
bool Warp::complete(Lane& lane) {
  const std::uint32_t awaited = lane.mask & exists_ & ~ended_;
  for (std::uint32_t left = awaited; left != 0; left &= left - 1) {
    const Lane& other = this->lane(lowest(left));
    if (other.at != Lane::At::kCollective || !same_call(lane, other)) return false;
  }
  for (std::uint32_t left = awaited; left != 0; left &= left - 1) {
    Lane& other = this->lane(lowest(left));
    other.result = result_for(other);
  }
  for (std::uint32_t left = awaited; left != 0; left &= left - 1) ready(this->lane(lowest(left)));
  return true;
}

std::uint64_t Warp::result_for(const Lane& mine) {
  const std::uint32_t here = mine.mask & exists_ & ~ended_;
  std::uint32_t yes = 0;
  std::uint32_t alike = 0;
  for (std::uint32_t left = here; left != 0; left &= left - 1) {
    const unsigned number = lowest(left);
    if (lane(number).value != 0) yes |= bit(number);
    if (lane(number).value == mine.value) alike |= bit(number);
  }
  const int first = static_cast<int>(mine.number) / mine.width * mine.width;
  int source = static_cast<int>(mine.number);
  switch (mine.what) {
    case Collective::kSync:
      return 0;
    case Collective::kBallot:
      return yes;
    case Collective::kAny:
      return yes != 0 ? 1 : 0;
    case Collective::kAll:
      return yes == here ? 1 : 0;
    case Collective::kMatch:
      return alike;
    case Collective::kShuffle:
      source = first + (mine.argument & (mine.width - 1));
      break;
    case Collective::kShuffleUp:
      if (source - mine.argument >= first) source -= mine.argument;
      break;
    case Collective::kShuffleDown:
      if (source + mine.argument < first + mine.width) source += mine.argument;
      break;
    case Collective::kShuffleXor:
      if ((source ^ mine.argument) < first + mine.width) source ^= mine.argument;
      break;
  }
  if ((here & bit(static_cast<unsigned>(source))) != 0) return lane(static_cast<unsigned>(source)).value;
  if (mine.what == Collective::kShuffle) {
    wrong(mine.describe() + "\nasks for the value of lane " + std::to_string(source) + ", which does not take part");
  }
  return 0xBADBADBADBADBADB;  // undefined; often nobody looks at it
}

void Warp::ended(Lane& lane) {
  lane.at = Lane::At::kEnded;
  ended_ |= bit(lane.number);
  ready_ &= ~bit(lane.number);
  for (Lane& other : lanes_) {
    if (other.at == Lane::At::kCollective) complete(other);
  }
  block_.lane_ended();
}

void Warp::deadlock() {
  std::string text = std::string("kernel ") + block_.launch().kernel->name +
                     ": all lanes of a warp wait for each other, and none can go on:";
  for (const Lane& lane : lanes_) text += "\n" + lane.describe();
  wrong(text);
}

// --- what kernels call

Index thread_index() { return me().index; }
Index block_index() { return me().warp->block().index(); }
Index block_size() { return me().warp->block().launch().block; }
Index grid_size() { return me().warp->block().launch().grid; }
unsigned lane_number() { return me().number; }

std::uint64_t now_ns() {
  turn();
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

std::uint32_t random_number() { return random().next() >> 8; }

void turn() {
  if (current != nullptr && random().one_in(kTurnOneIn)) current->fiber.leave();
}

void sleep() {
  ++sleeps();
  me().fiber.leave();
}

void trap() {
  Lane& lane = me();
  lane.warp->block().trap();
  for (;;) lane.fiber.leave();
}

std::uint32_t active_mask(void* frame, Place place) {
  Lane& lane = me();
  lane.place = place;
  lane.path = path_from(lane, frame);
  return lane.warp->active_mask(lane);
}

std::uint64_t meet(Collective what, std::uint32_t mask, std::uint64_t value, int argument, int width, void* frame,
                   Place place) {
  Lane& lane = me();
  lane.what = what;
  lane.mask = mask;
  lane.value = value;
  lane.argument = argument;
  lane.width = width;
  lane.place = place;
  lane.path = path_from(lane, frame);
  return lane.warp->meet(lane);
}

int barrier(Barrier what, int value, void* frame, Place place) {
  Lane& lane = me();
  lane.barrier = what;
  lane.value = static_cast<std::uint64_t>(value != 0);
  lane.place = place;
  lane.path = path_from(lane, frame);
  return lane.warp->block().wait_at_barrier(lane);
}

}  // namespace simt
