// Transfers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>

#include "bindings.h"
#include "engine.h"
#include "job.h"
#include "small_read.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {

nb::object failure_tuple(const Failure& failure);

namespace {

using Part = std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t>;

// A forked child has the parent's jobs but not its workers, and their locks may be held for ever.
Job& checked(Job& job) {
  if (job.process() != getpid()) {
    throw Failure(FailureKind::kCancelled, "the transfer was started by the parent process and runs only there");
  }
  return job;
}

nb::dict report(Job& job) {
  const Counts counts = checked(job).counts();
  nb::dict result;
  result["direct_bytes"] = counts.direct;
  result["cached_bytes"] = counts.cached;
  result["buffered_bytes"] = counts.buffered;
  result["bounced_bytes"] = counts.bounced;
  result["mapped_bytes"] = counts.mapped;
  result["seconds"] = job.seconds();
  result["workers"] = job.workers();
  result["io_uring"] = job.used_io_uring();
  result["io_threads"] = job.used_io_threads();
  result["pageable"] = job.used_pageable();
  return result;
}

}  // namespace

void bind_jobs(nb::module_& module) {
  nb::class_<Job>(module, "Job")
      .def_static(
          "make",
          [](bool write, int device, std::optional<std::uint64_t> stream, std::optional<double> timeout) {
            Job::Options options;
            options.direction = write ? Job::Direction::kWrite : Job::Direction::kRead;
            options.device = device;
            options.stream = stream;
            if (timeout) options.timeout = std::chrono::duration<double>(*timeout);
            WithoutGil release;
            return Job::make(options);
          },
          nb::arg("write"), nb::arg("device"), nb::arg("stream").none(), nb::arg("timeout").none())
      .def("add_file",
           [](Job& job, std::shared_ptr<SourceFile> file) { return checked(job).add_file(std::move(file)); })
      .def("add",
           [](Job& job, const std::vector<Part>& parts) {
             std::vector<Segment> segments;
             segments.reserve(parts.size());
             for (const auto& [file, offset, nbytes, address] : parts) {
               segments.push_back({file, offset, nbytes, address});
             }
             WithoutGil release;
             checked(job).add(std::move(segments));
           })
      .def("add_gather",
           [](Job& job, std::uint32_t file, std::uint64_t offsets, std::uint64_t count, std::uint64_t nbytes,
              std::uint64_t address) {
             WithoutGil release;
             checked(job).add_gather(file, reinterpret_cast<const std::int64_t*>(offsets), count, nbytes, address);
           })
      .def("seal", [](Job& job) { checked(job).seal(); })
      .def("cancel",
           [](Job& job) { checked(job).stop(Failure(FailureKind::kCancelled, "the transfer was cancelled")); })
      .def("expire",
           [](Job& job) {
             checked(job).stop(Failure(FailureKind::kDeadline, "the transfer was not complete by its deadline"));
           })
      .def("wait",
           [](Job& job, double seconds) {
             checked(job);
             WithoutGil release;
             return job.wait_for(std::chrono::duration<double>(seconds));
           })
      .def_prop_ro("done", [](Job& job) { return checked(job).done(); })
      .def("failure",
           [](Job& job) -> nb::object {
             const auto failure = checked(job).failure();
             return failure ? failure_tuple(*failure) : nb::none();
           })
      .def("report", &report);

  module.attr("MOST_GATHERED_BYTES") = Gather::kMostBytes;
  module.def("small_read", &small_read, nb::arg("file"), nb::arg("offset"), nb::arg("nbytes"), nb::arg("device"),
             nb::arg("stream"), nb::arg("address"), nb::call_guard<WithoutGil>());
  module.def("shutdown", &Engine::shutdown, nb::call_guard<WithoutGil>());
}

}  // namespace gpunvme
