// PRP entries and lists: every shape that is allowed, and every offset that is not.
#include <algorithm>

#include "soft_client.h"

using namespace testing;

namespace {

// A controller without MDTS; pages of data that do not lie one after another.
struct PrpClient : Client {
  explicit PrpClient(std::uint32_t mps = 0) : Client(make(mps), 192 << 20) {
    enable();
    queue = create(1);
    check::Random random(mps + 1);
    for (int i = 0; i < 1100; ++i) pages.push_back(memory.allocate(page(), page()));
    for (std::size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[random.below(i)]);
    lists = memory.allocate(8 * page(), page());
    data = memory.allocate(16 << 20);
    std::vector<std::byte> bytes(options.size);
    fill(bytes.data(), bytes.size(), 9);
    content = bytes;
    // By pages of two PRPs, which the first test shows to work.
    for (std::uint64_t at = 0; at < options.size; at += 2 * page()) {
      std::memcpy(memory.at(data), content.data() + at, 2 * page());
      CHECK_EQ(
          code(queue, io(nvme::kNvmWrite, at / 512, static_cast<std::uint32_t>(2 * page() / 512), data, data + page())),
          nvme::kStatusSuccess);
    }
  }
  static Options make(std::uint32_t mps) {
    Options options = in_memory(std::uint64_t{8 << 20} << mps);
    options.mdts = 0;
    options.mpsmin = mps;
    return options;
  }

  // Reads `nbytes` from LBA 3: the first PRP at `offset` into a page, then a list that starts at `list_offset` into its
  // own page and goes on in the next ones. Checks all bytes and what lies around them.
  void read(std::uint64_t nbytes, std::uint64_t offset, std::uint64_t list_offset) {
    for (const auto one : pages) std::memset(memory.at(one), 0xEE, page());
    std::vector<std::pair<std::uint64_t, std::uint64_t>> pieces = {
        {pages[0] + offset, std::min(nbytes, page() - offset)}};
    std::uint64_t rest = nbytes - pieces[0].second;
    std::vector<std::uint64_t> entries;
    while (rest > 0) {
      const std::uint64_t now = std::min(rest, page());
      entries.push_back(pages[entries.size() + 1]);
      pieces.emplace_back(entries.back(), now);
      rest -= now;
    }
    std::uint64_t prp2 = 0;
    if (entries.size() == 1) {
      prp2 = entries[0];
    } else if (!entries.empty()) {
      prp2 = lists + list_offset;
      std::uint64_t at = prp2;
      std::uint64_t next_list = lists + page();
      for (std::size_t i = 0; i < entries.size(); ++i) {
        if (at % page() == page() - 8 && i + 1 < entries.size()) {
          *memory.at<std::uint64_t>(at) = next_list;
          at = next_list;
          next_list += page();
        }
        *memory.at<std::uint64_t>(at) = entries[i];
        at += 8;
      }
    }
    CHECK_EQ(code(queue, io(nvme::kNvmRead, 3, static_cast<std::uint32_t>(nbytes / 512), pages[0] + offset, prp2)),
             nvme::kStatusSuccess);
    std::uint64_t done = 0;
    for (const auto& [at, length] : pieces) {
      CHECK(std::memcmp(memory.at(at), content.data() + 3 * 512 + done, length) == 0);
      done += length;
      const std::uint64_t base = at / page() * page();
      const auto untouched = [&](std::uint64_t from, std::uint64_t to) {
        return std::all_of(memory.at(from), memory.at(from) + (to - from),
                           [](std::byte b) { return b == std::byte{0xEE}; });
      };
      CHECK(untouched(base, at));
      CHECK(untouched(at + length, base + page()));
    }
  }
  std::uint16_t read_code(std::uint64_t nbytes, std::uint64_t prp1, std::uint64_t prp2) {
    return code(queue, io(nvme::kNvmRead, 0, static_cast<std::uint32_t>(nbytes / 512), prp1, prp2));
  }

  Pair queue;
  std::vector<std::uint64_t> pages;
  std::uint64_t lists = 0;
  std::uint64_t data = 0;
  std::vector<std::byte> content;
};

}  // namespace

TEST(one_page_and_less) {
  PrpClient client;
  client.read(512, 0, 0);
  client.read(512, 4, 0);
  client.read(512, 4096 - 512, 0);
  client.read(4096, 0, 0);
}

TEST(exactly_two_pages_need_no_list) {
  PrpClient client;
  client.read(8192, 0, 0);
  client.read(4096, 4, 0);
  client.read(4096 + 512, 0, 0);
  client.read(512, 4096 - 4, 0);
}

TEST(lists_of_two_to_514_entries_with_and_without_an_offset) {
  PrpClient client;
  for (const std::uint64_t entries : {2, 3, 511, 512, 513, 514, 1022, 1023, 1024, 1025}) {
    client.read((entries + 1) * 4096, 0, 0);
    client.read(entries * 4096, 8, 0);  // an unaligned first entry makes one more
    client.read(entries * 4096 + 512, 4096 - 512, 0);
  }
}

