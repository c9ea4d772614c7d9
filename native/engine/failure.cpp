#include "failure.h"

#include <cerrno>
#include <system_error>

namespace gpunvme {

Failure file_failure(int error_number, const std::string& what, const std::string& file, std::int64_t offset) {
  Failure failure(FailureKind::kFile, what + ": " + std::generic_category().message(error_number));
  failure.error_number = error_number;
  failure.file = file;
  failure.offset = offset;
  return failure;
}

Failure truncated_failure(const std::string& file, std::int64_t offset) {
  Failure failure(FailureKind::kTruncated, "the file ended before the bytes that were asked for; was it truncated?");
  failure.error_number = EIO;
  failure.file = file;
  failure.offset = offset;
  return failure;
}

Failure cuda_failure(std::string message) { return Failure(FailureKind::kCuda, std::move(message)); }

}  // namespace gpunvme
