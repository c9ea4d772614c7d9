// What can be opened and how, and what an open file says of itself.
#include <sys/socket.h>

#include "block_device.h"
#include "check.h"
#include "files.h"
#include "source_file.h"

using namespace testing;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;
constexpr auto kReadWrite = SourceFile::Mode::kReadWrite;
constexpr auto kCreate = SourceFile::Mode::kCreate;

bool is_power_of_two(std::uint32_t value) { return value != 0 && (value & (value - 1)) == 0; }

}  // namespace

TEST(modes) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, pattern(100, 1));
  const auto read = SourceFile::open(path, kRead);
  CHECK(!read->writable());
  CHECK_EQ(read->name(), path);
  CHECK_EQ(read->size(), 100u);
  CHECK(!read->is_block_device());
  const auto write = SourceFile::open(path, kReadWrite);
  CHECK(write->writable());
  CHECK_EQ(write->size(), 100u);  // kept
  CHECK(SourceFile::open(path, kCreate)->writable());
  CHECK_EQ(write->size(), 0u);  // emptied
  CHECK_EQ(SourceFile::open(directory / "new", kCreate)->size(), 0u);
}

TEST(what_cannot_be_opened_says_why) {
  const Directory directory;
  const auto error_of = [](const std::string& path, SourceFile::Mode mode) {
    const Failure failure = CHECK_FAILS(SourceFile::open(path, mode));
    CHECK_EQ(failure.kind, FailureKind::kFile);
    CHECK_EQ(failure.file, path);
    return failure.error_number;
  };
  CHECK_EQ(error_of(directory / "missing", kRead), ENOENT);
  CHECK_EQ(error_of(directory / "missing", kReadWrite), ENOENT);
  CHECK_EQ(error_of(directory / "missing/file", kCreate), ENOENT);
  CHECK_EQ(error_of(directory.path(), kRead), EISDIR);
  CHECK_EQ(error_of(directory.path(), kCreate), EISDIR);
  require(mkfifo((directory / "fifo").c_str(), 0600) == 0, "mkfifo");
  // Without waiting for somebody at the other end.
  CHECK_EQ(error_of(directory / "fifo", kRead), ESPIPE);
  CHECK_EQ(error_of(directory / "fifo", kReadWrite), ESPIPE);
  CHECK_EQ(error_of("/dev/null", kRead), ESPIPE);
  if (geteuid() != 0) {
    write_file(directory / "secret", {});
    chmod((directory / "secret").c_str(), 0);
    CHECK_EQ(error_of(directory / "secret", kRead), EACCES);
  }
}

TEST(descriptors) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, pattern(100, 1));
  std::shared_ptr<SourceFile> file;
  {
    const Descriptor fd(path);
    file = SourceFile::from_descriptor(fd, "named");
    CHECK(file->fd() != fd);
    CHECK(!file->writable());
  }
  CHECK_EQ(file->size(), 100u);  // although its owner has closed it
  CHECK_EQ(file->name(), "named");
  CHECK_EQ((fcntl(file->fd(), F_GETFD) & FD_CLOEXEC), FD_CLOEXEC);
  {
    const Descriptor fd(path, O_RDWR);
    CHECK(SourceFile::from_descriptor(fd, "")->writable());
  }
  CHECK_EQ(CHECK_FAILS(SourceFile::from_descriptor(-1, "")).error_number, EBADF);
  int pipes[2];
  require(pipe(pipes) == 0, "pipe");
  CHECK_EQ(CHECK_FAILS(SourceFile::from_descriptor(pipes[0], "pipe")).error_number, ESPIPE);
  close(pipes[0]);
  close(pipes[1]);
}

TEST(a_refused_file_leaves_no_descriptor_behind) {
  const Directory directory;
  const auto open_descriptors = [] {
    int count = 0;
    DIR* fds = opendir("/proc/self/fd");
    while (readdir(fds) != nullptr) ++count;
    closedir(fds);
    return count;
  };
  const int before = open_descriptors();
  for (int i = 0; i < 10; ++i) {
    (void)CHECK_FAILS(SourceFile::open(directory.path(), kRead));
    write_file(directory / "file", {});
    SourceFile::open(directory / "file", kReadWrite)->mapping();
  }
  CHECK_EQ(open_descriptors(), before);
}

TEST(descriptors_that_append_or_are_direct_move_the_same_bytes) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes old = pattern(2 * kMiB, 1);
  // pwrite to a descriptor with O_APPEND appends, whatever the offset (pwrite(2), BUGS), and one with O_DIRECT refuses
  // what is not aligned: neither may reach what we write and read through the page cache.
  for (const int flag : {O_APPEND, O_DIRECT, O_APPEND | O_DIRECT}) {
    write_file(path, old);
    const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | flag);
    if (fd < 0) continue;
    const auto file = SourceFile::from_descriptor(fd, path);
    close(fd);
    Memory bytes(1000, 1);
    fill(bytes.data(), 0, 1000, 2);
    CHECK_EQ(move(file, 777, 1000, bytes.address(), Job::Direction::kWrite).total(), 1000u);
    Bytes expected = old;
    put(expected, 777, pattern(1000, 2), 0, 1000);
    CHECK_EQ(first_difference(read_file(path), expected), -1);
    make_hot(path);
    Memory back(old.size(), 3);
    move(file, 0, old.size(), back.address());
    CHECK_EQ(first_difference(back, expected), -1);
  }
}

