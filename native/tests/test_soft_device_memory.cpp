// GPU memory as the software controller reaches it: queues and data that only the copy engine touches.
#include <sys/mman.h>

#include "fake.h"
#include "gpu_copies.h"
#include "soft_client.h"

using namespace testing;

namespace {

constexpr int kIllegalAddress = 700;
constexpr std::uint64_t kGpuIova = 0x4000'0000'0000;

class Gpu final : public gpunvme::soft::DeviceMemory {
 public:
  explicit Gpu(int device) : copies(device) {}
  bool read(void* to, std::uint64_t from, std::size_t nbytes) override { return copies.to_host(to, from, nbytes); }
  bool write(std::uint64_t to, const void* from, std::size_t nbytes) override {
    if (writes != nullptr) {
      const auto* const bytes = static_cast<const std::uint8_t*>(from);
      writes->emplace_back(to, Bytes(bytes, bytes + nbytes));
    }
    return copies.to_gpu(to, from, nbytes);
  }
  gpunvme::GpuCopies copies;
  std::vector<std::pair<std::uint64_t, Bytes>>* writes = nullptr;  // of a controller that is stepped
};

// A controller that reaches memory of GPU 0.
struct Case {
  explicit Case(Options options = in_memory(), std::uint64_t nbytes = 1 << 20, bool readable = true,
                bool writable = true)
      : nbytes(nbytes) {
    fake.reset();
    memory = std::make_unique<testing::DeviceMemory>(0, nbytes);
    client = std::make_unique<Client>(options, 8 << 20);
    client->enable();
    gpu = std::make_shared<Gpu>(0);
    client->controller.map_device(kGpuIova, nbytes, memory->address(), readable, writable, gpu);
    mapped = true;
  }
  ~Case() {
    if (mapped) unmap();
    client.reset();
    fake.reset();
  }
  void unmap() {
    client->controller.unmap(kGpuIova, nbytes);
    mapped = false;
  }
  void put(std::uint64_t iova, const void* from, std::size_t count) {
    gpunvme::cuda_check(fake.poke(memory->address() + (iova - kGpuIova), from, count), "poke");
  }
  void get(void* to, std::uint64_t iova, std::size_t count) {
    gpunvme::cuda_check(fake.peek(to, memory->address() + (iova - kGpuIova), count), "peek");
  }
  std::uint16_t code(Pair& pair, const nvme::Sqe& sqe) { return client->code(pair, sqe); }

  const Fake& fake = Fake::instance();
  const std::uint64_t nbytes;
  std::unique_ptr<testing::DeviceMemory> memory;
  std::unique_ptr<Client> client;
  std::shared_ptr<Gpu> gpu;
  bool mapped = false;
};

// A queue pair in GPU memory: entries are poked and peeked.
struct GpuPair : Pair {
  GpuPair(Case& c, std::uint16_t number, std::uint64_t sq_at, std::uint64_t cq_at, std::uint32_t size) {
    id = number;
    entries = cq_entries = size;
    sq = sq_at;
    cq = cq_at;
    const Bytes zeroes(std::size_t{size} * 16);
    c.put(cq, zeroes.data(), zeroes.size());
    CHECK_EQ(c.code(c.client->admin, c.client->create_cq_command(id, size, cq)), nvme::kStatusSuccess);
    CHECK_EQ(c.code(c.client->admin, c.client->create_sq_command(id, size, sq, id)), nvme::kStatusSuccess);
  }
  void submit(Case& c, nvme::Sqe sqe) {
    sqe.cid = next_cid++;
    c.put(sq + std::uint64_t{tail} * 64, &sqe, 64);
    tail = (tail + 1) % entries;
  }
  void ring(Case& c) { c.client->ring(*this); }
  std::optional<nvme::Cqe> poll(Case& c) {
    nvme::Cqe cqe;
    c.get(&cqe, cq + std::uint64_t{head} * 16, 16);
    if ((cqe.status & 1) != (phase ? 1 : 0)) return std::nullopt;
    if (++head == cq_entries) {
      head = 0;
      phase = !phase;
    }
    c.client->release(*this);
    return cqe;
  }
  nvme::Cqe wait(Case& c) {
    std::optional<nvme::Cqe> cqe;
    c.client->until("a completion", [&] { return (cqe = poll(c)).has_value(); });
    return *cqe;
  }
};

std::uint16_t code_of(const nvme::Cqe& cqe) { return nvme::status_code(nvme::cqe_status(cqe.status)); }

Options with_threads(unsigned threads) {
  Options options = in_memory();
  options.threads = threads;
  return options;
}

}  // namespace

