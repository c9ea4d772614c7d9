// Catalogs on a device, as src/gpunvme/catalog sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "bindings.h"
#include "catalog/crc32.h"
#include "catalog/format.h"
#include "catalog/parse.h"
#include "catalog/serialise.h"
#include "catalog/space.h"
#include "catalog/superblocks.h"

namespace nb = nanobind;

namespace gpunvme {
namespace {

using catalog::Extent;
using catalog::Problem;
using catalog::Region;
using catalog::Space;
using catalog::Superblock;

std::span<const std::uint8_t> span_of(const nb::bytes& bytes) {
  return {static_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

template <typename Bytes>
nb::bytes as_bytes(const Bytes& bytes) {
  return nb::bytes(bytes.data(), bytes.size());
}

nb::object as_tuple(const std::optional<Problem>& problem) {
  if (!problem) return nb::none();
  return nb::make_tuple(problem->offset, problem->reason);
}

nb::object copy_of(const Superblock* superblock) { return superblock == nullptr ? nb::none() : nb::cast(*superblock); }

std::string element_type_name(const Region& region) {
  if (region.element_type >= catalog::kElementTypes.size()) return "";
  return std::string(catalog::kElementTypes[region.element_type].name);
}

void set_element_type(Region& region, const std::string& name) {
  const auto& types = catalog::kElementTypes;
  const auto found = std::find_if(types.begin(), types.end(), [&](const auto& type) { return type.name == name; });
  if (found == types.end()) throw std::invalid_argument("unknown element type " + name);
  region.element_type = static_cast<std::uint16_t>(found - types.begin());
}

}  // namespace

void bind_catalog(nb::module_& module) {
  nb::class_<Superblock>(module, "CatalogSuperblock")
      .def(nb::init<>())
      .def_prop_rw(
          "id", [](const Superblock& self) { return as_bytes(self.id); },
          [](Superblock& self, const nb::bytes& id) {
            if (id.size() != self.id.size()) throw std::invalid_argument("a catalog's id has 16 bytes");
            std::ranges::copy(span_of(id), self.id.begin());
          })
      .def_rw("generation", &Superblock::generation)
      .def_rw("alignment", &Superblock::alignment)
      .def_rw("capacity", &Superblock::capacity)
      .def_rw("table_offset", &Superblock::table_offset)
      .def_rw("table_bytes", &Superblock::table_bytes)
      .def_rw("table_crc32", &Superblock::table_crc32)
      .def_rw("regions", &Superblock::regions)
      .def("serialise", [](const Superblock& self) { return as_bytes(catalog::serialise_superblock(self)); });

  nb::class_<Region>(module, "CatalogRegion")
      .def(nb::init<>())
      .def_rw("kind", &Region::kind)
      .def_rw("offset", &Region::offset)
      .def_rw("nbytes", &Region::nbytes)
      .def_rw("record_bytes", &Region::record_bytes)
      .def_rw("crc32", &Region::crc32)
      .def_prop_rw("dtype", &element_type_name, &set_element_type)
      .def_rw("shape", &Region::shape)
      .def_rw("name", &Region::name);

  nb::class_<Space>(module, "CatalogSpace")
      .def(nb::init<std::uint64_t, std::uint64_t>(), nb::arg("end"), nb::arg("alignment"))
      .def(
          "add",
          [](Space& self, const Superblock& superblock, const std::vector<Region>& regions) {
            self.add(catalog::used_by(superblock, regions));
          },
          nb::arg("superblock"), nb::arg("regions"))
      .def("take", &Space::take, nb::arg("nbytes"))
      .def("longest", &Space::longest);

  // (newest, previous, what forbids trusting them, what is wrong with either slot, whether either begins like a
  // superblock)
  module.def(
      "catalog_superblocks",
      [](const nb::bytes& first, const nb::bytes& second, std::uint64_t device_bytes) {
        const auto found = catalog::read_superblocks({span_of(first), span_of(second)}, device_bytes);
        return nb::make_tuple(copy_of(found.newest()), copy_of(found.previous()),
                              as_tuple(found.refusal() != nullptr ? std::optional(*found.refusal()) : std::nullopt),
                              nb::make_tuple(as_tuple(found.problems[0]), as_tuple(found.problems[1])),
                              catalog::has_magic(span_of(first)) || catalog::has_magic(span_of(second)));
      },
      nb::arg("first"), nb::arg("second"), nb::arg("device_bytes"));
  // (regions, None) or (None, (offset, reason))
  module.def(
      "catalog_table",
      [](const nb::bytes& bytes, const Superblock& superblock, std::uint64_t device_bytes) {
        std::vector<Region> regions;
        const auto problem = catalog::parse_table(span_of(bytes), superblock, device_bytes, regions);
        return problem ? nb::make_tuple(nb::none(), as_tuple(problem)) : nb::make_tuple(std::move(regions), nb::none());
      },
      nb::arg("data"), nb::arg("superblock"), nb::arg("device_bytes"));
  module.def(
      "catalog_check",
      [](const std::vector<Region>& regions, const Superblock& superblock, std::uint64_t device_bytes) {
        return as_tuple(catalog::check_regions(regions, superblock, device_bytes));
      },
      nb::arg("regions"), nb::arg("superblock"), nb::arg("device_bytes"));
  module.def("catalog_table_bytes", &catalog::table_bytes, nb::arg("regions"));
  module.def(
      "catalog_serialise_table",
      [](const std::vector<Region>& regions, std::uint64_t generation) {
        return as_bytes(catalog::serialise_table(regions, generation));
      },
      nb::arg("regions"), nb::arg("generation"));
  module.def(
      "catalog_crc32", [](const nb::bytes& bytes) { return catalog::crc32(span_of(bytes)); }, nb::arg("data"));

  nb::dict limits;
  limits["SUPERBLOCK_BYTES"] = catalog::kSuperblockBytes;
  limits["SLOT_BYTES"] = catalog::kSlotBytes;
  limits["HEAD_BYTES"] = catalog::kHeadBytes;
  limits["LEAST_ALIGNMENT"] = catalog::kLeastAlignment;
  limits["MOST_ALIGNMENT"] = catalog::kMostAlignment;
  limits["MOST_BYTES"] = catalog::kMostBytes;
  limits["MOST_REGIONS"] = catalog::kMostRegions;
  limits["MOST_TABLE_BYTES"] = catalog::kMostTableBytes;
  limits["MOST_NAME_BYTES"] = catalog::kMostNameBytes;
  limits["MOST_DIMENSIONS"] = catalog::kMostDimensions;
  module.attr("CATALOG") = limits;
}

}  // namespace gpunvme
