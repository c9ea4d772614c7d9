// Queues of the software controller: wrapping, being full, doorbells that are wrong, several on one.
#include <set>

#include "soft_client.h"

using namespace testing;

namespace {

std::uint64_t buffer_of(Client& client) { return client.memory.allocate(4096); }

// The events that have arrived, as DW0.
std::vector<std::uint32_t> events(Client& client, int turns = 50) {
  std::vector<std::uint32_t> all;
  for (int i = 0; i < turns; ++i) {
    client.turn();
    while (const auto cqe = client.poll(client.admin)) {
      CHECK_EQ(nvme::cqe_status(cqe->status), nvme::kStatusSuccess);
      all.push_back(cqe->dw0);
    }
  }
  return all;
}

void request_event(Client& client) {
  nvme::Sqe sqe{};
  sqe.opcode = nvme::kAdminAsyncEventRequest;
  client.submit(client.admin, sqe);
}

constexpr std::uint32_t event(std::uint8_t information) {
  return nvme::kEventError | std::uint32_t{information} << 8 | std::uint32_t{nvme::kLogError} << 16;
}

}  // namespace

// Sizes that are not powers of two are where counting modulo 2^n would go wrong; also a completion queue of another
// size.
TEST(queues_of_any_size_wrap_and_change_phase) {
  for (const auto& [sq_entries, cq_entries] :
       std::vector<std::pair<std::uint32_t, std::uint32_t>>{{2, 2}, {3, 3}, {5, 7}, {7, 3}, {13, 13}, {100, 31}}) {
    Options options = in_memory();
    Client client(options);
    client.enable(5, 3);
    Pair io = client.create(1, sq_entries, cq_entries);
    const auto buffer = buffer_of(client);
    std::uint16_t cid = 0;
    std::uint16_t done = 0;
    std::uint32_t sq_head = 0;
    check::Random random(sq_entries);
    while (done < 500) {
      while ((io.tail + 1) % sq_entries != sq_head && cid < 500 && !random.one_in(5)) {
        nvme::Sqe sqe = client.io(nvme::kNvmRead, cid, 1, buffer);
        sqe.cid = cid++;
        client.put(io, sqe);
      }
      client.ring(io);
      client.turn();
      while (const auto cqe = client.poll(io)) {
        CHECK_EQ(cqe->cid, done++);
        CHECK_EQ(nvme::cqe_status(cqe->status), nvme::kStatusSuccess);
        CHECK(cqe->sq_head < sq_entries);
        sq_head = cqe->sq_head;
      }
    }
    CHECK_EQ(client.controller.dma_faults().size(), 0u);
  }
}

TEST(a_full_completion_queue_is_waited_for) {
  Client client(in_memory());
  client.enable();
  Pair io = client.create(1, 64, 4);
  const auto buffer = buffer_of(client);
  for (std::uint16_t cid = 0; cid < 60; ++cid) {
    nvme::Sqe sqe = client.io(nvme::kNvmRead, cid, 1, buffer);
    sqe.cid = cid;
    client.put(io, sqe);
  }
  client.ring(io);
  for (int i = 0; i < 100; ++i) client.turn();
  // Three entries of four: a fourth would look like none.
  std::uint16_t done = 0;
  while (const auto cqe = client.poll(io, false)) CHECK_EQ(cqe->cid, done++);
  CHECK_EQ(done, 3);
  CHECK_EQ(client.stat("queue_full_waits"), 1u);
  client.release(io);
  while (done < 60) {
    const nvme::Cqe cqe = client.wait(io);
    CHECK_EQ(cqe.cid, done++);
  }
  CHECK_EQ(client.stat("commands"), 60u);
}

// Completions that were held back come when they come: those for which there is no room then have to wait for it.
TEST(late_completions_wait_for_room_too) {
  Options options = in_memory();
  options.faults = "delay:1000";  // long enough for all to be fetched before the first is let go
  Client client(options);
  client.enable();
  Pair io = client.create(1, 64, 4);
  const auto buffer = buffer_of(client);
  for (int i = 0; i < 40; ++i) client.submit(io, client.io(nvme::kNvmRead, 0, 1, buffer));
  client.until("all are fetched", [&] { return client.stat("commands") == 40; });
  std::set<int> seen;
  client.until("the completion queue is full", [&] {
    while (const auto cqe = client.poll(io, false)) seen.insert(cqe->cid);
    return seen.size() >= 3;
  });
  for (int i = 0; i < 5; ++i) client.turn();
  CHECK(!client.poll(io, false).has_value());
  CHECK_EQ(seen.size(), 3u);
  client.release(io);
  while (seen.size() < 40) CHECK(seen.insert(client.wait(io).cid).second);
  for (int i = 0; i < 5; ++i) client.turn();
  CHECK(!client.poll(io).has_value());
}