// Data at any offset, its pages in any order, some of them the host's, lists in either memory: and nothing beside it.
TEST(data_and_lists_in_gpu_memory) {
  for (int round = 0; round < check::rounds(60); ++round) {
    check::Random random(static_cast<std::uint64_t>(round) + check::seed());
    Case c;
    c.fake.set_copy_time(0, 50, 0, 1);
    Client& client = *c.client;
    Pair io = client.create(1);
    const std::uint64_t blocks = random.between(1, 64);
    const std::uint64_t lba = random.below(1000);
    const std::uint64_t nbytes = blocks * 512;
    const std::uint64_t first = random.below(1024) * 4;
    const std::uint64_t pages = (first + nbytes + 4095) / 4096;
    const auto host = client.memory.allocate(pages * 4096);
    // Where each page is: in GPU memory at a place of its own, or in the host's.
    std::vector<std::uint64_t> where(pages);
    for (std::uint64_t i = 0; i < pages; ++i) {
      const bool in_gpu = i == 0 || random.below(4) != 0;
      const std::uint64_t place = random.below(2) == 0 ? i : 100 - i;
      where[i] = in_gpu ? kGpuIova + (8 + place) * 4096 : host + i * 4096;
    }
    std::uint64_t prp2 = pages > 1 ? where[1] : 0;
    if (pages > 2) {
      const bool list_in_gpu = random.below(2) == 0;
      prp2 = list_in_gpu ? kGpuIova + 4096 + random.below(8) * 8 : client.memory.allocate(4096);
      if (list_in_gpu) {
        c.put(prp2, where.data() + 1, (pages - 1) * 8);
      } else {
        std::memcpy(client.memory.at(prp2), where.data() + 1, (pages - 1) * 8);
      }
    }
    const auto buffer = client.memory.allocate(64 * 512);
    std::vector<std::byte> content(nbytes);
    fill(content.data(), nbytes, static_cast<std::uint64_t>(round) + 7);
    // Written from the pages, read back into host memory.
    const auto each = [&](auto move) {
      for (std::uint64_t i = 0, done = 0; i < pages; ++i) {
        const std::uint64_t skip = i == 0 ? first : 0;
        const std::uint64_t now = std::min(nbytes - done, 4096 - skip);
        move(where[i] + skip, content.data() + done, now);
        done += now;
      }
    };
    each([&](std::uint64_t at, std::byte* from, std::uint64_t now) {
      at >= kGpuIova&& at < kGpuIova + c.nbytes ? c.put(at, from, now)
                                                : static_cast<void>(std::memcpy(client.memory.at(at), from, now));
    });
    CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, lba, static_cast<std::uint32_t>(blocks), where[0] + first, prp2)),
             nvme::kStatusSuccess);
    CHECK_EQ(c.code(io, client.io(nvme::kNvmCompare, lba, static_cast<std::uint32_t>(blocks), where[0] + first, prp2)),
             nvme::kStatusSuccess);
    // Read into the pages: the rest of the GPU's memory stays as it is.
    fill(content.data(), nbytes, static_cast<std::uint64_t>(round) + 99);
    std::memcpy(client.memory.at(buffer), content.data(), nbytes);
    const auto list = client.memory.allocate(4096);
    for (std::uint64_t i = 1; i < 16; ++i) client.memory.at<std::uint64_t>(list)[i - 1] = buffer + i * 4096;
    CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, lba, static_cast<std::uint32_t>(blocks), buffer,
                                  nbytes > 8192   ? list
                                  : nbytes > 4096 ? buffer + 4096
                                                  : 0)),
             nvme::kStatusSuccess);
    Bytes expected = c.memory->bytes();
    each([&](std::uint64_t at, std::byte* from, std::uint64_t now) {
      if (at >= kGpuIova && at < kGpuIova + c.nbytes) std::memcpy(expected.data() + (at - kGpuIova), from, now);
    });
    CHECK_EQ(c.code(io, client.io(nvme::kNvmRead, lba, static_cast<std::uint32_t>(blocks), where[0] + first, prp2)),
             nvme::kStatusSuccess);
    CHECK_EQ(first_difference(c.memory->bytes(), expected), -1);
    each([&](std::uint64_t at, std::byte* from, std::uint64_t now) {
      if (at < kGpuIova || at >= kGpuIova + c.nbytes) CHECK(std::memcmp(client.memory.at(at), from, now) == 0);
    });
    CHECK_EQ(client.stat("dma_faults"), 0u);
    CHECK_EQ(client.stat("device_copy_errors"), 0u);
  }
}

