// Page caches: made by the GPU, and what the host asks of them: elements by index, and lines that stay.
#include "gpunvme/page_cache.h"

namespace gpunvme {

// A cache as the host describes it; 64 bits each. Addresses are the GPU's.
struct CacheSetup {
  std::uint64_t queues, words, controls, failures, lines, counters, error;
  std::uint64_t sets, line_shift, nbytes, lba, blocks, queue_count, line_blocks;
};

// Elements that are gathered. Those that are not in memory are listed, for as few warps as there are slots for.
struct CacheGather {
  const PageCache* cache;
  const std::int64_t* indices;
  unsigned char* out;
  std::uint64_t count;
  std::uint64_t element_bytes;
  std::uint32_t* missed;             // their positions among the indices
  unsigned long long* missed_count;  // zeroed before
  std::uint64_t width;               // lanes of a warp that have wishes; all copy
  std::uint64_t batch;               // as for serve
};

// Lines from `first` on, and for each whether it is pinned.
struct CachePins {
  const PageCache* cache;
  unsigned char* pinned;
  std::uint64_t first;
  std::uint64_t count;
};

template <typename T>
__device__ void gather_found(const CacheGather& job) {
  const CachedArray<T> array(job.cache);
  auto* const out = reinterpret_cast<T*>(job.out);
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  const std::uint64_t first = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (std::uint64_t at = first; at < job.count; at += stride) {
    T value{};
    const bool found = array.find(static_cast<std::uint64_t>(job.indices[at]), value);
    if (found) {
      out[at] = value;
    } else {
      const Lanes lanes = Lanes::here();
      unsigned long long where = 0;
      if (lanes.leads()) where = atomicAdd(job.missed_count, static_cast<unsigned long long>(lanes.count()));
      job.missed[lanes.leaders(where) + lanes.rank()] = static_cast<std::uint32_t>(at);
    }
  }
}

__device__ void gather_missed(const CacheGather& job) {
  const PageCache& cache = *job.cache;
  const auto nbytes = static_cast<std::uint32_t>(job.element_bytes);
  const std::uint32_t shift = cache.frames.line_shift();
  const std::uint64_t size = cache.nbytes / nbytes;
  const std::uint64_t count = *job.missed_count;
  const std::uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const std::uint32_t lane = threadIdx.x % 32;
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x / 32 * job.width;
  std::uint64_t at = lane < job.width ? warp * job.width + lane : count;
  std::uint64_t position = 0;
  std::uint64_t index = 0;
  std::uint64_t misses = 0;
  const auto next = [&](std::uint64_t& line) {
    for (; at < count; at += stride) {
      position = job.missed[at];
      index = static_cast<std::uint64_t>(job.indices[position]);
      if (index >= size) {
        cache.record(index, nbytes, Failure::word({Fate::kDone, kOutOfRange, 0}, 0));
        continue;
      }
      line = index * nbytes >> shift;
      at += stride;
      ++misses;
      return true;
    }
    return false;
  };
  const auto ready = [&](std::uint32_t frame, std::uint64_t failure) {
    if (failure == 0) {
      const std::uint64_t offset = index * nbytes & ((std::uint64_t{1} << shift) - 1);
      detail::copy_element(job.out + position * nbytes, cache.frames.data(frame) + offset, nbytes);
    } else {
      cache.record(index, nbytes, failure);
    }
    return false;
  };
  const Lanes lanes = Lanes::here();
  // By turns: there are as many warps as all queues together have slots for.
  detail::serve(lanes, cache, warp, static_cast<std::uint32_t>(job.batch), next, ready);
  const std::uint64_t total = lanes.sum(misses);
  if (lanes.leads() && total != 0) Near(cache.some_counters().misses).add_relaxed(total);
}

}  // namespace gpunvme

// What the host has to know of a cache's memory.
extern "C" __global__ void gpunvme_cache_layout(unsigned long long* out) {
  using namespace gpunvme;
  out[0] = sizeof(PageCache);
  out[1] = PageFrames::kWays;
  out[2] = PageFrames::kLineBits;
  out[3] = sizeof(PageFrames::Control);
  out[4] = sizeof(CacheCounters);
  out[5] = PageCache::kStripes;
  out[6] = sizeof(CacheError);
  out[7] = CacheError::kSet;
}

// Its words, controls, failures, counters and error are zeroed, and no kernel uses it.
extern "C" __global__ void gpunvme_cache_set_up(const gpunvme::CacheSetup* from, gpunvme::PageCache* cache) {
  cache->frames.initialise(from->sets, static_cast<std::uint32_t>(from->line_shift),
                           reinterpret_cast<void*>(from->words), reinterpret_cast<void*>(from->controls),
                           reinterpret_cast<void*>(from->failures), reinterpret_cast<void*>(from->lines));
  cache->queues = reinterpret_cast<const gpunvme::GpuQueue*>(from->queues);
  cache->counters = reinterpret_cast<gpunvme::CacheCounters*>(from->counters);
  cache->error = reinterpret_cast<gpunvme::CacheError*>(from->error);
  cache->nbytes = from->nbytes;
  cache->lba = from->lba;
  cache->blocks = from->blocks;
  cache->queue_count = static_cast<std::uint32_t>(from->queue_count);
  cache->line_blocks = static_cast<std::uint32_t>(from->line_blocks);
}

extern "C" __global__ void __launch_bounds__(128)
    gpunvme_cache_gather_found(const __grid_constant__ gpunvme::CacheGather job) {
  switch (job.element_bytes) {
    case 1:
      return gpunvme::gather_found<std::uint8_t>(job);
    case 2:
      return gpunvme::gather_found<std::uint16_t>(job);
    case 4:
      return gpunvme::gather_found<std::uint32_t>(job);
    case 8:
      return gpunvme::gather_found<std::uint64_t>(job);
    default:
      return gpunvme::gather_found<ulonglong2>(job);
  }
}

extern "C" __global__ void __launch_bounds__(128)
    gpunvme_cache_gather_missed(const __grid_constant__ gpunvme::CacheGather job) {
  gpunvme::gather_missed(job);
}

extern "C" __global__ void __launch_bounds__(128) gpunvme_cache_pin(const __grid_constant__ gpunvme::CachePins job) {
  const gpunvme::PageCache& cache = *job.cache;
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  std::uint64_t at = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  std::uint64_t now = 0;
  const auto next = [&](std::uint64_t& line) {
    if (at >= job.count) return false;
    now = at;
    line = job.first + at;
    at += stride;
    return true;
  };
  const auto ready = [&](std::uint32_t, std::uint64_t failure) {
    job.pinned[now] = failure == 0;
    if (failure != 0) cache.record((job.first + now) << cache.frames.line_shift(), 1, failure);
    return true;
  };
  const std::uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  gpunvme::detail::serve(gpunvme::Lanes::here(), cache, warp, gpunvme::kBatch, next, ready);
}

extern "C" __global__ void __launch_bounds__(128) gpunvme_cache_unpin(const __grid_constant__ gpunvme::CachePins job) {
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  const gpunvme::PageFrames& frames = job.cache->frames;
  for (std::uint64_t at = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < job.count; at += stride) {
    if (job.pinned[at] == 0) continue;
    const std::uint32_t frame = frames.pin_ready(job.first + at, 1);
    if (frame != gpunvme::PageFrames::kNoFrame) frames.unpin(frame, 2);  // this one, and the one of before
  }
}
