// A transfer of the engine, waited for at once or as a handle.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "deadline.h"
#include "job.h"
#include "library.h"
#include "memory_place.h"
#include "source.h"

namespace gpunvme::capi {

// Reads or writes that are under way. Throws Failure; then nothing touches the memory.
std::shared_ptr<Job> begin_job(const Job::Options& options, const std::shared_ptr<SourceFile>& file,
                               std::vector<Segment> segments);
// Stops a job, and returns when nothing touches its memory any more.
void stop_job(Job& job, FailureKind kind);
// Returns when it is done; after the deadline it is stopped.
void finish_job(Job& job, const Deadline& deadline);
// As the caller wants it, who may not (null).
void fill_report(gpunvme_report* report, const Job& job);
// Why it failed, with a message that shares no memory with the job's, which a worker may be the last to let go.
std::optional<Failure> failure_of(const Job& job);
// Throws it, if there is one.
void throw_failure(const Job& job);

class Transfer : public Object {
 public:
  static constexpr const char* kWhat = "a transfer";

  Transfer(std::shared_ptr<Job> job, Deadline deadline, std::shared_ptr<const Source> source)
      : job_(std::move(job)), deadline_(deadline), source_(std::move(source)) {}
  ~Transfer() override;

  const char* what() const override { return kWhat; }
  void stop() override;

  // False if it is not done by `until`.
  bool wait(const Deadline& until);
  const Job& job() const { return *job_; }
  const Source& source() const { return *source_; }

 private:
  const std::shared_ptr<Job> job_;
  const Deadline deadline_;
  const std::shared_ptr<const Source> source_;
};

void read(const Source& source, std::uint64_t offset, const Place& to, const Deadline& deadline,
          gpunvme_report* report);
void write(Source& source, std::int64_t offset, const Place& from, const Deadline& deadline, gpunvme_report* report);
void gather(const Source& source, const std::int64_t* offsets, std::uint64_t count, std::uint64_t nbytes,
            const Place& to, const Deadline& deadline, gpunvme_report* report);
std::shared_ptr<Transfer> begin_read(std::shared_ptr<const Source> source, std::uint64_t offset, const Place& to,
                                     const Deadline& deadline);

}  // namespace gpunvme::capi
