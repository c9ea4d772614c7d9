// Blocks in an image file, by way of the page cache. The image is locked for as long as the controller lives.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <utility>
#include <vector>

#include "backend.h"
#include "failure.h"
#include "hot_regions.h"
#include "page_cache.h"

namespace gpunvme::soft {
namespace {

// The descriptor of an image being opened, closed where that fails.
class Opened {
 public:
  explicit Opened(int fd) : fd_(fd) {}
  ~Opened() {
    if (fd_ >= 0) ::close(fd_);
  }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;
  int fd() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

[[noreturn]] void refuse(const std::string& path, int error, const std::string& why) {
  Failure failure(FailureKind::kFile, why);
  failure.error_number = error;
  failure.file = path;
  throw failure;
}

// What is left of `segments` from byte `done` on.
void rest_of(const iovec* segments, std::size_t count, std::uint64_t done, std::vector<iovec>& rest) {
  rest.clear();
  for (std::size_t i = 0; i < count; ++i) {
    if (done >= segments[i].iov_len) {
      done -= segments[i].iov_len;
      continue;
    }
    rest.push_back({static_cast<std::byte*>(segments[i].iov_base) + done, segments[i].iov_len - done});
    done = 0;
  }
}

class FileBackend : public Backend {
 public:
  FileBackend(int fd, int lock, std::uint64_t size, std::uint64_t identity, bool read_only) : lock_(lock) {
    fd_ = fd;
    size_ = size;
    identity_ = identity;
    read_only_ = read_only;
    // tmpfs knows no RWF_NOWAIT, and no drive that could be waited for but for what is swapped out.
    cached_flags_ = is_in_memory(fd) ? 0 : RWF_NOWAIT;
    hot_ = HotRegions::of(fd, size);
  }
  ~FileBackend() override { close(); }

  void close() override {
    hot_.reset();
    for (int* const fd : {&fd_, &lock_}) {
      if (*fd >= 0) ::close(*fd);
      *fd = -1;
    }
  }

  int read(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes) override {
    return all(segments, count, nbytes, [&](const iovec* now, int number, std::uint64_t done) {
      return preadv(fd_, now, number, static_cast<off_t>(offset + done));
    });
  }

  int write(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes,
            bool durable) override {
    // RWF_DSYNC writes this range and what is needed to find it again, as O_DSYNC would.
    return all(segments, count, nbytes, [&](const iovec* now, int number, std::uint64_t done) {
      return pwritev2(fd_, now, number, static_cast<off_t>(offset + done), durable ? RWF_DSYNC : 0);
    });
  }

  int flush() override { return fdatasync(fd_) == 0 ? 0 : errno; }

  int zero(std::uint64_t offset, std::uint64_t nbytes, bool deallocate) override {
    const auto from = static_cast<off_t>(offset);
    const auto length = static_cast<off_t>(nbytes);
    constexpr int kPunch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    constexpr int kZero = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    if (!deallocate && fallocate(fd_, kZero, from, length) == 0) return 0;
    if (fallocate(fd_, kPunch, from, length) == 0) return 0;
    // A file system that can do neither.
    static const std::vector<std::byte> zeroes(64 << 10);
    while (nbytes > 0) {
      const std::uint64_t now = std::min<std::uint64_t>(nbytes, zeroes.size());
      const iovec segment{const_cast<std::byte*>(zeroes.data()), now};
      if (const int error = write(&segment, 1, offset, now, false); error != 0) return error;
      offset += now;
      nbytes -= now;
    }
    return 0;
  }

  void prefetch(std::uint64_t offset, std::uint64_t nbytes) const override {
    if (hot_ != nullptr) hot_->prefetch(offset, nbytes);
  }

  bool read_mapped(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t nbytes) override {
    return hot_ != nullptr && hot_->read(segments, count, offset, nbytes);
  }

  std::uint64_t read_cached(const iovec* segments, std::size_t count, std::uint64_t offset,
                            std::uint64_t nbytes) override {
    const int number = static_cast<int>(std::min<std::size_t>(count, IOV_MAX));
    const ssize_t got = preadv2(fd_, segments, number, static_cast<off_t>(offset), cached_flags_);
    if (hot_ != nullptr && got == static_cast<ssize_t>(nbytes)) hot_->count_hit(offset, nbytes);
    return got > 0 ? static_cast<std::uint64_t>(got) : 0;
  }

