// Transfers over queues: cut, sent, put together again, against a drive in memory.
#include <numeric>

#include "ram_device.h"

using namespace testing;
using State = IoRun::State;

namespace {

constexpr std::uint8_t kWrite = 1;
constexpr std::uint8_t kRead = 2;

void check_disk(const RamDevice& device, std::uint64_t lba, const std::uint8_t* memory, std::uint64_t nbytes) {
  CHECK_EQ(first_difference(memory, device.disk.data() + (lba - device.first_lba) * device.lba_bytes, nbytes), -1);
}

std::shared_ptr<IoStaging> make_staging(RamDevice& device, const Memory& memory, std::uint64_t slot_bytes,
                                        bool scattered = false) {
  return std::make_shared<IoStaging>(device.map(memory, scattered), slot_bytes);
}

}  // namespace

TEST(a_range_is_read_and_written) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(1, 16);
  Memory memory(1 * kMiB);
  const auto mapped = device.map(memory);
  IoRun read(run_options(device), queues, nullptr);
  read.add_range(100, 2000, mapped, 512);
  CHECK_EQ(drive(read, device), State::kDone);
  check_disk(device, 100, memory.data() + 512, 2000 * 512);
  CHECK_EQ(read.counts().mapped_bytes, 2000u * 512);
  CHECK_EQ(read.counts().bounced_host_bytes, 0u);
  CHECK(read.failures().empty());

  fill(memory.data(), 0, memory.size(), 9);
  IoRun write(run_options(device, kWrite), queues, nullptr);
  write.add_range(7, 1000, mapped, 4);
  CHECK_EQ(drive(write, device), State::kDone);
  check_disk(device, 7, memory.data() + 4, 1000 * 512);
  CHECK_EQ(write.drive(0), State::kDone);
  CHECK_EQ(queues[0]->in_flight(), 0u);
}

TEST(mdts_is_never_exceeded_and_0_means_65536_blocks) {
  for (const std::uint64_t max_bytes : {4096u, 8192u, 131072u}) {
    RamDevice device(512, 4096);
    device.max_bytes = max_bytes;
    const auto queues = device.add_queues(2, 8);
    Memory memory(2 * kMiB);
    IoRun run(run_options(device), queues, nullptr);
    run.add_range(1, 4000, device.map(memory, true), 0);
    CHECK_EQ(drive(run, device), State::kDone);
    check_disk(device, 1, memory.data(), 4000 * 512);
    CHECK_EQ(device.most_bytes, max_bytes);
    CHECK_EQ(device.commands, (4000 * 512 + max_bytes - 1) / max_bytes);
  }
  RamDevice device(512, 70000);
  std::vector<std::shared_ptr<IoQueue>> queues{device.add_queue(4, 20)};
  Memory memory(70000 * 512);
  IoRun run(run_options(device), queues, nullptr);
  run.add_range(0, 70000, device.map(memory), 0);
  CHECK_EQ(drive(run, device), State::kDone);
  check_disk(device, 0, memory.data(), memory.size());
  CHECK_EQ(device.most_bytes, 65536u * 512);
  CHECK_EQ(device.commands, 2u);
}

TEST(list_memory_that_is_too_small_splits_commands) {
  RamDevice device(512, 8192);
  std::vector<std::shared_ptr<IoQueue>> queues{device.add_queue(4, 0)};
  Memory memory(4 * kMiB);
  IoRun run(run_options(device), queues, nullptr);
  run.add_range(0, 100, device.map(memory), 512);
  CHECK_EQ(drive(run, device), State::kDone);
  check_disk(device, 0, memory.data() + 512, 100 * 512);
  CHECK_EQ(device.most_bytes, 2u * 4096);
}

TEST(lbas_of_64_bits) {
  const std::uint64_t first = (std::uint64_t{1} << 40) + 5;
  RamDevice device(512, 1000, 4096, first);
  const auto queues = device.add_queues(1, 8);
  Memory memory(64 * kKiB);
  IoRun run(run_options(device), queues, nullptr);
  run.add_range(first + 3, 128, device.map(memory), 0);
  CHECK_EQ(drive(run, device), State::kDone);
  check_disk(device, first + 3, memory.data(), 64 * kKiB);
}

