// DMA of the software controller: refused where nothing is mapped, finished before memory goes away.
#include <sys/mman.h>

#include <stdexcept>

#include "soft_client.h"

using namespace testing;
using gpunvme::soft::IovaTable;

namespace {

template <typename Call>
std::string refusal(Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

std::byte* anonymous(std::size_t nbytes) {
  void* const memory = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  return static_cast<std::byte*>(memory);
}

}  // namespace

TEST(the_table_takes_whole_pages_once) {
  IovaTable table;
  std::byte* const memory = anonymous(1 << 20);
  table.map(0x10000, 0x4000, memory, true, true);
  CHECK(refusal([&] { table.map(0x13000, 0x1000, memory, true, true); }).find("mapped already") != std::string::npos);
  CHECK(!refusal([&] { table.map(0xF000, 0x2000, memory, true, true); }).empty());
  CHECK(!refusal([&] { table.map(0x0, 0x100000, memory, true, true); }).empty());
  CHECK(!refusal([&] { table.map(0x20001, 0x1000, memory, true, true); }).empty());
  CHECK(!refusal([&] { table.map(0x20000, 0x1001, memory, true, true); }).empty());
  CHECK(!refusal([&] { table.map(0x20000, 0x1000, memory + 8, true, true); }).empty());
  CHECK(!refusal([&] { table.map(0x20000, 0, memory, true, true); }).empty());
  CHECK(!refusal([&] { table.map(~std::uint64_t{0xFFF}, 0x2000, memory, true, true); }).empty());
  table.map(~std::uint64_t{0xFFF}, 0x1000, memory, true, true);  // the very last page is a page
  table.map(0x14000, 0x1000, memory, true, true);
  CHECK(refusal([&] { table.unmap(0x11000, 0x1000); }).find("split") != std::string::npos);
  CHECK(refusal([&] { table.unmap(0x50000, 0x1000); }).find("nothing is mapped") != std::string::npos);
  table.unmap(0x10000, 0x5000);
  CHECK(table.snapshot()->find(0x10000) == nullptr);
  CHECK(table.snapshot()->find(~std::uint64_t{0}) != nullptr);
  munmap(memory, 1 << 20);
}

TEST(accesses_outside_what_is_mapped_are_refused_and_recorded) {
  Client client(in_memory());
  client.enable();
  Pair io = client.create(1);
  std::byte* const memory = anonymous(16 << 10);
  client.controller.map(0x100000, 0x1000, memory, true, false);
  client.controller.map(0x101000, 0x1000, memory + 0x1000, false, true);
  const auto buffer = client.memory.allocate(4096);
  std::memset(memory, 0x5A, 16 << 10);
  std::memset(client.memory.at(buffer), 0x77, 4096);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmWrite, 0, 8, buffer)), nvme::kStatusSuccess);
  const auto fails = [&](std::uint8_t opcode, std::uint64_t iova, std::uint64_t prp2 = 0, std::uint32_t blocks = 8) {
    const nvme::Cqe cqe = client.run(io, client.io(opcode, 0, blocks, iova, prp2));
    return nvme::status_code(nvme::cqe_status(cqe.status)) == nvme::kStatusDataTransferError;
  };
  CHECK(fails(nvme::kNvmRead, 0));
  CHECK(fails(nvme::kNvmRead, 0x100000));   // the controller may only read there
  CHECK(fails(nvme::kNvmWrite, 0x101000));  // and only write there
  CHECK(fails(nvme::kNvmRead, 0x102000));
  CHECK(fails(nvme::kNvmRead, 0x101000, 0x102000, 16));  // the second page is not mapped: the first is not written
  CHECK(fails(nvme::kNvmRead, ~std::uint64_t{0xFFF}));
  for (int i = 0; i < 16 << 10; ++i) CHECK(memory[i] == std::byte{0x5A});
  const auto faults = client.controller.dma_faults();
  CHECK_EQ(faults.size(), 6u);
  CHECK(faults[0].iova == 0 && faults[0].nbytes == 4096 && faults[0].write);
  CHECK(faults[1].iova == 0x100000 && faults[1].write);
  CHECK(faults[2].iova == 0x101000 && !faults[2].write);
  CHECK_EQ(client.stat("dma_faults"), 6u);
  // What is allowed works.
  CHECK_EQ(client.code(io, client.io(nvme::kNvmWrite, 0, 8, 0x100000)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 8, 0x101000)), nvme::kStatusSuccess);
  // The list of faults has an end.
  for (int i = 0; i < 300; ++i) CHECK(fails(nvme::kNvmRead, 0x900000 + 4096 * static_cast<std::uint64_t>(i)));
  CHECK_EQ(client.controller.dma_faults().size(), IovaTable::kFaultsKept);
  CHECK_EQ(client.controller.dma_faults().back().iova, 0x900000u + 4096 * 299);
  CHECK_EQ(client.stat("dma_faults"), 306u);
  munmap(memory, 16 << 10);
}

