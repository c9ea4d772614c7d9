// What is in the page cache decides which way bytes come; a wrong answer costs speed, or fills the cache.
#include "check.h"
#include "files.h"
#include "page_cache.h"

using namespace testing;
using gpunvme::cached_bytes;
using gpunvme::residency;

namespace {

constexpr auto kRead = SourceFile::Mode::kRead;

struct ColdFile {
  Directory directory;
  std::string path = directory / "file";
  std::shared_ptr<SourceFile> file;

  explicit ColdFile(std::uint64_t nbytes) {
    if (!can_be_cold(directory.path())) SKIP(directory.path() + " cannot be cold, or the kernel has no cachestat");
    write_file(path, pattern(nbytes, 1));
    make_cold(path);
    file = SourceFile::open(path, kRead);
  }
};

}  // namespace

TEST(none_some_all) {
  const ColdFile cold(4 * kMiB + 100);
  const SourceFile& file = *cold.file;
  CHECK_EQ(residency(file, 0, 4 * kMiB + 100), Residency::kNone);
  make_hot(cold.path, kMiB, 8192);
  CHECK_EQ(residency(file, 0, 4 * kMiB + 100), Residency::kSome);
  CHECK_EQ(residency(file, 0, kMiB), Residency::kNone);
  CHECK_EQ(residency(file, kMiB, 8192), Residency::kAll);
  CHECK_EQ(residency(file, kMiB + 1, 8190), Residency::kAll);
  CHECK_EQ(residency(file, kMiB - 1, 2), Residency::kSome);
  CHECK_EQ(residency(file, kMiB + 8191, 2), Residency::kSome);
  CHECK_EQ(residency(file, kMiB + 8192, kMiB), Residency::kNone);
  // A tail that is no whole page.
  make_hot(cold.path, 4 * kMiB, 100);
  CHECK_EQ(residency(file, 4 * kMiB, 100), Residency::kAll);
  CHECK_EQ(residency(file, 4 * kMiB + 99, 1), Residency::kAll);
  make_hot(cold.path);
  CHECK_EQ(residency(file, 0, 4 * kMiB + 100), Residency::kAll);
  make_cold(cold.path);
  CHECK_EQ(residency(file, 0, 4 * kMiB + 100), Residency::kNone);
}

TEST(bytes_are_counted_in_whole_pages) {
  const ColdFile cold(kMiB);
  const int fd = cold.file->fd();
  CHECK_EQ(cached_bytes(fd, 0, kMiB).value_or(1), 0u);
  make_hot(cold.path, 100, 1);
  CHECK_EQ(cached_bytes(fd, 0, kMiB).value_or(0), 4096u);
  CHECK_EQ(cached_bytes(fd, 0, 1).value_or(0), 4096u);
  CHECK_EQ(cached_bytes(fd, 4096, kMiB).value_or(1), 0u);
  // No bytes are none; cachestat itself takes 0 for "to the end".
  CHECK_EQ(cached_bytes(fd, 0, 0).value_or(1), 0u);
  CHECK(!cached_bytes(-1, 0, 100).has_value());
}

TEST(asking_changes_nothing) {
  const ColdFile cold(4 * kMiB);
  make_hot(cold.path, kMiB, kMiB);
  for (int i = 0; i < 20; ++i) residency(*cold.file, static_cast<std::uint64_t>(i) * 200'000, 200'000);
  CHECK_EQ(cached(cold.path).value(), kMiB);
}

TEST(a_file_in_memory_is_cached) {
  const Directory directory("/dev/shm");
  write_file(directory / "file", pattern(kMiB, 1));
  const auto file = SourceFile::open(directory / "file", kRead);
  if (!file->in_memory()) SKIP("/dev/shm is no tmpfs");
  CHECK_EQ(residency(*file, 0, kMiB), Residency::kAll);
}

TEST(where_cachestat_is_refused_pages_are_sampled) {
  const ColdFile cold(4 * kMiB);
  if (geteuid() != 0) SKIP("giving up the ownership of a file takes root");
  // Kernels since 6.14 or so refuse cachestat to those who could not write the file. Others tell: nothing to test.
  chmod(cold.path.c_str(), 0644);
  chmod(cold.directory.path().c_str(), 0755);
  constexpr int kNotRefused = 77;
  const int status = check::in_child([&cold] {
    require(setgid(65534) == 0 && setuid(65534) == 0, "setuid");
    const auto file = SourceFile::open(cold.path, kRead);
    if (cached_bytes(file->fd(), 0, 4096)) _exit(kNotRefused);
    CHECK_EQ(residency(*file, 0, 4096), Residency::kNone);
    make_hot(cold.path);
    CHECK_EQ(residency(*file, 0, 4 * kMiB), Residency::kAll);
    CHECK_EQ(residency(*file, kMiB + 1, 1), Residency::kAll);
  });
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNotRefused) SKIP("this kernel tells everybody by cachestat");
  CHECK_EQ(status, 0);
}