TEST(several_submission_queues_on_one_completion_queue) {
  for (const unsigned threads : {0u, 3u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    Pair first = client.create(1, 16, 5);
    std::vector<Pair> queues = {first};
    for (std::uint16_t id = 2; id <= 4; ++id) {
      Pair more;
      more.id = id;
      more.entries = 16;
      more.sq = client.memory.allocate(16 * 64);
      CHECK_EQ(client.code(client.admin, client.create_sq_command(id, 16, more.sq, 1)), nvme::kStatusSuccess);
      queues.push_back(more);
    }
    const auto buffer = buffer_of(client);
    std::set<std::pair<int, int>> open;
    for (Pair& queue : queues) {
      for (std::uint16_t cid = 0; cid < 15; ++cid) {
        nvme::Sqe sqe = client.io(nvme::kNvmWrite, queue.id * 100 + cid, 1, buffer);
        sqe.cid = cid;
        client.put(queue, sqe);
        open.emplace(queue.id, cid);
      }
      client.ring(queue);
    }
    while (!open.empty()) {
      const nvme::Cqe cqe = client.wait(first);
      CHECK_EQ(nvme::cqe_status(cqe.status), nvme::kStatusSuccess);
      CHECK_EQ(open.erase({cqe.sq_id, cqe.cid}), 1u);
    }
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, 1)),
             nvme::kStatusInvalidQueueDeletion);
  }
}

TEST(doorbells_lie_where_dstrd_says) {
  for (const unsigned dstrd : {0u, 1u, 4u, 10u, 15u}) {
    Options options = in_memory();
    options.dstrd = dstrd;
    Client client(options);
    CHECK(client.controller.bar_nbytes() >= nvme::cq_head_doorbell(options.queues, dstrd) + 4);
    CHECK_EQ(client.controller.doorbells().nbytes() % 4096, 0u);
    client.enable();
    Pair io = client.create(static_cast<std::uint16_t>(options.queues), 3);
    const auto buffer = buffer_of(client);
    for (int i = 0; i < 20; ++i) {
      CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
    }
    request_event(client);
    CHECK_EQ(events(client).size(), 0u);
  }
}

TEST(doorbells_may_be_written_as_registers) {
  Options options = in_memory();
  options.dstrd = 2;
  Client client(options);
  client.enable();
  Pair io = client.create(1, 4);
  const auto buffer = buffer_of(client);
  for (std::uint16_t i = 0; i < 10; ++i) {
    nvme::Sqe sqe = client.io(nvme::kNvmRead, 0, 1, buffer);
    sqe.cid = i;
    client.put(io, sqe);
    client.write32(static_cast<std::uint32_t>(nvme::sq_tail_doorbell(1, 2)), io.tail);
    client.turn();
    const auto cqe = client.poll(io, false);
    CHECK(cqe.has_value() && cqe->cid == i);
    client.write32(static_cast<std::uint32_t>(nvme::cq_head_doorbell(1, 2)), io.head);
  }
  // Between two doorbells there is none.
  request_event(client);
  client.write32(static_cast<std::uint32_t>(nvme::sq_tail_doorbell(1, 2)) + 4, 1);
  CHECK(events(client) == std::vector<std::uint32_t>{event(nvme::kEventErrorInvalidDoorbellRegister)});
}

