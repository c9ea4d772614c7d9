// Controllers on image files: what is written is there, what was flushed stays, and nobody else writes meanwhile.
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "failure.h"
#include "image_client.h"

using namespace testing;

namespace {

// Pages of the file that are not on the media yet; -1 where the kernel (before 6.5) or the file system cannot tell.
long dirty_pages(const std::string& path) {
  struct statfs filesystem {};
  if (statfs(path.c_str(), &filesystem) != 0 || filesystem.f_type == TMPFS_MAGIC) return -1;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0);
  const std::uint64_t range[2] = {0, 0};  // all of it
  std::uint64_t pages[5] = {};            // cached, dirty, under writeback, evicted, recently evicted
  constexpr long kCachestat = 451;
  const long result = syscall(kCachestat, fd, range, pages, 0);
  close(fd);
  return result == 0 ? static_cast<long>(pages[1] + pages[2]) : -1;
}

}  // namespace

TEST(an_image_is_made_written_and_read_again_by_the_next_controller) {
  const Directory directory;
  const std::string path = directory.file("image");
  for (const unsigned threads : {0u, 2u}) {
    std::filesystem::remove(path);
    {
      ImageClient client(image(path, 8 << 20, threads));
      CHECK_EQ(std::filesystem::file_size(path), 8u << 20);
      fill(client.memory.at(client.from), 128 << 10, threads);
      CHECK_EQ(client.move(nvme::kNvmWrite, 5, 256, client.from), nvme::kStatusSuccess);
    }
    ImageClient client(image(path, 0, threads));
    CHECK_EQ(client.move(nvme::kNvmRead, 5, 256, client.to), nvme::kStatusSuccess);
    std::vector<std::byte> expected(128 << 10);
    fill(expected.data(), expected.size(), threads);
    CHECK(std::memcmp(client.memory.at(client.to), expected.data(), expected.size()) == 0);
    CHECK_EQ(client.move(nvme::kNvmCompare, 5, 256, client.to), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmVerify, 5, 256, 0), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmWriteZeroes, 6, 10, 0), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmRead, 5, 256, client.to), nvme::kStatusSuccess);
    std::fill_n(expected.begin() + 512, 10 * 512, std::byte{0});
    CHECK(std::memcmp(client.memory.at(client.to), expected.data(), expected.size()) == 0);
    *client.memory.at<nvme::DsmRange>(client.from) = {0, 100, 50};
    nvme::Sqe trim{};
    trim.opcode = nvme::kNvmDatasetManagement;
    trim.nsid = 1;
    trim.prp1 = client.from;
    trim.cdw11 = nvme::kDsmAd;
    CHECK_EQ(client.code(client.queue, trim), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmRead, 5, 256, client.to), nvme::kStatusSuccess);
    std::fill_n(expected.begin() + 45 * 512, 100 * 512, std::byte{0});
    CHECK(std::memcmp(client.memory.at(client.to), expected.data(), expected.size()) == 0);
  }
}

// Blocks that are not in the page cache are read by io_uring, many at a time, each into the right place.
TEST(uncached_blocks_are_read_from_the_drive) {
  const Directory directory;
  const std::string path = directory.file("image");
  constexpr std::uint64_t kBytes = 16 << 20;
  std::vector<std::byte> content(kBytes);
  fill(content.data(), kBytes, 4);
  {
    std::ofstream stream(path, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(content.data()), kBytes);
  }
  for (const unsigned threads : {0u, 1u, 2u}) {
    ImageClient client(image(path, 0, threads));
    make_cold(path);
    check::Random random(threads);
    for (int round = 0; round < 10; ++round) {
      std::vector<std::uint64_t> lbas(60);
      std::vector<std::uint16_t> cids(60);
      for (std::size_t i = 0; i < lbas.size(); ++i) {
        lbas[i] = random.below(kBytes / 512 - 16);
        cids[i] = client.submit(client.queue, client.command(nvme::kNvmRead, lbas[i], 16, client.to + i * 8192));
      }
      for (std::size_t i = 0; i < lbas.size(); ++i) CHECK_EQ(nvme::cqe_status(client.wait(client.queue).status), 0);
      for (std::size_t i = 0; i < lbas.size(); ++i) {
        CHECK(std::memcmp(client.memory.at(client.to + i * 8192), content.data() + lbas[i] * 512, 8192) == 0);
      }
      make_cold(path);
    }
    CHECK_EQ(client.stat("copied_bytes") + client.stat("uring_bytes"), 600u * 8192);
  }
}

