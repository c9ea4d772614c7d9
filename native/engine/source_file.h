// An open file or block device: its descriptors, size, alignment, and the mapping that gathers copy from.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "file_mapping.h"

namespace gpunvme {

// enable_shared_from_this: then a Python object and the engine share one count, and the last owner, which may be a
// worker, never needs the interpreter.
class SourceFile : public std::enable_shared_from_this<SourceFile> {
 public:
  enum class Mode { kRead, kReadWrite, kCreate };  // "r", "r+", "w"

  // Throws Failure (kFile).
  static std::shared_ptr<SourceFile> open(const std::string& path, Mode mode);
  // The descriptor is duplicated; its owner may close it.
  static std::shared_ptr<SourceFile> from_descriptor(int fd, const std::string& name);

  ~SourceFile();
  SourceFile(const SourceFile&) = delete;
  SourceFile& operator=(const SourceFile&) = delete;

  const std::string& name() const { return name_; }
  int fd() const { return fd_; }
  bool writable() const { return writable_; }
  bool is_block_device() const { return block_device_; }
  bool in_memory() const { return in_memory_; }  // tmpfs, ramfs, hugetlbfs: there is no drive behind it

  // The size now, in bytes. Throws Failure (kFile).
  std::uint64_t size() const;

  // Makes room for a write, so that a full disk is found before anything is written and O_DIRECT need not extend the
  // file. Throws Failure (kFile).
  void reserve(std::uint64_t offset, std::uint64_t nbytes);

  // The O_DIRECT descriptor, or -1; then direct_refusal() says why.
  int direct_fd() const { return direct_refused_.load(std::memory_order_relaxed) ? -1 : direct_fd_; }
  std::string direct_refusal() const;
  // The same descriptor for requests that were made before a refusal.
  int direct_descriptor() const { return direct_fd_; }
  // A read that met the alignment was refused all the same (EINVAL): use the page cache from now on.
  void refuse_direct() { direct_refused_.store(true, std::memory_order_relaxed); }

  // O_DIRECT's alignment in bytes, powers of two (statx(2), STATX_DIOALIGN).
  std::uint32_t memory_align() const { return memory_align_; }
  std::uint32_t offset_align() const { return offset_align_; }

  // A read-only mapping of the whole file as it is now, made on first use and kept; null where it cannot be mapped.
  FileMapping* mapping();

 private:
  SourceFile(int fd, std::string name, bool writable);
  void open_direct();

  int fd_;
  int direct_fd_ = -1;
  std::string name_;
  bool writable_;
  bool block_device_ = false;
  bool in_memory_ = false;
  std::uint32_t memory_align_ = 4096;
  std::uint32_t offset_align_ = 4096;
  std::string open_refusal_;
  std::atomic<bool> direct_refused_{false};
  // Set once, without a lock: a child may be forked while a worker maps, and would inherit the lock held for ever.
  std::atomic<FileMapping*> mapping_{nullptr};
  std::atomic<bool> unmappable_{false};
};

}  // namespace gpunvme
