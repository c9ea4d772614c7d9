#include "transfer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "small_read.h"

namespace gpunvme::capi {
namespace {

Job::Options options_for(Job::Direction direction, const Place& place) {
  Job::Options options;
  options.direction = direction;
  options.device = place.device;
  options.stream = place.job_stream();
  return options;
}

// Adds to a new job and seals it. A job that could not be given all of its work must not stay with the engine.
template <typename Add>
std::shared_ptr<Job> begin(const Job::Options& options, const std::shared_ptr<SourceFile>& file, const Add& add) {
  auto job = Job::make(options);
  try {
    add(*job, job->add_file(file));
  } catch (...) {
    stop_job(*job, FailureKind::kCancelled);
    throw;
  }
  job->seal();
  return job;
}

void wait_until_done(Job& job) {
  while (!job.wait_for(std::chrono::hours(1))) {
  }
}

// The end of a transfer that its caller waits for.
void complete(Job& job, const Deadline& deadline, gpunvme_report* report) {
  finish_job(job, deadline);
  fill_report(report, job);
  throw_failure(job);
}

}  // namespace

std::shared_ptr<Job> begin_job(const Job::Options& options, const std::shared_ptr<SourceFile>& file,
                               std::vector<Segment> segments) {
  return begin(options, file, [&](Job& job, std::uint32_t number) {
    for (Segment& segment : segments) segment.file = number;
    job.add(std::move(segments));
  });
}

void stop_job(Job& job, FailureKind kind) {
  const bool late = kind == FailureKind::kDeadline;
  job.stop(Failure(kind, late ? "the transfer was not complete by its deadline" : "the transfer was stopped"));
  wait_until_done(job);
}

void finish_job(Job& job, const Deadline& deadline) {
  while (!job.done()) {
    if (deadline.passed()) return stop_job(job, FailureKind::kDeadline);
    job.wait_for(deadline.nap());
  }
}

void fill_report(gpunvme_report* report, const Job& job) {
  if (report == nullptr) return;
  const Counts counts = job.counts();
  *report = {"host", counts.total(), counts.direct, counts.cached, counts.buffered, counts.bounced, job.seconds(), {}};
}

std::optional<Failure> failure_of(const Job& job) {
  const auto failure = job.failure();
  if (!failure) return std::nullopt;
  Failure own(failure->kind, std::string(failure->what()));
  own.error_number = failure->error_number;
  own.file = failure->file;
  own.offset = failure->offset;
  return own;
}

void throw_failure(const Job& job) {
  if (const auto failure = failure_of(job)) throw *failure;
}

Transfer::~Transfer() {
  if (job_->process() == getpid()) stop_job(*job_, FailureKind::kCancelled);
}

void Transfer::stop() {
  // A forked child has neither the workers nor the right to touch a lock that they may hold.
  if (job_->process() == getpid()) stop_job(*job_, FailureKind::kCancelled);
}

bool Transfer::wait(const Deadline& until) {
  if (job_->process() != getpid()) {
    throw Refusal(GPUNVME_EINVAL, "the transfer was started by the parent process and runs only there");
  }
  while (!job_->done()) {
    if (deadline_.passed()) {
      stop_job(*job_, FailureKind::kDeadline);
      break;
    }
    if (until.passed()) return false;
    job_->wait_for(std::min(deadline_.nap(), until.nap()));
  }
  return true;
}

void read(const Source& source, std::uint64_t offset, const Place& to, const Deadline& deadline,
          gpunvme_report* report) {
  const auto start = Deadline::Clock::now();
  if (small_read(*source.file(), offset, to.nbytes, to.device, reinterpret_cast<std::uint64_t>(to.stream),
                 to.address)) {
    if (report != nullptr) {
      const std::chrono::duration<double> took = Deadline::Clock::now() - start;
      *report = {"host", to.nbytes, 0, to.nbytes, 0, to.device == kHost ? 0 : to.nbytes, took.count(), {}};
    }
    return;
  }
  const auto job =
      begin_job(options_for(Job::Direction::kRead, to), source.file(), {{0, offset, to.nbytes, to.address}});
  complete(*job, deadline, report);
}

std::shared_ptr<Transfer> begin_read(std::shared_ptr<const Source> source, std::uint64_t offset, const Place& to,
                                     const Deadline& deadline) {
  auto job = begin_job(options_for(Job::Direction::kRead, to), source->file(), {{0, offset, to.nbytes, to.address}});
  return std::make_shared<Transfer>(std::move(job), deadline, std::move(source));
}

void write(Source& source, std::int64_t offset, const Place& from, const Deadline& deadline, gpunvme_report* report) {
  const auto& file = source.file();
  if (offset < 0 || from.nbytes > static_cast<std::uint64_t>(INT64_MAX - offset)) {
    throw Refusal(GPUNVME_ERANGE, "no file has " + std::to_string(from.nbytes) + " bytes from offset " +
                                      std::to_string(offset) + " on");
  }
  if (!file->writable()) {
    throw file_failure(EBADF, "the file is open for reading only; use GPUNVME_READ_WRITE", file->name());
  }
  const auto at = static_cast<std::uint64_t>(offset);
  Source::Room room(source, at, from.nbytes);
  const auto job = begin_job(options_for(Job::Direction::kWrite, from), file, {{0, at, from.nbytes, from.address}});
  complete(*job, deadline, report);
  room.keep();
}

void gather(const Source& source, const std::int64_t* offsets, std::uint64_t count, std::uint64_t nbytes,
            const Place& to, const Deadline& deadline, gpunvme_report* report) {
  const std::uint64_t size = source.file()->size();
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto from = static_cast<std::uint64_t>(offsets[i]);
    if (offsets[i] < 0 || from > size || nbytes > size - from) {
      throw Refusal(GPUNVME_ERANGE, source.file()->name() + " has " + std::to_string(size) + " bytes; read number " +
                                        std::to_string(i) + " asks for " + std::to_string(nbytes) + " from offset " +
                                        std::to_string(offsets[i]));
    }
  }
  const auto job = begin(options_for(Job::Direction::kRead, to), source.file(), [&](Job& job, std::uint32_t file) {
    if (nbytes <= Gather::kMostBytes) {
      if (count > 0) job.add_gather(file, offsets, count, nbytes, to.address);
      return;
    }
    std::vector<Segment> segments(count);
    for (std::uint64_t i = 0; i < count; ++i) {
      segments[i] = {file, static_cast<std::uint64_t>(offsets[i]), nbytes, to.address + i * nbytes};
    }
    job.add(std::move(segments));
  });
  complete(*job, deadline, report);
}

}  // namespace gpunvme::capi
