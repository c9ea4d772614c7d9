#include "events.h"

#include <algorithm>

namespace gpunvme::soft {

bool Events::keep_request(std::uint16_t cid) {
  const std::lock_guard lock(mutex_);
  if (requests_.size() == kRequestsMost) return false;
  requests_.push_back(cid);
  look();
  return true;
}

bool Events::take_request(std::uint16_t cid) {
  const std::lock_guard lock(mutex_);
  return std::erase(requests_, cid) != 0;
}

void Events::raise(std::uint8_t type, std::uint8_t information, std::uint8_t log_page) {
  const std::lock_guard lock(mutex_);
  const std::uint32_t dw0 = type | std::uint32_t{information} << 8 | std::uint32_t{log_page} << 16;
  const bool known = std::find(waiting_.begin(), waiting_.end(), dw0) != waiting_.end();
  if (!known && waiting_.size() < kEventsWaiting) waiting_.push_back(dw0);
  look();
}

void Events::log_was_read(std::uint8_t log_page) {
  const std::lock_guard lock(mutex_);
  for (std::size_t type = 0; type < masked_.size(); ++type) {
    if (masked_log_[type] == log_page) masked_[type] = false;
  }
  look();
}

void Events::look() {
  const bool deliverable =
      std::any_of(waiting_.begin(), waiting_.end(), [&](std::uint32_t dw0) { return !masked_[nvme::event_type(dw0)]; });
  due_.store(deliverable && !requests_.empty(), std::memory_order_relaxed);
}

std::optional<Events::Delivery> Events::next() {
  const std::lock_guard lock(mutex_);
  std::optional<Delivery> delivery;
  const auto event = std::find_if(waiting_.begin(), waiting_.end(),
                                  [&](std::uint32_t dw0) { return !masked_[nvme::event_type(dw0)]; });
  if (event != waiting_.end() && !requests_.empty()) {
    delivery = Delivery{requests_.front(), *event};
    masked_[nvme::event_type(*event)] = true;
    masked_log_[nvme::event_type(*event)] = static_cast<std::uint8_t>(nvme::event_log_page(*event));
    requests_.pop_front();
    waiting_.erase(event);
  }
  look();
  return delivery;
}

void Events::log_error(std::uint16_t sq_id, std::uint16_t cid, std::uint16_t status, std::uint32_t nsid,
                       std::uint64_t lba) {
  const std::lock_guard lock(mutex_);
  nvme::ErrorLogEntry entry{};
  entry.error_count = ++error_count_;
  entry.sqid = sq_id;
  entry.cid = cid;
  entry.status = static_cast<std::uint16_t>(status << 1);
  entry.parameter_error_location = 0xFFFF;
  entry.lba = lba;
  entry.nsid = nsid;
  if (errors_.size() == kErrorsKept) errors_.pop_back();
  errors_.push_front(entry);
}

std::vector<nvme::ErrorLogEntry> Events::errors() const {
  const std::lock_guard lock(mutex_);
  return {errors_.begin(), errors_.end()};
}

std::uint64_t Events::error_count() const {
  const std::lock_guard lock(mutex_);
  return error_count_;
}

void Events::reset() {
  const std::lock_guard lock(mutex_);
  requests_.clear();
  waiting_.clear();
  masked_ = {};
  look();
}

}  // namespace gpunvme::soft
