// What the controller tells without being asked: asynchronous events, and the error log (Base 2.0, 5.2 and 5.16.1.2).
//
// Events are raised by any worker and delivered by the one that serves the admin queue.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {

class Events {
 public:
  static constexpr std::size_t kRequestsMost = 4;    // AERL + 1
  static constexpr std::size_t kErrorsKept = 64;     // ELPE + 1
  static constexpr std::size_t kEventsWaiting = 16;  // beyond these the host learns from the log alone

  // An Asynchronous Event Request; false: there are as many as may be.
  bool keep_request(std::uint16_t cid);
  // No request is left behind: aborted with the status given by the caller.
  bool take_request(std::uint16_t cid);
  void raise(std::uint8_t type, std::uint8_t information, std::uint8_t log_page);
  // The log page was read: events of its type may be delivered again.
  void log_was_read(std::uint8_t log_page);

  struct Delivery {
    std::uint16_t cid;
    std::uint32_t dw0;
  };
  // There may be something for `next`.
  bool due() const { return due_.load(std::memory_order_relaxed); }
  std::optional<Delivery> next();

  // `status` is the 15-bit one.
  void log_error(std::uint16_t sq_id, std::uint16_t cid, std::uint16_t status, std::uint32_t nsid, std::uint64_t lba);
  std::vector<nvme::ErrorLogEntry> errors() const;  // the newest first
  std::uint64_t error_count() const;

  // A controller reset: requests and events are gone, the error log stays.
  void reset();

 private:
  void look();

  mutable std::mutex mutex_;
  std::deque<std::uint16_t> requests_;
  std::deque<std::uint32_t> waiting_;         // DW0 of events
  std::array<bool, 8> masked_{};              // by type: reported, and the log not read since
  std::array<std::uint8_t, 8> masked_log_{};  // the page that has to be read
  std::atomic<bool> due_{false};

  std::deque<nvme::ErrorLogEntry> errors_;
  std::uint64_t error_count_ = 0;
};

}  // namespace gpunvme::soft
