#include "command_data.h"

namespace gpunvme::soft {

std::uint16_t CommandData::find_device(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                                       std::uint64_t page_bytes, bool write) {
  // All of it is found before any of it is moved.
  const std::uint16_t status = resolve_pieces(dma, prp1, prp2, nbytes, page_bytes, write, pieces_);
  if (status != nvme::kStatusSuccess) return status;
  if (room_ < nbytes) {
    buffer_ = std::make_unique<std::byte[]>(nbytes);
    room_ = nbytes;
  }
  segments_.assign(1, {buffer_.get(), nbytes});
  if (write) return nvme::kStatusSuccess;
  std::byte* to = buffer_.get();
  for (const Dma::Piece& piece : pieces_) {
    if (!dma.read(piece, to)) return nvme::kStatusDataTransferError;
    to += piece.nbytes;
  }
  return nvme::kStatusSuccess;
}

std::uint16_t CommandData::deliver(Dma& dma) {
  const std::byte* from = buffer_.get();
  for (const Dma::Piece& piece : pieces_) {
    if (!dma.write(piece, from)) return nvme::kStatusDataTransferError;
    from += piece.nbytes;
  }
  return nvme::kStatusSuccess;
}

}  // namespace gpunvme::soft
