// Files with known bytes, the page cache put into a known state, and memory whose surroundings are watched.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "failure.h"
#include "job.h"
#include "page_cache.h"
#include "source_file.h"

namespace testing {

using gpunvme::Counts;
using gpunvme::Failure;
using gpunvme::FailureKind;
using gpunvme::Job;
using gpunvme::Residency;
using gpunvme::Segment;
using gpunvme::SourceFile;
using Bytes = std::vector<std::uint8_t>;

inline constexpr std::uint64_t kKiB = 1u << 10;
inline constexpr std::uint64_t kMiB = 1u << 20;

inline void require(bool good, const char* what) {
  if (!good) throw std::system_error(errno, std::generic_category(), what);
}

// On a drive: /tmp is in memory on many systems.
inline std::string default_directory() {
  const char* chosen = std::getenv("TMPDIR");
  return chosen != nullptr ? chosen : "/var/tmp";
}

// A directory that goes away with all that is in it.
class Directory {
 public:
  explicit Directory(const std::string& in = default_directory()) {
    std::string name = in + "/gpunvme-test-XXXXXX";
    require(mkdtemp(name.data()) != nullptr, "mkdtemp");
    path_ = name;
  }
  ~Directory() {
    if (DIR* directory = opendir(path_.c_str())) {
      while (const dirent* entry = readdir(directory)) unlink((path_ + "/" + entry->d_name).c_str());
      closedir(directory);
    }
    rmdir(path_.c_str());
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A descriptor for the test's own looks at a file.
class Descriptor {
 public:
  explicit Descriptor(const std::string& path, int flags = O_RDONLY)
      : fd_(open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    require(fd_ >= 0, path.c_str());
  }
  ~Descriptor() { close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

// Bytes that differ from place to place, so that one from a wrong place shows. A function of `seed` and `offset`.
__attribute__((no_sanitize("thread")))  // for speed: nobody else has this memory yet
inline void
fill(std::uint8_t* to, std::uint64_t offset, std::uint64_t nbytes, std::uint64_t seed) {
  const auto word_at = [seed](std::uint64_t index) {
    std::uint64_t x = (index + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1b54a32d192ed03u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 27);
  };
  std::uint64_t words[1024];
  while (nbytes > 0) {
    const std::uint64_t skip = offset % 8;
    const std::uint64_t count = std::min<std::uint64_t>(sizeof words - skip, nbytes);
    for (std::uint64_t i = 0; i * 8 < skip + count; ++i) words[i] = word_at(offset / 8 + i);
    std::memcpy(to, reinterpret_cast<const std::uint8_t*>(words) + skip, count);
    to += count;
    offset += count;
    nbytes -= count;
  }
}

inline Bytes pattern(std::uint64_t nbytes, std::uint64_t seed, std::uint64_t offset = 0) {
  Bytes bytes(nbytes);
  fill(bytes.data(), offset, nbytes, seed);
  return bytes;
}

// to[at...] = from[offset...]
inline void put(Bytes& to, std::uint64_t at, const Bytes& from, std::uint64_t offset, std::uint64_t nbytes) {
  if (at + nbytes > to.size() || offset + nbytes > from.size()) throw std::out_of_range("put");
  if (nbytes > 0) std::memcpy(to.data() + at, from.data() + offset, nbytes);
}

inline void write_at(int fd, const std::uint8_t* data, std::uint64_t nbytes, std::uint64_t offset) {
  while (nbytes > 0) {
    const ssize_t got = pwrite(fd, data, nbytes, static_cast<off_t>(offset));
    require(got > 0, "pwrite");
    data += got;
    offset += static_cast<std::uint64_t>(got);
    nbytes -= static_cast<std::uint64_t>(got);
  }
}

inline void write_file(const std::string& path, const Bytes& bytes) {
  const Descriptor file(path, O_RDWR | O_CREAT | O_TRUNC);
  write_at(file, bytes.data(), bytes.size(), 0);
}

inline Bytes read_file(const std::string& path) {
  const Descriptor file(path);
  struct stat status {};
  require(fstat(file, &status) == 0, "fstat");
  Bytes bytes(static_cast<std::size_t>(status.st_size));
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t got = pread(file, bytes.data() + at, bytes.size() - at, static_cast<off_t>(at));
    require(got > 0, "pread");
    at += static_cast<std::size_t>(got);
  }
  return bytes;
}

// Takes a range out of the page cache (0 bytes: all of the file from `offset` on). Whole pages only; the kernel keeps
// dirty ones, so they are written first.
inline void make_cold(const std::string& path, std::uint64_t offset = 0, std::uint64_t nbytes = 0) {
  const Descriptor file(path);
  require(fsync(file) == 0, "fsync");
  const int error = posix_fadvise(file, static_cast<off_t>(offset), static_cast<off_t>(nbytes), POSIX_FADV_DONTNEED);
  if (error != 0) throw std::system_error(error, std::generic_category(), "posix_fadvise");
}

// Brings exactly the pages of a range into the page cache: no reading ahead.
inline void make_hot(const std::string& path, std::uint64_t offset, std::uint64_t nbytes) {
  const Descriptor file(path);
  posix_fadvise(file, 0, 0, POSIX_FADV_RANDOM);
  Bytes bytes(1 * kMiB);
  for (std::uint64_t at = offset; at < offset + nbytes;) {
    const ssize_t got =
        pread(file, bytes.data(), std::min<std::uint64_t>(bytes.size(), offset + nbytes - at), static_cast<off_t>(at));
    require(got >= 0, "pread");
    if (got == 0) return;
    at += static_cast<std::uint64_t>(got);
  }
}

inline void make_hot(const std::string& path) { make_hot(path, 0, UINT64_MAX / 4); }

// Bytes of the file in the page cache; nothing where the kernel does not tell.
inline std::optional<std::uint64_t> cached(const std::string& path) {
  const Descriptor file(path);
  struct stat status {};
  require(fstat(file, &status) == 0, "fstat");
  return gpunvme::cached_bytes(file, 0, static_cast<std::uint64_t>(status.st_size));
}

// Calls a function in a thread of its own that sees `directory` as a tmpfs of 1 MiB and nobody else does. False, and
// it is not called, where we may not mount; what it throws is thrown.
template <typename Function>
bool on_a_small_disk(const std::string& directory, Function function) {
  bool mounted = false;
  std::exception_ptr thrown;
  std::thread([&] {
    mounted = unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
              mount("none", directory.c_str(), "tmpfs", 0, "size=1m") == 0;
    if (!mounted) return;
    try {
      function();
    } catch (...) {
      thrown = std::current_exception();
    }
  }).join();
  if (thrown) std::rethrow_exception(thrown);
  return mounted;
}

// Whether a cold file really is cold here: not on file systems in memory.
inline bool can_be_cold(const std::string& directory) {
  const std::string path = directory + "/can_be_cold";
  write_file(path, pattern(64 * kKiB, 0));
  make_cold(path);
  const auto left = cached(path);
  unlink(path.c_str());
  return left && *left == 0;
}

// Whether files here can be read O_DIRECT.
inline bool has_direct(const std::string& directory) {
  const std::string path = directory + "/has_direct";
  write_file(path, pattern(64 * kKiB, 0));
  const bool has = SourceFile::open(path, SourceFile::Mode::kRead)->direct_fd() >= 0;
  unlink(path.c_str());
  return has;
}

// Memory at an address with a known remainder. Whole pages, given back to the kernel at once when it is freed: what
// touches it later is a fault.
class Memory {
 public:
  explicit Memory(std::uint64_t nbytes, std::uint64_t shift = 0, int byte = 0xa5)
      : nbytes_(nbytes), mapped_(nbytes + shift + 4096) {
    void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(mapping != MAP_FAILED, "mmap");
    mapping_ = static_cast<std::uint8_t*>(mapping);
    data_ = mapping_ + shift;
    std::memset(mapping_, byte, mapped_);
  }
  ~Memory() { munmap(mapping_, mapped_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::uint8_t* data() { return data_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data_); }
  std::uint64_t size() const { return nbytes_; }

 private:
  std::uint64_t nbytes_;
  std::uint64_t mapped_;
  std::uint8_t* mapping_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

// Where two ranges first differ, or -1.
inline std::int64_t first_difference(const std::uint8_t* a, const std::uint8_t* b, std::uint64_t nbytes) {
  if (nbytes == 0 || std::memcmp(a, b, nbytes) == 0) return -1;
  return std::mismatch(a, a + nbytes, b).first - a;
}

inline std::int64_t first_difference(Memory& memory, const Bytes& bytes) {
  return first_difference(memory.data(), bytes.data(), std::min(memory.size(), bytes.size()));
}

inline std::int64_t first_difference(const Bytes& a, const Bytes& b) {
  if (a.size() != b.size()) return static_cast<std::int64_t>(std::min(a.size(), b.size()));
  return first_difference(a.data(), b.data(), a.size());
}

inline std::shared_ptr<Job> make_job(Job::Direction direction = Job::Direction::kRead, int device = gpunvme::kHost) {
  Job::Options options;
  options.direction = direction;
  options.device = device;
  return Job::make(options);
}

// Until the job is done; the watchdog of check.h ends a wait that never does.
inline std::optional<Failure> wait(Job& job) {
  while (!job.wait_for(std::chrono::seconds(1))) {
  }
  return job.failure();
}

inline std::optional<Failure> seal_and_wait(Job& job) {
  job.seal();
  return wait(job);
}

// Reads or writes one range; throws what failed.
inline Counts move(const std::shared_ptr<SourceFile>& file, std::uint64_t offset, std::uint64_t nbytes,
                   std::uint64_t address, Job::Direction direction = Job::Direction::kRead,
                   int device = gpunvme::kHost) {
  const auto job = make_job(direction, device);
  job->add({{job->add_file(file), offset, nbytes, address}});
  if (const auto failure = seal_and_wait(*job)) throw *failure;
  return job->counts();
}

}  // namespace testing