TEST(a_list_may_start_anywhere_in_its_page) {
  PrpClient client;
  for (const std::uint64_t offset : {8, 16, 2048, 4096 - 24, 4096 - 16}) {
    for (const std::uint64_t entries : {2, 3, 4, 20, 513, 600}) client.read((entries + 1) * 4096, 0, offset);
  }
}

TEST(a_list_whose_first_entry_is_already_the_chain) {
  PrpClient client;
  client.read(3 * 4096, 0, 4096 - 8);
  client.read(520 * 4096, 0, 4096 - 8);
}

TEST(larger_pages_have_longer_lists) {
  PrpClient client(1);
  for (const std::uint64_t entries : {1, 2, 3, 1000, 1023, 1024, 1025}) client.read((entries + 1) * 8192, 0, 0);
  client.read(8192, 4096, 0);
  client.read(20 * 8192, 8192 - 512, 8192 - 16);
  // 4 KiB-aligned is not page-aligned here.
  CHECK_EQ(client.read_code(16384, client.pages[0], client.pages[1] + 4096), nvme::kStatusPrpOffsetInvalid);
}

TEST(every_invalid_offset_is_found) {
  PrpClient client;
  const auto invalid = nvme::kStatusPrpOffsetInvalid;
  const auto list = [&](std::initializer_list<std::uint64_t> entries) {
    std::uint64_t at = client.lists;
    for (const std::uint64_t entry : entries) {
      *client.memory.at<std::uint64_t>(at) = entry;
      at += 8;
    }
    return client.lists;
  };
  const auto& pages = client.pages;
  // The first entry: dword-aligned.
  for (const std::uint64_t offset : {1, 2, 3, 5, 4095}) {
    CHECK_EQ(client.read_code(512, pages[0] + offset, 0), invalid);
  }
  // The second as a page: no offset at all.
  for (const std::uint64_t offset : {1, 4, 8, 512, 2048, 4092}) {
    CHECK_EQ(client.read_code(8192, pages[0], pages[1] + offset), invalid);
  }
  // The second as a list: quadword-aligned.
  for (const std::uint64_t offset : {1, 2, 4, 12}) {
    list({pages[1], pages[2], pages[3], pages[4]});
    CHECK_EQ(client.read_code(3 * 4096, pages[0], client.lists + offset), invalid);
  }
  // Entries of a list: no offset, the first, one in the middle, the last.
  CHECK_EQ(client.read_code(4 * 4096, pages[0], list({pages[1] + 4, pages[2], pages[3]})), invalid);
  CHECK_EQ(client.read_code(4 * 4096, pages[0], list({pages[1], pages[2] + 2048, pages[3]})), invalid);
  CHECK_EQ(client.read_code(4 * 4096, pages[0], list({pages[1], pages[2], pages[3] + 1})), invalid);
  CHECK_EQ(client.read_code(4 * 4096, pages[0], list({pages[1], pages[2], pages[3]})), nvme::kStatusSuccess);
  // The pointer to the next list: no offset.
  const std::uint64_t last = client.lists + 4096 - 16;
  *client.memory.at<std::uint64_t>(last) = pages[1];
  for (const std::uint64_t offset : {4, 8, 2048}) {
    *client.memory.at<std::uint64_t>(last + 8) = client.lists + 4096 + offset;
    CHECK_EQ(client.read_code(4 * 4096, pages[0], last), invalid);
  }
  // What is not needed is not looked at.
  CHECK_EQ(client.read_code(4096, pages[0], pages[1] + 3), nvme::kStatusSuccess);
  CHECK_EQ(client.controller.dma_faults().size(), 0u);
}

TEST(lists_that_lead_in_circles_or_nowhere_end) {
  PrpClient client;
  // A list that leads to itself: as many entries are used as there is data, no more.
  const std::uint64_t list = client.lists;
  for (std::uint64_t i = 0; i < 511; ++i) client.memory.at<std::uint64_t>(list)[i] = client.pages[1];
  client.memory.at<std::uint64_t>(list)[511] = list;
  CHECK_EQ(client.read_code(1050 * 4096, client.pages[0], list), nvme::kStatusSuccess);
  // Somewhere that is not mapped: refused and recorded.
  CHECK_EQ(client.read_code(4 * 4096, client.pages[0], 0x1000), nvme::kStatusDataTransferError);
  client.memory.at<std::uint64_t>(list)[1] = ~std::uint64_t{4095};
  CHECK_EQ(client.read_code(4 * 4096, client.pages[0], list), nvme::kStatusDataTransferError);
  CHECK_EQ(client.controller.dma_faults().size(), 2u);
}
