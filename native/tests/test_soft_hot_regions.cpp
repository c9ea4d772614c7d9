// Blocks of an image that are read again and again are copied from a mapping of the file. Whatever happens to the file
// meanwhile, a host must get what a read of the file would have given it, or an error; and the process must live.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <thread>
#include <vector>

#include "image_client.h"
#include "page_cache.h"

using namespace testing;

namespace {

constexpr std::uint64_t kBytes = 5 << 20;  // two and a half regions
constexpr std::uint64_t kBlock = 512;
constexpr std::uint32_t kBlocks = 8;  // of a command

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

// A controller on an image of random bytes, and what every block has to read as.
struct HotImage {
  explicit HotImage(unsigned threads, const std::filesystem::path& in = std::filesystem::temp_directory_path(),
                    std::uint64_t written = kBytes)
      : directory(in), path(directory.file("image")), expected(kBytes) {
    fill(expected.data(), written, 7);
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(expected.data()), written);
    cut(kBytes);
    client = std::make_unique<ImageClient>(image(path, 0, threads));
  }
  std::uint16_t read(std::uint64_t lba, std::uint32_t blocks = kBlocks) {
    std::memset(client->memory.at(client->to), 0xEE, blocks * kBlock);
    return client->move(nvme::kNvmRead, lba, blocks, client->to);
  }
  // Reads a range and finds what it must hold.
  void check(std::uint64_t lba, std::uint32_t blocks = kBlocks) {
    CHECK_EQ(read(lba, blocks), nvme::kStatusSuccess);
    CHECK(std::memcmp(client->memory.at(client->to), &expected[lba * kBlock], blocks * kBlock) == 0);
  }
  std::uint64_t mapped() const { return client->stat("mapped_bytes"); }
  bool is_mapped(std::uint64_t lba, std::uint32_t blocks = kBlocks) {
    const std::uint64_t before = mapped();
    check(lba, blocks);
    return mapped() - before == blocks * kBlock;
  }
  void read_all() {
    for (std::uint64_t lba = 0; lba < kBytes / kBlock; lba += kBlocks) check(lba);
  }
  void warm() {
    for (std::uint64_t region = 0; region < kBytes; region += 2 << 20) {
      for (int i = 0; i < 200; ++i) check(region / kBlock + 8 * (i % 100));
      CHECK(is_mapped(region / kBlock));
    }
  }
  void write(std::uint64_t lba, std::uint32_t blocks, std::uint64_t seed) {
    fill(&expected[lba * kBlock], blocks * kBlock, seed);
    std::memcpy(client->memory.at(client->from), &expected[lba * kBlock], blocks * kBlock);
    CHECK_EQ(client->move(nvme::kNvmWrite, lba, blocks, client->from), nvme::kStatusSuccess);
  }
  void zero(std::uint64_t lba, std::uint32_t blocks) {
    std::fill_n(&expected[lba * kBlock], blocks * kBlock, std::byte{0});
  }
  void deallocate(std::uint32_t lba, std::uint32_t blocks) {
    zero(lba, blocks);
    *client->memory.at<nvme::DsmRange>(client->from) = {0, blocks, lba};
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kNvmDatasetManagement;
    sqe.nsid = 1;
    sqe.prp1 = client->from;
    sqe.cdw11 = nvme::kDsmAd;
    CHECK_EQ(client->code(client->queue, sqe), nvme::kStatusSuccess);
  }
  bool in_memory() const { return gpunvme::is_in_memory(Descriptor(path, O_RDONLY)); }
  void cut(std::uint64_t nbytes) const { CHECK_EQ(truncate(path.c_str(), static_cast<off_t>(nbytes)), 0); }

  Directory directory;
  std::string path;
  std::vector<std::byte> expected;
  std::unique_ptr<ImageClient> client;
};

// Where files are in memory.
constexpr char kInMemory[] = "/dev/shm";

bool has_memory_files() {
  const Descriptor directory(kInMemory, O_RDONLY | O_DIRECTORY);
  return directory >= 0 && gpunvme::is_in_memory(directory) && access(kInMemory, W_OK) == 0 &&
         gpunvme::cached_bytes(directory, 0, 1).has_value();
}

// After this, what was seen in the page cache is looked for again.
void let_belief_end() { std::this_thread::sleep_for(std::chrono::milliseconds(300)); }

}  // namespace

TEST(what_is_read_again_and_again_is_copied_from_the_mapping) {
  for (const unsigned threads : {0u, 2u}) {
    HotImage hot(threads);
    for (int i = 0; i < 100; ++i) hot.check(8 * i);
    CHECK_EQ(hot.mapped(), 0u);
    hot.warm();
    // Ranges over the edge of a region, to the image's end, and with a PRP list.
    CHECK(hot.is_mapped((2 << 20) / kBlock - 3));
    CHECK(hot.is_mapped(kBytes / kBlock - 1, 1));
    CHECK(hot.is_mapped((2 << 20) / kBlock - 100, 256));
    CHECK(hot.is_mapped(1, 17));
    CHECK_EQ(hot.client->stat("errors"), 0u);
  }
}

