// The software controller's I/O commands, and the status of every wrong one.
#include "soft_client.h"

using namespace testing;

namespace {

struct IoClient : Client {
  explicit IoClient(const Options& options = in_memory()) : Client(options) {
    enable();
    queue = create(1);
    from = memory.allocate(1 << 20, 65536);
    to = memory.allocate(1 << 20, 65536);
    list = memory.allocate(65536, 65536);
  }
  using Client::code;
  std::uint16_t code(const nvme::Sqe& sqe) { return Client::code(queue, sqe); }
  // A transfer of any size up to a list's 512 pages, to or from contiguous memory.
  std::uint16_t move(std::uint8_t opcode, std::uint64_t lba, std::uint32_t blocks, std::uint64_t at,
                     std::uint32_t nsid = 1, std::uint32_t flags = 0) {
    const std::uint64_t nbytes = std::uint64_t{blocks} * options.lba_bytes;
    nvme::Sqe sqe = io(opcode, lba, blocks, at, 0, nsid);
    sqe.cdw12 |= flags;
    if (nbytes > 2 * page()) {
      for (std::uint64_t i = 1; i * page() < nbytes; ++i) memory.at<std::uint64_t>(list)[i - 1] = at + i * page();
      sqe.prp2 = list;
    } else if (nbytes > page()) {
      sqe.prp2 = at + page();
    }
    return code(sqe);
  }
  bool same(std::uint64_t a, std::uint64_t b, std::size_t nbytes) {
    return std::memcmp(memory.at(a), memory.at(b), nbytes) == 0;
  }
  bool zero(std::uint64_t at, std::size_t nbytes) {
    const std::byte* bytes = memory.at(at);
    return std::all_of(bytes, bytes + nbytes, [](std::byte b) { return b == std::byte{0}; });
  }

  Pair queue;
  std::uint64_t from = 0;
  std::uint64_t to = 0;
  std::uint64_t list = 0;
};

}  // namespace

TEST(reads_return_what_was_written) {
  check::Random random(1);
  for (const unsigned threads : {0u, 1u, 3u}) {
    for (const std::uint32_t lba_bytes : {512u, 4096u}) {
      Options options = in_memory();
      options.threads = threads;
      options.lba_bytes = lba_bytes;
      IoClient client(options);
      const std::uint32_t most = (128 << 10) / lba_bytes;
      const std::uint64_t blocks = options.size / lba_bytes;
      for (int round = 0; round < 50; ++round) {
        const auto count = static_cast<std::uint32_t>(random.between(1, most));
        const std::uint64_t lba = random.below(blocks - count + 1);
        const std::size_t nbytes = std::size_t{count} * lba_bytes;
        fill(client.memory.at(client.from), nbytes, random.below(1 << 30));
        CHECK_EQ(client.move(nvme::kNvmWrite, lba, count, client.from), nvme::kStatusSuccess);
        CHECK_EQ(client.move(nvme::kNvmRead, lba, count, client.to), nvme::kStatusSuccess);
        CHECK(client.same(client.from, client.to, nbytes));
        CHECK_EQ(client.move(nvme::kNvmCompare, lba, count, client.from), nvme::kStatusSuccess);
        client.memory.at(client.from)[random.below(nbytes)] ^= std::byte{1};
        CHECK_EQ(client.move(nvme::kNvmCompare, lba, count, client.from), nvme::kStatusCompareFailure);
      }
    }
  }
}

TEST(the_last_block_is_there_and_the_next_is_not) {
  Options options = in_memory(1 << 20);
  options.namespaces = 2;
  IoClient client(options);
  const std::uint64_t blocks = (1 << 20) / 512 / 2;
  for (const std::uint8_t opcode :
       {nvme::kNvmRead, nvme::kNvmWrite, nvme::kNvmCompare, nvme::kNvmVerify, nvme::kNvmWriteZeroes}) {
    CHECK_EQ(client.move(nvme::kNvmWriteZeroes, 0, 1024, client.from), nvme::kStatusSuccess);
    std::memset(client.memory.at(client.from), 0, 4096);
    CHECK_EQ(client.move(opcode, blocks - 1, 1, client.from), nvme::kStatusSuccess);
    CHECK_EQ(client.move(opcode, blocks - 4, 4, client.from), nvme::kStatusSuccess);
    for (const std::uint64_t lba : {blocks, blocks - 3, std::uint64_t{1} << 32, ~std::uint64_t{0},
                                    ~std::uint64_t{0} - 2, std::uint64_t{1} << 55}) {
      CHECK_EQ(client.move(opcode, lba, 4, client.from), nvme::kStatusLbaOutOfRange);
    }
    for (const std::uint32_t nsid : {0u, 3u, 0xFFFFFFFFu}) {
      CHECK_EQ(client.move(opcode, 0, 1, client.from, nsid), nvme::kStatusInvalidNamespaceOrFormat);
    }
  }
}