TEST(doorbells_of_queues_that_do_not_exist_are_reported_and_masked_until_the_log_is_read) {
  for (const bool by_register : {false, true}) {
    Client client(in_memory());
    client.enable();
    client.create(1);
    const auto page = client.memory.allocate(4096);
    for (int i = 0; i < 3; ++i) request_event(client);
    const auto ring = [&](std::uint64_t doorbell) {
      if (by_register) {
        client.controller.write(doorbell, 4, 0);
      } else {
        client.write_doorbell(doorbell, 0);
      }
    };
    ring(nvme::sq_tail_doorbell(2, 0));
    CHECK(events(client) == std::vector<std::uint32_t>{event(nvme::kEventErrorInvalidDoorbellRegister)});
    // Another one: not before the error log was read.
    ring(nvme::cq_head_doorbell(5, 0));
    CHECK_EQ(events(client).size(), 0u);
    const auto read_log = [&](bool retain) {
      client.submit(client.admin, client.log_command(nvme::kLogError, 64, page, retain));
    };
    read_log(true);
    CHECK_EQ(events(client).size(), 1u);  // Get Log Page's own completion
    read_log(false);
    const auto after = events(client);
    CHECK_EQ(after.size(), 2u);
    CHECK_EQ(after[1], event(nvme::kEventErrorInvalidDoorbellRegister));
    CHECK_EQ(client.memory.at<nvme::ErrorLogEntry>(page)->sqid, 5);
    // Far outside: queue ids that there can never be.
    read_log(false);
    events(client);
    ring(nvme::sq_tail_doorbell(400, 0));
    CHECK_EQ(events(client).size(), 1u);
  }
}

TEST(doorbell_values_outside_the_queue_are_reported_and_ignored) {
  Client client(in_memory());
  client.enable();
  Pair io = client.create(1, 8);
  const auto buffer = buffer_of(client);
  const auto page = client.memory.allocate(4096);
  const auto expect = [&](std::uint64_t doorbell, std::uint32_t value) {
    request_event(client);
    client.write_doorbell(doorbell, value);
    CHECK(events(client) == std::vector<std::uint32_t>{event(nvme::kEventErrorInvalidDoorbellValue)});
    CHECK_EQ(client.code(client.admin, client.log_command(nvme::kLogError, 64, page)), nvme::kStatusSuccess);
    CHECK_EQ(client.memory.at<nvme::ErrorLogEntry>(page)->sqid, 1);
  };
  expect(nvme::sq_tail_doorbell(1, 0), 8);
  expect(nvme::sq_tail_doorbell(1, 0), 0x12345678);
  // Nothing was completed: no head but 0 can be.
  expect(nvme::cq_head_doorbell(1, 0), 1);
  expect(nvme::cq_head_doorbell(1, 0), 8);
  // The queue goes on with the next good values.
  client.release(io);
  for (int i = 0; i < 20; ++i) {
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  }
  CHECK_EQ(io.tail, 4u);
  expect(nvme::sq_tail_doorbell(1, 0), 8);
  expect(nvme::sq_tail_doorbell(1, 0), 9);
  client.ring(io);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  CHECK(!nvme::csts_cfs(client.csts()));
}

TEST(more_commands_than_a_queue_has_room_for_are_not_taken) {
  Client client(in_memory());
  client.enable();
  Pair io = client.create(1, 8, 2);
  const auto buffer = buffer_of(client);
  for (int i = 0; i < 7; ++i) client.submit(io, client.io(nvme::kNvmRead, 0, 1, buffer));
  client.turn();
  CHECK_EQ(client.stat("commands"), 1u);  // the completion queue has room for one
  request_event(client);
  client.write_doorbell(nvme::sq_tail_doorbell(1, 0), 3);  // past the head, which is at 1
  CHECK(events(client) == std::vector<std::uint32_t>{event(nvme::kEventErrorInvalidDoorbellValue)});
  client.ring(io);
  for (int i = 0; i < 7; ++i) CHECK_EQ(client.wait(io).cid, i);
  CHECK_EQ(client.stat("commands"), 7u);
}