TEST(a_gather_is_packed_in_order) {
  check::Random random(2);
  for (const std::uint64_t blocks : {1u, 3u, 8u, 40u}) {
    RamDevice device(512, 4096);
    device.max_bytes = 8192;
    const auto queues = device.add_queues(3, 9);
    std::vector<std::uint64_t> lbas(500);
    for (auto& lba : lbas) lba = random.below(4096 - blocks);
    Memory memory(lbas.size() * blocks * 512 + 4);
    IoRun run(run_options(device), queues, nullptr);
    run.add_gather(lbas.data(), lbas.size(), blocks, device.map(memory, true), 4);
    CHECK_EQ(drive(run, device), State::kDone);
    for (std::size_t i = 0; i < lbas.size(); ++i) {
      check_disk(device, lbas[i], memory.data() + 4 + i * blocks * 512, blocks * 512);
    }
    // Queues share the work.
    for (const auto& queue : queues) CHECK(queue->pair().state().completed.load_relaxed() > 0);
  }
}

TEST(memory_that_is_not_mapped_goes_through_staging) {
  RamDevice device(512, 8192);
  device.max_bytes = 16384;
  const auto queues = device.add_queues(2, 16);
  Memory memory(3 * kMiB, 1);
  Memory staging_memory(256 * kKiB);
  const auto staging = make_staging(device, staging_memory, 64 * kKiB);
  const auto host = IoMemory::host(memory.address(), memory.size());
  IoRun read(run_options(device), queues, staging);
  read.add_range(5, 6000, host, 3);
  CHECK_EQ(drive(read, device), State::kDone);
  check_disk(device, 5, memory.data() + 3, 6000 * 512);
  CHECK_EQ(read.counts().bounced_host_bytes, 6000u * 512);
  CHECK_EQ(read.counts().mapped_bytes, 0u);
  CHECK_EQ(staging->free_slots(), 4u);

  fill(memory.data(), 0, memory.size(), 9);
  IoRun write(run_options(device, kWrite), queues, staging);
  write.add_range(11, 5000, host, 1);
  CHECK_EQ(drive(write, device), State::kDone);
  check_disk(device, 11, memory.data() + 1, 5000 * 512);
  CHECK_EQ(staging->free_slots(), 4u);

  std::vector<std::uint64_t> lbas(3000);
  std::iota(lbas.rbegin(), lbas.rend(), 17);
  IoRun gather(run_options(device), queues, staging);
  gather.add_gather(lbas.data(), lbas.size(), 1, host, 0);
  CHECK_EQ(drive(gather, device), State::kDone);
  for (std::size_t i = 0; i < lbas.size(); ++i) check_disk(device, lbas[i], memory.data() + i * 512, 512);
}

TEST(memory_that_is_not_aligned_to_a_dword_goes_through_staging) {
  RamDevice device(512, 1000);
  const auto queues = device.add_queues(1, 16);
  Memory memory(256 * kKiB);
  Memory staging_memory(64 * kKiB);
  const auto staging = make_staging(device, staging_memory, 16 * kKiB);
  const auto mapped = device.map(memory);
  for (std::uint64_t shift = 0; shift < 5; ++shift) {
    IoRun run(run_options(device), queues, staging);
    run.add_range(shift, 300, mapped, shift);
    CHECK_EQ(drive(run, device), State::kDone);
    check_disk(device, shift, memory.data() + shift, 300 * 512);
    CHECK_EQ(run.counts().bounced_host_bytes, shift % 4 == 0 ? 0u : 300 * 512);
  }
}

TEST(pieces_bounce_only_where_prps_cannot_say_them) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(1, 16);
  Memory memory(1 * kMiB);
  Memory staging_memory(64 * kKiB);
  const auto staging = make_staging(device, staging_memory, 16 * kKiB);
  const auto mapped = device.map(memory);
  // 100 bytes are missing for a block, which lies in two pieces; before and behind it all is direct.
  IoRun run(run_options(device), queues, staging);
  run.add_pieces(0, {{mapped, 0, 65536 - 100}, {mapped, 131072, 4096 + 100}, {mapped, 262144 + 4, 512}});
  CHECK_EQ(drive(run, device), State::kDone);
  check_disk(device, 0, memory.data(), 65536 - 100);
  CHECK_EQ(first_difference(memory.data() + 131072, device.disk.data() + 65536 - 100, 4096 + 100), -1);
  CHECK_EQ(first_difference(memory.data() + 262144 + 4, device.disk.data() + 65536 + 4096, 512), -1);
  CHECK_EQ(run.counts().bounced_host_bytes, 512u);
  CHECK_EQ(run.counts().mapped_bytes, 65536u + 4096);
}

