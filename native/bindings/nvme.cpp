// The driver's queues and transfers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "bindings.h"
#include "gpunvme/prp.h"
#include "io_memory.h"
#include "io_queue.h"
#include "io_run.h"
#include "io_staging.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

using Iovas = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Piece = std::tuple<std::shared_ptr<IoMemory>, std::uint64_t, std::uint64_t>;

std::vector<std::uint64_t> copied(const Iovas& iovas) { return {iovas.data(), iovas.data() + iovas.size()}; }

const char* state_name(IoRun::State state) {
  switch (state) {
    case IoRun::State::kRunning:
      return "running";
    case IoRun::State::kDone:
      return "done";
    case IoRun::State::kTimeout:
      return "timeout";
    case IoRun::State::kStopped:
      return "stopped";
  }
  return "running";
}

const char* failed_name(IoRun::Failed::Kind kind) {
  switch (kind) {
    case IoRun::Failed::Kind::kStatus:
      return "status";
    case IoRun::Failed::Kind::kTimeout:
      return "timeout";
    case IoRun::Failed::Kind::kLost:
      return "lost";
  }
  return "status";
}

nb::list failure_list(const IoRun& run) {
  nb::list list;
  for (const IoRun::Failed& failed : run.failures()) {
    list.append(nb::make_tuple(failed.opcode, failed.lba, failed.blocks, failed.queue, failed.cid, failed.status,
                               failed_name(failed.kind)));
  }
  return list;
}

nb::dict run_counts(const IoRun& run) {
  const IoRun::Counts counts = run.counts();
  nb::dict result;
  result["commands"] = counts.commands;
  result["retried"] = counts.retried;
  result["timeouts"] = counts.timeouts;
  result["mapped_bytes"] = counts.mapped_bytes;
  result["bounced_host_bytes"] = counts.bounced_host_bytes;
  result["bounced_gpu_bytes"] = counts.bounced_gpu_bytes;
  result["page_locked"] = counts.page_locked;
  result["seconds"] = counts.seconds;
  return result;
}

nb::dict queue_stats(const IoQueue& queue) {
  const QueuePair::State& state = queue.pair().state();
  nb::dict result;
  result["submitted"] = state.reserved.load_relaxed();
  result["completed"] = state.completed.load_relaxed();
  result["unknown_cid"] = state.unknown.load_relaxed();
  result["late"] = state.late.load_relaxed();
  result["bad_sqhd"] = state.bad_head.load_relaxed();
  result["quarantined"] = state.stuck.load_relaxed();
  return result;
}

void bind_memory_and_queue(nb::module_& module) {
  nb::class_<IoMemory>(module, "IoMemory")
      .def_static("mapped", &IoMemory::mapped, nb::arg("address"), nb::arg("nbytes"), nb::arg("iova"))
      .def_static(
          "mapped_pages",
          [](std::uint64_t address, std::uint64_t nbytes, const Iovas& iovas, std::uint64_t page_bytes,
             std::uint64_t first) { return IoMemory::mapped_pages(address, nbytes, copied(iovas), page_bytes, first); },
          nb::arg("address"), nb::arg("nbytes"), nb::arg("iovas"), nb::arg("page_bytes"), nb::arg("first") = 0)
      .def_static("host", &IoMemory::host, nb::arg("address"), nb::arg("nbytes"))
      .def_static("gpu", &IoMemory::gpu, nb::arg("address"), nb::arg("nbytes"), nb::arg("device"))
      .def_prop_ro("address", &IoMemory::address)
      .def_prop_ro("nbytes", &IoMemory::nbytes);

  nb::class_<IoStaging>(module, "IoStaging")
      .def(nb::init<std::shared_ptr<IoMemory>, std::uint64_t>(), nb::arg("memory"), nb::arg("slot_bytes"))
      .def_prop_ro("slot_bytes", &IoStaging::slot_bytes)
      .def_prop_ro("slots", &IoStaging::slots)
      .def_prop_ro("free_slots", &IoStaging::free_slots)
      .def_prop_ro("page_locked", &IoStaging::page_locked)
      .def("unlock", &IoStaging::unlock, nb::call_guard<WithoutGil>())
      .def("reclaim", &IoStaging::reclaim);

  nb::class_<IoQueue>(module, "IoQueue")
      .def(
          "__init__",
          [](IoQueue* self, std::uint64_t sq_address, std::uint64_t cq_address, std::uint32_t depth,
             std::uint64_t sq_doorbell_address, std::uint64_t cq_doorbell_address, std::uint16_t queue_id,
             std::uint64_t prp_address, const Iovas& prp_iovas, std::uint32_t page_bytes,
             std::uint32_t prp_pages_per_slot) {
            IoQueue::Options options;
            options.sq_address = sq_address;
            options.cq_address = cq_address;
            options.depth = depth;
            options.sq_doorbell_address = sq_doorbell_address;
            options.cq_doorbell_address = cq_doorbell_address;
            options.id = queue_id;
            options.prp_address = prp_address;
            options.prp_iovas = copied(prp_iovas);
            options.page_bytes = page_bytes;
            options.prp_pages_per_slot = prp_pages_per_slot;
            new (self) IoQueue(std::move(options));
          },
          nb::arg("sq_address"), nb::arg("cq_address"), nb::arg("depth"), nb::arg("sq_doorbell_address"),
          nb::arg("cq_doorbell_address"), nb::arg("queue_id"), nb::arg("prp_address"), nb::arg("prp_iovas"),
          nb::arg("page_bytes"), nb::arg("prp_pages_per_slot"))
      .def("stop", &IoQueue::stop, nb::call_guard<WithoutGil>())
      .def_prop_ro("stopped", &IoQueue::stopped)
      .def_prop_ro("queue_id", &IoQueue::id)
      .def_prop_ro("slots", [](const IoQueue& queue) { return queue.pair().shape().slots; })
      .def("in_flight", &IoQueue::in_flight)
      .def("quarantined", &IoQueue::quarantined)
      .def("stats", &queue_stats);

  module.attr("MOST_SLOTS") = IoQueue::kMostSlots;
  module.def("prp_list_pages", &prp_list_pages, nb::arg("data_pages"), nb::arg("page_bytes"));
}

