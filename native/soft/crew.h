// The workers' threads: started, paused while something is changed that they all look at, stopped.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "admin.h"
#include "device.h"
#include "queue_worker.h"

namespace gpunvme::soft {

class Crew {
 public:
  // No threads where the device's options say 0: then `step` is what makes a pass.
  Crew(Device& device, Admin& admin);
  ~Crew() { stop(); }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // While one exists, no worker runs, nothing is in flight and no host memory is touched.
  class Pause {
   public:
    explicit Pause(Crew& crew);
    ~Pause();
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    Crew& crew_;
  };

  // One pass on the caller's thread; commands fetched.
  unsigned step();
  // Workers that sleep look at once.
  void wake();
  // Threads end, with nothing in flight.
  void stop();

 private:
  void run(Worker& worker);
  bool attend(Worker& worker);
  void rest(Worker& worker, unsigned& idle, Clock::time_point& since);

  Device& device_;
  std::deque<Worker> workers_;  // a deque: they are not movable
  std::vector<std::thread> threads_;

  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned pauses_ = 0;    // under mutex_
  bool stopping_ = false;  // under mutex_
  // pauses_ > 0 or stopping_, for workers to see without the mutex.
  std::atomic<bool> attention_{false};
  std::atomic<unsigned> sleeping_{0};
  std::atomic<std::uint64_t> wakes_{0};
  std::mutex step_mutex_;
};

}  // namespace gpunvme::soft