TEST(data_may_lie_in_several_mappings_of_gpu_and_host_memory) {
  Case c;
  Client& client = *c.client;
  Pair io = client.create(1);
  // They meet as I/O virtual addresses, and are apart, in another order, in memory; the second one is the host's.
  constexpr std::uint64_t kIova = 0x2'0000'0000;
  void* const host = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  client.controller.map_device(kIova, 4096, c.memory->address() + 0x8000, true, true, c.gpu);
  client.controller.map(kIova + 4096, 4096, host, true, true);
  client.controller.map_device(kIova + 8192, 4096, c.memory->address() + 0x4000, true, true, c.gpu);
  client.controller.map_device(kIova + 12288, 4096, c.memory->address(), true, true, c.gpu);
  const auto buffer = client.memory.allocate(4 * 4096);
  const auto lists = client.memory.allocate(4096);
  for (std::uint64_t i = 0; i < 4; ++i) {
    std::memset(client.memory.at(buffer + i * 4096), static_cast<int>(i + 1), 4096);
    client.memory.at<std::uint64_t>(lists)[i] = buffer + (i + 1) * 4096;
    client.memory.at<std::uint64_t>(lists)[8 + i] = kIova + (i + 1) * 4096;
  }
  CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, 0, 32, buffer, lists)), nvme::kStatusSuccess);
  Bytes expected = c.memory->bytes();
  CHECK_EQ(c.code(io, client.io(nvme::kNvmRead, 0, 32, kIova, lists + 64)), nvme::kStatusSuccess);
  std::fill_n(expected.begin() + 0x8000, 4096, std::uint8_t{1});
  std::fill_n(expected.begin() + 0x4000, 4096, std::uint8_t{3});
  std::fill_n(expected.begin(), 4096, std::uint8_t{4});
  CHECK_EQ(first_difference(c.memory->bytes(), expected), -1);
  CHECK(static_cast<const std::uint8_t*>(host)[0] == 2 && static_cast<const std::uint8_t*>(host)[4095] == 2);
  CHECK_EQ(c.code(io, client.io(nvme::kNvmCompare, 0, 32, kIova, lists + 64)), nvme::kStatusSuccess);
  client.controller.unmap(kIova, 4 * 4096);
  munmap(host, 4096);
}

// Larger than what the copies pass through at a time.
TEST(large_commands_and_admin_data_in_gpu_memory) {
  Options options = in_memory();
  options.mdts = 0;
  Case c(options, 8 << 20);
  Client& client = *c.client;
  Pair io = client.create(1);
  constexpr std::uint64_t kBytes = 5 << 19;  // 2.5 MiB
  const auto list = client.memory.allocate(2 * 4096);
  auto* const entries = client.memory.at<std::uint64_t>(list);
  for (std::uint64_t i = 1, at = 0; i < kBytes / 4096; ++i, ++at) {
    if (at == 511) entries[at++] = list + 4096;
    entries[at] = kGpuIova + i * 4096;
  }
  Bytes content(kBytes);
  fill(reinterpret_cast<std::byte*>(content.data()), kBytes, 5);
  c.put(kGpuIova, content.data(), kBytes);
  CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, 0, kBytes / 512, kGpuIova, list)), nvme::kStatusSuccess);
  const Bytes nothing(kBytes);
  c.put(kGpuIova, nothing.data(), kBytes);
  CHECK_EQ(c.code(io, client.io(nvme::kNvmRead, 0, kBytes / 512, kGpuIova, list)), nvme::kStatusSuccess);
  Bytes got(kBytes);
  c.get(got.data(), kGpuIova, kBytes);
  CHECK_EQ(first_difference(got, content), -1);

  const auto page = client.memory.allocate(4096);
  CHECK_EQ(c.code(client.admin, client.identify_command(1, 0, page)), nvme::kStatusSuccess);
  CHECK_EQ(c.code(client.admin, client.identify_command(1, 0, kGpuIova + 4096)), nvme::kStatusSuccess);
  c.get(got.data(), kGpuIova + 4096, 4096);
  CHECK(std::memcmp(got.data(), client.memory.at(page), 4096) == 0);
}