TEST(queues_need_not_be_contiguous_where_cqr_is_clear) {
  Options options = in_memory();
  options.cqr = false;
  Client client(options);
  client.enable();
  // 300 submission entries: 5 pages, 500 completion entries: 2 pages, in no order.
  const auto lists = client.memory.allocate(4096);
  const auto pages = client.memory.allocate(20 * 4096);
  auto* const list = client.memory.at<std::uint64_t>(lists);
  const std::uint64_t sq_pages[] = {9, 3, 17, 1, 12};
  const std::uint64_t cq_pages[] = {6, 2};
  for (int i = 0; i < 5; ++i) list[i] = pages + sq_pages[i] * 4096;
  nvme::Sqe create_sq = client.create_sq_command(1, 300, lists, 1);
  create_sq.cdw11 &= ~nvme::kCreateQueuePc;
  CHECK_EQ(client.code(client.admin, create_sq), nvme::kStatusCompletionQueueInvalid);
  for (int i = 0; i < 2; ++i) list[i] = pages + cq_pages[i] * 4096;
  nvme::Sqe create_cq = client.create_cq_command(1, 500, lists);
  create_cq.cdw11 &= ~nvme::kCreateQueuePc;
  list[1] += 8;
  CHECK_EQ(client.code(client.admin, create_cq), nvme::kStatusPrpOffsetInvalid);
  list[1] -= 8;
  CHECK_EQ(client.code(client.admin, create_cq), nvme::kStatusSuccess);
  for (int i = 0; i < 5; ++i) list[i] = pages + sq_pages[i] * 4096;
  CHECK_EQ(client.code(client.admin, create_sq), nvme::kStatusSuccess);
  const auto buffer = buffer_of(client);
  std::uint32_t tail = 0;
  std::uint32_t head = 0;
  for (std::uint16_t i = 0; i < 1200; ++i) {
    nvme::Sqe sqe = client.io(nvme::kNvmRead, 0, 1, buffer);
    sqe.cid = i;
    std::memcpy(client.memory.at(pages + sq_pages[tail / 64] * 4096 + tail % 64 * 64), &sqe, 64);
    tail = (tail + 1) % 300;
    client.write_doorbell(nvme::sq_tail_doorbell(1, 0), tail);
    client.turn();
    nvme::Cqe cqe;
    std::memcpy(&cqe, client.memory.at(pages + cq_pages[head / 256] * 4096 + head % 256 * 16), 16);
    CHECK_EQ(cqe.cid, i);
    CHECK_EQ(nvme::cqe_phase(cqe.status), i / 500 % 2 == 0);
    head = (head + 1) % 500;
    client.write_doorbell(nvme::cq_head_doorbell(1, 0), head);
  }
}

TEST(deleting_a_queue_aborts_what_is_held_back_and_completes_last) {
  for (const unsigned threads : {0u, 2u}) {
    Options options = in_memory();
    options.threads = threads;
    options.faults = "delay:60000#2,delay:60000#3";
    Client client(options);
    client.enable();
    Pair io = client.create(1);
    const auto buffer = client.memory.allocate(4 * 4096);
    for (std::uint64_t i = 0; i < 4; ++i) client.submit(io, client.io(nvme::kNvmRead, 0, 1, buffer + i * 4096));
    // Which two are held back is known only where one thread takes them all: two threads count them in either order.
    std::set<int> unanswered = {0, 1, 2, 3};
    for (int i = 0; i < 2; ++i) CHECK_EQ(unanswered.erase(client.wait(io).cid), std::size_t{1});
    if (threads == 0) CHECK(unanswered == (std::set<int>{1, 2}));
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusSuccess);
    for (int i = 0; i < 2; ++i) {
      const auto cqe = client.poll(io);
      CHECK(cqe.has_value());
      CHECK_EQ(nvme::status_code(nvme::cqe_status(cqe->status)), nvme::kStatusAbortedSqDeletion);
      CHECK_EQ(unanswered.erase(cqe->cid), std::size_t{1});
    }
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, 1)), nvme::kStatusSuccess);
    Pair again = client.create(1);
    CHECK_EQ(client.code(again, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  }
}

TEST(deleting_a_queue_whose_completions_have_no_room) {
  Client client(in_memory());
  client.enable();
  client.controller.inject("delay:1", 0);
  Pair io = client.create(1, 16, 2);
  const auto buffer = buffer_of(client);
  for (int i = 0; i < 10; ++i) client.submit(io, client.io(nvme::kNvmRead, 0, 1, buffer));
  client.until("commands are fetched", [&] { return client.stat("commands") > 0; });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  for (int i = 0; i < 5; ++i) client.turn();
  CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, 1)), nvme::kStatusSuccess);
  client.controller.inject("", 0);
  Pair again = client.create(1);
  CHECK_EQ(client.code(again, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
}

// An idle controller sleeps; the first command after that is served all the same.
TEST(a_controller_that_has_been_idle_wakes_up) {
  Options options = in_memory();
  options.threads = 1;
  Client client(options);
  client.enable();
  Pair io = client.create(1);
  const auto buffer = buffer_of(client);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const std::uint64_t before = client.stat("idle_passes");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    // Asleep for most of the time: a spinning one makes a hundred thousand passes in that.
    CHECK(client.stat("idle_passes") - before < 5000);
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  }
}
