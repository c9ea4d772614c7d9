// Layers of a source, read ahead into a ring of memory and given out one at a time.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "deadline.h"
#include "job.h"
#include "layer_memory.h"
#include "library.h"
#include "source.h"

namespace gpunvme::capi {

class LayerLoader : public Object {
 public:
  static constexpr const char* kWhat = "a layer loader";
  static constexpr std::uint32_t kMostSlots = 1024;

  // Throws Refusal or Failure.
  LayerLoader(std::shared_ptr<const Source> source, const gpunvme_extent* extents, std::uint64_t count,
              std::uint32_t slots, std::int32_t device);
  ~LayerLoader() override;

  const char* what() const override { return kWhat; }
  void stop() override;

  struct Layer {
    std::uint64_t address = 0;
    std::uint64_t nbytes = 0;
  };
  // Throws Refusal, or the Failure of the layer's transfer.
  Layer load(std::uint64_t layer, void* stream, const Deadline& deadline);

 private:
  struct Plan {
    std::vector<Segment> segments;  // their addresses are positions
    std::uint64_t nbytes = 0;
  };
  struct Slot {
    LayerMemory memory;
    std::optional<std::uint64_t> layer;  // that is here, or on its way
    std::shared_ptr<Job> job;            // that brings it, or one that was given up; null when it is over
    bool checked = false;                // whether it is what the source said, since it is here
  };

  void make_plans(const gpunvme_extent* extents, std::uint64_t count);
  // Orders everything that is read from now on behind the caller's work with the layer that it has.
  void take_back();
  bool wanted_soon(std::uint64_t layer, std::uint64_t current) const;
  Slot* slot_of(std::uint64_t layer);
  // One that may be used for another layer; null if there is none by the deadline, or now without one.
  Slot* free_slot(std::uint64_t current, const Deadline* wait);
  void begin(Slot& slot, std::uint64_t layer);
  void read_ahead(std::uint64_t current);
  static void settle(Slot& slot);
  void free_all();
  void check_process() const;

  const std::shared_ptr<const Source> source_;
  const int device_;
  const pid_t process_ = getpid();
  std::vector<Plan> plans_;
  std::mutex mutex_;
  std::vector<Slot> slots_;
  CUstream behind_ = nullptr;      // of our own; has waited for all that layers were used for
  std::optional<void*> given_to_;  // the stream that works with the layer that the caller has
  bool stopped_ = false;
};

}  // namespace gpunvme::capi
