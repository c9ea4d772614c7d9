// Blocks in memory: gone with the controller.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <stdexcept>

#include "backend.h"
#include "failure.h"
#include "prefetch.h"

namespace gpunvme::soft {
namespace {

constexpr std::uint64_t kPage = 4096;

class MemoryBackend : public Backend {
 public:
  explicit MemoryBackend(std::uint64_t nbytes) {
    // Not reserved: blocks that were never written cost nothing.
    void* const memory =
        mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw file_failure(errno, "cannot reserve " + describe_bytes(nbytes), "ram");
    madvise(memory, nbytes, MADV_HUGEPAGE);
    memory_ = static_cast<std::byte*>(memory);
    size_ = nbytes;
    std::random_device random;
    identity_ = std::uint64_t{random()} << 32 | random();
  }
  ~MemoryBackend() override { munmap(memory_, size_); }

  int read(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t) override {
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(segments[i].iov_base, memory_ + offset, segments[i].iov_len);
      offset += segments[i].iov_len;
    }
    return 0;
  }

  int write(const iovec* segments, std::size_t count, std::uint64_t offset, std::uint64_t, bool) override {
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(memory_ + offset, segments[i].iov_base, segments[i].iov_len);
      offset += segments[i].iov_len;
    }
    return 0;
  }

  int flush() override { return 0; }

  int zero(std::uint64_t offset, std::uint64_t nbytes, bool deallocate) override {
    const std::uint64_t first = (offset + kPage - 1) / kPage * kPage;
    const std::uint64_t last = (offset + nbytes) / kPage * kPage;
    if (!deallocate || last <= first) {
      std::memset(memory_ + offset, 0, nbytes);
      return 0;
    }
    std::memset(memory_ + offset, 0, first - offset);
    std::memset(memory_ + last, 0, offset + nbytes - last);
    // Pages of private memory come back as zeroes.
    if (madvise(memory_ + first, last - first, MADV_DONTNEED) != 0) std::memset(memory_ + first, 0, last - first);
    return 0;
  }

  void prefetch(std::uint64_t offset, std::uint64_t nbytes) const override {
    gpunvme::prefetch(memory_ + offset, nbytes);
  }

  std::uint64_t read_cached(const iovec* segments, std::size_t count, std::uint64_t offset,
                            std::uint64_t nbytes) override {
    read(segments, count, offset, nbytes);
    return nbytes;
  }
};

}  // namespace

std::unique_ptr<Backend> open_memory(const Options& options) {
  if (options.size % options.lba_bytes != 0) {
    throw std::invalid_argument("size=" + describe_bytes(options.size) + " is not a whole number of blocks of " +
                                std::to_string(options.lba_bytes) + " bytes");
  }
  if (options.size / options.lba_bytes < options.namespaces) {
    throw std::invalid_argument("size=" + describe_bytes(options.size) + " is less than one block for each of " +
                                std::to_string(options.namespaces) + " namespaces");
  }
  return std::make_unique<MemoryBackend>(options.size);
}

std::unique_ptr<Backend> Backend::open(const Options& options) {
  return options.path ? open_image(options) : open_memory(options);
}

}  // namespace gpunvme::soft