TEST(flush_write_zeroes_trim_and_compare_go_as_they_are) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(1, 16);
  Memory memory(64 * kKiB);
  Memory staging_memory(64 * kKiB);
  const auto staging = make_staging(device, staging_memory, 16 * kKiB);
  const auto mapped = device.map(memory);
  IoRun run(run_options(device), queues, nullptr);
  run.add_simple(0, {}, std::nullopt);
  run.add_simple(8, {10, 0, 99, 0, 0, 0}, std::nullopt);
  run.add_simple(9, {0, 4, 0, 0, 0, 0}, IoRun::Span{mapped, 0, 16});
  CHECK_EQ(drive(run, device), State::kDone);
  CHECK_EQ(device.commands, 3u);
  CHECK(std::all_of(device.disk.begin() + 5120, device.disk.begin() + 5120 + 51200, [](auto b) { return b == 0; }));
  const auto trim = std::find_if(device.seen.begin(), device.seen.end(), [](const Sqe& s) { return s.opcode == 9; });
  CHECK_EQ(trim->cdw11, 4u);

  put(device.disk, 0, pattern(4096, 3), 0, 4096);
  for (const bool differs : {false, true}) {
    // From memory that has to be bounced.
    fill(memory.data() + 1, 0, 4096, 3);
    if (differs) memory.data()[4000] ^= 1;
    IoRun compare(run_options(device), queues, staging);
    compare.add_simple(5, {0, 0, 7, 0, 0, 0}, IoRun::Span{mapped, 1, 4096});
    CHECK_EQ(drive(compare, device), State::kDone);
    const auto failures = compare.failures();
    CHECK_EQ(failures.size(), differs ? 1u : 0u);
    if (!differs) continue;
    CHECK_EQ(failures[0].status, 0x4285);
    CHECK_EQ(failures[0].blocks, 8u);
  }
}

TEST(tiny_queues_wait_for_room) {
  RamDevice device(512, 4096);
  device.max_bytes = 512;
  for (const std::uint32_t depth : {2u, 3u, 5u}) {
    const auto queues = device.add_queues(1, depth);
    Memory memory(1 * kMiB);
    IoRun run(run_options(device), queues, nullptr);
    run.add_range(0, 2048, device.map(memory), 0);
    CHECK_EQ(drive(run, device), State::kDone);
    check_disk(device, 0, memory.data(), memory.size());
    CHECK(device.most_waiting <= depth - 1);
    device.most_waiting = 0;
  }
}

TEST(a_depth_is_kept) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(2, 64);
  Memory memory(1 * kMiB);
  auto options = run_options(device);
  options.max_bytes = 512;
  options.depth = 5;
  IoRun run(options, queues, nullptr);
  run.add_range(0, 2048, device.map(memory), 0);
  for (;;) {
    const State state = run.drive(0);
    CHECK(queues[0]->in_flight() + queues[1]->in_flight() <= 5);
    if (state == State::kDone) break;
    device.step();
  }
}

TEST(bad_requests_are_refused_before_anything_is_sent) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(1, 8);
  Memory memory(8192);
  const auto mapped = device.map(memory);
  IoRun run(run_options(device), queues, nullptr);
  const auto refused = [](const auto& function) {
    try {
      function();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refused([&] { run.add_range(0, 17, mapped, 0); }));
  CHECK(refused([&] { run.add_range(0, 1, mapped, 8192 - 511); }));
  CHECK(refused([&] { run.add_range(0, 1, IoMemory::host(memory.address(), 8192), 0); }));
  CHECK(refused([&] { run.add_range(0, 1, mapped, 2); }));
  CHECK(refused([&] { run.add_pieces(0, {{mapped, 0, 500}}); }));
  CHECK(refused([&] { IoRun(run_options(device), {}, nullptr); }));
  IoQueue::Options options;
  options.depth = 1;
  CHECK(refused([&] { IoQueue queue(options); }));
  run.add_range(0, 0, mapped, 0);
  CHECK_EQ(run.drive(0), State::kDone);
  CHECK_EQ(device.step(), 0);
}