TEST(namespaces_do_not_overlap) {
  Options options = in_memory(3 << 20);
  options.namespaces = 3;
  IoClient client(options);
  for (std::uint32_t nsid = 1; nsid <= 3; ++nsid) {
    std::memset(client.memory.at(client.from), static_cast<int>(nsid), 512);
    CHECK_EQ(client.move(nvme::kNvmWrite, 0, 1, client.from, nsid), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmWrite, 2047, 1, client.from, nsid), nvme::kStatusSuccess);
  }
  for (std::uint32_t nsid = 1; nsid <= 3; ++nsid) {
    std::memset(client.memory.at(client.from), static_cast<int>(nsid), 512);
    for (const std::uint64_t lba : {0u, 2047u}) {
      CHECK_EQ(client.move(nvme::kNvmRead, lba, 1, client.to, nsid), nvme::kStatusSuccess);
      CHECK(client.same(client.from, client.to, 512));
    }
  }
}

TEST(transfers_beyond_mdts_are_refused) {
  Options options = in_memory();
  options.mdts = 1;
  IoClient client(options);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 16, client.to), nvme::kStatusSuccess);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 17, client.to), nvme::kStatusInvalidField);
  CHECK_EQ(client.move(nvme::kNvmWrite, 0, 17, client.to), nvme::kStatusInvalidField);
  CHECK_EQ(client.move(nvme::kNvmCompare, 0, 17, client.to), nvme::kStatusInvalidField);
  // No data moves here.
  CHECK_EQ(client.move(nvme::kNvmWriteZeroes, 0, 17, client.to), nvme::kStatusSuccess);
  CHECK_EQ(client.move(nvme::kNvmVerify, 0, 17, client.to), nvme::kStatusSuccess);
  // The unit is the smallest page, whatever CC.MPS says.
  options.mpsmin = 1;
  IoClient larger(options);
  CHECK_EQ(larger.move(nvme::kNvmRead, 0, 32, larger.to), nvme::kStatusSuccess);
  CHECK_EQ(larger.move(nvme::kNvmRead, 0, 33, larger.to), nvme::kStatusInvalidField);
}

TEST(without_mdts_a_command_moves_as_much_as_it_can_say) {
  Options options = in_memory(64 << 20);
  options.mdts = 0;
  Client client(options, 96 << 20);
  client.enable();
  Pair queue = client.create(1);
  const std::uint64_t nbytes = std::uint64_t{65536} * 512;
  const auto data = client.memory.allocate(nbytes);
  const auto back = client.memory.allocate(nbytes);
  const auto lists = client.memory.allocate(64 << 12);
  const auto chain = [&](std::uint64_t to) {
    // Lists of 512 entries, each last one leading to the next list.
    std::uint64_t entry = 0;
    for (std::uint64_t i = 1; i < nbytes / 4096; ++i) {
      if (entry % 512 == 511 && i + 1 < nbytes / 4096) {
        *client.memory.at<std::uint64_t>(lists + entry * 8) = lists + (entry + 1) * 8;
        ++entry;
      }
      *client.memory.at<std::uint64_t>(lists + entry++ * 8) = to + i * 4096;
    }
  };
  fill(client.memory.at(data), nbytes, 3);
  chain(data);
  CHECK_EQ(client.code(queue, client.io(nvme::kNvmWrite, 7, 65536, data, lists)), nvme::kStatusSuccess);
  chain(back);
  CHECK_EQ(client.code(queue, client.io(nvme::kNvmRead, 7, 65536, back, lists)), nvme::kStatusSuccess);
  CHECK(std::memcmp(client.memory.at(data), client.memory.at(back), nbytes) == 0);
}

