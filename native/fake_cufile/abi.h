// The C interface of libcufile as far as the fake offers it: names, values and layouts as its manual gives them.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#define FAKE_CUFILE_API extern "C" __attribute__((visibility("default")))

namespace gpunvme::fake_cufile {

struct Error {
  int err;
  int cu_err;
};

enum : int {
  kSuccess = 0,
  kDriverNotInitialized = 5001,
  kDriverClosing = 5006,
  kPointerInvalid = 5012,
  kPointerRange = 5014,
  kInvalidValue = 5022,
  kAlreadyRegistered = 5023,
  kNotRegistered = 5024,
  kDriverAlreadyOpen = 5026,
  kHandleNotRegistered = 5027,
  kInvalidContext = 5047,
};

enum : int { kRead = 0, kWrite = 1 };
enum : int { kPending = 2, kInvalid = 4, kCanceled = 8, kComplete = 16, kFailed = 64 };

struct Properties {
  unsigned major_version;
  unsigned minor_version;
  std::size_t poll_thresh_size;
  std::size_t max_direct_io_size;
  unsigned dstatusflags;
  unsigned dcontrolflags;
  unsigned fflags;
  unsigned max_device_cache_size;
  unsigned per_buffer_cache_size;
  unsigned max_device_pinned_mem_size;
  unsigned max_batch_io_size;
  unsigned max_batch_io_timeout_msecs;
};

struct Descriptor {
  int type;
  union {
    int fd;
    void* handle;
  } handle;
  const void* fs_ops;
};

struct IoParams {
  int mode;
  struct {
    char* base;
    off_t file_offset;
    off_t base_offset;
    std::size_t size;
  } batch;
  void* handle;
  int opcode;
  void* cookie;
};

struct IoEvent {
  void* cookie;
  int status;
  std::size_t ret;  // or a negative error, as unsigned as it is
};

struct GpuStats {
  unsigned char uuid[16];
  std::uint64_t read_bytes, read_rate, read_utilization, read_microseconds;
  std::uint64_t reads, p2p_reads, nvfs_reads, posix_reads, unaligned_reads, routed_reads;
  std::uint64_t sparse_regions, inline_regions, read_errors;
  std::uint64_t write_bytes, write_rate, write_utilization, write_microseconds;
  std::uint64_t writes, p2p_writes, nvfs_writes, posix_writes, unaligned_writes, routed_writes, write_errors;
  std::uint64_t mappings[4], registered_bytes;
};

// What stands before the GPUs in the third level of statistics; it grew when cuFileReadv came.
inline constexpr std::size_t kStatsBeforeGpus = 1144;
inline constexpr std::size_t kStatsBeforeGpusBeforeReadv = 1144 - 16 * 8;
inline constexpr int kMostGpus = 16;

}  // namespace gpunvme::fake_cufile
