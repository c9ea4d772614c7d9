// Faults on purpose: each does what its name says, exactly where it was asked for, and the same again from the same
// seed.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "faults.h"
#include "soft_client.h"

using namespace testing;
using gpunvme::soft::Fault;
using gpunvme::soft::FaultPlan;

namespace {

struct FaultClient : Client {
  explicit FaultClient(const std::string& faults, unsigned threads = 0, std::uint64_t seed = 0)
      : Client(make(faults, threads, seed)) {
    enable();
    queue = create(1, 64);
    buffer = memory.allocate(4096);
  }
  static Options make(const std::string& faults, unsigned threads, std::uint64_t seed) {
    Options options = in_memory();
    options.faults = faults;
    options.threads = threads;
    options.seed = seed;
    return options;
  }
  std::uint16_t read() { return submit(queue, io(nvme::kNvmRead, 0, 1, buffer)); }
  // CIDs of what completes within some passes.
  std::vector<int> completions(int turns = 20) {
    std::vector<int> cids;
    for (int i = 0; i < turns; ++i) {
      turn();
      while (const auto cqe = poll(queue)) cids.push_back(cqe->cid);
    }
    return cids;
  }
  // Bytes of completion entry `index` as they lie in memory.
  nvme::Cqe raw(std::uint32_t index) { return *memory.at<nvme::Cqe>(queue.cq + std::uint64_t{index} * 16); }
  std::uint64_t injected(const char* name) { return stat(std::string("fault.") + name); }

  Pair queue;
  std::uint64_t buffer = 0;
};

using Cids = std::vector<int>;

}  // namespace

TEST(names_rates_numbers_and_values_are_understood) {
  for (const char* good :
       {"", "delay", "delay:5", "delay:5@0.5", "drop#3", "error:0x281", "error:0x281!@0.1", "error:2#7,drop@0,slow:2",
        "cq-stall,torn-cqe,stale-phase,unknown-cid,duplicate-cqe", "reorder@1,cfs#1,device-gone#2,short-ready:100"}) {
    FaultPlan(good, 1);
  }
  for (const char* bad :
       {"rust", "drop:5", "drop@2", "drop@-1", "drop@", "drop#0", "drop#", "drop#x", "error", "error:", "error:0",
        "error:0x800", "error:x", "delay:x", "delay:-1", "drop,,drop", "drop@nan", "delay:99999999999"}) {
    bool refused = false;
    try {
      FaultPlan(bad, 1);
    } catch (const std::invalid_argument& error) {
      refused = std::string(error.what()).starts_with("faults: ");
    }
    if (!refused) check::fail(bad, 0, "was accepted");
  }
}

TEST(a_seed_makes_the_same_faults_and_another_seed_others) {
  const auto pattern = [](std::uint64_t seed) {
    FaultPlan plan("drop@0.3,error:0x281@0.2", seed);
    std::vector<int> faults;
    for (int i = 0; i < 2000; ++i) faults.push_back(plan.decide().faults);
    return faults;
  };
  CHECK(pattern(1) == pattern(1));
  CHECK(pattern(1) != pattern(2));
  const auto with = [&](Fault fault) {
    const auto faults = pattern(3);
    return std::count_if(faults.begin(), faults.end(),
                         [&](int one) { return (one >> static_cast<int>(fault) & 1) != 0; });
  };
  CHECK(with(Fault::kDrop) > 500 && with(Fault::kDrop) < 700);
  CHECK(with(Fault::kError) > 300 && with(Fault::kError) < 500);
}

