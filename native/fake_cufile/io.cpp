// Handles, buffers, and I/O in its three forms: synchronous, in batches, in a stream's order.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <string>

#include "state.h"

namespace gpunvme::fake_cufile {

namespace {

constexpr int kDeviceOrdinal = 9;
constexpr int kBufferId = 7;
constexpr std::uint64_t kPage = 4096;

int device_of(std::uint64_t pointer) {
  int device = -1;
  return cuda().attribute(&device, kDeviceOrdinal, pointer) == 0 ? device : -1;
}

std::uint64_t buffer_id_of(std::uint64_t pointer) {
  std::uint64_t id = 0;
  return cuda().attribute(&id, kBufferId, pointer) == 0 ? id : 0;
}

void* current_context() {
  void* context = nullptr;
  return cuda().context(&context) == 0 ? context : nullptr;
}

bool have_context() { return current_context() != nullptr; }

void count(State& s, int device, std::size_t nbytes, bool write, bool aligned) {
  if (s.setting("count") == 0 || device < 0) return;
  GpuStats& stats = s.gpus[device];
  const std::uint64_t number = write ? ++stats.writes : ++stats.reads;
  (write ? stats.write_bytes : stats.read_bytes) += nbytes;
  long long mode = s.setting("mode");
  if (mode == 3) mode = static_cast<long long>(number % 2);
  std::uint64_t& by = mode == 0   ? (write ? stats.posix_writes : stats.posix_reads)
                      : mode == 1 ? (write ? stats.nvfs_writes : stats.nvfs_reads)
                                  : (write ? stats.p2p_writes : stats.p2p_reads);
  ++by;
  if (!aligned) {
    ++(write ? stats.unaligned_writes : stats.unaligned_reads);
    ++s.counters["unaligned_io"];
  }
}

// Whether a request is within the memory that its base stands for: a registration, or as many bytes as are asked for.
bool within(State& s, std::uint64_t base, std::size_t size, off_t base_offset) {
  const auto found = s.buffers.find(base);
  const std::size_t length = found == s.buffers.end() ? size : found->second.nbytes;
  return base_offset >= 0 && static_cast<std::uint64_t>(base_offset) + size <= length;
}

bool known_to_udev(int fd) {
  struct stat status = {};
  const char* const folder = std::getenv("GPUNVME_FAKE_UDEV");
  if (folder == nullptr || fstat(fd, &status) != 0) return false;
  std::ifstream entry(std::string(folder) + "/b" + std::to_string(major(status.st_dev)) + ":" +
                      std::to_string(minor(status.st_dev)));
  for (std::string line; std::getline(entry, line);) {
    if (line.rfind("E:ID_FS_USAGE=", 0) == 0) return true;
  }
  return false;
}

// The registration that a pointer lies in.
std::map<std::uint64_t, Buffer>::iterator registration_of(State& s, std::uint64_t pointer) {
  auto found = s.buffers.upper_bound(pointer);
  if (found == s.buffers.begin()) return s.buffers.end();
  --found;
  return pointer < found->first + found->second.nbytes ? found : s.buffers.end();
}

}  // namespace

ssize_t move(Handle* handle, std::uint64_t base, std::size_t size, off_t file_offset, off_t base_offset, bool write,
             const char* function) {
  State& s = state();
  const std::uint64_t pointer = base + static_cast<std::uint64_t>(base_offset);
  long long delay = 0;
  long long code = 0;
  std::uint64_t stale = 0;
  std::uint64_t registered = 0;
  {
    const std::lock_guard lock(s.mutex);
    code = s.called(function);
    if (!s.open) return -kDriverNotInitialized;
    if (s.handles.count(handle) == 0) return -kHandleNotRegistered;
    if (!within(s, base, size, base_offset)) return -kInvalidValue;
    if (const long long most = s.setting("short"); most > 0) size = std::min(size, static_cast<std::size_t>(most));
    delay = s.setting("delay_us");
    const auto found = registration_of(s, pointer);
    if (found != s.buffers.end()) {
      registered = found->first;
      ++found->second.busy;
      ++s.counters["registered_io"];
      if (found->second.buffer_id != buffer_id_of(pointer)) {
        stale = 1;
        ++s.counters["stale_io"];
      }
    }
  }
  const auto leave = [&](ssize_t result) {
    const int kept = errno;
    const std::lock_guard lock(s.mutex);
    if (registered != 0) {
      const auto found = s.buffers.find(registered);
      if (found != s.buffers.end()) --found->second.busy;
    }
    errno = kept;
    return result;
  };
  if (delay > 0) usleep(static_cast<useconds_t>(delay));
  if (code == -1) errno = static_cast<int>(s.setting("errno"));
  if (code < 0) return leave(code);
  std::uint64_t start = 0;
  std::size_t nbytes = 0;
  if (device_of(pointer) < 0) return leave(-kPointerInvalid);
  // On a stream's thread there is no context to ask in; peek and poke check the range as well.
  if (have_context() && cuda().range(&start, &nbytes, pointer) != 0) return leave(-kPointerInvalid);
  if (nbytes != 0 && pointer + size > start + nbytes) return leave(-kPointerRange);
  std::vector<char> bytes(size);
  ssize_t moved = 0;
  if (write) {
    cuda().peek(bytes.data(), pointer, size);
    moved = pwrite(handle->fd, bytes.data(), size, file_offset);
  } else {
    moved = pread(handle->fd, bytes.data(), size, file_offset);
    if (moved > 0 && stale == 0) cuda().poke(pointer, bytes.data(), static_cast<std::size_t>(moved));
  }
  if (moved < 0) return leave(-1);
  {
    const std::lock_guard lock(s.mutex);
    const bool aligned = (static_cast<std::uint64_t>(file_offset) | size) % kPage == 0;
    count(s, device_of(pointer), static_cast<std::size_t>(moved), write, aligned);
    moved += s.setting("too_much");
  }
  return leave(moved);
}

extern "C" {

FAKE_CUFILE_API Error cuFileHandleRegister(Handle** handle, const Descriptor* descriptor) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("HandleRegister")) return error(code);
  if (!s.open) return error(kDriverNotInitialized);
  if (descriptor->type != 1) return error(kInvalidValue);
  if (s.setting("udev") != 0 && !known_to_udev(descriptor->handle.fd)) return error(kHandleNotRegistered);
  char name[64];
  std::snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor->handle.fd);
  const int flags = fcntl(descriptor->handle.fd, F_GETFL);
  const int fd = open(name, (flags & O_ACCMODE) | O_CLOEXEC);
  if (fd < 0) return error(kInvalidValue);
  *handle = new Handle{fd};
  s.handles.insert(*handle);
  return error(kSuccess);
}

