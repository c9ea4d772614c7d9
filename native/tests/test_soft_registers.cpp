// The software controller's registers: what they say, enabling, reset, shutdown.
#include <sys/eventfd.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>

#include "soft_client.h"

using namespace testing;

TEST(capabilities_say_what_was_asked_for) {
  Options options = in_memory();
  options.mqes = 7;
  options.cqr = false;
  options.to = 9;
  options.dstrd = 3;
  options.mpsmin = 1;
  options.mpsmax = 5;
  Client client(options);
  const std::uint64_t cap = client.controller.read(nvme::kRegCap, 8);
  CHECK_EQ(nvme::cap_queue_entries(cap), 7u);
  CHECK(!nvme::cap_cqr(cap));
  CHECK_EQ(nvme::cap_to(cap), 9u);
  CHECK_EQ(nvme::cap_dstrd(cap), 3u);
  CHECK_EQ(nvme::cap_page_bytes_min(cap), 8192u);
  CHECK_EQ(nvme::cap_page_bytes_max(cap), 131072u);
  CHECK((nvme::cap_css(cap) & nvme::kCapCssNvm) != 0);
  // Halves, as a 32-bit host reads them.
  CHECK_EQ(client.read32(0), static_cast<std::uint32_t>(cap));
  CHECK_EQ(client.read32(4), static_cast<std::uint32_t>(cap >> 32));
  CHECK_EQ(client.read32(nvme::kRegVs), nvme::kVersion20);
  CHECK_EQ(client.read32(nvme::kRegCmbsz), 0u);
  CHECK_EQ(client.read32(nvme::kRegPmrcap), 0u);
  CHECK_EQ(client.csts(), 0u);
}

TEST(read_only_registers_do_not_change) {
  Client client(in_memory());
  const std::uint64_t cap = client.controller.read(nvme::kRegCap, 8);
  client.controller.write(nvme::kRegCap, 8, 0);
  client.write32(nvme::kRegVs, 0);
  client.write32(nvme::kRegCsts, 0xFFFFFFFF);
  CHECK_EQ(client.controller.read(nvme::kRegCap, 8), cap);
  CHECK_EQ(client.read32(nvme::kRegVs), nvme::kVersion20);
  CHECK_EQ(client.csts(), 0u);
}

TEST(accesses_of_other_sizes_and_places_do_no_harm) {
  Client client(in_memory());
  client.enable();
  const std::uint64_t cap = client.controller.read(nvme::kRegCap, 8);
  CHECK_EQ(client.controller.read(1, 1), cap >> 8 & 0xFF);
  CHECK_EQ(client.controller.read(2, 2), cap >> 16 & 0xFFFF);
  for (const std::uint64_t offset : {1ull, 2ull, 0x15ull, 0xFFDull, 0x3FFFull, 0x4000ull, 1ull << 40, ~0ull, ~7ull}) {
    for (const unsigned nbytes : {0u, 1u, 2u, 3u, 4u, 8u, 16u}) {
      client.controller.read(offset, nbytes);
      client.controller.write(offset, nbytes, 0);
    }
  }
  CHECK(nvme::csts_rdy(client.csts()));
}

TEST(addresses_may_be_written_in_halves_and_in_either_order) {
  Client client(in_memory());
  client.start();
  client.disable();
  const std::uint64_t asq = client.admin.sq;
  const std::uint64_t acq = client.admin.cq;
  client.controller.write(nvme::kRegAsq, 8, 0);
  client.controller.write(nvme::kRegAcq, 8, 0);
  client.write32(nvme::kRegAsq + 4, static_cast<std::uint32_t>(asq >> 32));
  client.write32(nvme::kRegAcq, static_cast<std::uint32_t>(acq));
  client.write32(nvme::kRegAsq, static_cast<std::uint32_t>(asq));
  client.write32(nvme::kRegAcq + 4, static_cast<std::uint32_t>(acq >> 32));
  CHECK_EQ(client.controller.read(nvme::kRegAsq, 8), asq);
  CHECK_EQ(client.controller.read(nvme::kRegAcq, 8), acq);
  client.begin(client.admin, 32, 32);
  client.write32(nvme::kRegCc, client.cc());
  client.until("CSTS.RDY", [&] { return nvme::csts_rdy(client.csts()); });
  const auto page = client.memory.allocate(4096);
  CHECK_EQ(client.code(client.admin, client.identify_command(nvme::kCnsController, 0, page)), nvme::kStatusSuccess);
}

