// Several workers on several queues, and everything that interrupts them.
#include <array>
#include <atomic>
#include <thread>

#include "soft_client.h"

using namespace testing;

namespace {

// Keeps a queue full of writes and reads of its own blocks, each checked; returns the number of commands completed.
std::uint64_t load(Client& client, Pair queue, std::uint64_t blocks_from, int commands, std::uint64_t data) {
  const std::uint32_t depth = queue.entries - 1;
  std::vector<std::uint32_t> written(64, 0);  // what each block holds
  std::vector<int> block_of(depth, -1);       // by CID
  std::vector<bool> is_write(depth);
  std::vector<bool> busy(64, false);
  std::vector<std::uint16_t> free_cids;
  for (std::uint32_t i = 0; i < depth; ++i) free_cids.push_back(static_cast<std::uint16_t>(i));
  check::Random random(queue.id);
  std::uint64_t done = 0;
  std::uint32_t next = 1;
  int sent = 0;
  client.until("all commands complete", [&] {
    while (!free_cids.empty() && sent < commands) {
      const int block = static_cast<int>(random.below(64));
      if (busy[static_cast<std::size_t>(block)]) break;
      const std::uint16_t cid = free_cids.back();
      free_cids.pop_back();
      busy[static_cast<std::size_t>(block)] = true;
      block_of[cid] = block;
      is_write[cid] = random.one_in(2);
      const std::uint64_t at = data + std::uint64_t{cid} * 4096;
      auto* const words = client.memory.at<std::uint32_t>(at);
      if (is_write[cid]) {
        written[static_cast<std::size_t>(block)] = next;
        for (int i = 0; i < 128; ++i) words[i] = next;
        ++next;
      }
      nvme::Sqe sqe = client.io(is_write[cid] ? nvme::kNvmWrite : nvme::kNvmRead,
                                blocks_from + static_cast<std::uint64_t>(block), 1, at);
      sqe.cid = cid;
      client.put(queue, sqe);
      ++sent;
    }
    client.ring(queue);
    while (const auto cqe = client.poll(queue)) {
      CHECK_EQ(nvme::cqe_status(cqe->status), nvme::kStatusSuccess);
      const auto block = static_cast<std::size_t>(block_of[cqe->cid]);
      if (!is_write[cqe->cid]) {
        const auto* const words = client.memory.at<std::uint32_t>(data + std::uint64_t{cqe->cid} * 4096);
        for (int i = 0; i < 128; ++i) CHECK_EQ(words[i], written[block]);
      }
      busy[block] = false;
      free_cids.push_back(cqe->cid);
      ++done;
    }
    return done == static_cast<std::uint64_t>(commands);
  });
  return done;
}

}  // namespace

