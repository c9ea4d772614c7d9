#include <algorithm>
#include <chrono>
#include <thread>

#include "worker.h"

namespace gpunvme {
namespace {

// What the driver writes down for one batch stays small.
constexpr std::size_t kMostBatched = 1024;

}  // namespace

// This worker's stream on the job's GPU, ordered behind what was queued on the caller's stream.
Worker::Lane& Worker::lane(const Operation& operation) {
  const int device = operation.job->options().device;
  cuda_make_current(device);
  Lane& lane = lanes_[device];
  if (lane.stream == nullptr) cuda_check(cuda().StreamCreate(&lane.stream, kStreamNonBlocking), "cuStreamCreate");
  const CUevent event = operation.piece.event();
  const auto key = std::make_pair(operation.job->id(), event);
  if (event != nullptr && !lane.ordered.contains(key)) {
    cuda_check(cuda().StreamWaitEvent(lane.stream, event, 0), "cuStreamWaitEvent");
    if (lane.ordered.size() > 64) lane.ordered.clear();  // waiting once more for an old one costs nothing
    lane.ordered.insert(key);
  }
  return lane;
}

void Worker::copy_to_device(Operation& operation) {
  const Piece& piece = operation.piece;
  Lane& to = lane(operation);
  operation.copying = true;
  if (piece.gather != nullptr) {
    const std::uint64_t nbytes = (piece.end - piece.begin) * piece.gather->nbytes;
    const CUdeviceptr address = piece.gather->address + piece.begin * piece.gather->nbytes;
    cuda_check(cuda().MemcpyHtoDAsync(address, operation.slot, nbytes, to.stream), "cuMemcpyHtoDAsync");
    return begin_copying(operation, to);
  }
  copy_segments(operation, to, true);
  begin_copying(operation, to);
}

void Worker::copy_from_device(Operation& operation) {
  Lane& from = lane(operation);
  operation.copying = true;
  copy_segments(operation, from, false);
  begin_copying(operation, from);
}

// Queues the copies between a piece's slot and its segments. One a segment, even where neighbours adjoin: they may be
// different allocations, which no copy may span. Several are handed over at once where the driver can: the GPU then
// pauses once a batch, and not for some 3 us after each copy.
void Worker::copy_segments(Operation& operation, Lane& lane, bool to_device) {
  const Piece& piece = operation.piece;
  std::vector<CUdeviceptr> device;
  std::vector<CUdeviceptr> host;
  std::vector<std::size_t> nbytes;
  const auto [first, last] = piece.extent->overlap(piece.begin, piece.end);
  for (const Segment* segment = first; segment != last; ++segment) {
    const std::uint64_t begin = std::max(piece.begin, segment->offset);
    const std::uint64_t end = std::min(piece.end, segment->offset + segment->nbytes);
    device.push_back(segment->address + (begin - segment->offset));
    host.push_back(reinterpret_cast<CUdeviceptr>(operation.slot + (begin - operation.slot_begin)));
    nbytes.push_back(end - begin);
  }
  std::size_t done = 0;
  lane.batches = lane.batches && cuda().MemcpyBatchAsync != nullptr && slots(*operation.job).page_locked();
  while (lane.batches && device.size() - done > 1) {
    const std::size_t count = std::min(device.size() - done, kMostBatched);
    auto* const to = (to_device ? device : host).data() + done;
    auto* const from = (to_device ? host : device).data() + done;
    CopyAttributes attributes;
    std::size_t first_of_attributes = 0;
    std::size_t failed = 0;
    const CUresult error = cuda().MemcpyBatchAsync(to, from, nbytes.data() + done, count, &attributes,
                                                   &first_of_attributes, 1, &failed, lane.stream);
    lane.batches = error != kCudaNotSupported;
    if (!lane.batches) break;
    cuda_check(error, "cuMemcpyBatchAsync");
    done += count;
  }
  for (; done < device.size(); ++done) {
    auto* const memory = reinterpret_cast<void*>(host[done]);
    if (to_device) {
      cuda_check(cuda().MemcpyHtoDAsync(device[done], memory, nbytes[done], lane.stream), "cuMemcpyHtoDAsync");
    } else {
      cuda_check(cuda().MemcpyDtoHAsync(memory, device[done], nbytes[done], lane.stream), "cuMemcpyDtoHAsync");
    }
  }
}

void Worker::begin_copying(Operation& operation, Lane& lane) {
  if (lane.spare_events.empty()) {
    CUevent event = nullptr;
    cuda_check(cuda().EventCreate(&event, kEventDisableTiming), "cuEventCreate");
    lane.spare_events.push_back(event);
  }
  cuda_check(cuda().EventRecord(lane.spare_events.back(), lane.stream), "cuEventRecord");
  operation.event = lane.spare_events.back();
  lane.spare_events.pop_back();
  lane.copying.push_back(&operation);
}

// Takes back the operations whose copies have passed.
bool Worker::take_back_copies() {
  bool progress = false;
  for (auto& [device, lane] : lanes_) {
    while (!lane.copying.empty()) {
      Operation& operation = *lane.copying.front();
      const CUresult state = cuda().EventQuery(operation.event);
      if (state == kCudaNotReady) break;
      lane.copying.pop_front();
      lane.spare_events.push_back(operation.event);
      operation.copying = state != kCudaSuccess;
      progress = true;
      try {
        cuda_check(state, "cuEventQuery after a copy");
        if (operation.piece.kind == Piece::Kind::kWrite) {
          write_out(operation, operation.slot + (operation.piece.begin - operation.slot_begin));
        } else {
          end(operation);
        }
      } catch (const Failure& failure) {
        fail(operation, failure);
      }
    }
  }
  return progress;
}

// Waits for the oldest copy of a GPU. In the driver only once the caller's stream, which the copy is queued behind, has
// come to it: that stream may be busy for long, and what runs there may be waiting for other jobs of ours.
bool Worker::wait_for_copy() {
  for (auto& [device, lane] : lanes_) {
    if (lane.copying.empty()) continue;
    const Operation& oldest = *lane.copying.front();
    const CUevent caller = oldest.piece.event();
    if (caller != nullptr && cuda().EventQuery(caller) == kCudaNotReady) continue;
    cuda().EventSynchronize(oldest.event);  // an error is seen again, and handled, by take_back_copies
    return take_back_copies();
  }
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  return take_back_copies();
}

}  // namespace gpunvme
