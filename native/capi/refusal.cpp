#include "refusal.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace gpunvme::capi {
namespace {

// Plain bytes: nothing is destroyed when a thread ends, and nothing allocated when memory has run out.
thread_local gpunvme_error last{GPUNVME_OK, 0, -1, ""};

}  // namespace

gpunvme_status code_of(const Failure& failure) {
  switch (failure.kind) {
    case FailureKind::kFile:
      return GPUNVME_EFILE;
    case FailureKind::kTruncated:
      return GPUNVME_ETRUNCATED;
    case FailureKind::kCuda:
      return GPUNVME_ECUDA;
    case FailureKind::kCancelled:
      return GPUNVME_ECANCELED;
    case FailureKind::kDeadline:
      return GPUNVME_ETIMEDOUT;
  }
  return GPUNVME_EINTERNAL;
}

int remember(gpunvme_status code, const char* message) noexcept {
  last.code = code;
  last.system_error = 0;
  last.offset = -1;
  std::snprintf(last.message, sizeof last.message, "%s", message);
  return code;
}

int remember(const Failure& failure) noexcept {
  last.code = code_of(failure);
  last.system_error = failure.error_number;
  last.offset = failure.offset;
  // The file's name is cut before the reason is.
  const int name = static_cast<int>(std::min<std::size_t>(failure.file.size(), sizeof last.message / 2));
  char where[48] = "";
  if (failure.offset >= 0) {
    std::snprintf(where, sizeof where, " at offset %lld", static_cast<long long>(failure.offset));
  }
  std::snprintf(last.message, sizeof last.message, "%.*s%s%s%s", name, failure.file.c_str(), where,
                failure.file.empty() ? "" : ": ", failure.what());
  return last.code;
}

const gpunvme_error* last_error() noexcept { return &last; }

}  // namespace gpunvme::capi
