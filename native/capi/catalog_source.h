// A file or block device with a catalog, opened for reading: one generation of it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "catalog/format.h"
#include "catalog/superblocks.h"
#include "source.h"

namespace gpunvme::capi {

class CatalogSource : public Source {
 public:
  static constexpr const char* kWhat = "a catalog";

  // Throws Refusal (GPUNVME_ECATALOG: there is none, or it is damaged), or Failure (kFile).
  static std::shared_ptr<CatalogSource> open(const char* path);

  const char* what() const override { return kWhat; }

  // In the order of its table.
  const std::vector<gpunvme_kind>& kinds() const { return kinds_; }
  // Throws Refusal (GPUNVME_EINVAL).
  std::uint64_t kind_of(const std::string& name) const;
  // What was read until now was of this generation; else Refusal (GPUNVME_ECHANGED). A writer takes a superblock away
  // before it uses the space that it refers to again.
  void check_current() const override;

 private:
  explicit CatalogSource(std::shared_ptr<SourceFile> file) : Source(std::move(file)) {}
  catalog::Superblocks read_superblocks() const;
  std::vector<std::uint8_t> read_bytes(std::uint64_t offset, std::uint64_t nbytes) const;
  // What is wrong with the newest generation's table, and where; nothing if it was taken up.
  std::optional<catalog::Problem> take_up(const catalog::Superblock& superblock);

  catalog::Superblock superblock_;
  std::vector<gpunvme_kind> kinds_;
  std::vector<std::string> names_;
};

}  // namespace gpunvme::capi