TEST(error_fails_one_command_and_does_not_execute_it) {
  FaultClient client("error:0x281#2,error:0x002!#3");
  fill(client.memory.at(client.buffer), 512, 1);
  std::vector<std::uint16_t> statuses;
  for (int i = 0; i < 4; ++i) {
    const nvme::Cqe cqe =
        client.run(client.queue, client.io(nvme::kNvmWrite, static_cast<std::uint64_t>(i), 1, client.buffer));
    statuses.push_back(nvme::cqe_status(cqe.status));
  }
  CHECK(statuses == (std::vector<std::uint16_t>{0, 0x281, 0x002 | nvme::kStatusDnr, 0}));
  CHECK_EQ(client.injected("error"), 2u);
  CHECK_EQ(client.stat("writes"), 2u);
  // Block 1 was not written.
  CHECK_EQ(client.code(client.queue, client.io(nvme::kNvmRead, 1, 1, client.buffer)), nvme::kStatusSuccess);
  CHECK_EQ(*client.memory.at<std::uint64_t>(client.buffer), 0u);
}

TEST(drop_loses_a_completion_for_good) {
  FaultClient client("drop#2");
  for (int i = 0; i < 3; ++i) client.read();
  CHECK(client.completions() == (Cids{0, 2}));
  CHECK_EQ(client.injected("drop"), 1u);
  // Abort does not find it, and the queue can be deleted.
  nvme::Sqe abort{};
  abort.opcode = nvme::kAdminAbort;
  abort.cdw10 = 1 | 1 << 16;
  CHECK_EQ(client.run(client.admin, abort).dw0, 1u);
  CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusSuccess);
}

TEST(delay_holds_one_completion_back_and_abort_finds_it) {
  FaultClient client("delay:60000#1,delay:30#2,delay:60000#4");
  for (int i = 0; i < 4; ++i) client.read();
  CHECK_EQ(client.wait(client.queue).cid, 2);
  CHECK_EQ(client.wait(client.queue).cid, 1);
  nvme::Sqe abort{};
  abort.opcode = nvme::kAdminAbort;
  abort.cdw10 = 1 | 0 << 16;
  CHECK_EQ(client.run(client.admin, abort).dw0, 0u);
  const nvme::Cqe cqe = client.wait(client.queue);
  CHECK_EQ(cqe.cid, 0);
  CHECK_EQ(nvme::status_code(nvme::cqe_status(cqe.status)), nvme::kStatusAbortRequested);
  CHECK_EQ(client.run(client.admin, abort).dw0, 1u);
  // Only that one.
  CHECK(client.completions().empty());
  abort.cdw10 = 1 | 3 << 16;
  CHECK_EQ(client.run(client.admin, abort).dw0, 0u);
  CHECK_EQ(client.wait(client.queue).cid, 3);
  CHECK_EQ(client.injected("delay"), 3u);
}

TEST(slow_delays_everything_admin_commands_too) {
  FaultClient client("");
  client.controller.inject("slow:30", 0);
  const auto page = client.memory.allocate(4096);
  client.read();
  client.submit(client.admin, client.identify_command(nvme::kCnsController, 0, page));
  client.controller.step();
  CHECK(!client.poll(client.queue).has_value());
  CHECK(!client.poll(client.admin).has_value());
  client.wait(client.queue);
  client.wait(client.admin);
  CHECK_EQ(client.injected("slow"), 2u);
}

TEST(reorder_lets_later_commands_pass_and_nothing_is_lost) {
  FaultClient client("reorder@0.3", 0, 5);
  Cids sent;
  Cids got;
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 30; ++i) sent.push_back(client.read());
    client.until("all complete", [&] {
      for (const int cid : client.completions(1)) got.push_back(cid);
      return got.size() == sent.size();
    });
  }
  CHECK(got != sent);
  std::sort(got.begin(), got.end());
  CHECK(got == sent);
  CHECK(client.injected("reorder") > 100);
}

TEST(duplicate_cqe_completes_twice) {
  FaultClient client("duplicate-cqe#2");
  for (int i = 0; i < 3; ++i) client.read();
  CHECK(client.completions() == (Cids{0, 1, 1, 2}));
  CHECK_EQ(client.injected("duplicate-cqe"), 1u);
}

