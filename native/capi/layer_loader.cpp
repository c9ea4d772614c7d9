#include "layer_loader.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cuda_driver.h"
#include "memory_place.h"
#include "transfer.h"

namespace gpunvme::capi {
namespace {

std::string number(std::uint64_t n) { return std::to_string(n); }

}  // namespace

LayerLoader::LayerLoader(std::shared_ptr<const Source> source, const gpunvme_extent* extents, std::uint64_t count,
                         std::uint32_t slots, std::int32_t device)
    : source_(std::move(source)), device_(device) {
  if (slots == 0 || slots > kMostSlots) {
    throw Refusal(GPUNVME_EINVAL, number(slots) + " slots: use 1 to " + number(kMostSlots));
  }
  check_device(device);
  make_plans(extents, count);
  std::uint64_t largest = 0;
  for (const Plan& plan : plans_) largest = std::max(largest, plan.nbytes);
  try {
    if (device_ != kHost) {
      CudaContextScope scope(device_);
      cuda_check(cuda().StreamCreate(&behind_, kStreamNonBlocking), "cuStreamCreate");
    }
    slots_.reserve(slots);
    for (std::uint64_t i = 0; i < std::min<std::uint64_t>(slots, plans_.size()); ++i) {
      slots_.push_back({LayerMemory(device_, largest), std::nullopt, nullptr, false});
    }
    read_ahead(0);
  } catch (...) {
    free_all();
    throw;
  }
}

void LayerLoader::make_plans(const gpunvme_extent* extents, std::uint64_t count) {
  if (count == 0) throw Refusal(GPUNVME_EINVAL, "there are no extents");
  if (extents == nullptr) throw Refusal(GPUNVME_EINVAL, "extents is NULL");
  for (std::uint64_t i = 0; i < count; ++i) {
    const gpunvme_extent& extent = extents[i];
    const std::string which = "extent " + number(i);
    // Each layer has an extent, so that no number can be beyond their count.
    if (extent.layer >= count) {
      throw Refusal(GPUNVME_EINVAL, which + " is of layer " + number(extent.layer) + ", and some before it have none");
    }
    if (extent.offset > INT64_MAX) throw Refusal(GPUNVME_ERANGE, which + " begins beyond the end of any file");
    source_->checked_range(static_cast<std::int64_t>(extent.offset), extent.length);
    if (extent.position > INT64_MAX - extent.length) {
      throw Refusal(GPUNVME_EINVAL, which + ": no memory reaches to position " + number(extent.position));
    }
    if (extent.length == 0) throw Refusal(GPUNVME_EINVAL, which + " has no bytes");
    if (extent.layer >= plans_.size()) plans_.resize(extent.layer + 1);
    Plan& plan = plans_[extent.layer];
    plan.segments.push_back({0, extent.offset, extent.length, extent.position});
    plan.nbytes = std::max(plan.nbytes, extent.position + extent.length);
  }
  for (std::uint64_t layer = 0; layer < plans_.size(); ++layer) {
    auto& segments = plans_[layer].segments;
    if (segments.empty()) throw Refusal(GPUNVME_EINVAL, "layer " + number(layer) + " has no extent");
    std::sort(segments.begin(), segments.end(),
              [](const Segment& a, const Segment& b) { return a.address < b.address; });
    for (std::size_t i = 1; i < segments.size(); ++i) {
      if (segments[i - 1].address + segments[i - 1].nbytes > segments[i].address) {
        throw Refusal(GPUNVME_EINVAL,
                      "two extents of layer " + number(layer) + " go to position " + number(segments[i].address));
      }
    }
  }
}

LayerLoader::~LayerLoader() {
  if (process_ == getpid()) {
    free_all();
    return;
  }
  // A forked child: the memory of a GPU is the parent's, and host memory may go with the process.
  auto* const left_behind = new std::vector<Slot>(std::move(slots_));
  (void)left_behind;
}

void LayerLoader::free_all() {
  stop();
  slots_.clear();
  if (behind_ == nullptr) return;
  try {
    CudaContextScope scope(device_);
    cuda().StreamDestroy(behind_);
  } catch (const Failure&) {
    // The context is gone, and the stream with it.
  }
  behind_ = nullptr;
}

void LayerLoader::stop() {
  if (process_ != getpid()) return;
  std::lock_guard lock(mutex_);
  stopped_ = true;
  for (Slot& slot : slots_) {
    if (slot.job != nullptr) stop_job(*slot.job, FailureKind::kCancelled);
    slot.job = nullptr;
    slot.layer.reset();
  }
}

void LayerLoader::check_process() const {
  if (process_ == getpid()) return;
  throw Refusal(GPUNVME_EINVAL, "the layer loader is the parent process's: make one in this process");
}

LayerLoader::Layer LayerLoader::load(std::uint64_t layer, void* stream, const Deadline& deadline) {
  check_process();
  std::lock_guard lock(mutex_);
  if (stopped_) throw Refusal(GPUNVME_ECANCELED, "the layer loader was destroyed");
  if (layer >= plans_.size()) {
    throw Refusal(GPUNVME_ERANGE,
                  "there are layers 0 to " + number(plans_.size() - 1) + ", and no layer " + number(layer));
  }
  take_back();
  for (Slot& slot : slots_) settle(slot);
  Slot* slot = slot_of(layer);
  if (slot == nullptr) {
    slot = free_slot(layer, &deadline);
    if (slot == nullptr) throw Failure(FailureKind::kDeadline, "no slot was free by the deadline");
    begin(*slot, layer);
  }
  read_ahead(layer);  // before waiting: the drive has work when this layer is there
  while (slot->job != nullptr && !slot->job->done()) {
    if (deadline.passed()) {
      throw Failure(FailureKind::kDeadline, "layer " + number(layer) + " was not there by the deadline");
    }
    slot->job->wait_for(deadline.nap());
  }
  const auto failure = slot->job == nullptr ? std::nullopt : failure_of(*slot->job);
  settle(*slot);
  if (failure) throw *failure;
  if (!slot->checked) source_->check_current();
  slot->checked = true;
  read_ahead(layer);  // slots that were given up may be free by now
  if (device_ != kHost) given_to_ = stream;
  return {slot->memory.address(), plans_[layer].nbytes};
}

void LayerLoader::take_back() {
  if (!given_to_) return;
  CudaContextScope scope(device_);
  CUevent event = nullptr;
  cuda_check(cuda().EventCreate(&event, kEventDisableTiming), "cuEventCreate");
  CUresult result = cuda().EventRecord(event, static_cast<CUstream>(*given_to_));
  const char* call = "cuEventRecord";
  if (result == kCudaSuccess) {
    result = cuda().StreamWaitEvent(behind_, event, 0);
    call = "cuStreamWaitEvent";
  }
  cuda().EventDestroy(event);  // the driver keeps it until the stream has passed it
  // If it could not be ordered, the layer stays the caller's: nothing may ever be read in its place.
  cuda_check(result, call);
  given_to_.reset();
}

void LayerLoader::settle(Slot& slot) {
  if (slot.job == nullptr || !slot.job->done()) return;
  if (slot.job->failure()) slot.layer.reset();
  slot.job = nullptr;
}

bool LayerLoader::wanted_soon(std::uint64_t layer, std::uint64_t current) const {
  const std::uint64_t ahead = (layer + plans_.size() - current) % plans_.size();
  return ahead < slots_.size();
}

LayerLoader::Slot* LayerLoader::slot_of(std::uint64_t layer) {
  for (Slot& slot : slots_) {
    if (slot.layer == layer) return &slot;
  }
  return nullptr;
}

LayerLoader::Slot* LayerLoader::free_slot(std::uint64_t current, const Deadline* wait) {
  for (Slot& slot : slots_) {
    if (!slot.layer && slot.job == nullptr) return &slot;
  }
  Slot* busy = nullptr;
  for (Slot& slot : slots_) {
    if (slot.layer && wanted_soon(*slot.layer, current)) continue;
    if (slot.job != nullptr) {
      slot.layer.reset();  // first: nobody may wait for a layer whose transfer was given up
      slot.job->stop(Failure(FailureKind::kCancelled, "another layer was asked for"));
      settle(slot);
    }
    if (slot.job == nullptr) return &slot;
    busy = &slot;
  }
  // There are no more slots than layers that are wanted soon. The current one is missing, so a slot is not among them.
  if (wait == nullptr || busy == nullptr) return nullptr;
  while (!busy->job->done()) {
    if (wait->passed()) return nullptr;
    busy->job->wait_for(wait->nap());
  }
  settle(*busy);
  return busy;
}

void LayerLoader::begin(Slot& slot, std::uint64_t layer) {
  std::vector<Segment> segments = plans_[layer].segments;
  for (Segment& segment : segments) segment.address += slot.memory.address();
  Job::Options options;
  options.device = device_;
  if (device_ != kHost) options.stream = reinterpret_cast<std::uint64_t>(behind_);
  slot.layer.reset();
  slot.checked = false;
  slot.job = begin_job(options, source_->file(), std::move(segments));
  slot.layer = layer;
}

void LayerLoader::read_ahead(std::uint64_t current) {
  for (std::uint64_t ahead = 0; ahead < slots_.size(); ++ahead) {
    const std::uint64_t layer = (current + ahead) % plans_.size();
    if (slot_of(layer) != nullptr) continue;
    Slot* slot = free_slot(current, nullptr);
    if (slot == nullptr) return;
    begin(*slot, layer);
  }
}

}  // namespace gpunvme::capi