TEST(memory_may_be_unmapped_and_the_controller_reset_while_the_drive_reads) {
  const Directory directory;
  const std::string path = directory.file("image");
  {
    ImageClient client(image(path, 16 << 20, 1));
    for (std::uint64_t lba = 0; lba < 32768; lba += 256) {
      CHECK_EQ(client.move(nvme::kNvmWrite, lba, 256, client.from), nvme::kStatusSuccess);
    }
  }
  for (int round = 0; round < check::rounds(10); ++round) {
    ImageClient client(image(path, 0, 1 + round % 2));
    make_cold(path);
    constexpr std::uint64_t kIova = 0x100000;
    constexpr std::uint64_t kBytes = 60 * 8192;
    void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    client.controller.map(kIova, kBytes, memory, true, true);
    for (std::uint64_t i = 0; i < 60; ++i) {
      client.submit(client.queue, client.command(nvme::kNvmRead, i * 500, 16, kIova + i * 8192));
    }
    client.until("some are fetched", [&] { return client.stat("commands") > 0; });
    if (round % 2 == 0) {
      client.controller.unmap(kIova, kBytes);
      munmap(memory, kBytes);
      for (int i = 0; i < 60; ++i) {
        const auto code = nvme::status_code(nvme::cqe_status(client.wait(client.queue).status));
        CHECK(code == nvme::kStatusSuccess || code == nvme::kStatusDataTransferError);
      }
    } else {
      client.disable();
      // Nothing may touch it after a reset, although it is still mapped for DMA.
      std::memset(memory, 0xCC, kBytes);
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const auto* const bytes = static_cast<const std::uint8_t*>(memory);
      CHECK(std::all_of(bytes, bytes + kBytes, [](std::uint8_t byte) { return byte == 0xCC; }));
      client.controller.unmap(kIova, kBytes);
      munmap(memory, kBytes);
    }
  }
}

TEST(a_queue_is_deleted_after_the_reads_that_the_drive_was_asked_for) {
  const Directory directory;
  const std::string path = directory.file("image");
  {
    ImageClient client(image(path, 16 << 20, 1));
    for (std::uint64_t lba = 0; lba < 32768; lba += 256) {
      CHECK_EQ(client.move(nvme::kNvmWrite, lba, 256, client.from), nvme::kStatusSuccess);
    }
  }
  for (int round = 0; round < check::rounds(10); ++round) {
    ImageClient client(image(path, 0, 1 + round % 2));
    make_cold(path);
    for (std::uint64_t i = 0; i < 60; ++i) {
      client.submit(client.queue, client.command(nvme::kNvmRead, i * 500, 16, client.to + i * 8192));
    }
    client.until("some are fetched", [&] { return client.stat("commands") > 0; });
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoSq, 1)), nvme::kStatusSuccess);
    const std::uint64_t fetched = client.stat("commands");
    std::uint64_t completed = 0;
    while (const auto cqe = client.poll(client.queue)) {
      CHECK_EQ(nvme::cqe_status(cqe->status), 0);
      ++completed;
    }
    CHECK_EQ(completed, fetched);
    CHECK_EQ(client.code(client.admin, client.delete_command(nvme::kAdminDeleteIoCq, 1)), nvme::kStatusSuccess);
  }
}

