#include "catalog/space.h"

#include <algorithm>

namespace gpunvme::catalog {

std::vector<Extent> used_by(const Superblock& superblock, const std::vector<Region>& regions) {
  std::vector<Extent> used = {{superblock.table_offset, round_up(superblock.table_bytes, superblock.alignment)}};
  for (const Region& region : regions) {
    if (region.nbytes > 0) used.push_back({region.offset, round_up(region.nbytes, superblock.alignment)});
  }
  return used;
}

void Space::add(const std::vector<Extent>& used) {
  // All at once: inserting thousands one by one into a sorted vector costs the square of their number.
  for (const Extent& extent : used) {
    if (extent.nbytes > 0) used_.push_back({extent.offset, round_up(extent.nbytes, alignment_)});
  }
  std::sort(used_.begin(), used_.end(), [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  std::vector<Extent> joined;
  for (const Extent& extent : used_) {
    if (!joined.empty() && extent.offset <= joined.back().offset + joined.back().nbytes) {
      const std::uint64_t reached =
          std::max(joined.back().offset + joined.back().nbytes, extent.offset + extent.nbytes);
      joined.back().nbytes = reached - joined.back().offset;
    } else {
      joined.push_back(extent);
    }
  }
  used_ = std::move(joined);
}

std::optional<std::uint64_t> Space::take(std::uint64_t nbytes) {
  if (nbytes > kMostBytes) return std::nullopt;
  const std::uint64_t first = round_up(kHeadBytes, alignment_);
  if (nbytes == 0) return first;
  const std::uint64_t wanted = round_up(nbytes, alignment_);
  std::uint64_t at = first;
  for (const Extent& extent : used_) {
    if (extent.offset > at && extent.offset - at >= wanted) break;
    at = std::max(at, extent.offset + extent.nbytes);
  }
  if (at > end_ || wanted > end_ - at) return std::nullopt;
  insert({at, wanted});
  return at;
}

void Space::insert(Extent extent) {
  const auto by_offset = [](const Extent& a, const Extent& b) { return a.offset < b.offset; };
  auto next = std::lower_bound(used_.begin(), used_.end(), extent, by_offset);
  const bool joins_next = next != used_.end() && extent.offset + extent.nbytes == next->offset;
  if (next != used_.begin()) {
    const auto before = std::prev(next);
    if (before->offset + before->nbytes == extent.offset) {
      before->nbytes += extent.nbytes;
      if (joins_next) {
        before->nbytes += next->nbytes;
        used_.erase(next);
      }
      return;
    }
  }
  if (joins_next) {
    next->offset = extent.offset;
    next->nbytes += extent.nbytes;
  } else {
    used_.insert(next, extent);
  }
}

std::uint64_t Space::longest() const {
  std::uint64_t most = 0;
  std::uint64_t at = round_up(kHeadBytes, alignment_);
  for (const Extent& extent : used_) {
    if (extent.offset > at) most = std::max(most, std::min(extent.offset, end_) - std::min(at, end_));
    at = std::max(at, extent.offset + extent.nbytes);
  }
  return at < end_ ? std::max(most, end_ - at) : most;
}

}  // namespace gpunvme::catalog
