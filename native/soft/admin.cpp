#include "admin.h"

#include <algorithm>
#include <cstring>

#include "identify.h"
#include "log_pages.h"

namespace gpunvme::soft {
namespace {

constexpr std::uint16_t refuse(std::uint16_t code) { return code | nvme::kStatusDnr; }

// The most that one Get Log Page may ask for where MDTS sets no limit.
constexpr std::uint64_t kLogBytesMost = 16 << 20;

std::uint16_t queue_id(const nvme::Sqe& sqe) { return static_cast<std::uint16_t>(sqe.cdw10); }

}  // namespace

Admin::Result Admin::execute(Worker& worker, const nvme::Sqe& sqe) {
  Result result;
  result.status = run(worker, sqe, result);
  if (result.status != nvme::kStatusSuccess) {
    result.completes = true;
    result.status |= nvme::kStatusMore;
    worker.counters().add(Count::kErrors);
    device_.events.log_error(0, sqe.cid, result.status, sqe.nsid, 0);
  }
  return result;
}

std::uint16_t Admin::run(Worker& worker, const nvme::Sqe& sqe, Result& result) {
  if ((sqe.flags & (nvme::kSqeFuseMask | nvme::kSqePsdtMask)) != 0) return refuse(nvme::kStatusInvalidField);
  switch (sqe.opcode) {
    case nvme::kAdminIdentify:
      return identify_command(worker, sqe);
    case nvme::kAdminGetLogPage:
      return get_log_page(worker, sqe);
    case nvme::kAdminCreateIoCq:
      return create_cq(worker, sqe);
    case nvme::kAdminCreateIoSq:
      return create_sq(worker, sqe);
    case nvme::kAdminDeleteIoCq:
      return delete_cq(sqe);
    case nvme::kAdminDeleteIoSq:
      return delete_sq(worker, sqe, result);
    case nvme::kAdminAbort:
      return abort(worker, sqe, result);
    case nvme::kAdminSetFeatures:
      return features_.set(sqe, result.dw0);
    case nvme::kAdminGetFeatures:
      return features_.get(sqe, result.dw0);
    case nvme::kAdminAsyncEventRequest:
      result.completes = false;
      return device_.events.keep_request(sqe.cid) ? nvme::kStatusSuccess : refuse(nvme::kStatusAerLimitExceeded);
    default:
      return refuse(nvme::kStatusInvalidOpcode);
  }
}

// Writes `nbytes` of data to the host, who gave room for `wanted`.
std::uint16_t Admin::send(Worker& worker, const nvme::Sqe& sqe, const std::byte* data, std::uint64_t nbytes,
                          std::uint64_t wanted) {
  if (wanted > device_.most_bytes) return refuse(nvme::kStatusInvalidField);
  // By what was asked for, also where there is less: it decides whether PRP2 is a page or a list.
  const std::uint16_t status = data_.find(worker.dma(), sqe.prp1, sqe.prp2, wanted, device_.page_bytes, true);
  if (status != nvme::kStatusSuccess) return status;
  for (const iovec& segment : data_.segments()) {
    const std::uint64_t now = std::min<std::uint64_t>(segment.iov_len, nbytes);
    std::memcpy(segment.iov_base, data, now);
    data += now;
    nbytes -= now;
  }
  return data_.is_device() ? data_.deliver(worker.dma()) : nvme::kStatusSuccess;
}

std::uint16_t Admin::identify_command(Worker& worker, const nvme::Sqe& sqe) {
  std::array<std::byte, nvme::kIdentifyBytes> page{};
  if (const auto status = identify(device_, sqe, page); status != nvme::kStatusSuccess) return status;
  return send(worker, sqe, page.data(), page.size(), page.size());
}

std::uint16_t Admin::get_log_page(Worker& worker, const nvme::Sqe& sqe) {
  const std::uint8_t log = sqe.cdw10 & 0xFF;
  const std::uint64_t dwords = (sqe.cdw10 >> nvme::kLogNumdlShift | std::uint64_t{sqe.cdw11 & 0xFFFF} << 16) + 1;
  const std::uint64_t offset = sqe.cdw12 | std::uint64_t{sqe.cdw13} << 32;
  const auto csi = static_cast<std::uint8_t>(sqe.cdw14 >> 24);
  if (const auto status = make_log_page(device_, log, sqe.nsid, csi, page_); status != nvme::kStatusSuccess) {
    return status;
  }
  if (offset % 4 != 0 || offset > page_.size() || dwords * 4 > kLogBytesMost) {
    return refuse(nvme::kStatusInvalidField);
  }
  const std::uint64_t nbytes = std::min(dwords * 4, page_.size() - offset);
  const std::uint16_t status = send(worker, sqe, page_.data() + offset, nbytes, dwords * 4);
  if (status == nvme::kStatusSuccess && (sqe.cdw10 & nvme::kLogRetainEvent) == 0) device_.events.log_was_read(log);
  return status;
}

// Where a new queue's entries are, from PRP1 and PC.
std::uint16_t Admin::queue_memory(Worker& worker, const nvme::Sqe& sqe, std::uint32_t entries,
                                  std::uint32_t entry_bytes, QueueMemory& memory) {
  const bool contiguous = (sqe.cdw11 & nvme::kCreateQueuePc) != 0;
  if (!contiguous && device_.options.cqr) return refuse(nvme::kStatusInvalidField);
  if (sqe.prp1 % device_.page_bytes != 0) return refuse(nvme::kStatusPrpOffsetInvalid);
  if (contiguous) {
    memory.reset(sqe.prp1, entries, entry_bytes);
    return nvme::kStatusSuccess;
  }
  const std::uint64_t pages = (std::uint64_t{entries} * entry_bytes + device_.page_bytes - 1) / device_.page_bytes;
  std::vector<std::uint64_t> addresses;
  const auto status = read_queue_pages(worker.dma(), sqe.prp1, pages, device_.page_bytes, addresses);
  if (status == nvme::kStatusSuccess) memory.reset(std::move(addresses), device_.page_bytes, entries, entry_bytes);
  return status;
}

std::uint16_t Admin::create_cq(Worker& worker, const nvme::Sqe& sqe) {
  const std::uint16_t id = queue_id(sqe);
  if (id == 0 || id >= device_.queues.count()) return refuse(nvme::kStatusInvalidQueueId);
  CompletionQueue& cq = device_.queues.cq(id);
  if (cq.live.load(std::memory_order_relaxed)) return refuse(nvme::kStatusInvalidQueueId);
  const std::uint32_t entries = (sqe.cdw10 >> nvme::kCreateQueueQsizeShift) + 1;
  // A host that has not said how large entries are gets no queue either (Base 2.0, 5.4).
  const bool sized = nvme::cc_iocqes(device_.cc) == nvme::kCqeExponent;
  if (entries < 2 || entries > device_.options.mqes || !sized) return refuse(nvme::kStatusInvalidQueueSize);
  const bool interrupts = (sqe.cdw11 & nvme::kCreateCqIen) != 0;
  const std::uint32_t vector = sqe.cdw11 >> nvme::kCreateCqIvShift;
  if (interrupts && vector >= Interrupts::kVectors) return refuse(nvme::kStatusInvalidInterruptVector);
  QueueMemory memory;
  const auto status = queue_memory(worker, sqe, entries, sizeof(nvme::Cqe), memory);
  if (status != nvme::kStatusSuccess) return status;
  const SpinGuard guard(cq.lock, device_.several);
  device_.queues.start_cq(cq, std::move(memory), entries);
  cq.interrupts = interrupts;
  cq.vector = static_cast<std::uint16_t>(vector);
  return nvme::kStatusSuccess;
}

std::uint16_t Admin::create_sq(Worker& worker, const nvme::Sqe& sqe) {
  const std::uint16_t id = queue_id(sqe);
  if (id == 0 || id >= device_.queues.count()) return refuse(nvme::kStatusInvalidQueueId);
  SubmissionQueue& sq = device_.queues.sq(id);
  if (sq.cq != nullptr) return refuse(nvme::kStatusInvalidQueueId);  // it exists, or is still being deleted
  const std::uint32_t entries = (sqe.cdw10 >> nvme::kCreateQueueQsizeShift) + 1;
  const bool sized = nvme::cc_iosqes(device_.cc) == nvme::kSqeExponent;
  if (entries < 2 || entries > device_.options.mqes || !sized) return refuse(nvme::kStatusInvalidQueueSize);
  const std::uint32_t cq_id = sqe.cdw11 >> nvme::kCreateSqCqidShift;
  if (cq_id == 0 || cq_id >= device_.queues.count()) return refuse(nvme::kStatusInvalidQueueId);
  CompletionQueue& cq = device_.queues.cq(cq_id);
  if (!cq.live.load(std::memory_order_relaxed)) return refuse(nvme::kStatusCompletionQueueInvalid);
  QueueMemory memory;
  const auto status = queue_memory(worker, sqe, entries, sizeof(nvme::Sqe), memory);
  if (status != nvme::kStatusSuccess) return status;
  const SpinGuard guard(sq.lock, device_.several);
  device_.queues.start_sq(sq, cq, std::move(memory), entries);
  return nvme::kStatusSuccess;
}

std::uint16_t Admin::delete_cq(const nvme::Sqe& sqe) {
  const std::uint16_t id = queue_id(sqe);
  if (id == 0 || id >= device_.queues.count()) return refuse(nvme::kStatusInvalidQueueId);
  CompletionQueue& cq = device_.queues.cq(id);
  if (!cq.live.load(std::memory_order_relaxed)) return refuse(nvme::kStatusInvalidQueueId);
  if (cq.users.load(std::memory_order_relaxed) != 0) return refuse(nvme::kStatusInvalidQueueDeletion);
  const SpinGuard guard(cq.lock, device_.several);
  if (cq.waiting.load(std::memory_order_relaxed)) device_.waiting_queues.fetch_sub(1, std::memory_order_relaxed);
  device_.queues.stop_cq(cq);
  return nvme::kStatusSuccess;
}

std::uint16_t Admin::delete_sq(Worker& worker, const nvme::Sqe& sqe, Result& result) {
  const std::uint16_t id = queue_id(sqe);
  if (id == 0 || id >= device_.queues.count()) return refuse(nvme::kStatusInvalidQueueId);
  SubmissionQueue& sq = device_.queues.sq(id);
  if (!sq.live.load(std::memory_order_relaxed)) return refuse(nvme::kStatusInvalidQueueId);
  {
    // Nothing more is fetched from here on.
    const SpinGuard guard(sq.lock, device_.several);
    sq.live.store(false, std::memory_order_relaxed);
  }
  for (const HeldCompletion& held : device_.held.take_all(sq)) {
    complete_held(worker, held, nvme::kStatusAbortedSqDeletion);
  }
  {
    // The host takes a command of this queue that has not completed by the time that the queue is gone for aborted.
    CompletionQueue& cq = *sq.cq;
    const SpinGuard guard(cq.lock, device_.several);
    std::erase_if(cq.backlog, [&](const Completion& completion) { return completion.sq_id == id; });
  }
  // Acquire: with the release of whoever finished the last one, so that nobody uses the queue when it is cleared.
  if (sq.unfinished.load(std::memory_order_acquire) == 0) {
    delete_now(sq);
  } else {
    deletions_.push_back({&sq, sqe.cid});
    deleting_.store(true, std::memory_order_relaxed);
    result.completes = false;
  }
  return nvme::kStatusSuccess;
}

// A command that a fault held back ends now, with another status.
void Admin::complete_held(Worker& worker, const HeldCompletion& held, std::uint16_t status) {
  Completion completion = held.completion;
  completion.status = status;
  worker.complete(*held.sq, completion);
  held.sq->unfinished.fetch_sub(1, std::memory_order_release);
}

void Admin::delete_now(SubmissionQueue& sq) {
  const SpinGuard guard(sq.lock, device_.several);
  device_.queues.stop_sq(sq);
}

std::vector<std::uint16_t> Admin::finished_deletions() {
  std::vector<std::uint16_t> finished;
  std::erase_if(deletions_, [&](const Deletion& deletion) {
    if (deletion.sq->unfinished.load(std::memory_order_acquire) != 0) return false;
    delete_now(*deletion.sq);
    finished.push_back(deletion.cid);
    return true;
  });
  deleting_.store(!deletions_.empty(), std::memory_order_relaxed);
  return finished;
}

std::uint16_t Admin::abort(Worker& worker, const nvme::Sqe& sqe, Result& result) {
  const auto sq_id = static_cast<std::uint16_t>(sqe.cdw10);
  const auto cid = static_cast<std::uint16_t>(sqe.cdw10 >> 16);
  result.dw0 = nvme::kAbortNotAborted;
  // Commands are executed as soon as they are fetched. What can still be aborted is what a fault holds back, and
  // Asynchronous Event Requests.
  if (const auto held = device_.held.take(sq_id, cid)) {
    complete_held(worker, *held, nvme::kStatusAbortRequested);
    result.dw0 = 0;
  } else if (sq_id == 0 && device_.events.take_request(cid)) {
    worker.complete(device_.queues.sq(0), {0, 0, cid, nvme::kStatusAbortRequested});
    result.dw0 = 0;
  }
  return nvme::kStatusSuccess;
}

void Admin::reset() {
  features_.reset();
  deletions_.clear();
  deleting_.store(false, std::memory_order_relaxed);
}

}  // namespace gpunvme::soft
