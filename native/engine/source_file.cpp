#include "source_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "failure.h"
#include "page_cache.h"

namespace gpunvme {

std::shared_ptr<SourceFile> SourceFile::open(const std::string& path, Mode mode) {
  int flags = O_RDONLY;
  if (mode == Mode::kReadWrite) flags = O_RDWR;
  if (mode == Mode::kCreate) flags = O_RDWR | O_CREAT | O_TRUNC;
  // O_NONBLOCK: opening a FIFO by mistake must not wait for a writer; it changes nothing for files and devices.
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, 0666);
  if (fd < 0) throw file_failure(errno, "cannot open", path);
  return std::shared_ptr<SourceFile>(new SourceFile(fd, path, flags != O_RDONLY));
}

std::shared_ptr<SourceFile> SourceFile::from_descriptor(int fd, const std::string& name) {
  const int flags = fcntl(fd, F_GETFL);
  int copy = -1;
  if (flags >= 0 && (flags & (O_APPEND | O_DIRECT)) != 0) {
    // pwrite would append, or refuse what is not aligned. These flags belong to the open file, which a duplicate
    // shares.
    copy = ::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), (flags & O_ACCMODE) | O_CLOEXEC);
  } else if (flags >= 0) {
    copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  }
  if (copy < 0) throw file_failure(errno, "cannot use the file descriptor", name);
  return std::shared_ptr<SourceFile>(new SourceFile(copy, name, (flags & O_ACCMODE) == O_RDWR));
}

SourceFile::SourceFile(int fd, std::string name, bool writable) : fd_(fd), name_(std::move(name)), writable_(writable) {
  struct stat status {};
  int error = fstat(fd_, &status) == 0 ? 0 : errno;
  if (error == 0 && S_ISDIR(status.st_mode)) error = EISDIR;
  if (error == 0 && !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) error = ESPIPE;
  if (error != 0) {
    close(fd_);
    throw file_failure(error, error == ESPIPE ? "not a regular file or block device" : "cannot open", name_);
  }
  block_device_ = S_ISBLK(status.st_mode);
  in_memory_ = !block_device_ && is_in_memory(fd_);
  open_direct();
}

void SourceFile::open_direct() {
  if (in_memory_) {
    open_refusal_ = "the file is in memory";
    return;
  }
  // Through /proc, so that it is the same inode even if the name has moved on.
  const std::string link = "/proc/self/fd/" + std::to_string(fd_);
  const int flags = (writable_ ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC;
  direct_fd_ = ::open(link.c_str(), flags);
  if (direct_fd_ < 0) {
    open_refusal_ = std::string("O_DIRECT was refused: ") + std::strerror(errno);
    return;
  }
  if (block_device_) {
    int sector = 0;
    if (ioctl(fd_, BLKSSZGET, &sector) == 0 && sector > 0) {
      memory_align_ = offset_align_ = static_cast<std::uint32_t>(sector);
    }
    return;
  }
#ifdef STATX_DIOALIGN
  struct statx extended {};
  if (statx(fd_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &extended) == 0 && (extended.stx_mask & STATX_DIOALIGN) != 0) {
    if (extended.stx_dio_offset_align == 0) {
      open_refusal_ = "the file system says that this file cannot be read O_DIRECT";
      close(direct_fd_);
      direct_fd_ = -1;
      return;
    }
    memory_align_ = extended.stx_dio_mem_align;
    offset_align_ = extended.stx_dio_offset_align;
  }
#endif
}

SourceFile::~SourceFile() {
  delete mapping_.load();
  if (direct_fd_ >= 0) close(direct_fd_);
  close(fd_);
}

std::uint64_t SourceFile::size() const {
  if (block_device_) {
    std::uint64_t nbytes = 0;
    if (ioctl(fd_, BLKGETSIZE64, &nbytes) != 0) throw file_failure(errno, "cannot tell the device's size", name_);
    return nbytes;
  }
  struct stat status {};
  if (fstat(fd_, &status) != 0) throw file_failure(errno, "cannot tell the file's size", name_);
  return static_cast<std::uint64_t>(status.st_size);
}

void SourceFile::reserve(std::uint64_t offset, std::uint64_t nbytes) {
  if (block_device_ || nbytes == 0) return;
  int error = 0;
  do {
    error = fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(nbytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == EOPNOTSUPP && offset + nbytes > size()) {
    error = ftruncate(fd_, static_cast<off_t>(offset + nbytes)) == 0 ? 0 : errno;
  } else if (error == EOPNOTSUPP) {
    error = 0;
  }
  if (error != 0) throw file_failure(error, "no room to write", name_, static_cast<std::int64_t>(offset));
}

std::string SourceFile::direct_refusal() const {
  if (!open_refusal_.empty()) return open_refusal_;
  return direct_refused_.load(std::memory_order_relaxed) ? "the file system refused an aligned O_DIRECT read" : "";
}

FileMapping* SourceFile::mapping() {
  FileMapping* known = mapping_.load(std::memory_order_acquire);
  if (known != nullptr || unmappable_.load(std::memory_order_relaxed)) return known;
  auto made = FileMapping::make(fd_, size());
  if (made == nullptr) {
    unmappable_.store(true, std::memory_order_relaxed);
    return nullptr;
  }
  // If somebody else was faster, `made` is unmapped again.
  return mapping_.compare_exchange_strong(known, made.get(), std::memory_order_acq_rel) ? made.release() : known;
}

}  // namespace gpunvme
