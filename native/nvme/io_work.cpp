#include "io_work.h"

#include <algorithm>
#include <stdexcept>

namespace gpunvme {

void Work::add_piece(std::shared_ptr<IoMemory> memory, std::uint64_t offset, std::uint64_t nbytes) {
  if (offset > memory->nbytes() || nbytes > memory->nbytes() - offset) {
    throw std::invalid_argument("a transfer goes past the end of its memory");
  }
  if (nbytes == 0) return;
  pieces.push_back({std::move(memory), offset, nbytes, this->nbytes});
  this->nbytes += nbytes;
}

const Work::Piece& Work::piece_at(std::uint64_t at) const {
  if (pieces.size() == 1) return pieces.front();
  const auto after =
      std::partition_point(pieces.begin(), pieces.end(), [at](const Piece& piece) { return piece.begin <= at; });
  return *(after - 1);
}

std::uint64_t Work::build(PrpBuilder& builder, std::uint64_t at, std::uint64_t nbytes) const {
  std::uint64_t done = 0;
  for (const Piece* piece = &piece_at(at); done < nbytes; ++piece) {
    if (piece->memory->kind() != IoMemory::Kind::kMapped) break;
    const std::uint64_t end = std::min(at + nbytes, piece->begin + piece->nbytes);
    while (at + done < end) {
      const auto extent = piece->memory->extent(piece->offset + (at + done - piece->begin), end - at - done);
      const std::uint64_t taken = builder.add(extent.iova, extent.nbytes);
      done += taken;
      if (taken < extent.nbytes) return done;
    }
  }
  return done;
}

bool Work::is_direct(std::uint64_t at, std::uint64_t nbytes, std::uint64_t page_bytes) const {
  const std::uint64_t begin = at;
  const std::uint64_t end = at + nbytes;
  std::uint64_t reached = 0;  // where the last extent ended, for the controller
  for (const Piece* piece = &piece_at(at); at < end; ++piece) {
    if (piece->memory->kind() != IoMemory::Kind::kMapped) return false;
    const std::uint64_t piece_end = std::min(end, piece->begin + piece->nbytes);
    while (at < piece_end) {
      const auto extent = piece->memory->extent(piece->offset + (at - piece->begin), piece_end - at);
      const bool page_ended = reached % page_bytes == 0;
      const bool suits =
          at == begin ? extent.iova % 4 == 0 : (page_ended ? extent.iova % page_bytes == 0 : extent.iova == reached);
      if (!suits) return false;
      at += extent.nbytes;
      reached = extent.iova + extent.nbytes;
    }
  }
  return true;
}

}  // namespace gpunvme
