// Files and what the kernel says of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "direct_io.h"
#include "failure.h"
#include "page_cache.h"
#include "source_file.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

const char* kind_name(FailureKind kind) {
  switch (kind) {
    case FailureKind::kFile:
      return "file";
    case FailureKind::kTruncated:
      return "truncated";
    case FailureKind::kCuda:
      return "cuda";
    case FailureKind::kCancelled:
      return "cancelled";
    case FailureKind::kDeadline:
      return "deadline";
  }
  return "file";
}

// File names are bytes: they need not be UTF-8.
nb::bytes as_bytes(const std::string& text) { return nb::bytes(text.data(), text.size()); }

SourceFile::Mode parse_mode(const std::string& mode) {
  if (mode == "r") return SourceFile::Mode::kRead;
  if (mode == "r+") return SourceFile::Mode::kReadWrite;
  return SourceFile::Mode::kCreate;
}

}  // namespace

nb::object failure_tuple(const Failure& failure) {
  return nb::make_tuple(kind_name(failure.kind), failure.what(), failure.error_number, as_bytes(failure.file),
                        failure.offset);
}

void bind_files(nb::module_& module) {
  // Python turns these arguments into its own error: (kind, message, errno, file name, offset).
  static PyObject* failure_type = nb::exception<Failure>(module, "Failure").ptr();
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const Failure& failure) {
      PyErr_SetObject(failure_type, failure_tuple(failure).ptr());
    }
  });

  nb::class_<SourceFile>(module, "SourceFile", nb::is_weak_referenceable())
      .def_static(
          "open",
          [](nb::bytes path, const std::string& mode) {
            const std::string name(path.c_str(), path.size());
            WithoutGil release;
            return SourceFile::open(name, parse_mode(mode));
          },
          nb::arg("path"), nb::arg("mode"))
      .def_static(
          "from_descriptor",
          [](int fd, nb::bytes name) {
            return SourceFile::from_descriptor(fd, {name.c_str(), name.size()});
          },
          nb::arg("fd"), nb::arg("name"))
      .def("size", &SourceFile::size)
      .def("fileno", &SourceFile::fd)
      .def("reserve", &SourceFile::reserve, nb::arg("offset"), nb::arg("nbytes"), nb::call_guard<WithoutGil>())
      .def_prop_ro("writable", &SourceFile::writable)
      .def_prop_ro("is_block_device", &SourceFile::is_block_device)
      .def_prop_ro("in_memory", &SourceFile::in_memory)
      .def_prop_ro("direct_refusal", &SourceFile::direct_refusal)
      .def_prop_ro("memory_align", &SourceFile::memory_align)
      .def_prop_ro("offset_align", &SourceFile::offset_align);

  module.def("cached_bytes", &cached_bytes, nb::arg("fd"), nb::arg("offset"), nb::arg("nbytes"),
             nb::call_guard<WithoutGil>());
  module.def(
      "dio_alignment",
      [](int fd) -> std::optional<std::pair<std::uint32_t, std::uint32_t>> {
        const auto file = SourceFile::from_descriptor(fd, "");
        if (file->direct_fd() < 0) return std::nullopt;
        return std::make_pair(file->memory_align(), file->offset_align());
      },
      nb::arg("fd"));
  module.def("io_uring_reason", &io_uring_refusal);
}

}  // namespace gpunvme