TEST(unknown_cid_completes_what_nobody_sent) {
  FaultClient client("unknown-cid");
  std::set<int> strangers;
  for (int i = 0; i < 20; ++i) {
    const int cid = client.read();
    const Cids got = client.completions(2);
    CHECK_EQ(got.size(), 2u);
    CHECK(got[0] == 0xFFFF || got[0] == (cid ^ 0x8000));
    CHECK_EQ(got[1], cid);
    strangers.insert(got[0] == 0xFFFF);
  }
  CHECK_EQ(strangers.size(), 2u);
}

// Another thread looks at the entry while it is being posted.
TEST(torn_and_stale_entries_can_be_seen_before_they_are_whole) {
  for (const bool stale : {false, true}) {
    FaultClient client(stale ? "stale-phase" : "torn-cqe", 1);
    bool seen = false;
    for (int i = 0; i < 200 && !seen; ++i) {
      const std::uint32_t index = client.queue.head;
      const bool phase = client.queue.phase;
      auto* const entry = client.memory.at(client.queue.cq + std::uint64_t{index} * 16);
      const auto word = [&](int which) {
        return std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(entry + 4 * which))
            .load(std::memory_order_acquire);
      };
      const std::uint32_t word2 = word(2);
      const std::uint32_t word3 = word(3);
      client.read();
      std::optional<nvme::Cqe> cqe;
      client.until("a completion", [&] {
        // The first half is new, the second one not, or of the previous round.
        const std::uint32_t first = word(2);
        const std::uint32_t second = word(3);
        if (first != word2 && !stale && second == word3) seen = true;
        if (stale && second != word3 && ((second >> 16 & 1) != 0) != phase) seen = true;
        return (cqe = client.poll(client.queue)).has_value();
      });
      CHECK_EQ(cqe->cid, i);
      CHECK_EQ(nvme::cqe_status(cqe->status), nvme::kStatusSuccess);
    }
    CHECK(seen);
    CHECK(client.injected(stale ? "stale-phase" : "torn-cqe") > 0);
  }
}

TEST(cfs_stops_everything_until_a_reset) {
  FaultClient client("delay:20#1,cfs#3");
  for (int i = 0; i < 5; ++i) client.read();
  CHECK(client.completions(5) == (Cids{1}));
  CHECK(nvme::csts_cfs(client.csts()));
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  CHECK(client.completions() == Cids{});  // what was held back neither
  const auto page = client.memory.allocate(4096);
  client.submit(client.admin, client.identify_command(nvme::kCnsController, 0, page));
  for (int i = 0; i < 10; ++i) client.turn();
  CHECK(!client.poll(client.admin).has_value());
  client.disable();
  CHECK_EQ(client.csts(), 0u);
  client.enable();
  client.queue = client.create(1);
  CHECK_EQ(client.code(client.queue, client.io(nvme::kNvmRead, 0, 1, client.buffer)), nvme::kStatusSuccess);
  CHECK_EQ(client.injected("cfs"), 1u);
}

TEST(device_gone_reads_as_all_ones_and_stays_away) {
  FaultClient client("device-gone#2");
  for (int i = 0; i < 3; ++i) client.read();
  CHECK(client.completions() == (Cids{0}));
  CHECK_EQ(client.csts(), 0xFFFFFFFFu);
  CHECK_EQ(client.controller.read(nvme::kRegCap, 8), ~std::uint64_t{0});
  CHECK_EQ(client.controller.read(nvme::kRegCap, 2), 0xFFFFu);
  client.write32(nvme::kRegCc, 0);
  client.controller.reset();
  CHECK_EQ(client.csts(), 0xFFFFFFFFu);
  // Until it is plugged in again.
  client.controller.inject("", 0);
  CHECK_EQ(client.csts(), 0u);
  client.enable();
  client.queue = client.create(1);
  CHECK_EQ(client.code(client.queue, client.io(nvme::kNvmRead, 0, 1, client.buffer)), nvme::kStatusSuccess);
}