// Blocks that have to come from a drive first: none of them bypasses the copy.
TEST(an_image_that_is_not_in_the_page_cache) {
  const Directory directory;
  Options options = with_threads(2);
  options.path = directory.path() + "/image";
  options.size = 4 << 20;
  Case c(options);
  Client& client = *c.client;
  Pair io = client.create(1, 64);
  const auto buffer = client.memory.allocate(4096);
  for (std::uint64_t i = 0; i < 32; ++i) {
    std::memset(client.memory.at(buffer), static_cast<int>(i + 1), 4096);
    CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, i * 200, 8, buffer)), nvme::kStatusSuccess);
  }
  CHECK_EQ(c.code(io, client.io(nvme::kNvmFlush, 0, 1, 0)), nvme::kStatusSuccess);
  for (int round = 0; round < 3; ++round) {
    make_cold(*options.path);
    for (std::uint64_t i = 0; i < 32; ++i)
      client.submit(io, client.io(nvme::kNvmRead, i * 200, 8, kGpuIova + i * 4096));
    for (int i = 0; i < 32; ++i) CHECK_EQ(code_of(client.wait(io)), nvme::kStatusSuccess);
    for (std::uint64_t i = 0; i < 32; ++i) {
      Bytes got(4096);
      c.get(got.data(), kGpuIova + i * 4096, 4096);
      CHECK_EQ(first_difference(got, Bytes(4096, static_cast<std::uint8_t>(i + 1))), -1);
    }
    const Bytes nothing(32 * 4096);
    c.put(kGpuIova, nothing.data(), nothing.size());
  }
  CHECK_EQ(client.stat("uring_bytes"), 0u);
}

// What a kernel that sees the completion would compute with.
TEST(data_is_there_before_its_completion_is) {
  for (const unsigned threads : {1u, 2u}) {
    Case c(with_threads(threads));
    Client& client = *c.client;
    Pair io = client.create(1, 32);
    const auto buffer = client.memory.allocate(4096);
    for (std::uint64_t i = 0; i < 16; ++i) {
      std::memset(client.memory.at(buffer), static_cast<int>(i + 1), 4096);
      CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, i * 8, 8, buffer)), nvme::kStatusSuccess);
    }
    c.fake.set_copy_time(1000, 1000, 0, 3);
    for (int round = 0; round < check::rounds(4); ++round) {
      std::map<std::uint16_t, std::uint64_t> sent;
      for (std::uint64_t i = 0; i < 8; ++i) {
        const std::uint64_t lba = (i + static_cast<std::uint64_t>(round)) % 16;
        sent[client.submit(io, client.io(nvme::kNvmRead, lba * 8, 8, kGpuIova + i * 4096))] = lba << 8 | i;
      }
      for (int i = 0; i < 8; ++i) {
        const nvme::Cqe cqe = client.wait(io);
        CHECK_EQ(code_of(cqe), nvme::kStatusSuccess);
        const std::uint64_t what = sent.at(cqe.cid);
        Bytes got(4096);
        c.get(got.data(), kGpuIova + (what & 0xFF) * 4096, 4096);
        CHECK_EQ(first_difference(got, Bytes(4096, static_cast<std::uint8_t>((what >> 8) + 1))), -1);
      }
    }
  }
}

TEST(queues_in_gpu_memory) {
  for (const std::uint32_t entries : {2u, 5u, 16u, 100u}) {
    Case c;
    Client& client = *c.client;
    GpuPair io(c, 1, kGpuIova + 0x40000, kGpuIova + 0x50000, entries);
    const std::uint64_t before = client.stat("device_copies");
    std::uint32_t done = 0;
    for (int round = 0; round < 60; ++round) {
      const std::uint32_t now = std::min<std::uint32_t>(entries - 1, 1 + static_cast<std::uint32_t>(round) % 24);
      for (std::uint32_t i = 0; i < now; ++i) {
        const std::uint64_t lba = (done + i) % 200;
        io.submit(c, client.io(round % 2 == 0 ? nvme::kNvmWrite : nvme::kNvmRead, lba, 1, kGpuIova + lba * 512));
      }
      io.ring(c);
      for (std::uint32_t i = 0; i < now; ++i) {
        const nvme::Cqe cqe = io.wait(c);
        CHECK_EQ(code_of(cqe), nvme::kStatusSuccess);
        CHECK_EQ(cqe.cid, static_cast<std::uint16_t>(done + i));
        CHECK_EQ(cqe.sq_id, 1);
        CHECK_EQ(cqe.dw0, 0u);
      }
      done += now;
    }
    CHECK_EQ(client.stat("commands"), done);
    // Entries come in batches: fewer copies than three a command.
    if (entries == 100) CHECK(client.stat("device_copies") - before < 3 * std::uint64_t{done});
    CHECK_EQ(client.stat("dma_faults"), 0u);
  }
}