void bind_run(nb::module_& module) {
  nb::class_<IoRun>(module, "IoRun")
      .def(
          "__init__",
          [](IoRun* self, std::uint32_t nsid, std::uint32_t lba_bytes, std::uint64_t max_bytes,
             std::uint32_t page_bytes, std::uint8_t opcode, std::uint32_t cdw12_flags, double timeout_seconds,
             const std::vector<std::shared_ptr<IoQueue>>& queues, std::shared_ptr<IoStaging> staging,
             std::optional<std::uint64_t> stream, std::uint32_t depth) {
            IoRun::Options options;
            options.nsid = nsid;
            options.lba_bytes = lba_bytes;
            options.max_bytes = max_bytes;
            options.page_bytes = page_bytes;
            options.opcode = opcode;
            options.cdw12 = cdw12_flags;
            options.timeout = timeout_seconds;
            options.depth = depth;
            options.stream = stream;
            new (self) IoRun(options, queues, std::move(staging));
          },
          nb::arg("nsid"), nb::arg("lba_bytes"), nb::arg("max_bytes"), nb::arg("page_bytes"), nb::arg("opcode"),
          nb::arg("cdw12_flags"), nb::arg("timeout_seconds"), nb::arg("queues"), nb::arg("staging").none() = nb::none(),
          nb::arg("stream").none() = nb::none(), nb::arg("depth") = 0)
      .def("add_range", &IoRun::add_range, nb::arg("lba"), nb::arg("blocks"), nb::arg("memory"), nb::arg("offset"))
      .def(
          "add_gather",
          [](IoRun& run, std::uint64_t lbas_address, std::uint64_t count, std::uint64_t blocks,
             std::shared_ptr<IoMemory> memory, std::uint64_t offset) {
            run.add_gather(reinterpret_cast<const std::uint64_t*>(lbas_address), count, blocks, std::move(memory),
                           offset);
          },
          nb::arg("lbas_address"), nb::arg("count"), nb::arg("blocks"), nb::arg("memory"), nb::arg("offset"))
      .def(
          "add_pieces",
          [](IoRun& run, std::uint64_t lba, const std::vector<Piece>& pieces) {
            std::vector<IoRun::Span> spans;
            spans.reserve(pieces.size());
            for (const auto& [memory, offset, nbytes] : pieces) spans.push_back({memory, offset, nbytes});
            run.add_pieces(lba, spans);
          },
          nb::arg("lba"), nb::arg("pieces"))
      .def(
          "add_simple",
          [](IoRun& run, std::uint8_t opcode, const std::array<std::uint32_t, 6>& cdw10_to_15,
             const std::optional<Piece>& memory) {
            std::optional<IoRun::Span> span;
            if (memory) span = IoRun::Span{std::get<0>(*memory), std::get<1>(*memory), std::get<2>(*memory)};
            run.add_simple(opcode, cdw10_to_15, std::move(span));
          },
          nb::arg("opcode"), nb::arg("cdw10_to_15"), nb::arg("memory").none() = nb::none())
      .def(
          "drive", [](IoRun& run, double seconds) { return state_name(run.drive(seconds)); }, nb::arg("seconds"),
          nb::call_guard<WithoutGil>())
      .def("attach", &IoRun::attach, nb::arg("queues"), nb::arg("retry") = true, nb::call_guard<WithoutGil>())
      .def("abandon", &IoRun::abandon, nb::call_guard<WithoutGil>())
      .def("timed_out", &IoRun::timed_out)
      .def("failures", &failure_list)
      .def("counts", &run_counts);
}

}  // namespace

void bind_nvme(nb::module_& module) {
  bind_memory_and_queue(module);
  bind_run(module);
}

}  // namespace gpunvme
