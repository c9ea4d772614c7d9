// How calls end: what the library throws inside becomes a code, and the thread's last error.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "failure.h"
#include "gpunvme/gpunvme.h"

namespace gpunvme::capi {

// A call that is refused before anything is done.
struct Refusal : std::runtime_error {
  Refusal(gpunvme_status code, const std::string& message) : std::runtime_error(message), code(code) {}
  gpunvme_status code;
};

gpunvme_status code_of(const Failure& failure);

// Make it the thread's last error, and return its code. They allocate nothing that they could not do without.
int remember(gpunvme_status code, const char* message) noexcept;
int remember(const Failure& failure) noexcept;
const gpunvme_error* last_error() noexcept;

// Runs the body of a public function. Nothing that it throws goes further.
template <typename Body>
int guarded(const Body& body) noexcept {
  try {
    body();
    return GPUNVME_OK;
  } catch (const Refusal& refusal) {
    return remember(refusal.code, refusal.what());
  } catch (const Failure& failure) {
    return remember(failure);
  } catch (const std::bad_alloc&) {
    return remember(GPUNVME_ENOMEM, "out of memory");
  } catch (const std::length_error&) {
    return remember(GPUNVME_ENOMEM, "out of memory: more was asked for than a process can have");
  } catch (const std::exception& exception) {
    return remember(GPUNVME_EINTERNAL, exception.what());
  } catch (...) {
    return remember(GPUNVME_EINTERNAL, "an exception of an unknown kind");
  }
}

}  // namespace gpunvme::capi