TEST(queues_in_gpu_memory_that_are_not_contiguous) {
  Options options = in_memory();
  options.cqr = false;
  Case c(options);
  Client& client = *c.client;
  const auto pages = [&](std::uint64_t one, std::uint64_t other) {
    const auto list = client.memory.allocate(4096);
    client.memory.at<std::uint64_t>(list)[0] = one;
    client.memory.at<std::uint64_t>(list)[1] = other;
    return list;
  };
  // The submission queue's second page is the host's: entries are fetched from both at once.
  const auto host = client.memory.allocate(4096);
  auto create_cq = client.create_cq_command(1, 100, kGpuIova);
  auto create_sq = client.create_sq_command(1, 100, pages(kGpuIova + 0x5000, host), 1);
  create_sq.cdw11 &= ~std::uint32_t{nvme::kCreateQueuePc};
  const Bytes zeroes(4096);
  c.put(kGpuIova, zeroes.data(), 4096);
  CHECK_EQ(c.code(client.admin, create_cq), nvme::kStatusSuccess);
  CHECK_EQ(c.code(client.admin, create_sq), nvme::kStatusSuccess);
  for (std::uint32_t i = 0; i < 80; ++i) {
    nvme::Sqe sqe = client.io(nvme::kNvmFlush, 0, 1, 0);
    sqe.cid = static_cast<std::uint16_t>(i);
    i < 64 ? c.put(kGpuIova + 0x5000 + i * 64, &sqe, 64)
           : static_cast<void>(std::memcpy(client.memory.at(host) + (i - 64) * 64, &sqe, 64));
  }
  // Some are on both sides of a page's end.
  for (std::uint32_t tail = 10; tail <= 80; tail += 10) {
    client.write_doorbell(nvme::sq_tail_doorbell(1, 0), tail);
    client.until("they are fetched", [&] { return client.stat("flushes") == tail; });
  }
  for (std::uint32_t i = 0; i < 80; ++i) {
    nvme::Cqe cqe;
    c.get(&cqe, kGpuIova + i * 16, 16);
    CHECK_EQ(cqe.cid, i);
    CHECK_EQ(cqe.status, 1);
  }
}

#ifndef __SANITIZE_THREAD__  // who polls memory while it is written races, as a kernel that polls does
TEST(completions_in_gpu_memory_come_after_their_data) {
  Case c(with_threads(2));
  Client& client = *c.client;
  Pair host = client.create(2);
  const auto buffer = client.memory.allocate(4096);
  for (std::uint64_t i = 0; i < 8; ++i) {
    std::memset(client.memory.at(buffer), static_cast<int>(i + 1), 4096);
    CHECK_EQ(c.code(host, client.io(nvme::kNvmWrite, i * 8, 8, buffer)), nvme::kStatusSuccess);
  }
  GpuPair io(c, 1, kGpuIova + 0x40000, kGpuIova + 0x50000, 16);
  c.fake.set_copy_time(200, 300, 0, 3);
  std::uint32_t sent = 0;
  for (int round = 0; round < check::rounds(6); ++round) {
    const std::uint32_t start = sent;
    for (std::uint32_t i = 0; i < 8; ++i, ++sent) {
      io.submit(c, client.io(nvme::kNvmRead, (sent * 3 % 8) * 8, 8, kGpuIova + i * 4096));
    }
    io.ring(c);
    for (std::uint32_t i = 0; i < 8; ++i) {
      const nvme::Cqe cqe = io.wait(c);
      CHECK_EQ(code_of(cqe), nvme::kStatusSuccess);
      const std::uint32_t number = cqe.cid - start;
      Bytes got(4096);
      c.get(got.data(), kGpuIova + number * 4096, 4096);
      CHECK_EQ(first_difference(got, Bytes(4096, static_cast<std::uint8_t>(cqe.cid * 3 % 8 + 1))), -1);
    }
  }
}
#endif

TEST(faults_of_completions_in_gpu_memory) {
  Case c;
  Client& client = *c.client;
  GpuPair io(c, 1, kGpuIova + 0x10000, kGpuIova + 0x20000, 8);
  client.controller.inject("torn-cqe#2,stale-phase#3,duplicate-cqe#5,drop#7", 1);
  for (std::uint16_t i = 0; i < 7; ++i) {
    io.submit(c, client.io(nvme::kNvmRead, i, 1, kGpuIova + i * 512u));
    io.ring(c);
    if (i == 6) break;
    CHECK_EQ(io.wait(c).cid, i);
    if (i == 4) CHECK_EQ(io.wait(c).cid, 4);  // again
  }
  for (int i = 0; i < 100; ++i) client.turn();
  CHECK(!io.poll(c).has_value());
  CHECK_EQ(client.stat("fault.torn-cqe"), 1u);
  CHECK_EQ(client.stat("fault.stale-phase"), 1u);
  CHECK_EQ(client.stat("device_copy_errors"), 0u);
}