TEST(flush_and_fua_reach_the_file_system) {
  const Directory directory;
  Options options = image(directory.file("image"), 1 << 20, 1);
  ImageClient client(options);
  CHECK_EQ(client.move(nvme::kNvmWrite, 0, 1, client.from), nvme::kStatusSuccess);
  CHECK_EQ(client.stat("fsyncs"), 0u);
  CHECK_EQ(client.flush(), nvme::kStatusSuccess);
  CHECK_EQ(client.stat("fsyncs"), 1u);
  CHECK_EQ(client.stat("flushes"), 1u);
  CHECK_EQ(client.move(nvme::kNvmWrite, 0, 1, client.from, nvme::kRwFua), nvme::kStatusSuccess);
  CHECK_EQ(client.stat("fsyncs"), 2u);
  CHECK_EQ(client.move(nvme::kNvmWriteZeroes, 0, 1, 0, nvme::kRwFua), nvme::kStatusSuccess);
  CHECK_EQ(client.stat("fsyncs"), 3u);
  // With the write cache switched off every write is durable.
  nvme::Sqe off{};
  off.opcode = nvme::kAdminSetFeatures;
  off.cdw10 = nvme::kFeatureVolatileWriteCache;
  CHECK_EQ(client.code(client.admin, off), nvme::kStatusSuccess);
  CHECK_EQ(client.move(nvme::kNvmWrite, 0, 1, client.from), nvme::kStatusSuccess);
  CHECK_EQ(client.stat("fsyncs"), 4u);
}

TEST(what_is_flushed_is_on_the_media) {
  const Directory directory;
  const std::string path = directory.file("image");
  for (const unsigned threads : {0u, 1u}) {  // on the spot, and by io_uring
    ImageClient client(image(path, 1 << 20, threads));
    CHECK_EQ(client.flush(), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmWrite, 0, 256, client.from), nvme::kStatusSuccess);
    if (dirty_pages(path) < 0) SKIP("the kernel or the file system does not tell which pages are dirty");
    CHECK_EQ(client.flush(), nvme::kStatusSuccess);
    CHECK_EQ(dirty_pages(path), 0);
    CHECK_EQ(client.move(nvme::kNvmWrite, 0, 256, client.from, nvme::kRwFua), nvme::kStatusSuccess);
    CHECK_EQ(dirty_pages(path), 0);
    // An orderly shutdown and the controller's end flush as well.
    CHECK_EQ(client.move(nvme::kNvmWrite, 0, 256, client.from), nvme::kStatusSuccess);
    client.write32(nvme::kRegCc, client.cc() | nvme::kCcShnNormal << nvme::kCcShnShift);
    client.until("CSTS.SHST", [&] { return nvme::csts_shst(client.csts()) == nvme::kShstComplete; });
    CHECK_EQ(dirty_pages(path), 0);
  }
}

// The process is killed in the middle of writing: what was flushed before is there.
TEST(a_writer_that_is_killed_loses_nothing_that_was_flushed) {
  const Directory directory;
  const std::string path = directory.file("image");
  int report[2];
  CHECK_EQ(pipe(report), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(report[0]);
    try {
      ImageClient client(image(path, 4 << 20, 1));
      for (std::uint32_t round = 0;; ++round) {
        fill(client.memory.at(client.from), 64 << 10, round);
        client.move(nvme::kNvmWrite, (round % 32) * 128, 128, client.from);
        if (client.flush() != nvme::kStatusSuccess) _exit(2);
        if (write(report[1], &round, sizeof round) != sizeof round) _exit(3);
      }
    } catch (const std::exception&) {
    }
    _exit(1);
  }
  close(report[1]);
  std::uint32_t last = 0;
  while (last < 40) CHECK_EQ(read(report[0], &last, sizeof last), static_cast<ssize_t>(sizeof last));
  kill(child, SIGKILL);
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFSIGNALED(status));
  while (read(report[0], &last, sizeof last) == sizeof last) {
  }
  close(report[0]);
  // The lock died with the process.
  ImageClient client(image(path, 0));
  std::vector<std::byte> expected(64 << 10);
  for (std::uint32_t round = last < 31 ? 0 : last - 30; round <= last; ++round) {
    fill(expected.data(), expected.size(), round);
    CHECK_EQ(client.move(nvme::kNvmRead, (round % 32) * 128, 128, client.to), nvme::kStatusSuccess);
    CHECK(std::memcmp(client.memory.at(client.to), expected.data(), expected.size()) == 0);
  }
}

