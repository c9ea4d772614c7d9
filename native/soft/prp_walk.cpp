#include "prp_walk.h"

#include <algorithm>
#include <cstddef>

namespace gpunvme::soft {
namespace {

constexpr std::uint16_t kInvalidOffset = nvme::kStatusPrpOffsetInvalid | nvme::kStatusDnr;

// Adds host memory to `segments`, which may take several pieces where mappings meet.
bool append(Dma& dma, std::uint64_t iova, std::uint64_t nbytes, bool write, Segments& segments) {
  while (nbytes > 0) {
    std::uint64_t available = 0;
    std::byte* const address = dma.at(iova, nbytes, write, &available);
    if (address == nullptr) return false;
    if (!segments.empty() && static_cast<std::byte*>(segments.back().iov_base) + segments.back().iov_len == address) {
      segments.back().iov_len += available;
    } else {
      segments.push_back({address, available});
    }
    iova += available;
    nbytes -= available;
  }
  return true;
}

bool append(Dma& dma, std::uint64_t iova, std::uint64_t nbytes, bool write, Pieces& pieces) {
  while (nbytes > 0) {
    Dma::Piece piece;
    if (!dma.find(iova, nbytes, write, piece)) return false;
    if (!pieces.empty() && pieces.back().mapping == piece.mapping &&
        pieces.back().iova + pieces.back().nbytes == piece.iova) {
      pieces.back().nbytes += piece.nbytes;
    } else {
      pieces.push_back(piece);
    }
    iova += piece.nbytes;
    nbytes -= piece.nbytes;
  }
  return true;
}

// Calls `use(entry)` for `count` entries of the list at `list`; `use` returns a status. A list ends with its page;
// where more entries are needed than fit, its last one leads to the next list.
template <typename Use>
std::uint16_t walk(Dma& dma, std::uint64_t list, std::uint64_t count, std::uint64_t page_bytes, Use use) {
  // The list that the command names may start anywhere in its page, at a quadword.
  if (list % 8 != 0) return kInvalidOffset;
  std::uint64_t entries[64];
  while (count > 0) {
    const std::uint64_t fit = (page_bytes - list % page_bytes) / 8;
    const bool chained = count > fit;
    std::uint64_t data = chained ? fit - 1 : count;
    count -= data;
    while (data > 0) {
      const std::uint64_t now = std::min<std::uint64_t>(data, std::size(entries));
      // Copied before they are looked at: the host may change them meanwhile.
      if (!dma.read(list, entries, now * 8)) return nvme::kStatusDataTransferError;
      for (std::uint64_t i = 0; i < now; ++i) {
        if (const std::uint16_t status = use(entries[i]); status != nvme::kStatusSuccess) return status;
      }
      list += now * 8;
      data -= now;
    }
    if (!chained) break;
    std::uint64_t next = 0;
    if (!dma.read(list, &next, 8)) return nvme::kStatusDataTransferError;
    if (next % page_bytes != 0) return kInvalidOffset;
    list = next;
  }
  return nvme::kStatusSuccess;
}

// `found` takes what is at each page, in order.
template <typename Found>
std::uint16_t resolve(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes, std::uint64_t page_bytes,
                      bool write, Found& found) {
  found.clear();
  // Only the first entry may point into a page.
  if (prp1 % 4 != 0) return kInvalidOffset;
  const std::uint64_t first = std::min(nbytes, page_bytes - prp1 % page_bytes);
  if (!append(dma, prp1, first, write, found)) return nvme::kStatusDataTransferError;
  std::uint64_t rest = nbytes - first;
  if (rest == 0) return nvme::kStatusSuccess;

  const auto page = [&](std::uint64_t entry) -> std::uint16_t {
    if (entry % page_bytes != 0) return kInvalidOffset;
    const std::uint64_t now = std::min(rest, page_bytes);
    if (!append(dma, entry, now, write, found)) return nvme::kStatusDataTransferError;
    rest -= now;
    return nvme::kStatusSuccess;
  };
  // One more page: PRP2 is its address. More: PRP2 is a list's.
  if (rest <= page_bytes) return page(prp2);
  return walk(dma, prp2, (rest + page_bytes - 1) / page_bytes, page_bytes, page);
}

}  // namespace

std::uint16_t resolve_prps(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                           std::uint64_t page_bytes, bool write, Segments& segments) {
  return resolve(dma, prp1, prp2, nbytes, page_bytes, write, segments);
}

std::uint16_t resolve_pieces(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                             std::uint64_t page_bytes, bool write, Pieces& pieces) {
  return resolve(dma, prp1, prp2, nbytes, page_bytes, write, pieces);
}

std::uint16_t read_queue_pages(Dma& dma, std::uint64_t list, std::uint64_t pages, std::uint64_t page_bytes,
                               std::vector<std::uint64_t>& addresses) {
  addresses.clear();
  return walk(dma, list, pages, page_bytes, [&](std::uint64_t entry) -> std::uint16_t {
    if (entry % page_bytes != 0) return kInvalidOffset;
    addresses.push_back(entry);
    return nvme::kStatusSuccess;
  });
}

}  // namespace gpunvme::soft
