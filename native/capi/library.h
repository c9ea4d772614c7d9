// Whether the library may be used, who uses it, and what its handles stand for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpunvme/gpunvme.h"
#include "refusal.h"

namespace gpunvme::capi {

// What a handle stands for.
class Object {
 public:
  virtual ~Object() = default;
  // For messages: "a source".
  virtual const char* what() const = 0;
  // Ends what it does, and returns when nothing touches the caller's memory any more.
  virtual void stop() = 0;
};

void library_init(std::uint32_t api_version);
void library_shutdown();

// A call in progress. Throws Refusal (GPUNVME_ENOTINIT). The library is not shut down before it ends.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

gpunvme_handle add_handle(std::shared_ptr<Object> object);
// Throws Refusal (GPUNVME_EINVAL) for a handle that is none, or no more.
std::shared_ptr<Object> find_object(gpunvme_handle handle);
// Whoever gets true has taken the handle away.
bool remove_handle(gpunvme_handle handle);

[[noreturn]] void refuse_handle(const Object& object, const char* wanted);

// Throws Refusal (GPUNVME_EINVAL) where the handle stands for something else, too.
template <typename T>
std::shared_ptr<T> find(gpunvme_handle handle) {
  const auto object = find_object(handle);
  auto found = std::dynamic_pointer_cast<T>(object);
  if (found == nullptr) refuse_handle(*object, T::kWhat);
  return found;
}

}  // namespace gpunvme::capi
