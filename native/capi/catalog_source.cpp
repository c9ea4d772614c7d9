#include "catalog_source.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "catalog/parse.h"
#include "failure.h"

namespace gpunvme::capi {
namespace {

// A reader that finds another generation each time it looks gives up after so many.
constexpr int kLooks = 10;

[[noreturn]] void refuse(const std::string& name, const catalog::Problem& problem) {
  throw Refusal(GPUNVME_ECATALOG,
                name + " at offset " + std::to_string(problem.offset) + ": the catalog is damaged: " + problem.reason);
}

}  // namespace

std::shared_ptr<CatalogSource> CatalogSource::open(const char* path) {
  std::shared_ptr<CatalogSource> opened(new CatalogSource(open_file(path, GPUNVME_READ_ONLY)));
  const std::string& name = opened->file()->name();
  for (int look = 0; look < kLooks; ++look) {
    const catalog::Superblocks found = opened->read_superblocks();
    if (const catalog::Problem* refusal = found.refusal()) refuse(name, *refusal);
    const catalog::Superblock* newest = found.newest();
    if (newest == nullptr) {
      const auto reason = found.problems[0] ? ": " + found.problems[0]->reason : "";
      throw Refusal(GPUNVME_ECATALOG, name + " holds no catalog" + reason);
    }
    const auto problem = opened->take_up(*newest);
    if (!problem) return opened;
    const catalog::Superblocks again = opened->read_superblocks();
    if (again.newest() != nullptr && again.newest()->generation == newest->generation) refuse(name, *problem);
    // A writer was faster: the table that was wanted is not there any more.
  }
  throw Refusal(GPUNVME_ECHANGED,
                name + ": the catalog changed each of the " + std::to_string(kLooks) + " times that it was read");
}

std::vector<std::uint8_t> CatalogSource::read_bytes(std::uint64_t offset, std::uint64_t nbytes) const {
  std::vector<std::uint8_t> bytes(nbytes);
  std::uint64_t got = 0;
  while (got < nbytes) {
    const ssize_t more = pread(file()->fd(), bytes.data() + got, nbytes - got, static_cast<off_t>(offset + got));
    if (more < 0 && errno == EINTR) continue;
    if (more < 0) throw file_failure(errno, "read", file()->name(), static_cast<std::int64_t>(offset + got));
    if (more == 0) break;
    got += static_cast<std::uint64_t>(more);
  }
  bytes.resize(got);
  return bytes;
}

catalog::Superblocks CatalogSource::read_superblocks() const {
  const auto first = read_bytes(catalog::kSlots[0], catalog::kSuperblockBytes);
  const auto second = read_bytes(catalog::kSlots[1], catalog::kSuperblockBytes);
  return catalog::read_superblocks({first, second}, file()->size());
}

std::optional<catalog::Problem> CatalogSource::take_up(const catalog::Superblock& superblock) {
  const std::uint64_t size = file()->size();
  if (superblock.table_offset > size || superblock.table_bytes > size - superblock.table_offset) {
    return catalog::Problem{superblock.table_offset, "its table lies beyond the end", false};
  }
  std::vector<catalog::Region> regions;
  auto problem =
      catalog::parse_table(read_bytes(superblock.table_offset, superblock.table_bytes), superblock, size, regions);
  if (problem) return problem;
  superblock_ = superblock;
  kinds_.clear();
  names_.clear();
  for (catalog::Region& region : regions) {
    kinds_.push_back({region.kind, region.offset, region.nbytes, region.record_bytes});
    names_.push_back(std::move(region.name));
  }
  return std::nullopt;
}

std::uint64_t CatalogSource::kind_of(const std::string& name) const {
  const auto found = std::find(names_.begin(), names_.end(), name);
  if (name.empty() || found == names_.end()) {
    throw Refusal(GPUNVME_EINVAL, file()->name() + ": the catalog has no region that is called \"" + name + "\"");
  }
  return kinds_[static_cast<std::size_t>(found - names_.begin())].kind;
}

void CatalogSource::check_current() const {
  const catalog::Superblocks found = read_superblocks();
  for (const catalog::Superblock* superblock : {found.newest(), found.previous()}) {
    if (superblock != nullptr && superblock->id == superblock_.id && superblock->generation == superblock_.generation) {
      return;
    }
  }
  throw Refusal(GPUNVME_ECHANGED, file()->name() + ": what was read is of generation " +
                                      std::to_string(superblock_.generation) +
                                      ", whose space may have been written again: open the catalog again");
}

}  // namespace gpunvme::capi
