// An open file, as a handle.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "library.h"
#include "source_file.h"

namespace gpunvme::capi {

class Source : public Object {
 public:
  static constexpr const char* kWhat = "a source";

  // Throws Refusal or Failure (kFile).
  static std::shared_ptr<Source> open(const char* path, std::uint32_t mode);

  const char* what() const override { return kWhat; }
  void stop() override {}

  // Throws Refusal or Failure (kFile).
  static std::shared_ptr<SourceFile> open_file(const char* path, std::uint32_t mode);

  const std::shared_ptr<SourceFile>& file() const { return file_; }
  // The range as the engine counts. Throws Refusal (GPUNVME_ERANGE) if the file does not have it.
  std::uint64_t checked_range(std::int64_t offset, std::uint64_t nbytes) const;
  // What was read until now was what the source said that it is; else Refusal (GPUNVME_ECHANGED).
  virtual void check_current() const {}

  // Room for a write in the file, until it succeeded: a write that fails takes back what the file grew by, but nothing
  // that other writes need. Throws Failure (kFile).
  class Room {
   public:
    Room(Source& source, std::uint64_t offset, std::uint64_t nbytes);
    ~Room();
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    void keep() { kept_ = true; }

   private:
    Source& source_;
    std::multiset<std::uint64_t>::iterator end_;
    bool kept_ = false;
  };

 protected:
  explicit Source(std::shared_ptr<SourceFile> file) : file_(std::move(file)) {}

 private:
  const std::shared_ptr<SourceFile> file_;
  std::mutex mutex_;
  std::multiset<std::uint64_t> ends_;  // of the writes in progress
  std::uint64_t needed_ = 0;           // the size that the file had before them, or has by writes that succeeded
};

}  // namespace gpunvme::capi