TEST(alignment) {
  const Directory directory;
  write_file(directory / "file", pattern(10'000, 1));
  const auto file = SourceFile::open(directory / "file", kRead);
  CHECK(is_power_of_two(file->memory_align()));
  CHECK(is_power_of_two(file->offset_align()));
  if (file->direct_fd() < 0) SKIP("no O_DIRECT here: " + file->direct_refusal());
  CHECK_EQ(file->direct_refusal(), "");
  CHECK(!file->in_memory());
  // What it says is what the kernel takes.
  Memory memory(kMiB, file->memory_align());
  CHECK_EQ(pread(file->direct_fd(), memory.data(), file->offset_align(), file->offset_align()),
           static_cast<ssize_t>(file->offset_align()));
  file->refuse_direct();
  CHECK_EQ(file->direct_fd(), -1);
  CHECK(file->direct_descriptor() >= 0);
  CHECK(!file->direct_refusal().empty());
}

TEST(a_file_in_memory_has_no_direct_descriptor) {
  const Directory directory("/dev/shm");
  write_file(directory / "file", pattern(10, 1));
  const auto file = SourceFile::open(directory / "file", kRead);
  if (!file->in_memory()) SKIP("/dev/shm is no tmpfs");
  CHECK_EQ(file->direct_fd(), -1);
  CHECK(!file->direct_refusal().empty());
}

TEST(block_devices) {
  const Directory directory;
  const Bytes bytes = pattern(4 * kMiB, 1);
  write_file(directory / "backing", bytes);
  BlockDevice device(directory / "backing");
  const auto file = SourceFile::open(device.path(), kRead);
  CHECK(file->is_block_device());
  CHECK(!file->in_memory());
  CHECK_EQ(file->size(), 4 * kMiB);
  CHECK(file->direct_fd() >= 0);
  Memory memory(bytes.size());
  CHECK_EQ(move(file, 0, bytes.size(), memory.address()).total(), bytes.size());
  CHECK_EQ(first_difference(memory, bytes), -1);
}

TEST(a_deleted_file_stays_readable_and_a_replaced_one_is_the_old_one) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(2 * kMiB, 1);
  for (const bool replaced : {false, true}) {
    write_file(path, bytes);
    {
      const Descriptor fd(path);
      unlink(path.c_str());
      if (replaced) write_file(path, pattern(2 * kMiB, 2));
      const auto file = SourceFile::from_descriptor(fd, path);  // the name is gone, or another file's
      Memory memory(bytes.size());
      CHECK_EQ(move(file, 0, bytes.size(), memory.address()).total(), bytes.size());
      CHECK_EQ(first_difference(memory, bytes), -1);
    }
    unlink(path.c_str());
  }
}

TEST(size_follows_the_file) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, pattern(100, 1));
  const auto file = SourceFile::open(path, kRead);
  write_file(path, pattern(300, 1));
  CHECK_EQ(file->size(), 300u);
}

TEST(reserve_extends_and_keeps) {
  for (const std::string& where : {default_directory(), std::string("/dev/shm")}) {
    const Directory directory(where);
    const std::string path = directory / "file";
    write_file(path, pattern(100, 1));
    const auto file = SourceFile::open(path, kReadWrite);
    file->reserve(0, 0);
    CHECK_EQ(file->size(), 100u);
    file->reserve(10, 50);
    CHECK_EQ(file->size(), 100u);
    file->reserve(50, 10'000);
    CHECK_EQ(file->size(), 10'050u);
    Bytes expected = pattern(100, 1);
    expected.resize(10'050);
    CHECK_EQ(first_difference(read_file(path), expected), -1);
    const Failure failure = CHECK_FAILS(SourceFile::open(path, kRead)->reserve(0, 10));
    CHECK_EQ(failure.error_number, EBADF);
  }
}

TEST(reserve_finds_a_full_disk_before_anything_is_written) {
  const Directory directory;
  const bool mounted = on_a_small_disk(directory.path(), [&directory] {
    const auto file = SourceFile::open(directory / "file", kCreate);
    file->reserve(0, kMiB / 2);
    CHECK_EQ(file->size(), kMiB / 2);
    const Failure failure = CHECK_FAILS(file->reserve(0, 2 * kMiB));
    CHECK_EQ(failure.kind, FailureKind::kFile);
    CHECK_EQ(failure.error_number, ENOSPC);
    CHECK_EQ(failure.file, directory / "file");
    CHECK_EQ(file->size(), kMiB / 2);
  });
  if (!mounted) SKIP("mounting a tmpfs takes root");
}

TEST(the_mapping_is_of_the_file_as_it_was_first_mapped) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(3 * kMiB, 1);
  write_file(path, bytes);
  const auto file = SourceFile::open(path, kRead);
  const gpunvme::FileMapping* mapping = file->mapping();
  CHECK(mapping != nullptr);
  CHECK_EQ(mapping->nbytes(), 3 * kMiB);
  CHECK_EQ(first_difference(mapping->data(), bytes.data(), bytes.size()), -1);
  CHECK(file->mapping() == mapping);
  write_file(directory / "empty", {});
  CHECK(SourceFile::open(directory / "empty", kRead)->mapping() == nullptr);
}
