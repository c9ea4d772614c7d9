// Where a command's data is: its PRP entries and PRP lists, followed and checked (Base 2.0, 4.1.1).
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "dma.h"
#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {

// Pieces of host memory, in the data's order, neighbours joined.
using Segments = std::vector<iovec>;
// The same for memory of which some is a device's.
using Pieces = std::vector<Dma::Piece>;

// Fills `segments` with the `nbytes` (at least 1) that PRP1 and PRP2 describe. `write`: the controller will write to
// them. Returns a status: success, an invalid offset, or a data transfer error where DMA was refused. Reads no more
// list entries than `nbytes` needs, whatever the lists say. A data transfer error with dma.is_device() means that some
// of the memory is a device's: then it is for resolve_pieces.
std::uint16_t resolve_prps(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                           std::uint64_t page_bytes, bool write, Segments& segments);

// The same for any memory.
std::uint16_t resolve_pieces(Dma& dma, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                             std::uint64_t page_bytes, bool write, Pieces& pieces);

// The entries of a queue that is not contiguous: `pages` page addresses from the list at `list`.
std::uint16_t read_queue_pages(Dma& dma, std::uint64_t list, std::uint64_t pages, std::uint64_t page_bytes,
                               std::vector<std::uint64_t>& addresses);

}  // namespace gpunvme::soft
