// The software controller's admin commands: what they return, and the status of every wrong one.
#include <set>
#include <string>

#include "soft_client.h"

using namespace testing;

namespace {

// A client with a page to return data to.
struct AdminClient : Client {
  explicit AdminClient(const Options& options = in_memory()) : Client(options) {
    enable();
    page = memory.allocate(4096);
  }
  template <typename T>
  T& returned() {
    return *memory.at<T>(page);
  }
  std::uint16_t identify(std::uint8_t cns, std::uint32_t nsid = 0, std::uint8_t csi = 0) {
    std::memset(memory.at(page), 0xAA, 4096);
    return code(admin, identify_command(cns, nsid, page, csi));
  }
  std::uint16_t feature(std::uint8_t opcode, std::uint32_t cdw10, std::uint32_t cdw11 = 0, std::uint32_t nsid = 0) {
    nvme::Sqe sqe{};
    sqe.opcode = opcode;
    sqe.nsid = nsid;
    sqe.cdw10 = cdw10;
    sqe.cdw11 = cdw11;
    const nvme::Cqe cqe = run(admin, sqe);
    dw0 = cqe.dw0;
    return nvme::status_code(nvme::cqe_status(cqe.status));
  }
  std::uint16_t set(std::uint32_t cdw10, std::uint32_t cdw11 = 0, std::uint32_t nsid = 0) {
    return feature(nvme::kAdminSetFeatures, cdw10, cdw11, nsid);
  }
  std::uint16_t get(std::uint32_t cdw10, std::uint32_t cdw11 = 0, std::uint32_t nsid = 0) {
    return feature(nvme::kAdminGetFeatures, cdw10, cdw11, nsid);
  }

  std::uint64_t page = 0;
  std::uint32_t dw0 = 0;
};

}  // namespace

TEST(identify_controller_is_what_kernels_ask_for) {
  Options options = in_memory();
  options.serial = "S3R1AL";
  options.mdts = 3;
  options.namespaces = 3;
  AdminClient client(options);
  CHECK_EQ(client.identify(nvme::kCnsController), nvme::kStatusSuccess);
  const auto& data = client.returned<nvme::IdentifyController>();
  CHECK(std::string(data.sn, 20) == "S3R1AL              ");
  CHECK_EQ(data.mdts, 3);
  CHECK_EQ(data.ver, nvme::kVersion20);
  CHECK_EQ(data.cntrltype, 1);
  CHECK_EQ(data.nn, 3u);
  CHECK_EQ(data.sqes, 0x66);
  CHECK_EQ(data.cqes, 0x44);
  CHECK_EQ(data.vwc, 7);
  CHECK_EQ(data.sgls, 0u);
  CHECK((data.oncs & nvme::kOncsCompare) != 0 && (data.oncs & nvme::kOncsVerify) != 0);
  CHECK(std::string(data.subnqn).starts_with("nqn.2014-08.org.nvmexpress:uuid:"));
  CHECK_EQ(std::string(data.subnqn).size(), 32u + 36u);
}

TEST(identify_namespaces_differ_where_they_have_to) {
  Options options = in_memory(10 << 20);
  options.lba_bytes = 4096;
  options.namespaces = 2;
  AdminClient client(options);
  std::set<std::string> ids;
  for (std::uint32_t nsid = 1; nsid <= 2; ++nsid) {
    CHECK_EQ(client.identify(nvme::kCnsNamespace, nsid), nvme::kStatusSuccess);
    const auto& data = client.returned<nvme::IdentifyNamespace>();
    CHECK_EQ(data.nsze, (10u << 20) / 2 / 4096);
    CHECK_EQ(data.ncap, data.nsze);
    CHECK_EQ(data.flbas, 0);
    CHECK_EQ(data.lbaf[0].lbads, 12);
    CHECK_EQ(data.lbaf[0].ms, 0);
    ids.emplace(reinterpret_cast<const char*>(data.nguid), 16);
    ids.emplace(reinterpret_cast<const char*>(data.eui64), 8);
    const std::string eui64(reinterpret_cast<const char*>(data.eui64), 8);

    CHECK_EQ(client.identify(nvme::kCnsNamespaceDescriptors, nsid), nvme::kStatusSuccess);
    std::set<int> types;
    const std::byte* at = client.memory.at(client.page);
    while (true) {
      const auto& descriptor = *reinterpret_cast<const nvme::NamespaceDescriptor*>(at);
      if (descriptor.nidl == 0) break;
      types.insert(descriptor.nidt);
      const std::string value(reinterpret_cast<const char*>(at + 4), descriptor.nidl);
      if (descriptor.nidt == nvme::kNidtEui64) CHECK(value == eui64);
      if (descriptor.nidt == nvme::kNidtUuid) ids.insert(value);
      if (descriptor.nidt == nvme::kNidtCsi) CHECK(value == std::string(1, '\0'));
      at += 4 + descriptor.nidl;
    }
    CHECK(types == (std::set<int>{nvme::kNidtEui64, nvme::kNidtNguid, nvme::kNidtUuid, nvme::kNidtCsi}));
  }
  CHECK_EQ(ids.size(), 6u);
}