TEST(many_queues_many_workers_right_data) {
  for (const unsigned threads : {1u, 2u, 4u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    constexpr int kQueues = 3;
    const int commands = check::rounds(1000);
    std::vector<Pair> queues;
    std::vector<std::uint64_t> data;
    for (std::uint16_t id = 1; id <= kQueues; ++id) {
      queues.push_back(client.create(id, 17));
      data.push_back(client.memory.allocate(17 * 4096));
    }
    std::vector<std::thread> hosts;
    std::array<std::string, kQueues> errors;
    for (std::size_t i = 0; i < kQueues; ++i) {
      hosts.emplace_back([&, i] {
        try {
          load(client, queues[i], i * 64, commands, data[i]);
        } catch (const std::exception& error) {
          errors[i] = error.what();
        }
      });
    }
    for (std::thread& host : hosts) host.join();
    for (const std::string& error : errors) CHECK(error.empty());
    CHECK_EQ(client.stat("commands"), static_cast<std::uint64_t>(commands) * kQueues);
    CHECK_EQ(client.stat("dma_faults"), 0u);
  }
}

// All of them on one long queue, whose completion queue is full now and then.
TEST(one_queue_many_workers_right_data) {
  for (const unsigned threads : {2u, 4u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    const int commands = check::rounds(3000);
    const Pair queue = client.create(1, 65, 33);
    load(client, queue, 0, commands, client.memory.allocate(65 * 4096));
    CHECK_EQ(client.stat("commands"), static_cast<std::uint64_t>(commands));
    CHECK_EQ(client.stat("dma_faults"), 0u);
  }
}

// After CC.EN went to 0, or a function-level reset, or a deletion, the queue's memory is the host's again.
TEST(nothing_is_written_after_a_reset_under_load) {
  for (const unsigned threads : {1u, 3u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    Pair io = client.create(1, 64);
    const auto data = client.memory.allocate(64 * 4096);
    for (int round = 0; round < check::rounds(100); ++round) {
      const std::uint32_t first = io.tail;
      for (std::uint32_t i = 0; i < 60; ++i) {
        nvme::Sqe sqe = client.io(nvme::kNvmRead, i, 8, data + i * 4096);
        sqe.cid = static_cast<std::uint16_t>(i);
        client.put(io, sqe);
      }
      CHECK_EQ(first, 0u);
      client.ring(io);
      if (round % 4 != 0) client.until("something completes", [&] { return client.poll(io).has_value(); });
      if (round % 2 == 0) {
        client.disable();
      } else {
        client.controller.reset();
      }
      std::memset(client.memory.at(data), 0xCC, 64 * 4096);
      std::memset(client.memory.at(io.cq), 0xCC, 64 * 16);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      for (int i = 0; i < 64 * 4096; ++i) CHECK(client.memory.at(data)[i] == std::byte{0xCC});
      for (int i = 0; i < 64 * 16; ++i) CHECK(client.memory.at(io.cq)[i] == std::byte{0xCC});
      client.enable();
      client.begin(io, 64, 64);
      CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 64, io.cq)), nvme::kStatusSuccess);
      CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 64, io.sq, 1)), nvme::kStatusSuccess);
    }
  }
}

TEST(queues_are_deleted_under_load_and_made_again) {
  for (const unsigned threads : {1u, 3u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    Pair io = client.create(1, 64);
    const auto data = client.memory.allocate(60 * 4096);
    for (int round = 0; round < check::rounds(200); ++round) {
      for (std::uint16_t i = 0; i < 60; ++i) {
        nvme::Sqe sqe = client.io(nvme::kNvmRead, i, 8, data + i * 4096u);
        sqe.cid = i;
        client.put(io, sqe);
      }
      client.ring(io);
      CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusSuccess);
      std::uint16_t seen = 0;
      while (const auto cqe = client.poll(io)) {
        CHECK_EQ(cqe->status >> 1, 0);
        ++seen;
      }
      // Whatever was fetched was completed before the deletion was.
      CHECK(seen <= 60);
      CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, 1)), nvme::kStatusSuccess);
      CHECK(!client.poll(io).has_value());
      client.begin(io, 64, 64);
      CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 64, io.cq)), nvme::kStatusSuccess);
      CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 64, io.sq, 1)), nvme::kStatusSuccess);
    }
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, data)), nvme::kStatusSuccess);
  }
}

// Register accesses, mappings, plans and interrupts from other threads, while commands run.
TEST(the_control_side_may_be_used_by_several_threads_under_load) {
  Options options = in_memory();
  options.threads = 2;
  Client client(options);
  client.enable();
  Pair io = client.create(1, 33);
  const auto data = client.memory.allocate(33 * 4096);
  std::atomic<bool> done{false};
  std::thread registers([&] {
    while (!done.load()) {
      client.controller.read(nvme::kRegCap, 8);
      client.csts();
      client.controller.stats();
      client.controller.dma_faults();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  std::thread plans([&] {
    while (!done.load()) {
      client.controller.inject("reorder@0.1", 1);
      client.controller.set_interrupt(0, -1);
      std::this_thread::sleep_for(std::chrono::microseconds(300));
      client.controller.inject("", 0);
    }
  });
  std::thread mappings([&] {
    void* const memory = mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    while (!done.load()) {
      client.controller.map(0x40000000, 1 << 20, memory, true, true);
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      client.controller.unmap(0x40000000, 1 << 20);
    }
    munmap(memory, 1 << 20);
  });
  std::string failed;
  try {
    load(client, io, 0, check::rounds(20000), data);
  } catch (const std::exception& error) {
    failed = error.what();
  }
  done.store(true);
  registers.join();
  plans.join();
  mappings.join();
  if (!failed.empty()) check::fail(__FILE__, __LINE__, failed);
}
