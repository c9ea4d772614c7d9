// A host of a software controller on an image file, and what its tests do to such a file.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <system_error>

#include "soft_client.h"

namespace testing {

// A directory of this test's own, on a disk as a rule.
struct Directory {
  explicit Directory(const std::filesystem::path& in = std::filesystem::temp_directory_path()) {
    std::string name = (in / "soft-image-XXXXXX").string();
    CHECK(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::string file(const std::string& name) const { return (path / name).string(); }
  std::filesystem::path path;
};

inline Options image(const std::string& path, std::uint64_t size, unsigned threads = 0) {
  Options options;
  options.path = path;
  options.size = size;
  options.threads = threads;
  return options;
}

// The page cache forgets the file.
inline void make_cold(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0);
  CHECK_EQ(fdatasync(fd), 0);
  CHECK_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
  close(fd);
}

struct ImageClient : Client {
  explicit ImageClient(const Options& options) : Client(options) {
    enable();
    queue = create(1, 64);
    from = memory.allocate(1 << 20);
    to = memory.allocate(1 << 20);
    list = memory.allocate(4096);
  }
  nvme::Sqe command(std::uint8_t opcode, std::uint64_t lba, std::uint32_t blocks, std::uint64_t at,
                    std::uint32_t flags = 0) {
    nvme::Sqe sqe = io(opcode, lba, blocks, at, at + 4096);
    sqe.cdw12 |= flags;
    if (blocks > 16) {
      for (std::uint64_t i = 1; i * 4096 < std::uint64_t{blocks} * 512; ++i) {
        memory.at<std::uint64_t>(list)[i - 1] = at + i * 4096;
      }
      sqe.prp2 = list;
    }
    return sqe;
  }
  std::uint16_t move(std::uint8_t opcode, std::uint64_t lba, std::uint32_t blocks, std::uint64_t at,
                     std::uint32_t flags = 0) {
    return code(queue, command(opcode, lba, blocks, at, flags));
  }
  std::uint16_t flush() {
    nvme::Sqe sqe{};
    sqe.opcode = nvme::kNvmFlush;
    sqe.nsid = 1;
    return code(queue, sqe);
  }
  Pair queue;
  std::uint64_t from = 0;
  std::uint64_t to = 0;
  std::uint64_t list = 0;
};

}  // namespace testing