TEST(identify_lists_and_the_command_set) {
  Options options = in_memory();
  options.namespaces = 3;
  AdminClient client(options);
  for (const std::uint8_t cns :
       {nvme::kCnsActiveNamespaces, nvme::kCnsAllocatedNamespaces, nvme::kCnsCommandSetActiveNamespaces}) {
    CHECK_EQ(client.identify(cns, 1), nvme::kStatusSuccess);
    const auto* list = &client.returned<std::uint32_t>();
    CHECK(list[0] == 2 && list[1] == 3 && list[2] == 0 && list[1023] == 0);
    CHECK_EQ(client.identify(cns, 0xFFFFFFFE), nvme::kStatusInvalidNamespaceOrFormat);
  }
  const auto all_zero = [&] {
    const auto* words = &client.returned<std::uint64_t>();
    return std::all_of(words, words + 512, [](std::uint64_t word) { return word == 0; });
  };
  CHECK_EQ(client.identify(nvme::kCnsCommandSetNamespace, 1), nvme::kStatusSuccess);
  CHECK(all_zero());
  CHECK_EQ(client.identify(nvme::kCnsCommandSetController), nvme::kStatusSuccess);
  CHECK(all_zero());
  CHECK_EQ(client.identify(nvme::kCnsIndependentNamespace, 3), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<std::uint8_t>(), 0);
  CHECK_EQ((&client.returned<std::uint8_t>())[14], 1);
  CHECK_EQ(client.identify(nvme::kCnsCommandSets), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<std::uint64_t>(), 1u);
  CHECK_EQ(client.identify(nvme::kCnsControllers), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<std::uint32_t>(), 1u | 1u << 16);
}

TEST(identify_refuses_what_is_not_there) {
  AdminClient client;
  for (const std::uint8_t cns : {nvme::kCnsNamespace, nvme::kCnsNamespaceDescriptors, nvme::kCnsCommandSetNamespace,
                                 nvme::kCnsIndependentNamespace}) {
    for (const std::uint32_t nsid : {0u, 2u, 0xFFFFFFFFu}) {
      CHECK_EQ(client.identify(cns, nsid), nvme::kStatusInvalidNamespaceOrFormat);
    }
  }
  CHECK_EQ(client.identify(nvme::kCnsCommandSetNamespace, 1, 2), nvme::kStatusInvalidField);
  CHECK_EQ(client.identify(0x7F), nvme::kStatusInvalidField);
  nvme::Sqe sgl = client.identify_command(nvme::kCnsController, 0, client.page);
  sgl.flags = 0x40;
  CHECK_EQ(client.code(client.admin, sgl), nvme::kStatusInvalidField);
  const nvme::Cqe cqe = client.run(client.admin, sgl);
  // Trying again would not help, and the error log has it.
  CHECK(nvme::status_dnr(nvme::cqe_status(cqe.status)));
  CHECK(nvme::status_more(nvme::cqe_status(cqe.status)));
}

