// The software controller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "controller.h"
#include "gpu_copies.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

// GPU memory for the software controller, which knows nothing of CUDA.
class GpuMemory final : public soft::DeviceMemory {
 public:
  explicit GpuMemory(int device) : copies_(device) {}
  bool read(void* to, std::uint64_t from, std::size_t nbytes) override { return copies_.to_host(to, from, nbytes); }
  bool write(std::uint64_t to, const void* from, std::size_t nbytes) override {
    return copies_.to_gpu(to, from, nbytes);
  }
  std::string failure() const { return copies_.failure(); }

 private:
  GpuCopies copies_;
};

class Controller : public soft::Controller {
 public:
  using soft::Controller::Controller;

  void map_gpu(std::uint64_t iova, std::uint64_t nbytes, std::uint64_t address, int device, bool readable,
               bool writable) {
    map_device(iova, nbytes, address, readable, writable, gpu(device));
  }
  // What GPUs are reached by goes with the last mapping, not when the object is collected: a kernel of somebody else's
  // may run by then, and CUDA frees nothing before it has ended.
  void stop() {
    soft::Controller::stop();
    const std::lock_guard lock(mutex_);
    gpus_.clear();
  }
  // Of the first copy that failed on a GPU, or an empty string.
  std::string gpu_failure(int device) {
    const std::lock_guard lock(mutex_);
    const auto found = gpus_.find(device);
    return found == gpus_.end() ? "" : found->second->failure();
  }

 private:
  // Kept until the controller stops: memory is mapped again and again.
  std::shared_ptr<GpuMemory> gpu(int device) {
    const std::lock_guard lock(mutex_);
    std::shared_ptr<GpuMemory>& found = gpus_[device];
    if (found == nullptr) found = std::make_shared<GpuMemory>(device);
    return found;
  }

  std::mutex mutex_;
  std::map<int, std::shared_ptr<GpuMemory>> gpus_;
};

template <typename T>
void take(const nb::dict& options, const char* name, T& into) {
  if (!options.contains(name) || options[name].is_none()) return;
  const nb::object value = options[name];
  if (!nb::try_cast<T>(value, into)) {
    throw std::invalid_argument(std::string(name) + "=" + nb::str(value).c_str() + ": not a value for this option");
  }
}

soft::Options parse(const nb::dict& given) {
  static const std::set<std::string> kKnown = {"path",    "size", "lba",        "mdts",   "queues", "dstrd",
                                               "threads", "mqes", "mpsmin",     "mpsmax", "cqr",    "faults",
                                               "vwc",     "seed", "namespaces", "to",     "serial", "read_only"};
  for (const auto& [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    if (!kKnown.contains(name)) throw std::invalid_argument("a software controller has no option \"" + name + "\"");
  }
  soft::Options options;
  if (given.contains("path") && !given["path"].is_none()) {
    nb::bytes path;
    take(given, "path", path);
    options.path = std::string(path.c_str(), path.size());
  }
  take(given, "size", options.size);
  take(given, "lba", options.lba_bytes);
  take(given, "mdts", options.mdts);
  take(given, "queues", options.queues);
  take(given, "dstrd", options.dstrd);
  take(given, "threads", options.threads);
  take(given, "mqes", options.mqes);
  take(given, "mpsmin", options.mpsmin);
  // A smallest page above the usual largest one is meant to be both.
  options.mpsmax = std::max(options.mpsmax, options.mpsmin);
  take(given, "mpsmax", options.mpsmax);
  take(given, "cqr", options.cqr);
  take(given, "vwc", options.vwc);
  take(given, "namespaces", options.namespaces);
  take(given, "to", options.to);
  take(given, "faults", options.faults);
  take(given, "seed", options.seed);
  take(given, "serial", options.serial);
  take(given, "read_only", options.read_only);
  return options;
}

std::vector<std::tuple<std::uint64_t, std::uint64_t, bool>> dma_faults(const Controller& controller) {
  std::vector<std::tuple<std::uint64_t, std::uint64_t, bool>> faults;
  for (const auto& fault : controller.dma_faults()) faults.emplace_back(fault.iova, fault.nbytes, fault.write);
  return faults;
}

}  // namespace

void bind_soft(nb::module_& module) {
  // Whatever may wait for a worker, for a drive or for another thread does so without the GIL.
  using Released = nb::call_guard<WithoutGil>;
  nb::class_<Controller>(module, "SoftController")
      .def(
          "__init__",
          [](Controller* self, const nb::dict& given) {
            const soft::Options options = parse(given);
            WithoutGil release;
            new (self) Controller(options);
          },
          nb::arg("options"))
      .def("read", &Controller::read, nb::arg("offset"), nb::arg("nbytes"), Released())
      .def("write", &Controller::write, nb::arg("offset"), nb::arg("nbytes"), nb::arg("value"), Released())
      .def_prop_ro("doorbells_address",
                   [](const Controller& self) { return reinterpret_cast<std::uintptr_t>(self.doorbells().address()); })
      .def_prop_ro("doorbells_fd", [](const Controller& self) { return self.doorbells().fd(); })
      .def_prop_ro("doorbells_nbytes", [](const Controller& self) { return self.doorbells().nbytes(); })
      .def_prop_ro("bar_nbytes", &Controller::bar_nbytes)
      .def(
          "map",
          [](Controller& self, std::uint64_t iova, std::uint64_t nbytes, std::uint64_t address, bool readable,
             bool writable) { self.map(iova, nbytes, reinterpret_cast<void*>(address), readable, writable); },
          nb::arg("iova"), nb::arg("nbytes"), nb::arg("address"), nb::arg("readable") = true,
          nb::arg("writable") = true, Released())
      .def("map_gpu", &Controller::map_gpu, nb::arg("iova"), nb::arg("nbytes"), nb::arg("address"), nb::arg("device"),
           nb::arg("readable") = true, nb::arg("writable") = true, Released())
      .def("gpu_failure", &Controller::gpu_failure, nb::arg("device"), Released())
      .def("unmap", &Controller::unmap, nb::arg("iova"), nb::arg("nbytes"), Released())
      .def("set_interrupt", &Controller::set_interrupt, nb::arg("vector"), nb::arg("eventfd"), Released())
      .def("reset", &Controller::reset, Released())
      .def("stats", &Controller::stats)
      .def("dma_faults", &dma_faults)
      .def("inject", &Controller::inject, nb::arg("faults"), nb::arg("seed"), Released())
      .def("step", &Controller::step, Released())
      .def("stop", &Controller::stop, Released());
}

}  // namespace gpunvme
