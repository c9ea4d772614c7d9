// The process's workers. Started on first use, as many as CPUs but at most 14; a forked child starts its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "job.h"

namespace gpunvme {

class Engine {
 public:
  static constexpr unsigned kMostWorkers = 14;

  static std::shared_ptr<Engine> instance();
  // Stops every job, waits for what is in flight and joins the workers; the next use starts new ones.
  static void shutdown();

  Engine();
  unsigned workers() const { return static_cast<unsigned>(threads_.size()); }

  void attach(std::shared_ptr<Job> job);
  void detach(const Job* job);
  // There are `pieces` more to take.
  void announce(std::size_t pieces);

  // For workers. The epoch changes with every announcement: read it, look for work, and sleep only if it is the same.
  std::uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }
  // False when the worker should end.
  bool sleep(std::uint64_t epoch);
  bool stopping() const { return stopping_.load(std::memory_order_acquire); }
  std::vector<std::shared_ptr<Job>> jobs() const;

 private:
  void stop();

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::vector<std::shared_ptr<Job>> jobs_;
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  unsigned sleepers_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace gpunvme