TEST(what_is_in_memory_anyway_is_copied_from_the_mapping_too) {
  if (!has_memory_files()) SKIP("no files in memory here, or the kernel does not tell of what they consist");
  HotImage hot(2, kInMemory);
  hot.warm();
  CHECK(hot.is_mapped((2 << 20) / kBlock - 3));
  CHECK_EQ(hot.client->stat("uring_bytes"), 0u);
}

TEST(holes_in_memory_are_read_and_stay_holes) {
  if (!has_memory_files()) SKIP("no files in memory here, or the kernel does not tell of what they consist");
  HotImage hot(0, kInMemory, 1 << 20);
  const auto used = [&] {
    struct stat status {};
    CHECK_EQ(stat(hot.path.c_str(), &status), 0);
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
  };
  const std::uint64_t before = used();
  CHECK(before < kBytes);
  for (int i = 0; i < 300; ++i) {
    hot.check((4 << 20) / kBlock + 8 * (i % 100));
    hot.check(8 * (i % 100));  // its region has a hole, too
  }
  CHECK_EQ(hot.mapped(), 0u);
  CHECK_EQ(used(), before);
}

TEST(a_range_of_which_a_part_is_cold_is_asked_of_the_file) {
  HotImage hot(0);
  for (int i = 0; i < 200; ++i) hot.check(8 * (i % 100));
  CHECK(hot.is_mapped(0));
  CHECK(!hot.is_mapped((2 << 20) / kBlock - 3));
  CHECK(!hot.is_mapped((2 << 20) / kBlock));
}

// A batch's later commands are looked at before they are checked and executed, and before the file is asked.
TEST(in_one_batch_some_commands_cannot_be_executed_and_the_others_get_their_data) {
  for (const unsigned threads : {0u, 2u}) {
    HotImage hot(threads);
    hot.warm();
    ImageClient& client = *hot.client;
    constexpr std::uint64_t kEnd = kBytes / kBlock;
    const std::vector<std::uint64_t> lbas = {0,    1ull << 60, 16,       ~0ull, 4096,
                                             kEnd, kEnd - 8,   kEnd - 7, 5000,  1ull << 40};
    const auto batch = [&](std::uint64_t end, std::uint32_t nsid) {
      const std::uint16_t first = client.queue.next_cid;
      for (std::size_t i = 0; i < lbas.size(); ++i) {
        nvme::Sqe sqe = client.io(nvme::kNvmRead, lbas[i], kBlocks, client.to + i * 4096, 0, nsid);
        sqe.cid = client.queue.next_cid++;
        client.put(client.queue, sqe);
      }
      client.ring(client.queue);
      for (std::size_t i = 0; i < lbas.size(); ++i) {
        const nvme::Cqe cqe = client.wait(client.queue);
        const auto which = static_cast<std::uint16_t>(cqe.cid - first);
        CHECK(which < lbas.size());
        const bool there = nsid == 1 && lbas[which] < end && end - lbas[which] >= kBlocks;
        CHECK_EQ(nvme::status_code(nvme::cqe_status(cqe.status)) == nvme::kStatusSuccess, there);
        if (!there) continue;
        CHECK(std::memcmp(client.memory.at(client.to + which * 4096), &hot.expected[lbas[which] * kBlock],
                          kBlocks * kBlock) == 0);
      }
    };
    for (int i = 0; i < 20; ++i) batch(kEnd, 1);
    batch(kEnd, 2);
    batch(kEnd, 0);
    constexpr std::uint64_t kShort = 1 << 20;
    hot.cut(kShort);
    for (int i = 0; i < 20; ++i) batch(kShort / kBlock, 1);
  }
}

TEST(everything_that_is_written_is_seen_at_once) {
  for (const unsigned threads : {0u, 2u}) {
    HotImage hot(threads);
    hot.warm();
    check::Random random(threads + 1);
    hot.write(3, 5, 1);
    CHECK(hot.is_mapped(3, 5));
    for (int round = 0; round < check::rounds(200); ++round) {
      const auto blocks = static_cast<std::uint32_t>(1 + random.below(40));
      const auto lba = static_cast<std::uint32_t>(random.below(kBytes / kBlock - blocks));
      switch (random.below(4)) {
        case 0:
          hot.write(lba, blocks, random.below(1000));
          break;
        case 1:
          hot.deallocate(lba, blocks);
          break;
        case 2:
          hot.zero(lba, blocks);
          CHECK_EQ(hot.client->move(nvme::kNvmWriteZeroes, lba, blocks, 0), nvme::kStatusSuccess);
          break;
        default:
          hot.zero(lba, blocks);
          CHECK_EQ(hot.client->move(nvme::kNvmWriteZeroes, lba, blocks, 0, nvme::kRwDeac), nvme::kStatusSuccess);
      }
      hot.check(lba, blocks);
    }
  }
}

