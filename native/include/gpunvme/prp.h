// PRP1, PRP2 and PRP lists: where a command's data is, in pages of the controller (CC.MPS).
//
// NVM Express Base Specification 2.0, 4.1.1: PRP1 may begin anywhere in a page that is a multiple of 4; every further
// entry is the address of a page. One further page is PRP2 itself, more are a list that PRP2 points to. A list does not
// leave its page: where more entries follow, the last one of the page is the address of the next page of the list.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpunvme/atomics.h"

namespace gpunvme {

// Memory for the lists of one command: `pages` whole pages, adjoining here and each at an IOVA of its own.
struct PrpList {
  std::uint64_t* entries;
  const std::uint64_t* iovas;
  std::uint32_t pages;
};

// Pages that the data of a command lies in when it begins `offset` bytes into the first.
GPUNVME_HD constexpr std::uint64_t prp_data_pages(std::uint64_t offset, std::uint64_t nbytes,
                                                  std::uint64_t page_bytes) {
  return (offset + nbytes + page_bytes - 1) / page_bytes;
}

// Pages of list memory that a command over so many pages of data needs.
GPUNVME_HD constexpr std::uint64_t prp_list_pages(std::uint64_t data_pages, std::uint64_t page_bytes) {
  if (data_pages <= 2) return 0;
  // Every page of the list but the last gives one entry to the chain.
  const std::uint64_t chained = page_bytes / 8 - 1;
  return (data_pages - 2 + chained - 1) / chained;
}

// Puts together one command's PRPs out of memory that is added in order. `page_bytes` is a power of two, at least 4096.
class PrpBuilder {
 public:
  GPUNVME_HD PrpBuilder(const PrpList& list, std::uint32_t page_bytes) : list_(list), page_bytes_(page_bytes) {}

  // Adds bytes that adjoin for the controller. Returns how many of them PRPs can describe: fewer than offered where the
  // list memory ends, 0 where the address does not suit. What was added before stays as it is.
  GPUNVME_HD std::uint64_t add(std::uint64_t iova, std::uint64_t nbytes) {
    std::uint64_t taken = 0;
    if (nbytes_ == 0) {
      if (iova % 4 != 0) return 0;
      prp1_ = iova;
      taken = least(nbytes, page_bytes_ - in_page(iova));
    } else if (in_page(end_) != 0) {
      // The last page goes on, or there is a gap that no PRP can say.
      if (iova != end_) return 0;
      taken = least(nbytes, page_bytes_ - in_page(iova));
    } else if (in_page(iova) != 0) {
      return 0;
    }
    while (taken < nbytes && push(iova + taken)) taken += least(nbytes - taken, page_bytes_);
    if (taken == 0) return 0;
    nbytes_ += taken;
    end_ = iova + taken;
    return taken;
  }

  GPUNVME_HD std::uint64_t prp1() const { return prp1_; }
  GPUNVME_HD std::uint64_t prp2() const { return prp2_; }
  GPUNVME_HD std::uint64_t nbytes() const { return nbytes_; }

 private:
  GPUNVME_HD static std::uint64_t least(std::uint64_t a, std::uint64_t b) { return a < b ? a : b; }
  GPUNVME_HD std::uint64_t in_page(std::uint64_t iova) const { return iova & (page_bytes_ - 1); }

  // One more page of data. False if the list memory is full.
  GPUNVME_HD bool push(std::uint64_t iova) {
    if (further_ == 0) {
      prp2_ = iova;
      further_ = 1;
      return true;
    }
    if (further_ == 1) {
      if (list_.pages == 0) return false;
      list_.entries[0] = prp2_;
      prp2_ = list_.iovas[0];
      at_ = 1;
      page_end_ = page_bytes_ / 8;
    }
    if (at_ == page_end_) {
      if (list_page_ + 1 == list_.pages) return false;
      ++list_page_;
      list_.entries[at_] = list_.entries[at_ - 1];
      list_.entries[at_ - 1] = list_.iovas[list_page_];
      ++at_;
      page_end_ += page_bytes_ / 8;
    }
    list_.entries[at_++] = iova;
    further_ = 2;
    return true;
  }

  const PrpList list_;
  const std::uint64_t page_bytes_;
  std::uint64_t prp1_ = 0;
  std::uint64_t prp2_ = 0;
  std::uint64_t nbytes_ = 0;
  std::uint64_t end_ = 0;        // where the bytes added last end
  std::uint32_t further_ = 0;    // pages after the first: none, one, or more
  std::uint32_t list_page_ = 0;  // the page of the list that is being filled
  std::uint32_t at_ = 0;         // entry of the list that is filled next
  std::uint32_t page_end_ = 0;   // the first entry behind that page
};

// The PRPs of `nbytes` that begin `offset` bytes into page 0; `page_iova(i)` is the address of page i. Returns the
// bytes described, fewer where the list memory ends or a page's address does not suit.
template <typename PageIova>
GPUNVME_HD std::uint64_t build_prps(PrpBuilder& builder, std::uint64_t offset, std::uint64_t nbytes,
                                    std::uint64_t page_bytes, const PageIova& page_iova) {
  std::uint64_t done = 0;
  for (std::uint64_t page = 0; done < nbytes; ++page) {
    const std::uint64_t room = page_bytes - offset;
    const std::uint64_t part = nbytes - done < room ? nbytes - done : room;
    const std::uint64_t taken = builder.add(page_iova(page) + offset, part);
    done += taken;
    if (taken < part) break;
    offset = 0;
  }
  return done;
}

}  // namespace gpunvme