FAKE_CUFILE_API void cuFileHandleDeregister(Handle* handle) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.called("HandleDeregister");
  if (s.handles.erase(handle) == 0) return;
  close(handle->fd);
  delete handle;
}

FAKE_CUFILE_API Error cuFileBufRegister(const void* base, std::size_t nbytes, int) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("BufRegister")) return error(code);
  if (!have_context()) return error(kInvalidContext);
  const auto pointer = reinterpret_cast<std::uint64_t>(base);
  if (s.buffers.count(pointer) != 0) return error(kAlreadyRegistered);
  const std::uint64_t id = buffer_id_of(pointer);
  if (id == 0) return error(kPointerInvalid);
  s.buffers[pointer] = {nbytes, id, current_context()};
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileBufDeregister(const void* base) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("BufDeregister")) return error(code);
  const auto found = s.buffers.find(reinterpret_cast<std::uint64_t>(base));
  if (found == s.buffers.end()) return error(kNotRegistered);
  if (found->second.context != current_context()) return error(kInvalidContext);
  if (found->second.busy != 0) ++s.counters["busy_deregistrations"];
  s.buffers.erase(found);
  return error(kSuccess);
}

FAKE_CUFILE_API ssize_t cuFileRead(Handle* handle, void* base, std::size_t size, off_t file_offset, off_t base_offset) {
  if (!have_context()) return -kInvalidContext;
  return move(handle, reinterpret_cast<std::uint64_t>(base), size, file_offset, base_offset, false, "Read");
}

FAKE_CUFILE_API ssize_t cuFileWrite(Handle* handle, const void* base, std::size_t size, off_t file_offset,
                                    off_t base_offset) {
  if (!have_context()) return -kInvalidContext;
  return move(handle, reinterpret_cast<std::uint64_t>(base), size, file_offset, base_offset, true, "Write");
}

#ifndef FAKE_CUFILE_OLD

