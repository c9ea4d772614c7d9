// PRPs as the driver builds them, read back the way the specification tells a controller to.
#include <map>
#include <vector>

#include "check.h"
#include "gpunvme/prp.h"

using gpunvme::build_prps;
using gpunvme::prp_data_pages;
using gpunvme::prp_list_pages;
using gpunvme::PrpBuilder;
using gpunvme::PrpList;

namespace {

struct Extent {
  std::uint64_t iova;
  std::uint64_t nbytes;
  bool operator==(const Extent& other) const { return iova == other.iova && nbytes == other.nbytes; }
};

// List memory whose pages lie in any order for the controller.
class Lists {
 public:
  Lists(std::uint32_t pages, std::uint64_t page_bytes)
      : page_bytes_(page_bytes), entries_(pages * page_bytes / 8, kUnset) {
    for (std::uint32_t i = 0; i < pages; ++i) iovas_.push_back((std::uint64_t{1} << 52) - (i + 1) * 3 * page_bytes);
  }
  PrpList list() { return {entries_.data(), iovas_.data(), static_cast<std::uint32_t>(iovas_.size())}; }
  // What the controller reads at `iova`. A failed check is an access outside the lists, or to what nobody wrote.
  std::uint64_t read(std::uint64_t iova) const {
    CHECK_EQ(iova % 8, 0u);
    for (std::size_t page = 0; page < iovas_.size(); ++page) {
      if (iova / page_bytes_ != iovas_[page] / page_bytes_) continue;
      const std::uint64_t entry = entries_[page * (page_bytes_ / 8) + iova % page_bytes_ / 8];
      CHECK(entry != kUnset);
      return entry;
    }
    check::fail(__FILE__, __LINE__, "a PRP list outside its memory");
  }

 private:
  static constexpr std::uint64_t kUnset = 0xeeeeeeeeeeeeeeee;
  const std::uint64_t page_bytes_;
  std::vector<std::uint64_t> entries_;
  std::vector<std::uint64_t> iovas_;
};

// The data of a command, as a controller finds it (Base 2.0, 4.1.1).
std::vector<Extent> walk(const Lists& lists, std::uint64_t prp1, std::uint64_t prp2, std::uint64_t nbytes,
                         std::uint64_t page) {
  std::vector<Extent> found;
  CHECK_EQ(prp1 % 4, 0u);
  found.push_back({prp1, std::min(nbytes, page - prp1 % page)});
  nbytes -= found.back().nbytes;
  if (nbytes == 0) return found;
  if (nbytes <= page) {
    CHECK_EQ(prp2 % page, 0u);
    found.push_back({prp2, nbytes});
    return found;
  }
  for (std::uint64_t at = prp2; nbytes > 0;) {
    const std::uint64_t entry = lists.read(at);
    CHECK_EQ(entry % page, 0u);
    if (at % page == page - 8 && nbytes > page) {
      at = entry;
      continue;
    }
    found.push_back({entry, std::min(nbytes, page)});
    nbytes -= found.back().nbytes;
    at += 8;
  }
  return found;
}

// A page's address, anywhere.
std::uint64_t scattered(std::uint64_t index, std::uint64_t page) {
  return (index * 0x9e3779b97f4a7c15 >> 16) / page * page;
}

void check_prps(std::uint64_t page, std::uint64_t offset, std::uint64_t nbytes) {
  const std::uint64_t pages = prp_data_pages(offset, nbytes, page);
  const auto list_pages = static_cast<std::uint32_t>(prp_list_pages(pages, page));
  for (const bool adjoining : {false, true}) {
    const auto page_iova = [&](std::uint64_t i) {
      return adjoining ? (std::uint64_t{7} << 40) + i * page : scattered(i + 1, page);
    };
    std::vector<Extent> expected;
    for (std::uint64_t i = 0, done = 0; done < nbytes; ++i) {
      const std::uint64_t begin = i == 0 ? offset : 0;
      expected.push_back({page_iova(i) + begin, std::min(nbytes - done, page - begin)});
      done += expected.back().nbytes;
    }
    Lists lists(list_pages, page);
    PrpBuilder builder(lists.list(), static_cast<std::uint32_t>(page));
    if (adjoining) {
      CHECK_EQ(builder.add(page_iova(0) + offset, nbytes), nbytes);
    } else {
      CHECK_EQ(build_prps(builder, offset, nbytes, page, page_iova), nbytes);
    }
    CHECK_EQ(builder.nbytes(), nbytes);
    CHECK(walk(lists, builder.prp1(), builder.prp2(), nbytes, page) == expected);
    if (pages == 1) CHECK_EQ(builder.prp2(), 0u);
    if (list_pages == 0) continue;
    // One page of list memory less is too little, and what fits is described all the same.
    Lists fewer(list_pages - 1, page);
    PrpBuilder shorter(fewer.list(), static_cast<std::uint32_t>(page));
    const std::uint64_t fits = build_prps(shorter, offset, nbytes, page, page_iova);
    CHECK(fits < nbytes);
    CHECK_EQ(prp_list_pages(prp_data_pages(offset, fits, page), page), list_pages - 1);
    CHECK_EQ(prp_list_pages(prp_data_pages(offset, fits + 1, page), page), list_pages);
    expected.resize(prp_data_pages(offset, fits, page));
    CHECK(walk(fewer, shorter.prp1(), shorter.prp2(), fits, page) == expected);
  }
}

void check_pages(std::uint64_t page, std::uint64_t pages) {
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4}, std::uint64_t{512}, page - 512, page - 4}) {
    for (const std::uint64_t end : {std::uint64_t{4}, std::uint64_t{512}, page - 4, page}) {
      const std::uint64_t nbytes = pages * page - offset - (page - end);
      if (pages == 1 && end <= offset) continue;
      CHECK_EQ(prp_data_pages(offset, nbytes, page), pages);
      check_prps(page, offset, nbytes);
    }
  }
}

}  // namespace

