#include "direct_io.h"

#include <liburing.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

namespace gpunvme {
namespace {

// Rings of one issuing thread need no locks and no interrupts to it (Linux 6.1); older kernels refuse the flags.
constexpr unsigned kPreferredFlags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;

int make_ring(unsigned depth, io_uring* ring) {
  const int error = io_uring_queue_init(depth, ring, kPreferredFlags);
  return error == 0 ? 0 : io_uring_queue_init(depth, ring, 0);
}

class RingQueue : public DirectQueue {
 public:
  RingQueue(unsigned depth, const io_uring& ring) : DirectQueue(depth), ring_(ring) {}
  ~RingQueue() override { io_uring_queue_exit(&ring_); }

  void push(const DirectRequest& request) override {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    if (entry == nullptr) {  // full of entries that the kernel has not taken yet
      io_uring_submit(&ring_);
      entry = io_uring_get_sqe(&ring_);
    }
    if (request.write) {
      io_uring_prep_write(entry, request.fd, request.address, request.nbytes, request.offset);
    } else {
      io_uring_prep_read(entry, request.fd, request.address, request.nbytes, request.offset);
    }
    io_uring_sqe_set_data(entry, request.tag);
    ++in_flight_;
  }

  std::size_t reap(DirectResult* results, std::size_t most, std::chrono::microseconds wait) override {
    if (in_flight_ == 0) return 0;
    io_uring_cqe* first = nullptr;
    if (wait.count() > 0) {
      __kernel_timespec limit{wait.count() / 1000000, wait.count() % 1000000 * 1000};
      // Several at once where many are under way: small reads would else cost a system call each.
      io_uring_submit_and_wait_timeout(&ring_, &first, std::max(1u, in_flight_ / 4), &limit, nullptr);
    } else {
      io_uring_submit(&ring_);
      if (io_uring_peek_cqe(&ring_, &first) != 0) io_uring_get_events(&ring_);
    }
    std::size_t count = 0;
    unsigned head = 0;
    io_uring_cqe* entry = nullptr;
    io_uring_for_each_cqe(&ring_, head, entry) {
      if (count == most) break;
      results[count++] = {io_uring_cqe_get_data(entry), entry->res};
    }
    io_uring_cq_advance(&ring_, static_cast<unsigned>(count));
    in_flight_ -= static_cast<unsigned>(count);
    return count;
  }

  bool is_io_uring() const override { return true; }

 private:
  io_uring ring_;
};

class ThreadQueue : public DirectQueue {
 public:
  explicit ThreadQueue(unsigned depth) : DirectQueue(depth) {}

  ~ThreadQueue() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void push(const DirectRequest& request) override {
    ++in_flight_;
    if (threads_.size() < kMostThreads && threads_.size() < in_flight_) threads_.emplace_back([this] { serve(); });
    {
      std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    work_.notify_one();
  }

  std::size_t reap(DirectResult* results, std::size_t most, std::chrono::microseconds wait) override {
    std::unique_lock lock(mutex_);
    if (wait.count() > 0) finished_.wait_for(lock, wait, [this] { return !results_.empty(); });
    std::size_t count = 0;
    while (count < most && !results_.empty()) {
      results[count++] = results_.front();
      results_.pop_front();
    }
    in_flight_ -= static_cast<unsigned>(count);
    return count;
  }

  bool is_io_uring() const override { return false; }

 private:
  static constexpr std::size_t kMostThreads = 8;

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return stopping_ || !requests_.empty(); });
      if (requests_.empty()) return;
      const DirectRequest request = requests_.front();
      requests_.pop_front();
      lock.unlock();
      const auto offset = static_cast<off_t>(request.offset);
      const ssize_t got = request.write ? pwrite(request.fd, request.address, request.nbytes, offset)
                                        : pread(request.fd, request.address, request.nbytes, offset);
      const int result = got < 0 ? -errno : static_cast<int>(got);
      lock.lock();
      results_.push_back({request.tag, result});
      finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable finished_;
  std::deque<DirectRequest> requests_;
  std::deque<DirectResult> results_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

}  // namespace

std::unique_ptr<DirectQueue> DirectQueue::make(unsigned depth) {
  const char* chosen = std::getenv("GPUNVME_IO");
  if (chosen == nullptr || std::string_view(chosen) != "threads") {
    io_uring ring{};
    if (make_ring(depth, &ring) == 0) return std::make_unique<RingQueue>(depth, ring);
  }
  return std::make_unique<ThreadQueue>(depth);
}

std::string io_uring_refusal() {
  // Tried once a process: setting a ring up and taking it down costs as much as reading a megabyte.
  static const std::string refusal = [] {
    io_uring ring{};
    const int error = make_ring(2, &ring);
    if (error == 0) io_uring_queue_exit(&ring);
    return error == 0 ? std::string() : std::string("io_uring_setup was refused: ") + std::strerror(-error);
  }();
  return refusal;
}

}  // namespace gpunvme
