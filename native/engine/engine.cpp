#include "engine.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>

#include "cuda_driver.h"
#include "worker.h"

namespace gpunvme {
namespace {

std::mutex& instance_mutex() {
  static std::mutex* mutex = new std::mutex;
  return *mutex;
}

// Never destroyed: worker threads may outlive static destructors.
std::shared_ptr<Engine>& instance_pointer() {
  static auto* pointer = new std::shared_ptr<Engine>;
  return *pointer;
}

void before_fork() {
  instance_mutex().lock();
  lock_cuda_driver_for_fork();
}

void after_fork_in_parent() {
  unlock_cuda_driver_after_fork();
  instance_mutex().unlock();
}

void after_fork_in_child() {
  // The workers exist in the parent only. Their engine is left behind, never touched: its locks may be held.
  new std::shared_ptr<Engine>(std::move(instance_pointer()));
  after_fork_in_parent();
}

unsigned worker_count() {
  const char* chosen = std::getenv("GPUNVME_WORKERS");
  if (chosen != nullptr) {
    return std::clamp(static_cast<unsigned>(std::strtoul(chosen, nullptr, 10)), 1u, 64u);
  }
  cpu_set_t cpus;
  unsigned count = 2;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) count = static_cast<unsigned>(CPU_COUNT(&cpus));
  // Two at least: one reads while the other hands over.
  return std::clamp(count, 2u, Engine::kMostWorkers);
}

Failure shut_down() { return Failure(FailureKind::kCancelled, "the engine was shut down"); }

}  // namespace

std::shared_ptr<Engine> Engine::instance() {
  static const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  (void)registered;
  std::lock_guard lock(instance_mutex());
  if (instance_pointer() == nullptr) instance_pointer() = std::make_shared<Engine>();
  return instance_pointer();
}

void Engine::shutdown() {
  std::shared_ptr<Engine> engine;
  {
    std::lock_guard lock(instance_mutex());
    engine.swap(instance_pointer());
  }
  if (engine != nullptr) engine->stop();
}

Engine::Engine() {
  const unsigned count = worker_count();
  for (unsigned index = 0; index < count; ++index) {
    threads_.emplace_back([this, index] { Worker(*this, index).run(); });
  }
}

void Engine::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_.store(true, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  for (const auto& job : jobs()) job->stop(shut_down());
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Engine::attach(std::shared_ptr<Job> job) {
  {
    std::lock_guard lock(mutex_);
    if (!stopping()) {
      jobs_.push_back(std::move(job));
      return;
    }
  }
  job->stop(shut_down());  // made while the workers were ending: nobody would ever take it up
}

void Engine::detach(const Job* job) {
  std::lock_guard lock(mutex_);
  std::erase_if(jobs_, [job](const auto& other) { return other.get() == job; });
}

void Engine::announce(std::size_t pieces) {
  std::lock_guard lock(mutex_);
  // Under the mutex, so that a worker that saw no work cannot fall asleep between this and the notification.
  epoch_.fetch_add(1, std::memory_order_release);
  if (sleepers_ == 0) return;
  if (pieces < sleepers_) {
    for (std::size_t i = 0; i < pieces; ++i) work_.notify_one();
  } else {
    work_.notify_all();
  }
}

bool Engine::sleep(std::uint64_t epoch) {
  std::unique_lock lock(mutex_);
  ++sleepers_;
  work_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != epoch; });
  --sleepers_;
  return !stopping();
}

std::vector<std::shared_ptr<Job>> Engine::jobs() const {
  std::lock_guard lock(mutex_);
  return jobs_;
}

}  // namespace gpunvme