TEST(zeroes_and_deallocated_blocks_read_as_zeroes_and_neighbours_do_not) {
  for (const std::uint32_t flags : {0u, nvme::kRwDeac, nvme::kRwFua}) {
    IoClient client;
    fill(client.memory.at(client.from), 128 << 10, 5);
    CHECK_EQ(client.move(nvme::kNvmWrite, 100, 256, client.from), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmWriteZeroes, 103, 201, client.from, 1, flags), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmRead, 100, 256, client.to), nvme::kStatusSuccess);
    CHECK(client.same(client.from, client.to, 3 * 512));
    CHECK(client.zero(client.to + 3 * 512, 201 * 512));
    CHECK(client.same(client.from + 204 * 512, client.to + 204 * 512, 52 * 512));
  }
}

TEST(dataset_management_deallocates_the_ranges_given) {
  IoClient client;
  fill(client.memory.at(client.from), 128 << 10, 6);
  CHECK_EQ(client.move(nvme::kNvmWrite, 0, 256, client.from), nvme::kStatusSuccess);
  // Across a page boundary, so that PRP2 counts.
  const std::uint64_t ranges = client.list + 4096 - 16;
  const auto more = client.memory.allocate(4096);
  nvme::DsmRange* first = client.memory.at<nvme::DsmRange>(ranges);
  nvme::DsmRange* second = client.memory.at<nvme::DsmRange>(more);
  *first = {0, 5, 10};
  second[0] = {0, 0, 0};
  second[1] = {0, 100, 50};
  nvme::Sqe sqe{};
  sqe.opcode = nvme::kNvmDatasetManagement;
  sqe.nsid = 1;
  sqe.prp1 = ranges;
  sqe.prp2 = more;
  sqe.cdw10 = 2;
  // Without the attribute nothing happens.
  CHECK_EQ(client.code(sqe), nvme::kStatusSuccess);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 256, client.to), nvme::kStatusSuccess);
  CHECK(client.same(client.from, client.to, 128 << 10));
  sqe.cdw11 = nvme::kDsmAd;
  CHECK_EQ(client.code(sqe), nvme::kStatusSuccess);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 256, client.to), nvme::kStatusSuccess);
  CHECK(client.same(client.from, client.to, 10 * 512));
  CHECK(client.zero(client.to + 10 * 512, 5 * 512));
  CHECK(client.same(client.from + 15 * 512, client.to + 15 * 512, 35 * 512));
  CHECK(client.zero(client.to + 50 * 512, 100 * 512));
  CHECK(client.same(client.from + 150 * 512, client.to + 150 * 512, 106 * 512));
  // One bad range: none is deallocated.
  second[1] = {0, 1, client.options.size / 512};
  *first = {0, 5, 0};
  CHECK_EQ(client.code(sqe), nvme::kStatusLbaOutOfRange);
  second[1] = {0, 0xFFFFFFFF, ~std::uint64_t{0}};
  CHECK_EQ(client.code(sqe), nvme::kStatusLbaOutOfRange);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 5, client.to), nvme::kStatusSuccess);
  CHECK(client.same(client.from, client.to, 5 * 512));
  sqe.nsid = 2;
  CHECK_EQ(client.code(sqe), nvme::kStatusInvalidNamespaceOrFormat);
}

TEST(flush_takes_one_namespace_or_all) {
  IoClient client;
  nvme::Sqe sqe{};
  sqe.opcode = nvme::kNvmFlush;
  for (const std::uint32_t nsid : {1u, nvme::kNsidAll}) {
    sqe.nsid = nsid;
    CHECK_EQ(client.code(sqe), nvme::kStatusSuccess);
  }
  for (const std::uint32_t nsid : {0u, 2u}) {
    sqe.nsid = nsid;
    CHECK_EQ(client.code(sqe), nvme::kStatusInvalidNamespaceOrFormat);
  }
  CHECK_EQ(client.stat("flushes"), 2u);
}

TEST(sgls_and_fused_commands_are_refused) {
  IoClient client;
  for (const std::uint8_t flags : {0x01, 0x02, 0x40, 0x80, 0xC0}) {
    for (const std::uint8_t opcode : {nvme::kNvmRead, nvme::kNvmWrite, nvme::kNvmFlush, nvme::kNvmCompare}) {
      nvme::Sqe sqe = client.io(opcode, 0, 1, client.to);
      sqe.flags = flags;
      const std::uint16_t status = nvme::cqe_status(client.run(client.queue, sqe).status);
      CHECK_EQ(nvme::status_code(status), nvme::kStatusInvalidField);
      CHECK(nvme::status_dnr(status));
    }
  }
  CHECK_EQ(client.stat("errors"), 20u);
}