// What a kernel may see of an entry on its way, and in which order.
TEST(entries_arrive_behind_their_data_and_whole_unless_a_fault_tears_them) {
  Case c;
  Client& client = *c.client;
  GpuPair io(c, 1, kGpuIova + 0x10000, kGpuIova + 0x20000, 8);
  const auto send = [&](const char* fault) {
    client.controller.inject(fault, 1);
    std::vector<std::pair<std::uint64_t, Bytes>> writes;
    c.gpu->writes = &writes;
    io.submit(c, client.io(nvme::kNvmRead, 0, 8, kGpuIova));
    io.ring(c);
    const nvme::Cqe cqe = io.wait(c);
    c.gpu->writes = nullptr;
    CHECK_EQ(code_of(cqe), nvme::kStatusSuccess);
    CHECK_EQ(writes.at(0).first, c.memory->address());
    CHECK_EQ(writes.at(0).second.size(), 4096u);
    writes.erase(writes.begin());
    return std::pair(cqe, writes);
  };
  const std::uint64_t first = c.memory->address() + 0x20000;
  const auto [whole, once] = send("");
  CHECK_EQ(once.size(), 1u);
  CHECK(once[0].first == first && once[0].second.size() == 16);
  for (const bool stale : {false, true}) {
    const auto [cqe, writes] = send(stale ? "stale-phase" : "torn-cqe");
    const std::uint64_t at = first + (stale ? 32 : 16);
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(&cqe);
    CHECK_EQ(writes.size(), stale ? 3u : 2u);
    CHECK(writes.front().first == at && writes.front().second == Bytes(bytes, bytes + 12));
    CHECK(writes.back().first == at + 12 && writes.back().second == Bytes(bytes + 12, bytes + 16));
    if (stale) {
      Bytes wrong(bytes + 12, bytes + 16);
      wrong[2] ^= 1;  // the phase tag
      CHECK(writes[1].first == at + 12 && writes[1].second == wrong);
    }
  }
}

TEST(accesses_that_the_mapping_does_not_allow_are_refused_and_recorded) {
  for (const bool writable : {false, true}) {
    Case c(in_memory(), 1 << 20, !writable, writable);
    Client& client = *c.client;
    Pair io = client.create(1);
    const std::uint8_t bad = writable ? nvme::kNvmWrite : nvme::kNvmRead;
    const Bytes before = c.memory->bytes();
    CHECK_EQ(c.code(io, client.io(bad, 0, 8, kGpuIova)), nvme::kStatusDataTransferError);
    // Past its end, with a first page that is there; and into nothing.
    const std::uint8_t good = writable ? nvme::kNvmRead : nvme::kNvmWrite;
    CHECK_EQ(c.code(io, client.io(good, 0, 16, kGpuIova + c.nbytes - 4096, kGpuIova + c.nbytes)),
             nvme::kStatusDataTransferError);
    CHECK_EQ(first_difference(c.memory->bytes(), before), -1);
    const auto faults = client.controller.dma_faults();
    CHECK_EQ(faults.size(), 2u);
    CHECK(faults[0].iova == kGpuIova && faults[0].nbytes == 4096 && faults[0].write == !writable);
    CHECK(faults[1].iova == kGpuIova + c.nbytes && faults[1].write == writable);
    CHECK_EQ(client.stat("dma_faults"), 2u);
    CHECK_EQ(client.stat("device_copies"), 0u);
    CHECK_EQ(c.code(io, client.io(good, 0, 8, kGpuIova)), nvme::kStatusSuccess);
  }
}