 private:
  // Calls `move(segments, count, bytes done)` until everything is moved.
  template <typename Move>
  static int all(const iovec* segments, std::size_t count, std::uint64_t nbytes, Move move) {
    std::vector<iovec> rest;
    const iovec* now = segments;
    std::size_t number = count;
    for (std::uint64_t done = 0; done < nbytes;) {
      const ssize_t moved = move(now, static_cast<int>(std::min<std::size_t>(number, IOV_MAX)), done);
      if (moved < 0 && errno == EINTR) continue;
      if (moved < 0) return errno;
      if (moved == 0) return EIO;  // the image was truncated
      done += static_cast<std::uint64_t>(moved);
      if (done == nbytes) break;
      rest_of(segments, count, done, rest);
      now = rest.data();
      number = rest.size();
    }
    return 0;
  }

  int cached_flags_;
  std::unique_ptr<HotRegions> hot_;
  // Opened apart from the one that io_uring knows: the kernel lets go of rings some time after their process has ended,
  // and the lock would be held until then.
  int lock_;
};

}  // namespace

std::unique_ptr<Backend> open_image(const Options& options) {
  const std::string& path = *options.path;
  const int flags = (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK;
  // Made where there is none and the size is known.
  const bool may_create = options.size > 0 && !options.read_only;
  Opened lock(::open(path.c_str(), flags | (may_create ? O_CREAT : 0), 0666));
  if (lock.fd() < 0 && errno == ENOENT && options.size == 0) {
    refuse(path, ENOENT, "there is no such image; give size= to have it made");
  }
  if (lock.fd() < 0) throw file_failure(errno, "cannot open the image", path);

  struct stat locked {};
  if (fstat(lock.fd(), &locked) != 0) throw file_failure(errno, "cannot open the image", path);
  if (!S_ISREG(locked.st_mode)) {
    refuse(path, EINVAL, "not a regular file: a software controller's blocks are kept in one, or in memory");
  }
  if (flock(lock.fd(), (options.read_only ? LOCK_SH : LOCK_EX) | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) throw file_failure(errno, "cannot lock the image", path);
    refuse(path, EWOULDBLOCK, "the image is in use by another software controller; close that one first");
  }
  // Under the lock: nobody else makes the image larger meanwhile.
  Opened image(::open(path.c_str(), flags));
  struct stat status {};
  if (image.fd() < 0 || fstat(image.fd(), &status) != 0) throw file_failure(errno, "cannot open the image", path);
  if (status.st_dev != locked.st_dev || status.st_ino != locked.st_ino) {
    refuse(path, EBUSY, "the image was replaced by another file while it was opened; open it again");
  }
  auto size = static_cast<std::uint64_t>(status.st_size);
  if (size == 0 && options.size > 0 && !options.read_only) {
    if (options.size % options.lba_bytes != 0) {
      refuse(path, EINVAL,
             "size=" + describe_bytes(options.size) + " is not a whole number of blocks of " +
                 std::to_string(options.lba_bytes) + " bytes");
    }
    if (ftruncate(image.fd(), static_cast<off_t>(options.size)) != 0) {
      throw file_failure(errno, "cannot make the image " + describe_bytes(options.size) + " large", path);
    }
    size = options.size;
  }
  if (options.size > size) {
    refuse(
        path, EINVAL,
        "the image is too small: it has " + describe_bytes(size) + ", size= asks for " + describe_bytes(options.size));
  }
  if (options.size > 0) size = options.size;
  if (size % options.lba_bytes != 0) {
    refuse(path, EINVAL,
           "the image's " + describe_bytes(size) + " are not a whole number of blocks of " +
               std::to_string(options.lba_bytes) + " bytes; choose size= or lba= accordingly");
  }
  if (size / options.lba_bytes < options.namespaces) {
    refuse(path, EINVAL,
           "the image is too small: " + describe_bytes(size) + " for " + std::to_string(options.namespaces) +
               " namespaces of at least one block of " + std::to_string(options.lba_bytes) + " bytes");
  }
  const std::uint64_t identity = status.st_dev * 0x9E3779B97F4A7C15u ^ status.st_ino;
  return std::make_unique<FileBackend>(image.release(), lock.release(), size, identity, options.read_only);
}

}  // namespace gpunvme::soft