TEST(what_cannot_be_enabled_is_a_fatal_error_and_can_be_mended) {
  Client client(in_memory());
  client.start();
  client.disable();
  const auto refused = [&](const char* what) {
    client.write32(nvme::kRegCc, client.cc());
    if (client.csts() != nvme::kCstsCfs) check::fail(what, 0, "was enabled all the same");
    client.write32(nvme::kRegCc, 0);
    CHECK_EQ(client.csts(), 0u);
  };
  const std::uint32_t aqa = client.read32(nvme::kRegAqa);
  client.controller.write(nvme::kRegAsq, 8, client.admin.sq + 8);
  refused("an unaligned ASQ");
  client.controller.write(nvme::kRegAsq, 8, client.admin.sq);
  client.controller.write(nvme::kRegAcq, 8, client.admin.cq + 2048);
  refused("an unaligned ACQ");
  client.controller.write(nvme::kRegAcq, 8, client.admin.cq);
  client.write32(nvme::kRegAqa, aqa & ~0xFFFu);
  refused("an admin submission queue of one entry");
  client.write32(nvme::kRegAqa, aqa & 0xFFFu);
  refused("an admin completion queue of one entry");
  client.write32(nvme::kRegAqa, aqa);
  client.write32(nvme::kRegCc, client.cc() | 5 << nvme::kCcMpsShift);
  CHECK_EQ(client.csts(), nvme::kCstsCfs);
  client.write32(nvme::kRegCc, 0);
  client.write32(nvme::kRegCc, client.cc() | 1 << nvme::kCcCssShift);
  CHECK_EQ(client.csts(), nvme::kCstsCfs);
  client.write32(nvme::kRegCc, 0);
  client.write32(nvme::kRegCc, client.cc() | 1 << nvme::kCcAmsShift);
  CHECK_EQ(client.csts(), nvme::kCstsCfs);
  client.write32(nvme::kRegCc, 0);
  client.enable();
  CHECK_EQ(client.csts(), nvme::kCstsRdy);
}

TEST(pages_below_the_smallest_are_refused) {
  Options options = in_memory();
  options.mpsmin = 2;
  Client client(options);
  client.start();
  client.disable();
  client.write32(nvme::kRegCc, client.cc() & ~(0xFu << nvme::kCcMpsShift));
  CHECK_EQ(client.csts(), nvme::kCstsCfs);
  client.disable();
  client.enable();
  // An address that is aligned to 4 KiB only is not aligned to a page.
  Pair pair;
  const auto address = client.memory.allocate(32768, 16384) + 4096;
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 4, address)), nvme::kStatusPrpOffsetInvalid);
}

