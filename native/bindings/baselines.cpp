// The baselines, for gpunvme.bench.
#include "baselines.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

using Offsets = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

double preadv_threads(int fd, std::uint64_t address, const Offsets& offsets, std::uint64_t each, unsigned threads) {
  WithoutGil release;
  return baselines::pread_random(fd, address, offsets.data(), offsets.size(), each, threads);
}

double mmap_copy(int fd, std::uint64_t address, const std::optional<Offsets>& offsets, std::uint64_t each,
                 unsigned threads) {
  WithoutGil release;
  return baselines::mmap_copy(fd, address, offsets ? offsets->data() : nullptr, offsets ? offsets->size() : 0, each,
                              threads);
}

double direct_read_random(const std::string& path, std::uint64_t address, const Offsets& offsets, std::uint64_t each,
                          unsigned depth) {
  WithoutGil release;
  return baselines::direct_random(path, address, offsets.data(), offsets.size(), each, depth);
}

}  // namespace

void bind_baselines(nb::module_& module) {
  const auto release = nb::call_guard<WithoutGil>();
  module.def("pread_sequential", &baselines::pread_sequential, nb::arg("fd"), nb::arg("address"), nb::arg("nbytes"),
             nb::arg("chunk"), nb::arg("threads"), release);
  module.def("preadv_threads", &preadv_threads, nb::arg("fd"), nb::arg("address"), nb::arg("offsets"), nb::arg("each"),
             nb::arg("threads"));
  module.def("mmap_copy", &mmap_copy, nb::arg("fd"), nb::arg("address"), nb::arg("offsets").none(), nb::arg("each"),
             nb::arg("threads"));
  module.def(
      "direct_read",
      [](const std::string& path, std::uint64_t address, std::uint64_t nbytes, std::uint64_t chunk, unsigned depth) {
        return baselines::direct_sequential(path, false, address, nbytes, chunk, depth);
      },
      nb::arg("path"), nb::arg("address"), nb::arg("nbytes"), nb::arg("chunk"), nb::arg("depth"), release);
  module.def(
      "direct_write",
      [](const std::string& path, std::uint64_t address, std::uint64_t nbytes, std::uint64_t chunk, unsigned depth) {
        return baselines::direct_sequential(path, true, address, nbytes, chunk, depth);
      },
      nb::arg("path"), nb::arg("address"), nb::arg("nbytes"), nb::arg("chunk"), nb::arg("depth"), release);
  module.def("direct_read_random", &direct_read_random, nb::arg("path"), nb::arg("address"), nb::arg("offsets"),
             nb::arg("each"), nb::arg("depth"));
  module.def("h2d_ceiling", &baselines::h2d_ceiling, nb::arg("device"), nb::arg("nbytes"), release);
}

}  // namespace gpunvme