TEST(prp_unaligned_first_entry) {
  for (std::uint64_t offset = 0; offset < 4096; offset += 4) {
    for (const std::uint64_t pages : {1u, 2u, 3u}) check_prps(4096, offset, pages * 4096 - offset);
    check_prps(4096, offset, 4);
  }
  check_pages(4096, 1);
}

TEST(prp_exactly_two_pages_need_no_list) {
  for (std::uint64_t offset = 0; offset < 4096; offset += 4) check_prps(4096, offset, 8192 - offset);
  check_pages(4096, 2);
  // Also where there is memory for one.
  Lists lists(1, 4096);
  PrpBuilder two(lists.list(), 4096);
  CHECK_EQ(two.add(0x10200, 4096), 4096u);
  CHECK_EQ(two.prp2(), 0x11000u);
  // Two pages that an offset makes three.
  PrpBuilder builder(lists.list(), 4096);
  CHECK_EQ(builder.add(0x10200, 8192), 8192u);
  CHECK_EQ(builder.prp2(), lists.list().iovas[0]);
}

TEST(prp_512_513_514_entries_and_every_number_around_them) {
  for (std::uint64_t pages = 3; pages <= 520; ++pages) check_prps(4096, pages % 7 * 4, pages * 4096 - 4096);
  for (const std::uint64_t pages : {3u, 511u, 512u, 513u, 514u, 515u}) check_pages(4096, pages);
}

TEST(prp_last_entry_chains) {
  // 513 pages of data: 512 entries, a whole page of list. One more, and the last entry is the address of the next page.
  CHECK_EQ(prp_list_pages(513, 4096), 1u);
  CHECK_EQ(prp_list_pages(514, 4096), 2u);
  CHECK_EQ(prp_list_pages(513 + 511, 4096), 2u);
  CHECK_EQ(prp_list_pages(513 + 512, 4096), 3u);
  for (const std::uint64_t pages : {1023u, 1024u, 1025u, 1026u, 1535u, 1536u, 1537u, 5000u}) check_pages(4096, pages);
}