TEST(a_controller_reset_forgets_queues_and_keeps_the_admin_queues_addresses) {
  for (const unsigned threads : {0u, 2u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    Pair io = client.create(1);
    const auto buffer = client.memory.allocate(4096);
    CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
    const std::uint32_t aqa = client.read32(nvme::kRegAqa);
    client.disable();
    CHECK_EQ(client.csts(), 0u);
    CHECK_EQ(client.read32(nvme::kRegAqa), aqa);
    CHECK_EQ(client.controller.read(nvme::kRegAsq, 8), client.admin.sq);
    client.enable();
    // The I/O queue is gone: it can be made again, and cannot be deleted before.
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusInvalidQueueId);
    Pair again = client.create(1);
    CHECK_EQ(client.code(again, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
    // A function-level reset forgets the rest too.
    client.controller.reset();
    CHECK_EQ(client.csts(), 0u);
    CHECK_EQ(client.read32(nvme::kRegCc), 0u);
    CHECK_EQ(client.read32(nvme::kRegAqa), 0u);
    CHECK_EQ(client.controller.read(nvme::kRegAsq, 8), 0u);
    client.enable();
    Pair third = client.create(1);
    CHECK_EQ(client.code(third, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  }
}

TEST(shutdown_completes_and_a_reset_follows_it) {
  Client client(in_memory());
  for (const std::uint32_t kind : {nvme::kCcShnNormal, nvme::kCcShnAbrupt}) {
    client.enable();
    client.write32(nvme::kRegCc, client.cc() | kind << nvme::kCcShnShift);
    client.until("CSTS.SHST", [&] { return nvme::csts_shst(client.csts()) == nvme::kShstComplete; });
    // Nothing is served any more.
    const auto page = client.memory.allocate(4096);
    client.submit(client.admin, client.identify_command(nvme::kCnsController, 0, page));
    for (int i = 0; i < 10; ++i) client.turn();
    CHECK(!client.poll(client.admin).has_value());
    client.disable();
    CHECK_EQ(client.csts(), 0u);
  }
  client.enable();
  CHECK_EQ(client.csts(), nvme::kCstsRdy);
}

TEST(shutdown_and_disable_in_one_write) {
  Client client(in_memory());
  client.enable();
  client.write32(nvme::kRegCc, (client.cc() & ~nvme::kCcEn) | nvme::kCcShnNormal << nvme::kCcShnShift);
  CHECK_EQ(client.csts(), nvme::kShstComplete << nvme::kCstsShstShift);
  client.write32(nvme::kRegCc, 0);
  client.enable();
  CHECK_EQ(client.csts(), nvme::kCstsRdy);
}

TEST(queue_entry_sizes_may_be_said_after_enabling) {
  Client client(in_memory());
  client.start();
  client.disable();
  client.begin(client.admin, 32, 32);
  client.write32(nvme::kRegCc, nvme::kCcEn);
  client.until("CSTS.RDY", [&] { return nvme::csts_rdy(client.csts()); });
  const auto address = client.memory.allocate(4096);
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 4, address)), nvme::kStatusInvalidQueueSize);
  client.write32(nvme::kRegCc, client.cc());
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 4, address)), nvme::kStatusSuccess);
  CHECK(nvme::csts_rdy(client.csts()));
}

// Whatever is written where: the controller lives, touches nothing that is not mapped, and works again after a reset.
TEST(random_register_writes_do_no_harm) {
  for (const unsigned threads : {0u, 1u}) {
    Options options = in_memory();
    options.threads = threads;
    Client client(options);
    client.enable();
    client.create(1);
    check::Random random(threads);
    for (int i = 0; i < check::rounds(5000); ++i) {
      const std::uint64_t offset =
          random.one_in(2) ? random.below(0x40) & ~3u : nvme::kRegDoorbells + (random.below(0x100) & ~3u);
      std::uint64_t value = random.below(~std::uint64_t{0});
      if (random.one_in(2)) value = random.pick<std::uint64_t>({0, 1, 7, client.cc(), client.admin.sq, 0x001F001F});
      client.controller.write(offset, random.one_in(2) ? 4 : 8, value);
      client.controller.read(offset, 8);
      if (threads == 0) client.turn();
      if (random.one_in(50)) {
        client.controller.reset();
        client.enable();
      }
    }
    client.controller.reset();
    client.enable();
    const auto page = client.memory.allocate(4096);
    CHECK_EQ(client.code(client.admin, client.identify_command(nvme::kCnsController, 0, page)), nvme::kStatusSuccess);
  }
}