TEST(queues_are_made_and_deleted_in_the_right_order_only) {
  Options options = in_memory();
  options.queues = 3;
  options.mqes = 64;
  AdminClient client(options);
  const auto address = client.memory.allocate(65536);
  const auto cq = [&](std::uint16_t id, std::uint32_t entries = 8) {
    return client.code(client.admin, client.create_cq_command(id, entries, address));
  };
  const auto sq = [&](std::uint16_t id, std::uint16_t with, std::uint32_t entries = 8) {
    return client.code(client.admin, client.create_sq_command(id, entries, address + 32768, with));
  };
  const auto gone_cq = [&](std::uint16_t id) {
    return client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, id));
  };
  const auto gone_sq = [&](std::uint16_t id) {
    return client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, id));
  };
  CHECK_EQ(cq(0), nvme::kStatusInvalidQueueId);
  CHECK_EQ(cq(4), nvme::kStatusInvalidQueueId);
  CHECK_EQ(cq(0xFFFF), nvme::kStatusInvalidQueueId);
  CHECK_EQ(cq(1, 1), nvme::kStatusInvalidQueueSize);
  CHECK_EQ(cq(1, 65), nvme::kStatusInvalidQueueSize);
  CHECK_EQ(cq(1, 65536), nvme::kStatusInvalidQueueSize);
  CHECK_EQ(sq(1, 1), nvme::kStatusCompletionQueueInvalid);
  CHECK_EQ(cq(1, 64), nvme::kStatusSuccess);
  CHECK_EQ(cq(1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(0, 1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(4, 1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(1, 0), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(1, 4), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(1, 1, 1), nvme::kStatusInvalidQueueSize);
  CHECK_EQ(sq(1, 1, 65), nvme::kStatusInvalidQueueSize);
  CHECK_EQ(sq(1, 1), nvme::kStatusSuccess);
  CHECK_EQ(sq(1, 1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(sq(2, 1), nvme::kStatusSuccess);
  CHECK_EQ(gone_cq(1), nvme::kStatusInvalidQueueDeletion);
  CHECK_EQ(gone_sq(1), nvme::kStatusSuccess);
  CHECK_EQ(gone_sq(1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(gone_cq(1), nvme::kStatusInvalidQueueDeletion);
  CHECK_EQ(gone_sq(2), nvme::kStatusSuccess);
  CHECK_EQ(gone_cq(1), nvme::kStatusSuccess);
  CHECK_EQ(gone_cq(1), nvme::kStatusInvalidQueueId);
  CHECK_EQ(gone_cq(0), nvme::kStatusInvalidQueueId);
  CHECK_EQ(gone_sq(0), nvme::kStatusInvalidQueueId);
  // Not contiguous is not allowed here (CAP.CQR), unaligned nowhere, and there are 2048 vectors.
  nvme::Sqe sqe = client.create_cq_command(1, 8, address);
  sqe.cdw11 = 0;
  CHECK_EQ(client.code(client.admin, sqe), nvme::kStatusInvalidField);
  CHECK_EQ(client.code(client.admin, client.create_cq_command(1, 8, address + 64)), nvme::kStatusPrpOffsetInvalid);
  sqe.cdw11 = nvme::kCreateQueuePc | nvme::kCreateCqIen | 2048u << nvme::kCreateCqIvShift;
  CHECK_EQ(client.code(client.admin, sqe), nvme::kStatusInvalidInterruptVector);
}

TEST(features_have_values_defaults_and_capabilities) {
  AdminClient client;
  const std::uint32_t queues = client.options.queues - 1;
  CHECK_EQ(client.set(nvme::kFeatureNumberOfQueues, 0 | 0 << 16), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, queues | queues << 16);
  CHECK_EQ(client.set(nvme::kFeatureNumberOfQueues, 0xFFFF), nvme::kStatusInvalidField);
  CHECK_EQ(client.get(nvme::kFeatureNumberOfQueues), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, queues | queues << 16);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 1u);
  CHECK_EQ(client.set(nvme::kFeatureVolatileWriteCache, 0), nvme::kStatusSuccess);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 0u);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache | 1 << 8), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 1u);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache | 3 << 8), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 4u);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache | 4 << 8), nvme::kStatusInvalidField);
  for (const std::uint8_t plain : {nvme::kFeatureArbitration, nvme::kFeatureInterruptCoalescing,
                                   nvme::kFeatureWriteAtomicity, nvme::kFeatureAsyncEvents}) {
    CHECK_EQ(client.set(plain, 0x1234), nvme::kStatusSuccess);
    CHECK_EQ(client.get(plain), nvme::kStatusSuccess);
    CHECK_EQ(client.dw0, 0x1234u);
  }
  CHECK_EQ(client.set(nvme::kFeatureArbitration | nvme::kSetFeaturesSave, 1), nvme::kStatusFeatureNotSaveable);
  CHECK_EQ(client.set(nvme::kFeatureArbitration, 1, 1), nvme::kStatusFeatureNotNamespaceSpecific);
  CHECK_EQ(client.set(nvme::kFeatureArbitration, 1, 9), nvme::kStatusInvalidNamespaceOrFormat);
  CHECK_EQ(client.set(nvme::kFeaturePowerManagement, 1), nvme::kStatusInvalidField);
  CHECK_EQ(client.set(nvme::kFeaturePowerManagement, 0), nvme::kStatusSuccess);
  CHECK_EQ(client.set(nvme::kFeatureCommandSetProfile, 1), nvme::kStatusCommandSetCombinationRejected);
  // Over and under temperature are two values.
  CHECK_EQ(client.set(nvme::kFeatureTemperatureThreshold, 350), nvme::kStatusSuccess);
  CHECK_EQ(client.set(nvme::kFeatureTemperatureThreshold, 260 | 1 << 20), nvme::kStatusSuccess);
  CHECK_EQ(client.get(nvme::kFeatureTemperatureThreshold, 0), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 350u);
  CHECK_EQ(client.get(nvme::kFeatureTemperatureThreshold, 1 << 20), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 260u);
  CHECK_EQ(client.set(nvme::kFeatureTemperatureThreshold, 1 << 16), nvme::kStatusInvalidField);
  // Error recovery is a namespace's.
  CHECK_EQ(client.set(nvme::kFeatureErrorRecovery, 7, 1), nvme::kStatusSuccess);
  CHECK_EQ(client.get(nvme::kFeatureErrorRecovery, 0, 1), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 7u);
  CHECK_EQ(client.get(nvme::kFeatureErrorRecovery, 0, 0), nvme::kStatusInvalidNamespaceOrFormat);
  CHECK_EQ(client.set(nvme::kFeatureErrorRecovery, 8, nvme::kNsidAll), nvme::kStatusSuccess);
  CHECK_EQ(client.get(nvme::kFeatureErrorRecovery, 0, 1), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 8u);
  CHECK_EQ(client.get(nvme::kFeatureInterruptVector, 5), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 5u);
  CHECK_EQ(client.get(nvme::kFeatureInterruptVector, 4000), nvme::kStatusInvalidField);
  CHECK_EQ(client.get(nvme::kFeatureHostMemoryBuffer), nvme::kStatusInvalidField);
  // The number of queues is fixed once there is one, and a reset brings defaults back.
  client.create(1);
  CHECK_EQ(client.set(nvme::kFeatureNumberOfQueues, 0), nvme::kStatusCommandSequenceError);
  client.disable();
  client.enable();
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache), nvme::kStatusSuccess);
  CHECK_EQ(client.dw0, 1u);
}