// Memory that was unmapped is freed at once: the fake libcuda ends a program whose copy still touches it.
TEST(unmapping_waits_for_copies_in_flight) {
  for (const unsigned threads : {1u, 2u}) {
    Case c(with_threads(threads));
    Client& client = *c.client;
    c.fake.set_copy_time(300, 500, 0, 2);
    Pair io = client.create(1, 16);
    std::uint64_t refused = 0;
    for (int round = 0; round < check::rounds(30); ++round) {
      std::uint64_t address = 0;
      gpunvme::cuda_check(c.fake.alloc(0, 64 << 10, &address), "alloc");
      constexpr std::uint64_t kIova = 0x9000'0000;
      client.controller.map_device(kIova, 64 << 10, address, true, true, c.gpu);
      for (std::uint64_t i = 0; i < 6; ++i) {
        client.submit(io, client.io(round % 2 == 0 ? nvme::kNvmRead : nvme::kNvmWrite, i * 8, 8, kIova + i * 4096));
      }
      if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(400));
      client.controller.unmap(kIova, 64 << 10);
      gpunvme::cuda_check(c.fake.free(address), "free");
      for (int i = 0; i < 6; ++i) {
        const std::uint16_t code = code_of(client.wait(io));
        CHECK(code == nvme::kStatusSuccess || code == nvme::kStatusDataTransferError);
        refused += code != nvme::kStatusSuccess;
      }
    }
    CHECK_EQ(client.stat("dma_faults"), refused);
    CHECK_EQ(client.stat("device_copy_errors"), 0u);
  }
}

// By a call that is refused, and by a copy that fails on its way.
TEST(a_copy_that_fails_fails_its_command_and_writes_nothing_more) {
  for (const bool sticky : {false, true}) {
    for (const std::uint8_t opcode : {nvme::kNvmRead, nvme::kNvmWrite}) {
      Case c;
      Client& client = *c.client;
      Pair io = client.create(1);
      const auto buffer = client.memory.allocate(8192);
      std::memset(client.memory.at(buffer), 0x31, 8192);
      CHECK_EQ(c.code(io, client.io(nvme::kNvmWrite, 0, 16, buffer, buffer + 4096)), nvme::kStatusSuccess);
      const Bytes before = c.memory->bytes();
      // Two pages apart: two copies, of which the second fails.
      const char* const call = opcode == nvme::kNvmRead ? "cuMemcpyHtoDAsync" : "cuMemcpyDtoHAsync";
      CHECK_EQ(sticky ? c.fake.fail_copy(2, kIllegalAddress) : c.fake.fail_call(call, 2, kIllegalAddress), 0);
      const nvme::Cqe cqe = client.run(io, client.io(opcode, 0, 16, kGpuIova, kGpuIova + 0x8000));
      CHECK_EQ(code_of(cqe), nvme::kStatusDataTransferError);
      CHECK_EQ(nvme::cqe_status(cqe.status) & nvme::kStatusDnr, 0);  // the driver may try it again
      Bytes expected = before;
      if (opcode == nvme::kNvmRead) std::fill_n(expected.begin(), 4096, std::uint8_t{0x31});
      CHECK_EQ(first_difference(c.memory->bytes(), expected), -1);
      const auto faults = client.controller.dma_faults();
      CHECK_EQ(faults.size(), 1u);
      CHECK(faults[0].iova == kGpuIova + 0x8000 && faults[0].nbytes == 4096);
      CHECK_EQ(faults[0].write, opcode == nvme::kNvmRead);
      CHECK_EQ(client.stat("device_copy_errors"), 1u);
      CHECK_EQ(client.stat("dma_faults"), 0u);
      CHECK(c.gpu->copies.failure().find("cu") == 0);
      CHECK(!nvme::csts_cfs(client.csts()));
      if (sticky) c.fake.reset();
      // What was on the blocks is still there: a write whose data did not arrive wrote nothing.
      CHECK_EQ(c.code(io, client.io(nvme::kNvmRead, 0, 16, kGpuIova, kGpuIova + 0x8000)), nvme::kStatusSuccess);
      Bytes got(4096);
      c.get(got.data(), kGpuIova + 0x8000, 4096);
      CHECK_EQ(first_difference(got, Bytes(4096, 0x31)), -1);
    }
  }
}

TEST(a_list_that_cannot_be_copied_is_an_error_of_its_command) {
  Case c;
  Client& client = *c.client;
  Pair io = client.create(1);
  const std::uint64_t entries[2] = {kGpuIova + 0x2000, kGpuIova + 0x3000};
  c.put(kGpuIova, entries, sizeof entries);
  const nvme::Sqe sqe = client.io(nvme::kNvmRead, 0, 24, kGpuIova + 0x1000, kGpuIova);
  CHECK_EQ(c.code(io, sqe), nvme::kStatusSuccess);
  c.fake.fail_call("cuMemcpyDtoHAsync", 1, kIllegalAddress);
  c.fake.fail_call("cuMemcpyDtoHAsync", 2, kIllegalAddress);
  const Bytes before = c.memory->bytes();
  CHECK_EQ(c.code(io, sqe), nvme::kStatusDataTransferError);
  CHECK_EQ(first_difference(c.memory->bytes(), before), -1);
  CHECK(client.controller.dma_faults().front().iova == kGpuIova);
}