TEST(data_may_lie_in_several_mappings) {
  Client client(in_memory());
  client.enable();
  Pair io = client.create(1);
  // Three mappings that meet as I/O virtual addresses and are apart, and in another order, in memory.
  std::byte* const memory = anonymous(1 << 20);
  client.controller.map(0x200000, 0x2000, memory + 0x8000, true, true);
  client.controller.map(0x202000, 0x1000, memory, true, true);
  client.controller.map(0x203000, 0x5000, memory + 0x20000, true, true);
  const auto list = client.memory.allocate(4096);
  for (std::uint64_t i = 0; i < 7; ++i) client.memory.at<std::uint64_t>(list)[i] = 0x201000 + i * 4096;
  fill(memory, 1 << 20, 1);
  const auto piece = [&](std::uint64_t i) {
    return i < 2 ? memory + 0x8000 + i * 4096 : i == 2 ? memory : memory + 0x20000 + (i - 3) * 4096;
  };
  std::vector<std::byte> before;
  for (std::uint64_t i = 0; i < 8; ++i) before.insert(before.end(), piece(i), piece(i) + 4096);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmWrite, 0, 64, 0x200000, list)), nvme::kStatusSuccess);
  std::memset(memory, 0, 1 << 20);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 64, 0x200000, list)), nvme::kStatusSuccess);
  for (std::uint64_t i = 0; i < 8; ++i) CHECK(std::memcmp(piece(i), before.data() + i * 4096, 4096) == 0);
  munmap(memory, 1 << 20);
}

TEST(queues_in_memory_that_is_not_mapped_are_fatal) {
  Client client(in_memory());
  client.enable();
  // Creating them is no access; the first doorbell is.
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 8, 0x5000)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 8, 0x6000, 1)), nvme::kStatusSuccess);
  client.write_doorbell(nvme::sq_tail_doorbell(1, 0), 1);
  client.until("CSTS.CFS", [&] { return nvme::csts_cfs(client.csts()); });
  client.disable();
  client.enable();
  // The same for completions.
  const auto sq = client.memory.allocate(4096);
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 8, 0x5000)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 8, sq, 1)), nvme::kStatusSuccess);
  client.write_doorbell(nvme::sq_tail_doorbell(1, 0), 1);
  client.until("CSTS.CFS", [&] { return nvme::csts_cfs(client.csts()); });
  CHECK_EQ(client.controller.dma_faults().size(), 2u);
  client.disable();
  client.enable();
}

TEST(queues_may_move_with_their_mappings) {
  Client client(in_memory());
  client.enable();
  std::byte* const memory = anonymous(1 << 20);
  client.controller.map(0x300000, 0x1000, memory, true, true);
  client.controller.map(0x301000, 0x1000, memory + 0x5000, true, true);  // the queue goes over both
  client.controller.map(0x400000, 0x1000, memory + 0x1000, true, true);
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 100, 0x400000)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 100, 0x300000, 1)), nvme::kStatusSuccess);
  const auto buffer = client.memory.allocate(4096);
  std::byte* completions = memory + 0x1000;
  for (std::uint16_t i = 0; i < 90; ++i) {
    if (i == 40) {
      // Remapped to another place: what was there goes along, and the old place is not touched any more.
      std::memcpy(memory + 0x9000, memory + 0x1000, 0x1000);
      client.controller.unmap(0x400000, 0x1000);
      std::memset(memory + 0x1000, 0x11, 0x1000);
      client.controller.map(0x400000, 0x1000, memory + 0x9000, true, true);
      completions = memory + 0x9000;
    }
    nvme::Sqe sqe = client.io(nvme::kNvmRead, 0, 1, buffer);
    sqe.cid = i;
    std::memcpy((i < 64 ? memory : memory + 0x5000 - 0x1000) + i * 64, &sqe, 64);
    client.write_doorbell(nvme::sq_tail_doorbell(1, 0), i + 1u);
    client.turn();
    nvme::Cqe cqe;
    std::memcpy(&cqe, completions + i * 16, 16);
    CHECK_EQ(cqe.cid, i);
    CHECK_EQ(cqe.status, 1);
    client.write_doorbell(nvme::cq_head_doorbell(1, 0), i + 1u);
  }
  for (int i = 0x1000; i < 0x2000; ++i) CHECK(memory[i] == std::byte{0x11});
  client.disable();
  munmap(memory, 1 << 20);
}