TEST(without_a_write_cache_there_is_no_such_feature) {
  Options options = in_memory();
  options.vwc = false;
  AdminClient client(options);
  CHECK_EQ(client.identify(nvme::kCnsController), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<nvme::IdentifyController>().vwc, 6);
  CHECK_EQ(client.get(nvme::kFeatureVolatileWriteCache), nvme::kStatusInvalidField);
}

TEST(log_pages_and_parts_of_them) {
  AdminClient client;
  Pair io = client.create(1);
  const auto buffer = client.memory.allocate(8192);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 0, 8, buffer)), nvme::kStatusSuccess);
  CHECK_EQ(client.code(io, client.io(nvme::kNvmRead, 1 << 30, 8, buffer)), nvme::kStatusLbaOutOfRange);
  const auto log = [&](std::uint8_t which, std::uint32_t nbytes) {
    return client.code(client.admin, client.log_command(which, nbytes, client.page));
  };
  CHECK_EQ(log(nvme::kLogSmart, 512), nvme::kStatusSuccess);
  const auto& smart = client.returned<nvme::SmartLog>();
  CHECK_EQ(smart.host_read_commands[0], 1);
  CHECK_EQ(smart.data_units_read[0], 1);
  CHECK_EQ(smart.error_log_entries[0], 1);
  CHECK_EQ(smart.available_spare, 100);
  CHECK_EQ(log(nvme::kLogError, 128), nvme::kStatusSuccess);
  const auto& error = client.returned<nvme::ErrorLogEntry>();
  CHECK_EQ(error.error_count, 1u);
  CHECK_EQ(error.sqid, 1);
  CHECK_EQ(error.lba, 1u << 30);
  CHECK_EQ(nvme::status_code(nvme::cqe_status(error.status)), nvme::kStatusLbaOutOfRange);
  CHECK_EQ((&error)[1].error_count, 0u);
  CHECK_EQ(log(nvme::kLogFirmwareSlot, 512), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<nvme::FirmwareSlotLog>().afi, 1);
  CHECK_EQ(log(nvme::kLogCommandEffects, 4096), nvme::kStatusSuccess);
  const auto* effects = &client.returned<std::uint32_t>();
  CHECK_EQ(effects[nvme::kAdminIdentify], 1u);
  CHECK_EQ(effects[nvme::kAdminFormatNvm], 0u);
  CHECK_EQ(effects[256 + nvme::kNvmWrite], 3u);
  CHECK_EQ(log(nvme::kLogSupportedPages, 1024), nvme::kStatusSuccess);
  CHECK_EQ((&client.returned<std::uint32_t>())[nvme::kLogSmart], 1u);
  CHECK_EQ(log(nvme::kLogFeatureEffects, 1024), nvme::kStatusSuccess);
  CHECK_EQ((&client.returned<std::uint32_t>())[nvme::kFeatureVolatileWriteCache] & 1, 1u);
  CHECK_EQ(log(nvme::kLogAna, 512), nvme::kStatusInvalidLogPage);

  // A part, from an offset; beyond the end; more than there is.
  nvme::Sqe part = client.log_command(nvme::kLogCommandEffects, 8, client.page);
  part.cdw12 = 4 * nvme::kAdminIdentify;
  CHECK_EQ(client.code(client.admin, part), nvme::kStatusSuccess);
  CHECK_EQ(client.returned<std::uint64_t>(), 1u);
  part.cdw12 = 2;
  CHECK_EQ(client.code(client.admin, part), nvme::kStatusInvalidField);
  part.cdw12 = 4100;
  CHECK_EQ(client.code(client.admin, part), nvme::kStatusInvalidField);
  nvme::Sqe more = client.log_command(nvme::kLogSmart, 8192, buffer);
  more.prp2 = buffer + 4096;
  CHECK_EQ(client.code(client.admin, more), nvme::kStatusSuccess);
  more.cdw10 = nvme::kLogSmart | 0xFFFFu << 16;
  more.cdw11 = 0xFFFF;
  CHECK_EQ(client.code(client.admin, more), nvme::kStatusInvalidField);
  nvme::Sqe one = client.log_command(nvme::kLogSmart, 512, client.page);
  one.nsid = 1;
  CHECK_EQ(client.code(client.admin, one), nvme::kStatusInvalidField);
}

