// What a run is asked to do, before it is cut into commands.
//
// The bytes of a work are numbered from 0. On the drive they are items, each adjoining from an LBA on: one for a range,
// many for a gather. In memory they are pieces, in order.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "gpunvme/prp.h"
#include "io_memory.h"

namespace gpunvme {

struct Work {
  struct Piece {
    std::shared_ptr<IoMemory> memory;
    std::uint64_t offset;  // in the memory
    std::uint64_t nbytes;
    std::uint64_t begin;  // in the work
  };
  // A byte of the work, and where that is on the drive.
  struct Place {
    std::uint64_t at = 0;
    std::uint64_t item = 0;
    std::uint64_t in_item = 0;
  };

  std::uint8_t opcode = 0;
  bool simple = false;                  // one command as it is
  std::array<std::uint32_t, 6> cdw{};   // CDW10 to CDW15 of it
  const std::uint64_t* lbas = nullptr;  // an LBA for each item, kept by the caller
  std::uint64_t lba = 0;                // where there is only one
  std::uint64_t item_bytes = 0;
  std::uint64_t nbytes = 0;
  std::vector<Piece> pieces;

  void add_piece(std::shared_ptr<IoMemory> memory, std::uint64_t offset, std::uint64_t nbytes);
  const Piece& piece_at(std::uint64_t at) const;

  std::uint64_t lba_at(const Place& place, int lba_shift) const {
    return (lbas != nullptr ? lbas[place.item] : lba) + (place.in_item >> lba_shift);
  }
  // To the end of the item.
  std::uint64_t bytes_left(const Place& place) const { return item_bytes - place.in_item; }
  // `nbytes` do not go past the end of the item.
  void advance(Place& place, std::uint64_t nbytes) const {
    place.at += nbytes;
    place.in_item += nbytes;
    if (place.in_item != item_bytes) return;
    ++place.item;
    place.in_item = 0;
  }

  // The same past as many items as it takes.
  void skip(Place& place, std::uint64_t nbytes) const {
    place.at += nbytes;
    place.item += (place.in_item + nbytes) / item_bytes;
    place.in_item = (place.in_item + nbytes) % item_bytes;
  }
  bool writes() const { return (opcode & 3) == 1; }  // data goes to the controller
  bool reads() const { return (opcode & 3) == 2; }

  // Describes memory from `at` on, as far as PRPs can; how far.
  std::uint64_t build(PrpBuilder& builder, std::uint64_t at, std::uint64_t nbytes) const;
  // True if PRPs can describe all of it, given list memory enough.
  bool is_direct(std::uint64_t at, std::uint64_t nbytes, std::uint64_t page_bytes) const;
};

}  // namespace gpunvme