TEST(one_image_has_one_controller) {
  const Directory directory;
  const std::string path = directory.file("image");
  Options options = image(path, 1 << 20);
  Options readers = options;
  readers.read_only = true;
  {
    Controller first(options);
    const gpunvme::Failure failure = CHECK_FAILS(Controller(options));
    CHECK(std::string(failure.what()).find("in use") != std::string::npos);
    CHECK(failure.file == path);
    CHECK_FAILS(Controller(readers));
    // In another process too.
    CHECK_EQ(check::in_child([&] { CHECK_FAILS(Controller(options)); }), 0);
    first.stop();
    Controller second(options);
  }
  Controller one(readers);
  Controller two(readers);
  CHECK_FAILS(Controller(options));
}

TEST(images_that_do_not_fit_are_refused_with_the_reason) {
  const Directory directory;
  const auto reason = [&](const Options& options) {
    const gpunvme::Failure failure = CHECK_FAILS(Controller(options));
    return std::string(failure.what());
  };
  CHECK(reason(image(directory.file("absent"), 0)).find("no such image") != std::string::npos);
  CHECK(reason(image(directory.path.string(), 0)).find("directory") != std::string::npos);
  CHECK(reason(image("/dev/null", 0)).find("regular file") != std::string::npos);
  CHECK(reason(image(directory.file("new"), 1000)).find("whole number of blocks") != std::string::npos);
  const std::string odd = directory.file("odd");
  std::ofstream(odd) << std::string(10000, 'x');
  CHECK(reason(image(odd, 0)).find("whole number of blocks") != std::string::npos);
  CHECK(reason(image(odd, 1 << 20)).find("too small") != std::string::npos);
  Options part = image(odd, 512 * 19);
  part.namespaces = 20;
  CHECK(reason(part).find("too small") != std::string::npos);
  part.namespaces = 19;
  Controller fits(part);
  const std::string empty = directory.file("empty");
  std::ofstream{empty};
  CHECK(reason(image(empty, 0)).find("too small") != std::string::npos);
}

TEST(a_read_only_image_is_not_written) {
  const Directory directory;
  const std::string path = directory.file("image");
  { Controller maker(image(path, 1 << 20)); }
  Options options = image(path, 0);
  options.read_only = true;
  ImageClient client(options);
  CHECK_EQ(client.move(nvme::kNvmRead, 0, 8, client.to), nvme::kStatusSuccess);
  CHECK_EQ(client.flush(), nvme::kStatusSuccess);
  for (const std::uint8_t opcode : {nvme::kNvmWrite, nvme::kNvmWriteZeroes}) {
    CHECK_EQ(client.move(opcode, 0, 8, client.to), nvme::kStatusNamespaceWriteProtected);
  }
  // Kernels ask for NSATTR in one of these two.
  CHECK_EQ(client.code(client.admin, client.identify_command(nvme::kCnsNamespace, 1, client.to)), nvme::kStatusSuccess);
  CHECK_EQ(client.memory.at<nvme::IdentifyNamespace>(client.to)->nsattr, 1);
  CHECK_EQ(client.code(client.admin, client.identify_command(nvme::kCnsIndependentNamespace, 1, client.to)),
           nvme::kStatusSuccess);
  CHECK_EQ(client.memory.at(client.to)[8], std::byte{1});
}

TEST(a_truncated_image_is_an_error_and_not_a_crash) {
  const Directory directory;
  const std::string path = directory.file("image");
  for (const unsigned threads : {0u, 1u}) {
    std::filesystem::remove(path);
    ImageClient client(image(path, 1 << 20, threads));
    CHECK_EQ(client.move(nvme::kNvmWrite, 0, 256, client.from), nvme::kStatusSuccess);
    std::filesystem::resize_file(path, 4096);
    CHECK_EQ(client.move(nvme::kNvmRead, 0, 8, client.to), nvme::kStatusSuccess);
    CHECK_EQ(client.move(nvme::kNvmRead, 0, 16, client.to), nvme::kStatusUnrecoveredReadError);
    CHECK_EQ(client.move(nvme::kNvmRead, 100, 8, client.to), nvme::kStatusUnrecoveredReadError);
  }
}
