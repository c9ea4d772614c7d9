#include "source.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.h"

namespace gpunvme::capi {
namespace {

void refuse_block_device(const std::string& path) {
  throw file_failure(EPERM, "the C interface does not write to block devices", path);
}

}  // namespace

std::shared_ptr<SourceFile> Source::open_file(const char* path, std::uint32_t mode) {
  if (path == nullptr) throw Refusal(GPUNVME_EINVAL, "the path is NULL");
  if (mode > GPUNVME_CREATE) throw Refusal(GPUNVME_EINVAL, "mode " + std::to_string(mode) + " is none");
  const std::string name = path;
  struct stat status {};
  const bool there = stat(path, &status) == 0;
  if (there && S_ISBLK(status.st_mode) && mode != GPUNVME_READ_ONLY) refuse_block_device(name);  // not even opened
  if (!there && name.rfind("nvme+", 0) == 0) {
    throw Refusal(GPUNVME_EUNSUPPORTED, name + ": controllers are driven from user space by the Python package only; " +
                                            "where the kernel has the namespace, open its block device");
  }
  constexpr SourceFile::Mode kModes[] = {SourceFile::Mode::kRead, SourceFile::Mode::kReadWrite,
                                         SourceFile::Mode::kCreate};
  auto file = SourceFile::open(name, kModes[mode]);
  if (file->is_block_device() && file->writable()) refuse_block_device(name);
  return file;
}

std::shared_ptr<Source> Source::open(const char* path, std::uint32_t mode) {
  return std::shared_ptr<Source>(new Source(open_file(path, mode)));
}

std::uint64_t Source::checked_range(std::int64_t offset, std::uint64_t nbytes) const {
  const std::uint64_t size = file_->size();
  const auto from = static_cast<std::uint64_t>(offset);
  if (offset < 0 || from > size || nbytes > size - from) {
    throw Refusal(GPUNVME_ERANGE, file_->name() + " has " + std::to_string(size) + " bytes; " + std::to_string(nbytes) +
                                      " from offset " + std::to_string(offset) + " were asked for");
  }
  return from;
}

Source::Room::Room(Source& source, std::uint64_t offset, std::uint64_t nbytes) : source_(source) {
  std::lock_guard lock(source.mutex_);
  const std::uint64_t size = source.file_->size();
  if (source.ends_.empty()) source.needed_ = size;
  try {
    source.file_->reserve(offset, nbytes);
  } catch (...) {
    if (source.file_->size() > size) (void)!ftruncate(source.file_->fd(), static_cast<off_t>(size));
    throw;
  }
  end_ = source.ends_.insert(offset + nbytes);
}

Source::Room::~Room() {
  std::lock_guard lock(source_.mutex_);
  if (kept_) source_.needed_ = std::max(source_.needed_, *end_);
  source_.ends_.erase(end_);
  if (kept_ || source_.file_->is_block_device()) return;
  const std::uint64_t needed =
      source_.ends_.empty() ? source_.needed_ : std::max(source_.needed_, *source_.ends_.rbegin());
  try {
    if (source_.file_->size() > needed) (void)!ftruncate(source_.file_->fd(), static_cast<off_t>(needed));
  } catch (const Failure&) {
    // The file cannot even be looked at. The write's own failure is what the caller hears.
  }
}

}  // namespace gpunvme::capi
