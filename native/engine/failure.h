// Why a transfer failed, in a form that the Python side can turn into its own errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gpunvme {

enum class FailureKind { kFile, kTruncated, kCuda, kCancelled, kDeadline };

struct Failure : std::runtime_error {
  Failure(FailureKind kind, std::string message) : std::runtime_error(message), kind(kind) {}

  FailureKind kind;
  int error_number = 0;      // errno, for kFile and kTruncated
  std::string file;          // name of the file, or empty
  std::int64_t offset = -1;  // file offset in bytes, or -1
};

// The operating system refused `what` on `file`: errno `error_number` at `offset` (-1: not at an offset).
Failure file_failure(int error_number, const std::string& what, const std::string& file, std::int64_t offset = -1);

// `file` ended at `offset`, before the bytes that were asked for.
Failure truncated_failure(const std::string& file, std::int64_t offset);

Failure cuda_failure(std::string message);

}  // namespace gpunvme