TEST(pieces_that_need_staging_and_have_none_fail_when_they_are_met) {
  RamDevice device(512, 4096);
  const auto queues = device.add_queues(1, 8);
  Memory memory(64 * kKiB);
  const auto mapped = device.map(memory);
  IoRun run(run_options(device), queues, nullptr);
  run.add_pieces(0, {{mapped, 0, 512 + 4}, {mapped, 8192, 512 - 4}});
  bool refused = false;
  try {
    drive(run, device);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  CHECK_EQ(queues[0]->in_flight(), 0u);
}

TEST(random_transfers_on_random_shapes) {
  for (int round = 0; round < check::rounds(60); ++round) {
    check::Random random(1000 + static_cast<std::uint64_t>(round));
    const std::uint32_t lba_bytes = random.pick({512u, 4096u});
    const std::uint32_t page_bytes = random.pick({4096u, 4096u, 8192u, 65536u});
    const std::uint64_t blocks = 2 * kMiB / lba_bytes;
    RamDevice device(lba_bytes, blocks, page_bytes);
    device.max_bytes = random.pick({0u, 4096u, 8192u, 65536u, 131072u});
    std::vector<std::shared_ptr<IoQueue>> queues;
    for (std::uint64_t i = random.between(1, 3); i > 0; --i) {
      queues.push_back(device.add_queue(static_cast<std::uint32_t>(random.between(2, 40)),
                                        static_cast<std::uint32_t>(random.between(1, 3))));
    }
    Memory memory(4 * kMiB, random.pick({0u, 512u, 4u, 1u}));
    Memory staging_memory(512 * kKiB);
    const auto staging = make_staging(device, staging_memory, random.pick({4096u, 16384u, 131072u}), random.one_in(2));
    const std::vector<std::shared_ptr<IoMemory>> kinds{device.map(memory), device.map(memory, true),
                                                       IoMemory::host(memory.address(), memory.size())};
    const auto any_memory = [&] { return kinds[random.below(kinds.size())]; };
    const bool writing = random.one_in(3);
    if (writing) fill(memory.data(), 0, memory.size(), random.below(1000));
    Bytes expected_disk = device.disk;
    Bytes expected(memory.data(), memory.data() + memory.size());
    const auto expect = [&](std::uint64_t lba, std::uint64_t at, std::uint64_t offset, std::uint64_t nbytes) {
      const std::uint64_t on_disk = lba * lba_bytes + at;
      if (writing) {
        put(expected_disk, on_disk, expected, offset, nbytes);
      } else {
        put(expected, offset, device.disk, on_disk, nbytes);
      }
    };
    IoRun run(run_options(device, writing ? kWrite : kRead), queues, staging);
    std::vector<std::vector<std::uint64_t>> lists;
    // Works touch parts of their own, on the drive and in memory, so that their order does not matter.
    for (std::uint64_t part = 0; part < 4; ++part) {
      const std::uint64_t first = part * blocks / 4;
      const std::uint64_t here = part * kMiB;
      switch (random.below(3)) {
        case 0: {
          const std::uint64_t count = random.between(1, blocks / 4);
          const std::uint64_t offset = here + random.below(4097);
          run.add_range(first, count, any_memory(), offset);
          expect(first, 0, offset, count * lba_bytes);
          break;
        }
        case 1: {
          const std::uint64_t each = random.between(1, 5);
          auto& lbas = lists.emplace_back(random.between(1, 20));
          const std::uint64_t offset = here + random.below(4097);
          for (std::size_t i = 0; i < lbas.size(); ++i) {
            lbas[i] = first + (writing ? i * each : random.below(blocks / 4 - each));
            expect(lbas[i], 0, offset + i * each * lba_bytes, each * lba_bytes);
          }
          run.add_gather(lbas.data(), lbas.size(), each, any_memory(), offset);
          break;
        }
        case 2: {
          std::vector<IoRun::Span> pieces;
          std::uint64_t total = 0;
          std::uint64_t offset = here;
          while (pieces.size() < 12) {
            offset += random.one_in(2) ? 0 : random.below(9000);
            if (random.one_in(2)) offset = (offset + 4095) / 4096 * 4096;
            std::uint64_t nbytes = random.one_in(2) ? random.between(1, 3) * 4096 : random.between(1, 9000);
            if (pieces.size() == 11) nbytes = lba_bytes - total % lba_bytes;
            pieces.push_back({any_memory(), offset, nbytes});
            expect(first, total, offset, nbytes);
            offset += nbytes;
            total += nbytes;
          }
          run.add_pieces(first, pieces);
          break;
        }
      }
    }
    CHECK_EQ(drive(run, device), State::kDone);
    CHECK(run.failures().empty());
    CHECK_EQ(first_difference(memory, expected), -1);
    CHECK_EQ(first_difference(device.disk, expected_disk), -1);
    CHECK_EQ(staging->free_slots(), staging->slots());
    for (const auto& queue : queues) CHECK_EQ(queue->in_flight(), 0u);
  }
}