TEST(abort_and_requests_for_events) {
  AdminClient client;
  nvme::Sqe request{};
  request.opcode = nvme::kAdminAsyncEventRequest;
  std::vector<std::uint16_t> cids;
  for (int i = 0; i < 4; ++i) cids.push_back(client.submit(client.admin, request));
  CHECK_EQ(client.code(client.admin, request), nvme::kStatusAerLimitExceeded);
  CHECK(!client.poll(client.admin).has_value());
  // Nothing to abort: bit 0 of DW0.
  nvme::Sqe abort{};
  abort.opcode = nvme::kAdminAbort;
  abort.cdw10 = 5 | 77 << 16;
  nvme::Cqe cqe = client.run(client.admin, abort);
  CHECK_EQ(cqe.dw0, 1u);
  CHECK_EQ(nvme::cqe_status(cqe.status), nvme::kStatusSuccess);
  // A request for events can be aborted: its completion, and Abort's.
  abort.cdw10 = static_cast<std::uint32_t>(cids[2]) << 16;
  client.submit(client.admin, abort);
  cqe = client.wait(client.admin);
  CHECK_EQ(cqe.cid, cids[2]);
  CHECK_EQ(nvme::status_code(nvme::cqe_status(cqe.status)), nvme::kStatusAbortRequested);
  CHECK_EQ(client.wait(client.admin).dw0, 0u);
}