TEST(queues_that_cannot_be_copied_are_fatal) {
  for (const char* call : {"cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync"}) {
    Case c;
    Client& client = *c.client;
    GpuPair io(c, 1, kGpuIova + 0x10000, kGpuIova + 0x20000, 8);
    c.fake.fail_call(call, 1, kIllegalAddress);
    io.submit(c, client.io(nvme::kNvmFlush, 0, 1, 0));
    io.ring(c);
    client.until("CSTS.CFS", [&] { return nvme::csts_cfs(client.csts()); });
    CHECK(!io.poll(c).has_value());
    CHECK_EQ(client.stat("device_copy_errors"), 1u);
    CHECK_EQ(client.controller.dma_faults().size(), 1u);
    client.disable();
    client.enable();
    GpuPair again(c, 1, kGpuIova + 0x10000, kGpuIova + 0x20000, 8);
    again.submit(c, client.io(nvme::kNvmFlush, 0, 1, 0));
    again.ring(c);
    CHECK_EQ(code_of(again.wait(c)), nvme::kStatusSuccess);
  }
}

// While a kernel waits for a completion, CUDA allocates and frees nothing.
TEST(nothing_is_allocated_after_the_first_mapping) {
  Case c;
  Client& client = *c.client;
  Pair io = client.create(1);
  const auto calls = [&] {
    std::uint64_t sum = 0;
    for (const char* call : {"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuMemHostRegister",
                             "cuMemHostUnregister", "cuStreamCreate", "cuStreamDestroy", "cuEventCreate"}) {
      sum += c.fake.calls(call);
    }
    return sum;
  };
  const std::uint64_t before = calls();
  const FakeCudaCounters counted = c.fake.counters();
  client.controller.map_device(kGpuIova + c.nbytes, 4096, c.memory->address(), true, true, c.gpu);
  for (int i = 0; i < 10; ++i) {
    CHECK_EQ(c.code(io, client.io(i % 2 == 0 ? nvme::kNvmRead : nvme::kNvmWrite, 0, 8, kGpuIova)),
             nvme::kStatusSuccess);
  }
  client.controller.unmap(kGpuIova + c.nbytes, 4096);
  CHECK_EQ(calls(), before);
  CHECK_EQ(c.fake.counters().pageable_copies, counted.pageable_copies);
}

TEST(copies_that_cannot_be_prepared_leave_nothing) {
  const Fake& fake = Fake::instance();
  fake.reset();
  const FakeCudaCounters before = fake.counters();
  for (const char* call :
       {"cuStreamCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemAlloc", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"}) {
    fake.fail_call(call, 1, 2);
    const auto failure = CHECK_FAILS(gpunvme::GpuCopies(0));
    CHECK(std::string(failure.what()).find(call) != std::string::npos);
    fake.wait_idle();
    CHECK_EQ(fake.counters().live_allocations, before.live_allocations);
    CHECK_EQ(fake.counters().page_locked_bytes, before.page_locked_bytes);
    CHECK_EQ(fake.counters().live_streams, before.live_streams);
    CHECK_EQ(fake.counters().live_events, before.live_events);
  }
}

// Behind a kernel that never ends, as where their streams share a queue of the hardware's: nobody waits for ever.
TEST(a_copy_that_does_not_end_is_given_up) {
  const Fake& fake = Fake::instance();
  fake.reset();
  const FakeCudaCounters before = fake.counters();
  {
    const testing::DeviceMemory memory(0, 4096);
    gpunvme::GpuCopies copies(0, std::chrono::milliseconds(20));
    Bytes bytes(4096, 7);
    CHECK(copies.to_gpu(memory.address(), bytes.data(), 4096));
    fake.hold();
    CHECK(!copies.to_host(bytes.data(), memory.address(), 4096));
    CHECK(copies.failure().find("did not end") != std::string::npos);
    CHECK_EQ(first_difference(bytes, Bytes(4096, 7)), -1);
    const std::uint64_t calls = fake.calls("cuMemcpyHtoDAsync");
    CHECK(!copies.to_gpu(memory.address(), bytes.data(), 4096));
    CHECK_EQ(fake.calls("cuMemcpyHtoDAsync"), calls);
    fake.release();
    fake.wait_idle();
  }
  // What it might still have used was not given back.
  CHECK_EQ(fake.counters().live_streams, before.live_streams + 1);
  CHECK_EQ(fake.counters().page_locked_bytes, before.page_locked_bytes + (1 << 20));
}