TEST(cq_stall_holds_a_queue_until_a_reset_or_a_second) {
  for (const bool by_reset : {true, false}) {
    FaultClient client("cq-stall#3");
    Pair other = client.create(2);
    for (int i = 0; i < 6; ++i) client.read();
    CHECK(client.completions(5) == (Cids{0, 1}));
    // The other queue is not held.
    CHECK_EQ(client.code(other, client.io(nvme::kNvmRead, 0, 1, client.buffer)), nvme::kStatusSuccess);
    if (by_reset) {
      client.disable();
      client.enable();
      client.queue = client.create(1);
      CHECK_EQ(client.code(client.queue, client.io(nvme::kNvmRead, 0, 1, client.buffer)), nvme::kStatusSuccess);
    } else {
      Cids got;
      client.until("the rest", [&] {
        for (const int cid : client.completions(1)) got.push_back(cid);
        return got.size() == 4;
      });
      CHECK(got == (Cids{2, 3, 4, 5}));
    }
    CHECK_EQ(client.injected("cq-stall"), 1u);
  }
}

TEST(short_ready_is_late_or_never) {
  Options options = in_memory();
  options.to = 1;
  options.faults = "short-ready:300#1,short-ready:501#2";
  Client client(options);
  client.start();
  CHECK(!nvme::csts_rdy(client.csts()));
  client.until("CSTS.RDY", [&] { return nvme::csts_rdy(client.csts()); });
  client.disable();
  client.start();
  std::this_thread::sleep_for(std::chrono::milliseconds(600));
  CHECK(!nvme::csts_rdy(client.csts()));
  client.disable();
  client.enable();
  CHECK_EQ(client.stat("fault.short-ready"), 2u);
}

TEST(a_plan_replaced_at_run_time_counts_from_there) {
  FaultClient client("drop#1");
  client.read();
  CHECK(client.completions().empty());
  client.controller.inject("drop#2", 0);
  client.read();
  client.read();
  CHECK(client.completions() == (Cids{1}));
  bool refused = false;
  try {
    client.controller.inject("rust", 0);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  // The plan is as before.
  client.controller.inject("", 0);
  client.read();
  CHECK(client.completions() == (Cids{3}));
}

// Everything at once that loses no completion: each command is completed at least once, in the right queue.
TEST(mixed_faults_on_several_queues_and_workers) {
  for (const unsigned threads : {0u, 2u}) {
    Options options = in_memory();
    options.threads = threads;
    options.seed = 11;
    options.faults =
        "delay:1@0.02,reorder@0.1,duplicate-cqe@0.05,unknown-cid@0.05,stale-phase@0.02,torn-cqe@0.02,error:0x281@0.1";
    Client client(options);
    client.enable();
    std::vector<Pair> queues = {client.create(1, 33), client.create(2, 7), client.create(3, 64)};
    std::vector<std::set<int>> open(3);
    std::vector<int> left(3, check::rounds(300));
    std::uint64_t errors = 0;
    client.until("all commands complete", [&] {
      bool all = true;
      for (std::size_t q = 0; q < 3; ++q) {
        Pair& queue = queues[q];
        while (left[q] > 0 && open[q].size() < queue.entries - 2) {
          // No data: two workers would write to one buffer.
          open[q].insert(client.submit(queue, client.io(nvme::kNvmVerify, 0, 1, 0)));
          --left[q];
        }
        while (const auto cqe = client.poll(queue)) {
          CHECK_EQ(cqe->sq_id, queue.id);
          if (open[q].erase(cqe->cid) == 1 && nvme::cqe_status(cqe->status) != 0) {
            CHECK_EQ(nvme::cqe_status(cqe->status), 0x281);
            ++errors;
          }
        }
        all = all && left[q] == 0 && open[q].empty();
      }
      return all;
    });
    CHECK_EQ(errors, client.stat("fault.error"));
    CHECK(errors > 0);
    CHECK(!nvme::csts_cfs(client.csts()));
  }
}