TEST(interrupts_are_signalled_masked_and_caught_up_with) {
  Options options = in_memory();
  Client client(options);
  const int admin = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  const int io_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  const auto count = [](int fd) {
    std::uint64_t value = 0;
    return read(fd, &value, sizeof value) == sizeof value ? value : 0;
  };
  client.controller.set_interrupt(0, admin);
  client.controller.set_interrupt(3, io_fd);
  client.enable();
  Pair io;
  io.id = 1;
  io.sq = client.memory.allocate(4096);
  io.cq = client.memory.allocate(4096);
  client.begin(io, 16, 16);
  nvme::Sqe create = client.create_cq_command(1, 16, io.cq);
  create.cdw11 |= nvme::kCreateCqIen | 3 << nvme::kCreateCqIvShift;
  CHECK_EQ(client.code(client.admin, create), nvme::kStatusSuccess);
  CHECK_EQ(count(admin), 1u);
  CHECK_EQ(client.code(client.admin, client.create_sq_command(1, 16, io.sq, 1)), nvme::kStatusSuccess);
  const auto buffer = client.memory.allocate(4096);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  CHECK_EQ(count(io_fd), 1u);
  // Masked: kept until it is unmasked.
  client.write32(nvme::kRegIntms, 1 << 3);
  CHECK_EQ(client.read32(nvme::kRegIntms), 1u << 3);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  CHECK_EQ(count(io_fd), 0u);
  client.write32(nvme::kRegIntmc, 1 << 3);
  CHECK_EQ(client.read32(nvme::kRegIntmc), 0u);
  CHECK_EQ(count(io_fd), 1u);
  // One interrupt for what completes together.
  for (int i = 0; i < 5; ++i) {
    nvme::Sqe sqe = client.io(nvme::kNvmRead, 0, 1, buffer);
    sqe.cid = static_cast<std::uint16_t>(100 + i);
    client.put(io, sqe);
  }
  client.ring(io);
  client.turn();
  CHECK_EQ(count(io_fd), 1u);
  // The descriptor is the controller's own; taking it away is quiet.
  client.controller.set_interrupt(3, -1);
  close(io_fd);
  for (int i = 0; i < 5; ++i) client.wait(io);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 1, buffer)), nvme::kStatusSuccess);
  bool refused = false;
  try {
    client.controller.set_interrupt(2048, admin);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
  close(admin);
}

TEST(options_that_make_no_sense_are_refused_by_name) {
  const auto refusal = [](void (*change)(Options&)) -> std::string {
    Options options = in_memory();
    change(options);
    try {
      Controller controller(options);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  CHECK(refusal([](Options& o) { o.lba_bytes = 1024; }).starts_with("lba="));
  CHECK(refusal([](Options& o) { o.queues = 0; }).starts_with("queues="));
  CHECK(refusal([](Options& o) { o.mqes = 1; }).starts_with("mqes="));
  CHECK(refusal([](Options& o) { o.dstrd = 16; }).starts_with("dstrd="));
  CHECK(refusal([](Options& o) { o.mpsmin = 3, o.mpsmax = 2; }).starts_with("mpsmax="));
  CHECK(refusal([](Options& o) { o.size = 1000; }).starts_with("size="));
  CHECK(refusal([](Options& o) { o.size = 512, o.namespaces = 2; }).starts_with("size="));
  CHECK(refusal([](Options& o) { o.serial = "more than twenty characters"; }).starts_with("serial="));
  CHECK(refusal([](Options& o) { o.faults = "rust"; }).starts_with("faults:"));
  CHECK(refusal([](Options& o) { o.size = 0; }).find("size=") != std::string::npos);
}

TEST(stop_is_idempotent_and_leaves_quiet_registers) {
  Options options = in_memory();
  options.threads = 2;
  Client client(options);
  client.enable();
  client.controller.stop();
  client.controller.stop();
  CHECK(!nvme::csts_rdy(client.csts()));
}

TEST(after_a_fork_the_child_leaves_it_alone) {
  Options options = in_memory();
  options.threads = 2;
  auto controller = std::make_unique<Controller>(options);
  CHECK_EQ(check::in_child([&] {
             controller->stop();
             controller.reset();
           }),
           0);
  CHECK_EQ(controller->read(nvme::kRegVs, 4), nvme::kVersion20);
}
