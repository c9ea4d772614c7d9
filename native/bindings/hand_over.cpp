// GPU memory that is computed with and filled again, in the order of streams.
#include "hand_over.h"

#include <nanobind/nanobind.h>

#include "bindings.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

CUstream stream_of(std::uint64_t handle) { return reinterpret_cast<CUstream>(handle); }

}  // namespace

void bind_hand_over(nb::module_& module) {
  using Unlocked = nb::call_guard<WithoutGil>;
  nb::class_<HandOver>(module, "HandOver")
      .def(nb::init<int>(), nb::arg("device"), Unlocked())
      .def_prop_ro("stream", [](const HandOver& self) { return reinterpret_cast<std::uintptr_t>(self.stream()); })
      .def(
          "follow", [](HandOver& self, std::uint64_t stream) { self.follow(stream_of(stream)); }, nb::arg("stream"),
          Unlocked())
      .def("passed", &HandOver::passed, Unlocked())
      .def(
          "fill",
          [](HandOver& self, std::uint64_t to, std::uint64_t from, std::uint64_t nbytes) {
            self.fill(to, reinterpret_cast<const void*>(from), nbytes);
          },
          nb::arg("to"), nb::arg("from_"), nb::arg("nbytes"), Unlocked())
      .def(
          "lead", [](HandOver& self, std::uint64_t stream) { self.lead(stream_of(stream)); }, nb::arg("stream"),
          Unlocked())
      .def("wait", &HandOver::wait, Unlocked());
  nb::class_<PageLocked>(module, "PageLocked")
      .def(nb::init<int, std::size_t>(), nb::arg("device"), nb::arg("nbytes"), Unlocked())
      .def_prop_ro("address", [](const PageLocked& self) { return reinterpret_cast<std::uintptr_t>(self.address()); });
}

}  // namespace gpunvme
