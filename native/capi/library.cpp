#include "library.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "engine.h"

namespace gpunvme::capi {
namespace {

// Never destroyed: other threads may be in a call while the process ends.
struct Library {
  std::mutex lifetime;  // held by init and shutdown
  unsigned users = 0;
  // A call counts itself and then looks; shutdown closes and then looks at the count. Both sequentially consistent, so
  // that one of them sees the other.
  std::atomic<bool> open{false};
  std::atomic<std::uint64_t> calls{0};

  std::shared_mutex handles;
  std::unordered_map<gpunvme_handle, std::shared_ptr<Object>> objects;
  gpunvme_handle next = 1;  // never given out twice
};

Library& library() {
  static auto* instance = new Library;
  return *instance;
}

// Not `lifetime`: shutdown holds it while it takes the engine's lock, which a fork holds before it comes here.
void before_fork() { library().handles.lock(); }

void after_fork_in_parent() { library().handles.unlock(); }

void after_fork_in_child() {
  library().calls.store(0);  // the threads that made them exist in the parent only
  // Locks of threads that are not here: one may have held the first, and the second knows its holder by the parent's
  // thread id.
  new (&library().lifetime) std::mutex;
  new (&library().handles) std::shared_mutex;
}

}  // namespace

void library_init(std::uint32_t api_version) {
  if (api_version != GPUNVME_API_VERSION) {
    throw Refusal(GPUNVME_EINVAL, "the program was compiled for version " + std::to_string(api_version) +
                                      " of gpunvme.h, and this library has version " +
                                      std::to_string(GPUNVME_API_VERSION) + ": compile it again");
  }
  static const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  (void)registered;
  std::lock_guard lock(library().lifetime);
  ++library().users;
  library().open.store(true);
}

void library_shutdown() {
  Library& lib = library();
  std::lock_guard lock(lib.lifetime);
  if (lib.users == 0) throw Refusal(GPUNVME_ENOTINIT, "gpunvme_init() was not called as often");
  if (--lib.users > 0) return;
  lib.open.store(false);
  // A call that came before may still begin a transfer: stop what there is until there are no more calls.
  do {
    Engine::shutdown();
    for (int i = 0; i < 10 && lib.calls.load() != 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  } while (lib.calls.load() != 0);
  std::unordered_map<gpunvme_handle, std::shared_ptr<Object>> objects;
  {
    std::lock_guard handles(lib.handles);
    objects.swap(lib.objects);
  }
  objects.clear();  // nobody else has them: they stop what they do
  Engine::shutdown();
}

Call::Call() {
  library().calls.fetch_add(1);
  if (library().open.load()) return;
  library().calls.fetch_sub(1);
  throw Refusal(GPUNVME_ENOTINIT, "gpunvme_init() was not called, or gpunvme_shutdown() was");
}

Call::~Call() { library().calls.fetch_sub(1); }

gpunvme_handle add_handle(std::shared_ptr<Object> object) {
  std::lock_guard lock(library().handles);
  const gpunvme_handle handle = library().next++;
  library().objects.emplace(handle, std::move(object));
  return handle;
}

std::shared_ptr<Object> find_object(gpunvme_handle handle) {
  std::shared_lock lock(library().handles);
  const auto found = library().objects.find(handle);
  if (found != library().objects.end()) return found->second;
  const bool was = handle != 0 && handle < library().next;
  throw Refusal(GPUNVME_EINVAL, "handle " + std::to_string(handle) + (was ? " was closed" : " was never given out"));
}

bool remove_handle(gpunvme_handle handle) {
  std::shared_ptr<Object> last;  // destroyed without the lock
  std::lock_guard lock(library().handles);
  const auto found = library().objects.find(handle);
  if (found == library().objects.end()) return false;
  last = std::move(found->second);
  library().objects.erase(found);
  return true;
}

void refuse_handle(const Object& object, const char* wanted) {
  throw Refusal(GPUNVME_EINVAL, std::string("the handle stands for ") + object.what() + ", not for " + wanted);
}

}  // namespace gpunvme::capi
