// What the fake knows, behind one mutex.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "fake_cufile.h"

#pragma GCC visibility push(hidden)
namespace gpunvme::fake_cufile {

// The driver functions that the fake needs; see ../fake_cuda.
struct Cuda {
  int (*context)(void**);
  int (*attribute)(void*, int, std::uint64_t);
  int (*range)(std::uint64_t*, std::size_t*, std::uint64_t);
  int (*uuid)(unsigned char*, int);
  int (*count)(int*);
  int (*peek)(void*, std::uint64_t, std::size_t);
  int (*poke)(std::uint64_t, const void*, std::size_t);
  int (*launch_host)(int, void*, void (*)(void*), void*);
};

const Cuda& cuda();

struct Handle {
  int fd;  // of our own, without O_DIRECT
};

struct Buffer {
  std::size_t nbytes;
  std::uint64_t buffer_id;
  void* context;  // that it was registered in
  int busy = 0;
};

struct Batch {
  unsigned most;
  std::deque<IoEvent> done;
  bool canceled = false;
};

struct Failure {
  std::uint64_t remaining;
  long long code;
};

struct State {
  std::mutex mutex;
  bool open = false;
  int stats_level = 0;
  std::map<std::string, long long> settings;
  std::map<std::string, std::vector<Failure>> failures;
  std::map<std::string, std::uint64_t> calls;
  std::map<std::string, std::uint64_t> counters;
  std::set<Handle*> handles;
  std::set<Batch*> batches;
  std::set<void*> streams;
  std::map<std::uint64_t, Buffer> buffers;
  std::map<int, GpuStats> gpus;

  State();
  long long setting(const char* name) const;
  // Whether compatibility mode is all that there is.
  bool in_compat() const { return setting("mode") == 0 && setting("props") == 0; }
  // Counts a call; the code that it was told to fail with, or 0.
  long long called(const char* function);
};

State& state();

// One read or write: bytes moved, -1 with errno, or a negative code.
ssize_t move(Handle* handle, std::uint64_t base, std::size_t size, off_t file_offset, off_t base_offset, bool write,
             const char* function);

inline Error error(long long code) { return {static_cast<int>(code), 0}; }

}  // namespace gpunvme::fake_cufile
#pragma GCC visibility pop