TEST(prp_pages_larger_than_4_kib) {
  for (const std::uint64_t page : {8192u, 16384u, 65536u, 1u << 20}) {
    for (const std::uint64_t pages : {1u, 2u, 3u, 20u}) check_pages(page, pages);
    const std::uint64_t entries = page / 8;
    if (page > 65536) continue;
    for (const std::uint64_t pages : {entries, entries + 1, entries + 2, 2 * entries + 1}) {
      check_prps(page, 4, pages * page - 4);
    }
  }
}

TEST(prp_offset_that_is_not_a_dword_is_refused) {
  Lists lists(1, 4096);
  for (std::uint64_t offset = 1; offset < 4; ++offset) {
    PrpBuilder builder(lists.list(), 4096);
    CHECK_EQ(builder.add(0x5000 + offset, 512), 0u);
    CHECK_EQ(builder.nbytes(), 0u);
    CHECK_EQ(builder.add(0x5000, 512), 512u);
  }
}

TEST(prp_gap_inside_a_page_is_refused_and_what_was_before_stays) {
  Lists lists(1, 4096);
  PrpBuilder builder(lists.list(), 4096);
  CHECK_EQ(builder.add(0x5000, 512), 512u);
  CHECK_EQ(builder.add(0x5204, 512), 0u);  // not where the first ended
  CHECK_EQ(builder.add(0x6000, 512), 0u);  // another page before this one is full
  CHECK_EQ(builder.add(0x5200, 4096 - 512), 4096u - 512);
  CHECK_EQ(builder.add(0x9004, 512), 0u);  // not the start of a page
  CHECK_EQ(builder.add(0x9000, 4096), 4096u);
  CHECK_EQ(builder.nbytes(), 8192u);
  CHECK(walk(lists, builder.prp1(), builder.prp2(), 8192, 4096) ==
        (std::vector<Extent>{{0x5000, 4096}, {0x9000, 4096}}));
}

TEST(prp_random_pieces_are_described_or_refused_as_a_model_says) {
  check::Random random(1);
  for (int round = 0; round < check::rounds(3000); ++round) {
    const std::uint64_t page = random.pick({4096u, 8192u, 65536u});
    Lists lists(3, page);
    PrpBuilder builder(lists.list(), static_cast<std::uint32_t>(page));
    std::vector<Extent> expected;
    std::uint64_t end = 0;
    std::uint64_t total = 0;
    for (std::uint64_t piece = 0; piece < random.between(1, 40); ++piece) {
      const std::uint64_t base = scattered(random.below(1u << 30) + 1, page);
      // Most pieces go on where one may; some do not.
      std::uint64_t iova = end % page != 0 && !random.one_in(10) ? end : base;
      if (expected.empty() || random.one_in(20)) iova += random.below(page);
      const std::uint64_t nbytes = random.one_in(3) ? random.between(1, 3 * page) : page * random.between(1, 3);
      const bool first = expected.empty();
      const bool good = first ? iova % 4 == 0 : (end % page == 0 ? iova % page == 0 : iova == end);
      CHECK_EQ(builder.add(iova, nbytes), good ? nbytes : 0u);
      if (!good) continue;
      for (std::uint64_t done = 0; done < nbytes;) {
        const std::uint64_t part = std::min(nbytes - done, page - (iova + done) % page);
        const bool goes_on = !expected.empty() && end == iova + done && end % page != 0;
        if (goes_on) {
          expected.back().nbytes += part;
        } else {
          expected.push_back({iova + done, part});
        }
        done += part;
        end = iova + done;
      }
      total += nbytes;
      CHECK(walk(lists, builder.prp1(), builder.prp2(), total, page) == expected);
    }
  }
}
