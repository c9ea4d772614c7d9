// Memory: device addresses that the host cannot touch with the bytes kept elsewhere, and page-locked host memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace gpunvme::fake_cuda {

namespace {

// How much freed device address space stays reserved, so that a stale address is not a new allocation's.
constexpr std::uint64_t kMostRetired = std::uint64_t{64} << 30;

std::size_t page() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

void* map(std::size_t nbytes, int protection) {
  void* const mapped = mmap(nullptr, nbytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return mapped == MAP_FAILED ? nullptr : mapped;
}

void retire(Range range) {
  State& s = state();
  s.retired.push_back(range);
  s.retired_nbytes += range.nbytes;
  while (s.retired_nbytes > kMostRetired) {
    munmap(reinterpret_cast<void*>(s.retired.front().begin), s.retired.front().nbytes);
    s.retired_nbytes -= s.retired.front().nbytes;
    s.retired.pop_front();
  }
}

// An engine that gives memory back while a copy may still touch it has corrupted someone's data on a real device.
void require_idle(const char* call, std::uintptr_t begin, std::size_t nbytes) {
  if (!in_flight(begin, nbytes)) return;
  std::fprintf(stderr, "fake libcuda: %s(%#zx): a copy or kernel that touches these %zu bytes has not finished\n", call,
               static_cast<std::size_t>(begin), nbytes);
  std::abort();
}

bool is_mapped(std::uintptr_t begin, std::size_t nbytes) {
  const std::uintptr_t first = begin / page() * page();
  const std::size_t length = begin + nbytes - first;
  std::vector<unsigned char> resident((length + page() - 1) / page());
  return mincore(reinterpret_cast<void*>(first), length, resident.data()) == 0;
}

// The first range of `ranges` that ends after `begin`.
template <typename Map>
auto first_ending_after(const Map& ranges, std::uintptr_t begin) {
  auto found = ranges.upper_bound(begin);
  if (found != ranges.begin()) {
    const auto before = std::prev(found);
    if (before->first + before->second.nbytes > begin) return before;
  }
  return found;
}

const std::pair<const std::uintptr_t, HostRange>* overlapping_host_range(std::uintptr_t begin, std::size_t nbytes) {
  const auto found = first_ending_after(state().host_ranges, begin);
  if (found == state().host_ranges.end() || found->first >= begin + nbytes) return nullptr;
  return &*found;
}

bool can_lock(std::size_t nbytes) {
  const State& s = state();
  return nbytes <= s.page_lock_limit && s.page_locked <= s.page_lock_limit - nbytes;
}

void add_host_range(std::uintptr_t begin, std::size_t nbytes, int device, bool portable, bool allocated) {
  state().host_ranges.emplace(
      begin, HostRange{.nbytes = nbytes, .device = device, .portable = portable, .allocated = allocated});
  state().page_locked += nbytes;
}

void remove_host_range(std::map<std::uintptr_t, HostRange>::iterator found, const char* call) {
  require_idle(call, found->first, found->second.nbytes);
  state().page_locked -= found->second.nbytes;
  state().host_ranges.erase(found);
}

}  // namespace

HostKind host_kind(std::uintptr_t begin, std::size_t nbytes, int device) {
  if (begin == 0) return HostKind::kInvalid;
  const auto allocation = first_ending_after(state().allocations, begin);
  if (allocation != state().allocations.end() && allocation->first < begin + nbytes) return HostKind::kInvalid;
  const auto* const range = overlapping_host_range(begin, nbytes);
  if (range == nullptr) return HostKind::kPageable;
  const auto& [base, host] = *range;
  if (begin < base || begin + nbytes > base + host.nbytes) return HostKind::kInvalid;
  return host.portable || host.device == device ? HostKind::kPageLocked : HostKind::kPageable;
}

const std::pair<const std::uintptr_t, Allocation>* find_allocation(std::uintptr_t begin, std::size_t nbytes) {
  const auto found = first_ending_after(state().allocations, begin);
  if (found == state().allocations.end() || found->first > begin) return nullptr;
  if (nbytes > found->second.nbytes - (begin - found->first)) return nullptr;
  return &*found;
}

std::byte* shadow_of(std::uintptr_t begin, std::size_t nbytes, int device) {
  const auto* const found = find_allocation(begin, nbytes);
  if (found == nullptr || (device >= 0 && found->second.device != device)) return nullptr;
  return found->second.shadow + (begin - found->first);
}

CUresult allocate(int device, std::size_t nbytes, std::uint64_t* pointer) {
  if (pointer == nullptr || nbytes == 0) return kInvalidValue;
  Device& owner = state().devices[device];
  if (nbytes > owner.limit || owner.used > owner.limit - nbytes) return kOutOfMemory;
  // One page more than needed: two allocations never touch, so running over the end meets no other one.
  const std::size_t mapped = (nbytes + page() - 1) / page() * page() + page();
  const bool reachable = state().runs_kernels;
  void* const address = map(mapped, reachable ? PROT_READ | PROT_WRITE : PROT_NONE);
  void* const shadow = reachable ? address : map(mapped, PROT_READ | PROT_WRITE);
  if (reachable && address != nullptr) {
    // The page behind the end, which a kernel must not touch either.
    mprotect(static_cast<std::byte*>(address) + mapped - page(), page(), PROT_NONE);
  }
  if (address == nullptr || shadow == nullptr) {
    if (address != nullptr) munmap(address, mapped);
    if (shadow != nullptr && shadow != address) munmap(shadow, mapped);
    return kOutOfMemory;
  }
  if (nbytes <= kMostFilled) std::memset(shadow, kFreshByte, nbytes);
  const auto base = reinterpret_cast<std::uintptr_t>(address);
  state().allocations.emplace(base, Allocation{.nbytes = nbytes,
                                               .mapped = mapped,
                                               .device = device,
                                               .id = state().next_buffer_id++,
                                               .shadow = static_cast<std::byte*>(shadow)});
  owner.used += nbytes;
  *pointer = base;
  return kCudaSuccess;
}

CUresult release_allocation(std::uintptr_t pointer) {
  State& s = state();
  const auto found = s.allocations.find(pointer);
  if (found == s.allocations.end()) return kInvalidValue;
  const Allocation allocation = found->second;
  require_idle("cuMemFree", pointer, allocation.nbytes);
  s.allocations.erase(found);
  s.devices[allocation.device].used -= allocation.nbytes;
  void* const address = reinterpret_cast<void*>(pointer);
  if (allocation.shadow == address) {
    // Nothing is there any more, for kernels either.
    mmap(address, allocation.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  } else {
    munmap(allocation.shadow, allocation.mapped);
  }
  retire({.begin = pointer, .nbytes = allocation.mapped});
  return s.devices[allocation.device].error;
}

}  // namespace gpunvme::fake_cuda

namespace gpunvme {

using namespace fake_cuda;

extern "C" {

CUresult cuMemAlloc_v2(CUdeviceptr* pointer, std::size_t nbytes) {
  DriverCall call("cuMemAlloc_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  if (call.sticky()) return call.sticky();
  return allocate(call.device(), nbytes, pointer);
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
  DriverCall call("cuMemFree_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  if (pointer == 0) return call.sticky();
  const auto found = state().allocations.find(pointer);
  if (found != state().allocations.end() && found->second.device != call.device()) return kInvalidContext;
  return release_allocation(pointer);
}

CUresult cuMemHostAlloc(void** pointer, std::size_t nbytes, unsigned flags) {
  DriverCall call("cuMemHostAlloc", DriverCall::kContext);
  if (call.error()) return call.error();
  if (pointer == nullptr || nbytes == 0 || flags > 7) return kInvalidValue;
  if (call.sticky()) return call.sticky();
  if (!can_lock(nbytes)) return kOutOfMemory;
  // From the heap, so that ASan knows its bounds.
  void* memory = nullptr;
  if (posix_memalign(&memory, page(), nbytes) != 0) return kOutOfMemory;
  if (nbytes <= kMostFilled) std::memset(memory, kFreshByte, nbytes);
  // Always portable: so it is with unified addressing.
  add_host_range(reinterpret_cast<std::uintptr_t>(memory), nbytes, call.device(), true, true);
  *pointer = memory;
  return kCudaSuccess;
}

CUresult cuMemFreeHost(void* pointer) {
  DriverCall call("cuMemFreeHost", DriverCall::kContext);
  if (call.error()) return call.error();
  if (pointer == nullptr) return call.sticky();
  const auto found = state().host_ranges.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == state().host_ranges.end() || !found->second.allocated) return kInvalidValue;
  if (found->second.device != call.device()) return kInvalidContext;
  remove_host_range(found, "cuMemFreeHost");
  {
    Shown shown;  // TSan checks that nobody still uses it
    std::free(pointer);
  }
  return call.sticky();
}

CUresult cuMemHostRegister_v2(void* pointer, std::size_t nbytes, unsigned flags) {
  DriverCall call("cuMemHostRegister_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
  if (pointer == nullptr || nbytes == 0 || flags > 15 || begin + nbytes < begin) return kInvalidValue;
  if (call.sticky()) return call.sticky();
  if (const auto* const other = overlapping_host_range(begin, nbytes)) {
    return other->second.allocated ? kInvalidValue : kAlreadyRegistered;
  }
  if (host_kind(begin, nbytes, call.device()) == HostKind::kInvalid || !is_mapped(begin, nbytes)) return kInvalidValue;
  if (!can_lock(nbytes)) return kOutOfMemory;
  add_host_range(begin, nbytes, call.device(), (flags & kHostRegisterPortable) != 0, false);
  return kCudaSuccess;
}

CUresult cuMemHostUnregister(void* pointer) {
  DriverCall call("cuMemHostUnregister", DriverCall::kContext);
  if (call.error()) return call.error();
  const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
  const auto found = state().host_ranges.find(begin);
  if (found == state().host_ranges.end()) {
    return begin == 0 || overlapping_host_range(begin, 1) != nullptr ? kInvalidValue : kNotRegistered;
  }
  if (found->second.allocated) return kInvalidValue;
  if (found->second.device != call.device()) return kInvalidContext;
  remove_host_range(found, "cuMemHostUnregister");
  return call.sticky();
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned flags) {
  DriverCall call("cuMemHostGetDevicePointer_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  if (device == nullptr || flags != 0) return kInvalidValue;
  const auto address = reinterpret_cast<std::uintptr_t>(host);
  const auto* const range = overlapping_host_range(address, 1);
  if (range == nullptr || (!range->second.portable && range->second.device != call.device())) return kInvalidValue;
  *device = address;  // unified addressing
  return call.sticky();
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* nbytes, CUdeviceptr pointer) {
  DriverCall call("cuMemGetAddressRange_v2", DriverCall::kContext);
  if (call.error()) return call.error();
  Range range{};
  if (const auto* const found = find_allocation(pointer, 1)) {
    range = {.begin = found->first, .nbytes = found->second.nbytes};
  } else if (const auto* const host = overlapping_host_range(pointer, 1)) {
    range = {.begin = host->first, .nbytes = host->second.nbytes};
  } else {
    return kNotFound;
  }
  if (base != nullptr) *base = range.begin;
  if (nbytes != nullptr) *nbytes = range.nbytes;
  return kCudaSuccess;
}

CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
  DriverCall call("cuPointerGetAttribute", DriverCall::kInit);
  if (call.error()) return call.error();
  if (data == nullptr) return kInvalidValue;
  if (attribute == kPointerBufferId || attribute == kPointerLegacyIpc) {
    const auto* const found = find_allocation(pointer, 1);
    if (found == nullptr) return kInvalidValue;
    if (attribute == kPointerBufferId) {
      *static_cast<std::uint64_t*>(data) = found->second.id;
    } else {
      *static_cast<int*>(data) = 1;  // all of it is cuMemAlloc's
    }
    return kCudaSuccess;
  }
  if (attribute != kPointerMemoryType && attribute != kPointerDeviceOrdinal) return kNotSupported;
  unsigned type = kMemoryTypeDevice;
  int device = 0;
  if (const auto* const found = find_allocation(pointer, 1)) {
    device = found->second.device;
  } else if (const auto* const range = overlapping_host_range(pointer, 1)) {
    type = kMemoryTypeHost;
    device = range->second.device;
  } else {
    return kInvalidValue;  // pageable memory is unknown to the driver
  }
  if (attribute == kPointerMemoryType) {
    *static_cast<unsigned*>(data) = type;
  } else {
    *static_cast<int*>(data) = device;
  }
  return kCudaSuccess;
}

}  // extern "C"

}  // namespace gpunvme