TEST(opcodes_that_do_not_exist_are_refused) {
  AdminClient client;
  Pair io = client.create(1);
  nvme::Sqe sqe{};
  for (const std::uint8_t opcode : {nvme::kAdminFormatNvm, nvme::kAdminSanitize, nvme::kAdminKeepAlive,
                                    nvme::kAdminNamespaceManagement, std::uint8_t{0xC0}, std::uint8_t{0xFF}}) {
    sqe.opcode = opcode;
    CHECK_EQ(client.code(client.admin, sqe), nvme::kStatusInvalidOpcode);
  }
  for (const std::uint8_t opcode : {nvme::kNvmWriteUncorrectable, nvme::kNvmCopy, std::uint8_t{0xFF}}) {
    sqe.opcode = opcode;
    sqe.nsid = 1;
    CHECK_EQ(client.code(io, sqe), nvme::kStatusInvalidOpcode);
  }
}

// Whatever a host sends: an answer for each command, no access outside of what it mapped, and the controller lives.
TEST(random_admin_commands_are_all_answered) {
  check::Random random(7);
  Options options = in_memory();
  options.cqr = false;
  options.namespaces = 2;
  AdminClient client(options);
  const auto buffer = client.memory.allocate(1 << 20);
  int requests = 0;
  for (int i = 0; i < check::rounds(20000); ++i) {
    nvme::Sqe sqe{};
    for (std::size_t word = 0; word < 8; ++word) {
      const std::uint64_t value = random.below(~std::uint64_t{0});
      std::memcpy(reinterpret_cast<std::byte*>(&sqe) + 8 * word, &value, 8);
    }
    sqe.flags = random.one_in(8) ? sqe.flags : 0;
    if (!random.one_in(8)) {
      sqe.opcode = random.pick<std::uint8_t>({0, 1, 2, 4, 5, 6, 8, 9, 10, 12});
      sqe.nsid = random.pick({0u, 1u, 2u, 3u, 0xFFFFFFFFu});
      sqe.prp1 = buffer + random.below(1 << 20) / random.pick({1u, 4u, 4096u}) * random.pick({1u, 4u, 4096u});
      if (!random.one_in(4)) sqe.prp2 = buffer + random.below(256) * 4096;
      sqe.cdw10 = static_cast<std::uint32_t>(random.below(32) | random.below(16) << (random.one_in(2) ? 16 : 8));
      sqe.cdw11 = static_cast<std::uint32_t>(random.below(4) | random.below(10) << 16);
      if (random.one_in(2)) sqe.cdw12 = sqe.cdw13 = 0;
    }
    const std::uint16_t cid = client.submit(client.admin, sqe);
    for (int turn = 0; turn < 3; ++turn) client.turn();
    bool answered = false;
    while (const auto cqe = client.poll(client.admin)) {
      if (cqe->cid == cid) answered = true;
    }
    if (!answered) {
      // Only requests for events stay open.
      CHECK_EQ(sqe.opcode, nvme::kAdminAsyncEventRequest);
      CHECK(++requests <= 5000);
    }
    if (nvme::csts_cfs(client.csts())) {
      // It made a queue outside of its memory and something looked there.
      client.disable();
      client.enable();
    }
  }
  client.disable();
  client.enable();
  CHECK_EQ(client.identify(nvme::kCnsController), nvme::kStatusSuccess);
}
