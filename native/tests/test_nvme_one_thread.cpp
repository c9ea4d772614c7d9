// Driver and software controller in turns, on one thread: no race, no clock, the same every time. What the driver's
// side and the controller's side of a command cost in instructions is counted here, too
// (benchmarks/nvme_instructions.py runs the test called "commands" under callgrind; benchmarks/hot_image.py asks it for
// blocks of an image).
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "io_memory.h"
#include "io_queue.h"
#include "io_run.h"
#include "soft_client.h"

namespace {

using gpunvme::IoMemory;
using gpunvme::IoQueue;
using gpunvme::IoRun;
using testing::Client;
using testing::Pair;

constexpr std::uint32_t kBlock = 4096;
constexpr std::uint64_t kBlocks = 1024;

// `image`: the file behind the controller; null: memory.
gpunvme::soft::Options on_this_thread(const char* image, std::uint64_t nbytes) {
  gpunvme::soft::Options options;
  options.size = nbytes;
  if (image != nullptr) options.path = image;
  options.lba_bytes = kBlock;
  options.threads = 0;
  return options;
}

struct Stepped {
  explicit Stepped(std::uint32_t depth, const char* image = nullptr, std::uint64_t blocks = kBlocks)
      : client(on_this_thread(image, blocks * kBlock), 16 << 20), data(kBlocks * kBlock) {
    client.enable();
    Pair pair = client.create(1, depth);
    const std::uint64_t lists = client.memory.allocate(std::uint64_t{depth} * 4096);
    std::vector<std::uint64_t> iovas;
    for (std::uint32_t i = 0; i < depth; ++i) iovas.push_back(lists + std::uint64_t{i} * 4096);
    const auto doorbells = reinterpret_cast<std::uint64_t>(client.controller.doorbells().address());
    queue = std::make_shared<IoQueue>(IoQueue::Options{
        .sq_address = reinterpret_cast<std::uint64_t>(client.memory.at(pair.sq)),
        .cq_address = reinterpret_cast<std::uint64_t>(client.memory.at(pair.cq)),
        .depth = depth,
        .sq_doorbell_address = doorbells + 8,
        .cq_doorbell_address = doorbells + 12,
        .id = 1,
        .prp_address = reinterpret_cast<std::uint64_t>(client.memory.at(lists)),
        .prp_iovas = iovas,
        .page_bytes = 4096,
        .prp_pages_per_slot = 1,
    });
    iova = client.memory.allocate(data);
    memory = IoMemory::mapped(reinterpret_cast<std::uint64_t>(client.memory.at(iova)), data, iova);
  }

  std::unique_ptr<IoRun> run(std::uint8_t opcode) {
    IoRun::Options options;
    options.lba_bytes = kBlock;
    options.max_bytes = 128 << 10;
    options.opcode = opcode;
    options.timeout = 1e6;
    return std::make_unique<IoRun>(options, std::vector{queue}, nullptr);
  }
  // In turns, each as far as it gets.
  void finish(IoRun& run) {
    for (int turn = 0; turn < 1'000'000; ++turn) {
      if (run.drive(0) == IoRun::State::kDone) return;
      client.controller.step();
    }
    check::fail("a run", 0, "does not come to its end");
  }

  Client client;
  std::uint64_t data;
  std::shared_ptr<IoQueue> queue;
  std::uint64_t iova = 0;
  std::shared_ptr<IoMemory> memory;
};

}  // namespace

TEST(what_is_written_is_read_back_at_any_depth) {
  for (const std::uint32_t depth : {2u, 3u, 7u, 64u, 129u}) {
    Stepped stepped(depth);
    auto* bytes = reinterpret_cast<unsigned char*>(stepped.client.memory.at(stepped.iova));
    std::mt19937_64 random(depth);
    std::vector<unsigned char> expected(stepped.data);
    for (auto& byte : expected) byte = static_cast<unsigned char>(random());
    std::copy(expected.begin(), expected.end(), bytes);
    auto write = stepped.run(1);
    write->add_range(0, kBlocks, stepped.memory, 0);
    stepped.finish(*write);
    CHECK_EQ(write->counts().mapped_bytes, stepped.data);
    std::fill(bytes, bytes + stepped.data, static_cast<unsigned char>(0));
    auto read = stepped.run(2);
    read->add_range(0, kBlocks, stepped.memory, 0);
    stepped.finish(*read);
    CHECK(std::equal(expected.begin(), expected.end(), bytes));
    CHECK(read->failures().empty());
  }
}

std::uint64_t number_in(const char* variable, std::uint64_t otherwise) {
  const char* const text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Random reads of one block, so many as GPUNVME_COMMANDS says: two runs of different length tell the cost of one.
// GPUNVME_BLOCKS: out of so many. GPUNVME_IMAGE: out of this file and not out of memory.
// GPUNVME_DEPTH: entries of the queue; one less is in flight.
TEST(commands) {
  const std::uint64_t count = number_in("GPUNVME_COMMANDS", 10'000);
  const std::uint64_t blocks = number_in("GPUNVME_BLOCKS", kBlocks);
  const auto depth = static_cast<std::uint32_t>(number_in("GPUNVME_DEPTH", 129));
  Stepped stepped(depth, std::getenv("GPUNVME_IMAGE"), blocks);
  std::vector<std::uint64_t> lbas(kBlocks);
  std::mt19937_64 random(1);
  std::uint64_t done = 0;
  while (done < count) {
    for (auto& lba : lbas) lba = random() % blocks;
    auto read = stepped.run(2);
    read->add_gather(lbas.data(), std::min<std::uint64_t>(count - done, kBlocks), 1, stepped.memory, 0);
    stepped.finish(*read);
    done += read->counts().commands;
  }
  CHECK_EQ(done, count);
}