FAKE_CUFILE_API Error cuFileBatchIOSetUp(Batch** batch, unsigned most) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("BatchIOSetUp")) return error(code);
  if (!have_context()) return error(kInvalidContext);
  *batch = new Batch{most, {}, false};
  s.batches.insert(*batch);
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileBatchIOSubmit(Batch* batch, unsigned count, const IoParams* entries, unsigned) {
  State& s = state();
  {
    const std::lock_guard lock(s.mutex);
    if (const long long code = s.called("BatchIOSubmit")) return error(code);
    if (s.in_compat()) ++s.counters["batches_in_compat"];
    if (s.batches.count(batch) == 0 || count > batch->most) return error(kInvalidValue);
  }
  for (unsigned i = 0; i < count; ++i) {
    const IoParams& entry = entries[i];
    const ssize_t moved =
        move(static_cast<Handle*>(entry.handle), reinterpret_cast<std::uint64_t>(entry.batch.base), entry.batch.size,
             entry.batch.file_offset, entry.batch.base_offset, entry.opcode == kWrite, "entry");
    const std::lock_guard lock(s.mutex);
    batch->done.push_back({entry.cookie, moved < 0 ? kFailed : kComplete, static_cast<std::size_t>(moved)});
  }
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileBatchIOGetStatus(Batch* batch, unsigned, unsigned* count, IoEvent* events,
                                             const timespec* timeout) {
  State& s = state();
  {
    const std::lock_guard lock(s.mutex);
    if (const long long code = s.called("BatchIOGetStatus")) return error(code);
    if (s.setting("batch_hang") == 0 || batch->canceled) {
      const auto most =
          std::min<std::size_t>({*count, batch->done.size(), static_cast<std::size_t>(s.setting("batch_at_once"))});
      for (std::size_t i = 0; i < most; ++i) {
        events[i] = batch->done.front();
        batch->done.pop_front();
      }
      *count = static_cast<unsigned>(most);
      return error(kSuccess);
    }
  }
  *count = 0;
  if (timeout != nullptr) nanosleep(timeout, nullptr);
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileBatchIOCancel(Batch* batch) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("BatchIOCancel")) return error(code);
  batch->canceled = true;
  for (IoEvent& event : batch->done) event.status = kCanceled;
  return error(kSuccess);
}

FAKE_CUFILE_API void cuFileBatchIODestroy(Batch* batch) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.called("BatchIODestroy");
  if (s.batches.erase(batch) != 0) delete batch;
}

FAKE_CUFILE_API Error cuFileStreamRegister(void* stream, unsigned) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("StreamRegister")) return error(code);
  s.streams.insert(stream);
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileStreamDeregister(void* stream) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("StreamDeregister")) return error(code);
  return error(s.streams.erase(stream) == 0 ? kInvalidValue : kSuccess);
}

namespace {

struct Later {
  Handle* handle;
  std::uint64_t base;
  std::size_t* size;
  off_t* file_offset;
  off_t* base_offset;
  ssize_t* moved;
  bool write;
};

void run(void* argument) {
  const std::unique_ptr<Later> later(static_cast<Later*>(argument));
  // As the manual has it, what the pointers lead to is read when the stream comes to it.
  *later->moved = move(later->handle, later->base, *later->size, *later->file_offset, *later->base_offset, later->write,
                       later->write ? "WriteAsync" : "ReadAsync");
}

Error enqueue(Later later, void* stream) {
  State& s = state();
  {
    const std::lock_guard lock(s.mutex);
    if (const long long code = s.called(later.write ? "submit WriteAsync" : "submit ReadAsync")) return error(code);
    if (s.in_compat()) ++s.counters["streams_in_compat"];
  }
  if (!have_context()) return error(kInvalidContext);
  const int device = device_of(later.base);
  if (device < 0) return error(kPointerInvalid);
  return {cuda().launch_host(device, stream, run, new Later(later)) == 0 ? kSuccess : kInvalidValue, 0};
}

}  // namespace

FAKE_CUFILE_API Error cuFileReadAsync(Handle* handle, void* base, std::size_t* size, off_t* file_offset,
                                      off_t* base_offset, ssize_t* moved, void* stream) {
  return enqueue({handle, reinterpret_cast<std::uint64_t>(base), size, file_offset, base_offset, moved, false}, stream);
}

FAKE_CUFILE_API Error cuFileWriteAsync(Handle* handle, void* base, std::size_t* size, off_t* file_offset,
                                       off_t* base_offset, ssize_t* moved, void* stream) {
  return enqueue({handle, reinterpret_cast<std::uint64_t>(base), size, file_offset, base_offset, moved, true}, stream);
}

#endif

}  // extern "C"

}  // namespace gpunvme::fake_cufile
