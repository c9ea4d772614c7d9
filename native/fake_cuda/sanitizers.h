// What TSan may see of the fake.
//
// One mutex guards the whole fake. If TSan saw it, every driver call would order the caller after all copies that have
// finished, and a caller that forgets to wait for its event would look correct. So the fake's own state and locks are
// hidden, and the ordering that CUDA promises is told to TSan explicitly. Without TSan all of this is nothing.
#pragma once

#include <cstdlib>

extern "C" {
// Weak: they exist where libtsan is loaded, and the rest of the time nobody calls them.
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreSyncBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreSyncEnd(const char* file, int line);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

#pragma GCC visibility push(hidden)
namespace gpunvme::fake_cuda {

inline const bool kHides = AnnotateIgnoreSyncBegin != nullptr && std::getenv("GPUNVME_FAKE_CUDA_SHOW_LOCKS") == nullptr;

inline void hide() {
  if (!kHides) return;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
}

inline void show() {
  if (!kHides) return;
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

// The fake's own business from here to the end of the scope.
struct Hidden {
  Hidden() { hide(); }
  ~Hidden() { show(); }
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;
};

// Inside a Hidden scope: the caller's memory is touched here, TSan shall look.
struct Shown {
  Shown() { show(); }
  ~Shown() { hide(); }
  Shown(const Shown&) = delete;
  Shown& operator=(const Shown&) = delete;
};

// An ordering that CUDA promises: what came before tell_before(x) comes before what follows tell_after(x).
// Both are called in Hidden scopes.
inline void tell_before(void* edge) {
  if (!kHides) return;
  Shown shown;
  __tsan_release(edge);
}

inline void tell_after(void* edge) {
  if (!kHides) return;
  Shown shown;
  __tsan_acquire(edge);
}

}  // namespace gpunvme::fake_cuda
#pragma GCC visibility pop
