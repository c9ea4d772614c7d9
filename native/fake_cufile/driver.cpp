// Driver, parameters and statistics; and the settings that make the fake misbehave.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace gpunvme::fake_cufile {

namespace {

void* cuda_symbol(void* library, const char* name) {
  void* const found = library == nullptr ? nullptr : dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "libcufile_fake: GPUNVME_LIBCUDA names no libcuda_fake.so with %s\n", name);
    std::abort();
  }
  return found;
}

void defaults(State& s) {
  s.settings = {{"version", 1160}, {"count", 1}, {"stats", 1}, {"errno", 5}, {"batch_at_once", 1 << 20}};
}

void from_environment(State& s) {
  const char* const text = std::getenv("GPUNVME_FAKE_CUFILE");
  if (text == nullptr) return;
  std::string rest = text;
  while (!rest.empty()) {
    const std::size_t comma = rest.find(',');
    const std::string item = rest.substr(0, comma);
    const std::size_t equals = item.find('=');
    if (equals != std::string::npos) s.settings[item.substr(0, equals)] = std::atoll(item.c_str() + equals + 1);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
}

}  // namespace

const Cuda& cuda() {
  static const Cuda functions = [] {
    const char* const name = std::getenv("GPUNVME_LIBCUDA");
    void* const library = name == nullptr ? nullptr : dlopen(name, RTLD_NOW | RTLD_LOCAL);
    Cuda found{};
    const auto load = [library](auto& member, const char* symbol) {
      member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(cuda_symbol(library, symbol));
    };
    load(found.context, "cuCtxGetCurrent");
    load(found.attribute, "cuPointerGetAttribute");
    load(found.range, "cuMemGetAddressRange_v2");
    load(found.uuid, "cuDeviceGetUuid");
    load(found.count, "cuDeviceGetCount");
    load(found.peek, "fake_cuda_peek");
    load(found.poke, "fake_cuda_poke");
    load(found.launch_host, "fake_cuda_launch_host");
    return found;
  }();
  return functions;
}

State::State() {
  defaults(*this);
  from_environment(*this);
}

State& state() {
  static State* const the_state = new State;
  return *the_state;
}

long long State::setting(const char* name) const {
  const auto found = settings.find(name);
  return found == settings.end() ? 0 : found->second;
}

long long State::called(const char* function) {
  ++calls[function];
  long long code = 0;
  std::vector<Failure>& waiting = failures[function];
  for (Failure& failure : waiting) {
    if (--failure.remaining == 0) code = failure.code;
  }
  std::erase_if(waiting, [](const Failure& failure) { return failure.remaining == 0; });
  return code;
}

extern "C" {

FAKE_CUFILE_API void fake_cufile_reset() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  defaults(s);
  from_environment(s);
  s.failures.clear();
  s.calls.clear();
  s.counters.clear();
}

FAKE_CUFILE_API int fake_cufile_set(const char* name, long long value) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.settings[name] = value;
  return 0;
}

FAKE_CUFILE_API void fake_cufile_fail(const char* function, std::uint64_t k, long long code) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.failures[function].push_back({k, code});
}

FAKE_CUFILE_API std::uint64_t fake_cufile_calls(const char* function) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return s.calls[function];
}

FAKE_CUFILE_API std::uint64_t fake_cufile_counter(const char* name) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const std::string_view asked = name;
  if (asked == "open") return s.open;
  if (asked == "live_handles") return s.handles.size();
  if (asked == "live_buffers") return s.buffers.size();
  if (asked == "live_streams") return s.streams.size();
  if (asked == "live_batches") return s.batches.size();
  return s.counters[name];
}

FAKE_CUFILE_API Error cuFileDriverOpen() {
  State& s = state();
  long long hang = 0;
  {
    const std::lock_guard lock(s.mutex);
    if (const long long code = s.called("DriverOpen")) return error(code);
    hang = s.setting("open_hang_ms");
  }
  if (hang > 0) usleep(static_cast<useconds_t>(hang * 1000));
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.setting("open_error")) return error(code);
  if (s.open) return error(kDriverAlreadyOpen);
  s.open = true;
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileDriverClose_v2() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("DriverClose")) return error(code);
  if (!s.open) return error(kDriverNotInitialized);
  s.open = false;
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileDriverClose() { return cuFileDriverClose_v2(); }

FAKE_CUFILE_API long cuFileUseCount() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return s.open ? 1 : 0;
}

FAKE_CUFILE_API Error cuFileDriverGetProperties(Properties* properties) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("DriverGetProperties")) return error(code);
  *properties = {};
  const long long promised = s.setting("props");
  if (promised == 1) {
    properties->major_version = 2;
    properties->minor_version = 26;
    properties->dstatusflags = ~0U;
  }
  if (promised == 2) {
    properties->dstatusflags = 1U << 4;
    properties->fflags |= 1U << 4;
  }
  properties->dcontrolflags = 1U << 1;  // compatibility mode is allowed
  properties->fflags |= 1U << 1 | 1U << 2;
  properties->max_direct_io_size = 16384;
  properties->max_device_pinned_mem_size = 33554432;
  properties->max_batch_io_size = 128;
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileGetVersion(int* version) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("GetVersion")) return error(code);
  *version = static_cast<int>(s.setting("version"));
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileSetParameterString(int, const char*) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return error(s.called("SetParameterString"));
}

#ifndef FAKE_CUFILE_OLD

FAKE_CUFILE_API Error cuFileSetStatsLevel(int level) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("SetStatsLevel")) return error(code);
  if (s.setting("stats") == 0) return error(kInvalidValue);
  s.stats_level = level;
  return error(kSuccess);
}

FAKE_CUFILE_API Error cuFileStatsStart() {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (!s.open) return error(kDriverNotInitialized);
  return error(s.called("StatsStart"));
}

FAKE_CUFILE_API Error cuFileStatsStop() { return error(kSuccess); }
FAKE_CUFILE_API Error cuFileStatsReset() { return error(kSuccess); }

FAKE_CUFILE_API Error cuFileGetStatsL3(char* statistics) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (const long long code = s.called("GetStatsL3")) return error(code);
  if (s.stats_level < 3) return error(kInvalidValue);
  const long long kind = s.setting("stats");
  const std::size_t before = kind == 3 ? kStatsBeforeGpusBeforeReadv : kStatsBeforeGpus;
  std::memset(statistics, 0, before + kMostGpus * sizeof(GpuStats));
  int count = 0;
  cuda().count(&count);
  const auto gpus = static_cast<std::uint32_t>(count);
  std::memcpy(statistics + before - 8, &gpus, sizeof gpus);
  for (int device = 0; device < count && device < kMostGpus; ++device) {
    GpuStats stats = s.gpus[device];
    if (cuda().uuid(stats.uuid, device) != 0 || kind == 2) std::memset(stats.uuid, 0x77, sizeof stats.uuid);
    std::memcpy(statistics + before + static_cast<std::size_t>(device) * sizeof stats, &stats, sizeof stats);
  }
  return error(kSuccess);
}

#endif

}  // extern "C"

}  // namespace gpunvme::fake_cufile