TEST(what_others_do_to_the_file_is_seen_at_once) {
  HotImage hot(0);
  hot.warm();
  const Descriptor file(hot.path, O_RDWR);
  fill(&hot.expected[8192], 4096, 1);
  CHECK_EQ(pwrite(file, &hot.expected[8192], 4096, 8192), 4096);
  CHECK(hot.is_mapped(16));
  if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 16384, 8192) == 0) {
    hot.zero(32, 16);
    hot.check(32, 16);
  }
  const Descriptor direct(hot.path, O_RDWR | O_DIRECT);
  if (direct < 0) SKIP("the file system knows no O_DIRECT");
  std::unique_ptr<void, decltype(&std::free)> aligned(std::aligned_alloc(4096, 4096), &std::free);
  fill(static_cast<std::byte*>(aligned.get()), 4096, 2);
  if (pwrite(direct, aligned.get(), 4096, 65536) != 4096) SKIP("the file system takes no O_DIRECT writes");
  std::memcpy(&hot.expected[65536], aligned.get(), 4096);
  hot.check(128);
}

TEST(an_image_that_is_cut_short_is_an_error_and_not_zeros_or_a_signal) {
  for (const unsigned threads : {0u, 2u}) {
    HotImage hot(threads);
    hot.warm();
    // In the middle of a page: the rest of that page reads as zeros through a mapping.
    constexpr std::uint64_t kLeft = (1 << 20) + 3 * kBlock;
    hot.cut(kLeft);
    hot.check(kLeft / kBlock - 8);
    CHECK_EQ(hot.read(kLeft / kBlock, 1), nvme::kStatusUnrecoveredReadError);
    CHECK_EQ(hot.read(kLeft / kBlock - 2, 3), nvme::kStatusUnrecoveredReadError);
    CHECK_EQ(hot.read(kLeft / kBlock - 2, 40), nvme::kStatusUnrecoveredReadError);
    // Pages that are gone, in this region and in the next.
    CHECK_EQ(hot.read(3 << 20 >> 9), nvme::kStatusUnrecoveredReadError);
    CHECK_EQ(hot.read(kBytes / kBlock - 8), nvme::kStatusUnrecoveredReadError);
    CHECK_EQ(hot.read((2 << 20) / kBlock - 4), nvme::kStatusUnrecoveredReadError);
    hot.check(0);
    // Long again: what was cut off is zeros now.
    hot.cut(kBytes);
    hot.zero(kLeft / kBlock, (kBytes - kLeft) / kBlock);
    hot.read_all();
    if (hot.in_memory()) continue;  // holes stay holes there, and are never hot
    hot.warm();
    hot.check(kLeft / kBlock - 2, 40);
    hot.check(kBytes / kBlock - 8);
  }
}

TEST(an_image_of_zeros_that_is_cut_short_is_an_error_too) {
  HotImage hot(0);
  hot.zero(0, kBytes / kBlock);
  CHECK_EQ(pwrite(Descriptor(hot.path, O_WRONLY), hot.expected.data(), kBytes, 0), static_cast<ssize_t>(kBytes));
  hot.warm();
  constexpr std::uint64_t kLeft = (1 << 20) + kBlock;
  hot.cut(kLeft);
  hot.check(kLeft / kBlock - 8);
  CHECK_EQ(hot.read(kLeft / kBlock, 1), nvme::kStatusUnrecoveredReadError);
  CHECK_EQ(hot.read(kLeft / kBlock - 7), nvme::kStatusUnrecoveredReadError);
}

TEST(a_region_that_left_the_page_cache_is_asked_of_the_file_again) {
  HotImage hot(1);
  hot.warm();
  // Written, and all of the region: what is dirty, or a part of a large folio, would stay and be zeroed.
  const Descriptor file(hot.path, O_RDWR);
  CHECK_EQ(fsync(file), 0);
  if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 << 20) != 0) SKIP("no holes can be punched");
  hot.zero(0, (2 << 20) / kBlock);
  let_belief_end();
  CHECK(!hot.is_mapped(0));
  CHECK(hot.is_mapped((2 << 20) / kBlock));  // the others go on
  hot.read_all();
  if (hot.in_memory()) return;
  // It is there again, and is asked for often enough.
  hot.warm();
}

TEST(hosts_that_read_while_the_file_is_cut_and_grows_get_bytes_or_errors) {
  HotImage hot(2);
  hot.warm();
  std::atomic<bool> over{false};
  std::thread other([&] {
    while (!over.load()) {
      hot.cut(1 << 20);
      hot.cut(kBytes);
    }
  });
  check::Random random(1);
  int wrong = 0;
  for (int round = 0; round < check::rounds(500); ++round) {
    const std::uint64_t lba = random.below(kBytes / kBlock - kBlocks);
    const std::uint16_t code = hot.read(lba);
    if (code == nvme::kStatusUnrecoveredReadError) continue;
    CHECK_EQ(code, nvme::kStatusSuccess);
    const auto* const got = hot.client->memory.at(hot.client->to);
    for (std::uint64_t i = 0; i < kBlocks * kBlock; ++i) {
      if (got[i] != hot.expected[lba * kBlock + i] && got[i] != std::byte{0}) ++wrong;
    }
  }
  over.store(true);
  other.join();
  CHECK_EQ(wrong, 0);
}