// Memory that was unmapped can be given back to the system at once, while commands to it are under way.
TEST(unmapping_waits_for_accesses_in_flight) {
  for (const unsigned threads : {1u, 2u}) {
    Options options = in_memory();
    options.threads = threads;
    options.mdts = 0;
    Client client(options, 4 << 20);
    client.enable();
    Pair io = client.create(1, 32);
    // Memory and blocks of its own for each command: workers execute them at the same time.
    constexpr std::uint64_t kCommands = 8;
    constexpr std::uint64_t kBytes = 256 << 10;
    constexpr std::uint64_t kIova = 0x8000'0000;
    std::uint64_t lists[kCommands];
    for (std::uint64_t i = 0; i < kCommands; ++i) {
      lists[i] = client.memory.allocate(4096);
      for (std::uint64_t page = 1; page < kBytes / 4096; ++page) {
        client.memory.at<std::uint64_t>(lists[i])[page - 1] = kIova + i * kBytes + page * 4096;
      }
    }
    std::uint64_t refused = 0;
    for (int round = 0; round < check::rounds(100); ++round) {
      std::byte* const memory = anonymous(kCommands * kBytes);
      client.controller.map(kIova, kCommands * kBytes, memory, true, true);
      for (std::uint64_t i = 0; i < kCommands; ++i) {
        client.submit(io, client.io(round % 2 == 0 ? nvme::kNvmRead : nvme::kNvmWrite, i * kBytes / 512, kBytes / 512,
                                    kIova + i * kBytes, lists[i]));
      }
      if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
      client.controller.unmap(kIova, kCommands * kBytes);
      munmap(memory, kCommands * kBytes);  // an access after this would be a segmentation fault
      for (std::uint64_t i = 0; i < kCommands; ++i) {
        const std::uint16_t code = nvme::status_code(nvme::cqe_status(client.wait(io).status));
        CHECK(code == nvme::kStatusSuccess || code == nvme::kStatusDataTransferError);
        refused += code != nvme::kStatusSuccess;
      }
    }
    CHECK_EQ(client.stat("dma_faults"), refused);
  }
}

// The worker is in the middle of a pass, with the table as it was at its start.
TEST(what_is_mapped_while_a_worker_is_busy_is_seen_by_its_next_command) {
  Options options = in_memory(64 << 20);
  options.threads = 1;
  options.mdts = 0;
  Client client(options);
  client.enable();
  Pair busy = client.create(1);
  Pair io = client.create(2);
  std::byte* const memory = anonymous(4096);
  const auto buffer = client.memory.allocate(4096);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t fetched = client.stat("commands");
    client.submit(busy, client.io(nvme::kNvmVerify, 0, 65536, buffer));  // milliseconds
    client.until("it is fetched", [&] { return client.stat("commands") > fetched; });
    client.controller.map(0x5000'0000, 4096, memory, true, true);
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 8, 0x5000'0000)), nvme::kStatusSuccess);
    client.wait(busy);
    client.controller.unmap(0x5000'0000, 4096);
  }
  munmap(memory, 4096);
}

// Mapped, used, unmapped, again and again: a command never sees the table without a mapping that was made before it.
TEST(what_is_mapped_before_the_doorbell_is_seen_after_it) {
  Options options = in_memory();
  options.threads = 2;
  Client client(options, 4 << 20);
  client.enable();
  Pair io = client.create(1);
  std::byte* const memory = anonymous(1 << 20);
  for (int round = 0; round < check::rounds(2000); ++round) {
    const std::uint64_t iova = 0x9000'0000 + 0x1000 * static_cast<std::uint64_t>(round % 256);
    client.controller.map(iova, 0x1000, memory + 0x1000 * (round % 256), true, true);
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 8, iova)), nvme::kStatusSuccess);
    // Some stay for a while, so that the table is not always the same.
    if (round % 2 == 0) client.controller.unmap(iova, 0x1000);
    if (round % 256 == 255) client.controller.unmap(0x9000'0000, 1 << 20);
  }
  CHECK_EQ(client.stat("dma_faults"), 0u);
  client.controller.stop();
  munmap(memory, 1 << 20);
}
