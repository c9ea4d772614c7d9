// Memory of devices: what the CPU does not touch, but has copied.
#include "dma.h"

namespace gpunvme::soft {

bool Dma::find(std::uint64_t iova, std::uint64_t nbytes, bool write, Piece& piece) {
  if (last_ == nullptr || iova - last_->iova >= last_->nbytes) {
    if (!find(iova, nbytes, write)) return false;
  }
  if (!(write ? last_->writable : last_->readable)) {
    is_device_ = false;
    table_.refuse(iova, nbytes, write);
    return false;
  }
  piece = {last_, iova, std::min(nbytes, last_->nbytes - (iova - last_->iova))};
  return true;
}

bool Dma::read(const Piece& piece, void* to) {
  const IovaTable::Mapping& mapping = *piece.mapping;
  const std::byte* const from = mapping.address + (piece.iova - mapping.iova);
  if (mapping.device == nullptr) {
    std::memcpy(to, from, piece.nbytes);
    return true;
  }
  table_.count_copy(piece.nbytes);
  if (mapping.device->read(to, reinterpret_cast<std::uintptr_t>(from), piece.nbytes)) return true;
  is_device_ = false;
  table_.copy_failed(piece.iova, piece.nbytes, false);
  return false;
}

bool Dma::write(const Piece& piece, const void* from) {
  const IovaTable::Mapping& mapping = *piece.mapping;
  std::byte* const to = mapping.address + (piece.iova - mapping.iova);
  if (mapping.device == nullptr) {
    std::memcpy(to, from, piece.nbytes);
    return true;
  }
  table_.count_copy(piece.nbytes);
  if (mapping.device->write(reinterpret_cast<std::uintptr_t>(to), from, piece.nbytes)) return true;
  is_device_ = false;
  table_.copy_failed(piece.iova, piece.nbytes, true);
  return false;
}

bool Dma::read_pieces(std::uint64_t iova, std::byte* to, std::uint64_t nbytes) {
  while (nbytes > 0) {
    Piece piece;
    if (!find(iova, nbytes, false, piece) || !read(piece, to)) return false;
    to += piece.nbytes;
    iova += piece.nbytes;
    nbytes -= piece.nbytes;
  }
  return true;
}

bool Dma::write(std::uint64_t iova, const void* from, std::uint64_t nbytes) {
  Piece piece;
  // Entries of queues lie in whole pages, and so in one mapping.
  return find(iova, nbytes, true, piece) && piece.nbytes == nbytes && write(piece, from);
}

}  // namespace gpunvme::soft
