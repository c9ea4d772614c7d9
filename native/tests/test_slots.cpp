// A worker's buffer memory.
#include <set>

#include "check.h"
#include "fake.h"
#include "files.h"
#include "slots.h"

using namespace testing;
using gpunvme::Slots;

TEST(blocks_come_from_both_ends_and_never_overlap) {
  Slots slots(0);
  CHECK_EQ(slots.free_blocks(), Slots::kBlocks);
  std::uint8_t* const bottom = slots.acquire(1, Slots::From::kBottom);
  std::uint8_t* const top = slots.acquire(1, Slots::From::kTop);
  CHECK_EQ(top - bottom, static_cast<std::ptrdiff_t>((Slots::kBlocks - 1) * Slots::kBlock));
  CHECK_EQ(reinterpret_cast<std::uintptr_t>(bottom) % 4096, 0u);
  CHECK_EQ(slots.free_blocks(), Slots::kBlocks - 2);
  CHECK(slots.acquire(Slots::kBlocks - 1, Slots::From::kBottom) == nullptr);
  std::uint8_t* const middle = slots.acquire(Slots::kBlocks - 2, Slots::From::kBottom);
  CHECK(middle == bottom + Slots::kBlock);
  CHECK(slots.acquire(1, Slots::From::kTop) == nullptr);
  // All of it is writable.
  std::memset(bottom, 1, Slots::kBlocks * Slots::kBlock);
  slots.release(middle, Slots::kBlocks - 2);
  slots.release(bottom, 1);
  slots.release(top, 1);
  CHECK_EQ(slots.free_blocks(), Slots::kBlocks);
  CHECK(slots.acquire(Slots::kBlocks, Slots::From::kTop) == bottom);
}

TEST(fragments_are_no_room_for_a_large_piece) {
  Slots slots(0);
  std::vector<std::uint8_t*> blocks;
  for (int i = 0; i < Slots::kBlocks; ++i) blocks.push_back(slots.acquire(1, Slots::From::kBottom));
  for (std::size_t i = 0; i < blocks.size(); i += 2) slots.release(blocks[i], 1);
  CHECK_EQ(slots.free_blocks(), Slots::kBlocks / 2);
  CHECK(slots.acquire(2, Slots::From::kBottom) == nullptr);
  slots.release(blocks[5], 1);
  CHECK(slots.acquire(3, Slots::From::kTop) == blocks[4]);
}

TEST(random_blocks_against_a_model) {
  check::Random random(1);
  for (int round = 0; round < check::rounds(20); ++round) {
    Slots slots(0);
    std::uint8_t* base = slots.acquire(Slots::kBlocks, Slots::From::kBottom);
    slots.release(base, Slots::kBlocks);
    std::vector<bool> used(Slots::kBlocks, false);
    std::vector<std::pair<int, int>> held;
    for (int step = 0; step < 400; ++step) {
      if (random.one_in(2) && !held.empty()) {
        const std::size_t which = random.below(held.size());
        const auto [first, count] = held[which];
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
        slots.release(base + static_cast<std::size_t>(first) * Slots::kBlock, count);
        for (int i = first; i < first + count; ++i) used[static_cast<std::size_t>(i)] = false;
      } else {
        const int count = static_cast<int>(random.between(1, 8));
        int longest = 0;
        for (int i = 0, run = 0; i < Slots::kBlocks; ++i) {
          run = used[static_cast<std::size_t>(i)] ? 0 : run + 1;
          longest = std::max(longest, run);
        }
        std::uint8_t* const got = slots.acquire(count, random.pick({Slots::From::kBottom, Slots::From::kTop}));
        CHECK_EQ(got != nullptr, count <= longest);
        if (got == nullptr) continue;
        const int first = static_cast<int>(static_cast<std::size_t>(got - base) / Slots::kBlock);
        for (int i = first; i < first + count; ++i) {
          CHECK(!used[static_cast<std::size_t>(i)]);
          used[static_cast<std::size_t>(i)] = true;
        }
        held.emplace_back(first, count);
      }
      CHECK_EQ(slots.free_blocks(), static_cast<int>(std::count(used.begin(), used.end(), false)));
    }
  }
}

TEST(page_locked_once_and_given_back) {
  const Fake& fake = Fake::instance();
  fake.reset();
  const std::uint64_t before = fake.counters().page_locked_bytes;
  {
    // Whatever context is current where they are made, and where they are destroyed.
    gpunvme::CudaContextScope scope(0);
    Slots slots(1);
    CHECK(!slots.page_locked());
    slots.page_lock();
    slots.page_lock();
    CHECK(slots.page_locked());
    CHECK_EQ(fake.counters().page_locked_bytes, before + Slots::kBlocks * Slots::kBlock);
    CHECK_EQ(fake.calls("cuMemHostRegister"), 1u);
  }
  CHECK_EQ(fake.counters().page_locked_bytes, before);
}

TEST(where_page_locking_is_refused_the_memory_works_all_the_same) {
  const Fake& fake = Fake::instance();
  fake.reset();
  fake.set_page_lock_limit(0);
  gpunvme::CudaContextScope scope(0);
  Slots slots(0);
  slots.page_lock();
  slots.page_lock();
  CHECK(!slots.page_locked());
  CHECK_EQ(fake.calls("cuMemHostRegister"), 1u);
  CHECK(slots.acquire(Slots::kBlocks, Slots::From::kBottom) != nullptr);
  fake.reset();
}
