// Catalogs on a device: what is written can be read, what is damaged is refused, and space is handed out once.
#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "catalog/bytes.h"
#include "catalog/crc32.h"
#include "catalog/format.h"
#include "catalog/parse.h"
#include "catalog/serialise.h"
#include "catalog/space.h"
#include "catalog/superblocks.h"
#include "catalog/utf8.h"
#include "check.h"

using namespace gpunvme::catalog;

namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr std::uint64_t kDevice = 64u << 20;

struct Written {
  Superblock superblock;
  std::vector<Region> regions;
  Bytes table;
  Bytes block;

  // Enters the table's and the superblock's sums again, so that a change reaches the checks behind them.
  void seal() {
    superblock.table_crc32 = crc32(table);
    superblock.table_bytes = table.size();
    const auto bytes = serialise_superblock(superblock);
    block.assign(bytes.begin(), bytes.end());
  }
  std::uint64_t slot() const { return kSlots[superblock.generation % 2]; }
};

Region region(std::uint32_t kind, std::uint64_t offset, std::uint64_t nbytes, const std::string& name = "") {
  Region made;
  made.kind = kind;
  made.offset = offset;
  made.nbytes = nbytes;
  made.name = name;
  return made;
}

Written written(std::vector<Region> regions, std::uint64_t generation = 7, std::uint64_t alignment = 4096) {
  Written made;
  made.regions = std::move(regions);
  made.superblock.generation = generation;
  made.superblock.alignment = alignment;
  made.superblock.capacity = kDevice;
  made.superblock.regions = static_cast<std::uint32_t>(made.regions.size());
  made.superblock.table_offset = kHeadBytes;
  made.table = serialise_table(made.regions, generation);
  CHECK_EQ(made.table.size(), table_bytes(made.regions));
  made.seal();
  return made;
}

Written sample() {
  Region matrix = region(3, 2 * kHeadBytes, 5 * 7 * 4, "matrix");
  matrix.element_type = 16;  // F32
  matrix.shape = {5, 7};
  matrix.record_bytes = 28;
  matrix.crc32 = 0x12345678;
  Region packed = region(9, 3 * kHeadBytes, 3, "gepackt, ü");
  packed.element_type = 2;  // F4
  packed.shape = {6};
  return written({matrix, packed, region(4000000000u, kHeadBytes + 4096, 0), region(0, 4 * kHeadBytes, kHeadBytes)});
}

std::optional<Problem> parse(const Written& what, std::vector<Region>& regions, std::uint64_t device = kDevice) {
  Superblock superblock;
  if (const auto problem = parse_superblock(what.block, what.slot(), device, superblock)) return problem;
  return parse_table(what.table, superblock, device, regions);
}

std::string refused(const Written& what, std::uint64_t device = kDevice) {
  std::vector<Region> regions;
  const auto problem = parse(what, regions, device);
  return problem ? problem->reason : "";
}

// One region changed by a function; why the whole is refused then.
template <typename Change>
std::string refused_with(Change change) {
  Written what = sample();
  change(what.regions);
  what.superblock.regions = static_cast<std::uint32_t>(what.regions.size());
  what.table = serialise_table(what.regions, what.superblock.generation);
  what.seal();
  return refused(what);
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST(crc32_is_that_of_zlib) {
  const std::string text = "123456789";
  const std::span bytes(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  CHECK_EQ(crc32(bytes), 0xCBF43926u);
  CHECK_EQ(crc32(bytes.subspan(4), crc32(bytes.first(4))), 0xCBF43926u);
  CHECK_EQ(crc32({}), 0u);
}

TEST(what_is_written_can_be_read) {
  const Written what = sample();
  std::vector<Region> regions;
  CHECK(!parse(what, regions));
  CHECK_EQ(regions.size(), what.regions.size());
  for (std::size_t i = 0; i < regions.size(); ++i) {
    CHECK_EQ(regions[i].kind, what.regions[i].kind);
    CHECK_EQ(regions[i].offset, what.regions[i].offset);
    CHECK_EQ(regions[i].nbytes, what.regions[i].nbytes);
    CHECK_EQ(regions[i].record_bytes, what.regions[i].record_bytes);
    CHECK_EQ(regions[i].crc32, what.regions[i].crc32);
    CHECK_EQ(regions[i].element_type, what.regions[i].element_type);
    CHECK(regions[i].shape == what.regions[i].shape);
    CHECK_EQ(regions[i].name, what.regions[i].name);
  }
}

TEST(every_flipped_bit_is_found) {
  Written what = sample();
  for (Bytes* part : {&what.block, &what.table}) {
    for (std::size_t bit = 0; bit < part->size() * 8; ++bit) {
      (*part)[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8);
      CHECK(!refused(what).empty());
      (*part)[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8);
    }
  }
  CHECK_EQ(refused(what), "");
}

TEST(regions_that_cannot_be_are_refused) {
  using Regions = std::vector<Region>;
  CHECK(has(refused_with([](Regions& r) { r[0].offset += 512; }), "no multiple"));
  CHECK(has(refused_with([](Regions& r) { r[0].offset = 0; }), "regions lie between"));
  CHECK(has(refused_with([](Regions& r) { r[3].offset = kDevice - 4096; }), "regions lie between"));
  CHECK(has(refused_with([](Regions& r) { r[3].offset = UINT64_MAX - 4095; }), "regions lie between"));
  CHECK(has(refused_with([](Regions& r) { r[3].nbytes = UINT64_MAX; }), "regions lie between"));
  CHECK(has(refused_with([](Regions& r) { r[3].offset = r[0].offset; }), "lies over"));
  CHECK(has(refused_with([](Regions& r) { r[3].offset = kHeadBytes; }), "lies over"));
  // The one before reaches into its last unit by one byte only.
  CHECK(has(refused_with([](Regions& r) { r[0].offset = r[3].offset + r[3].nbytes - 4096; }), "lies over"));
  CHECK(has(refused_with([](Regions& r) { r[3].record_bytes = 0; }), "records"));
  CHECK(has(refused_with([](Regions& r) { r[3].record_bytes = 3; }), "records"));
  CHECK(has(refused_with([](Regions& r) { r[0].shape = {5, 8}; }), "shape"));
  CHECK(has(refused_with([](Regions& r) { r[0].shape = {}; }), "shape"));
  CHECK(has(refused_with([](Regions& r) { r[3].shape = {kHeadBytes}; }), "shape"));
  CHECK(has(refused_with([](Regions& r) { r[0].element_type = 23; }), "element type"));
  // 2^32 * 2^32 * 32 bits wraps to 0; and 2^59 + 35 elements to the right number.
  CHECK(has(refused_with([](Regions& r) { r[0].shape = {std::uint64_t{1} << 32, std::uint64_t{1} << 32}; }), "shape"));
  CHECK(has(refused_with([](Regions& r) { r[0].shape = {(std::uint64_t{1} << 59) + 35}; }), "shape"));
  CHECK(has(refused_with([](Regions& r) { r[0].shape.assign(33, 1); }), "dimensions"));
  CHECK(has(refused_with([](Regions& r) { r[0].kind = 9; }), "number is there twice"));
  CHECK(has(refused_with([](Regions& r) { r[0].name = r[1].name; }), "name is there twice"));
  CHECK(has(refused_with([](Regions& r) { r[0].name = "\xff"; }), "UTF-8"));
  CHECK(has(refused_with([](Regions& r) { r[0].name.assign(4097, 'x'); }), "name has 4097"));
  CHECK_EQ(refused_with([](Regions& r) { r[0].name.assign(4096, 'x'); }), "");
  CHECK_EQ(refused_with([](Regions& r) { r[3].offset = kDevice - kHeadBytes; }), "");
  // No elements: whatever the other extents are.
  CHECK_EQ(refused_with([](Regions& r) {
             r[0].nbytes = 0;
             r[0].shape = {UINT64_MAX, 0, UINT64_MAX};
           }),
           "");
}

TEST(entries_that_cannot_be_are_refused) {
  const auto with = [](auto change) {
    Written what = written({region(1, 2 * kHeadBytes, 100, "name")});
    change(what.table);
    what.seal();
    return refused(what);
  };
  const std::size_t entry = kTableHeadBytes;
  CHECK_EQ(with([](Bytes&) {}), "");
  CHECK(has(with([=](Bytes& t) { t[entry + 42] = 1; }), "reserved"));
  CHECK(has(with([=](Bytes& t) { t[entry + 47] = 1; }), "reserved"));
  CHECK(has(with([](Bytes& t) { t.back() = 1; }), "reserved"));  // behind the name
  // Longer than its parts, by zeros that the table has.
  CHECK(has(with([=](Bytes& t) {
              t.resize(t.size() + 8);
              store(std::span(t), entry, static_cast<std::uint32_t>(t.size() - entry));
            }),
            "whose parts have"));
  CHECK(has(with([=](Bytes& t) { store(std::span(t), entry, std::uint32_t{44}); }), "an entry of 44"));
  CHECK(has(with([=](Bytes& t) { store(std::span(t), entry, std::uint32_t{64}); }), "left"));
  CHECK(has(with([=](Bytes& t) { store(std::span(t), entry + 40, std::uint16_t{9}); }), "whose parts have"));
  CHECK(has(with([=](Bytes& t) { store(std::span(t), entry + 38, std::uint16_t{UINT16_MAX}); }), "whose parts have"));
  // Its parts fit its size, and reach past the table.
  CHECK(has(with([=](Bytes& t) {
              store(std::span(t), entry, std::uint32_t{64});
              store(std::span(t), entry + 40, std::uint16_t{12});
            }),
            "left"));
  CHECK(has(with([](Bytes& t) { t.resize(t.size() - 8); }), "left"));
  CHECK(has(with([](Bytes& t) { t[0] ^= 1; }), "there is no table"));
}

TEST(superblocks_that_cannot_be_are_refused) {
  const auto with = [](auto change) {
    Written what = sample();
    change(what.superblock);
    const auto bytes = serialise_superblock(what.superblock);
    what.block.assign(bytes.begin(), bytes.end());
    return refused(what);
  };
  CHECK(has(with([](Superblock& s) { s.generation = 0; }), "slot"));
  CHECK(has(with([](Superblock& s) { s.generation = UINT64_MAX; }), "slot"));
  CHECK(has(with([](Superblock& s) { s.generation = 9; }), "of generation 7"));
  CHECK(has(with([](Superblock& s) { s.alignment = 0; }), "alignment"));
  CHECK(has(with([](Superblock& s) { s.alignment = 2048; }), "alignment"));
  CHECK(has(with([](Superblock& s) { s.alignment = 12288; }), "alignment"));
  CHECK(has(with([](Superblock& s) { s.alignment = std::uint64_t{1} << 31; }), "alignment"));
  CHECK(has(with([](Superblock& s) { s.capacity = kDevice + 1; }), "made for"));
  CHECK(has(with([](Superblock& s) { s.table_offset = 0; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_offset += 8; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_offset = kDevice; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_offset = UINT64_MAX - 4095; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_bytes = UINT64_MAX; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_bytes = kMostTableBytes + 1; }), "table"));
  CHECK(has(with([](Superblock& s) { s.table_bytes -= 8; }), "table has"));
  CHECK(has(with([](Superblock& s) { s.regions = UINT32_MAX; }), "regions in a table"));
  CHECK(has(with([](Superblock& s) { s.regions = 1000; }), "regions in a table"));
  CHECK(has(with([](Superblock& s) { s.regions = 3; }), "behind its last entry"));
  CHECK(has(with([](Superblock& s) { s.regions = 5; }), "ends within"));
  CHECK(has(refused(sample(), kDevice - 1), "the device has"));
  CHECK(has(refused(sample(), 0), "the device has"));
  CHECK(has(refused(sample(), UINT64_MAX), "the device has"));

  Written other = sample();
  store(std::span(other.block), 8, std::uint32_t{2});
  store(std::span(other.block), kSuperblockBytes - 4, crc32(std::span(other.block).first(kSuperblockBytes - 4)));
  CHECK(has(refused(other), "version 2"));
}

// Numbers that break what adds, multiplies or rounds them.
TEST(mutations_are_refused_or_harmless) {
  std::mt19937_64 random(check::seed());
  const std::uint64_t nasty[] = {0,
                                 1,
                                 7,
                                 8,
                                 48,
                                 4095,
                                 4096,
                                 kHeadBytes,
                                 UINT32_MAX,
                                 kDevice,
                                 kDevice - 1,
                                 UINT64_MAX,
                                 UINT64_MAX - 7,
                                 kMostBytes,
                                 1u << 31,
                                 0xFFFF,
                                 UINT64_MAX / 8};
  int accepted = 0;
  const int rounds = check::is_long() ? 2000000 : 100000;
  for (int round = 0; round < rounds; ++round) {
    Written what = sample();
    std::uint64_t device = kDevice;
    for (int change = static_cast<int>(random() % 3); change >= 0; --change) {
      const std::uint64_t value = random() % 4 == 0 ? random() : nasty[random() % std::size(nasty)];
      switch (random() % 6) {
        case 0:
          what.table[random() % what.table.size()] = static_cast<std::uint8_t>(value);
          break;
        case 1:
          store(std::span(what.table), random() % (what.table.size() / 8 - 1) * 8, value);
          break;
        case 2:
          store(std::span(what.table), random() % (what.table.size() / 4 - 1) * 4, static_cast<std::uint32_t>(value));
          break;
        case 3: {
          std::uint64_t* const fields[] = {&what.superblock.alignment, &what.superblock.capacity,
                                           &what.superblock.table_offset};
          *fields[random() % std::size(fields)] = value;
          break;
        }
        case 4:
          what.superblock.regions = static_cast<std::uint32_t>(value);
          break;
        default:
          if (random() % 2 == 0) {
            what.table.resize(kTableHeadBytes + random() % 2 * 8 + random() % what.table.size());
          } else {
            device = value;
          }
      }
    }
    what.seal();
    std::vector<Region> regions;
    if (parse(what, regions, device)) continue;
    ++accepted;
    std::set<std::uint64_t> units;
    const std::uint64_t alignment = what.superblock.alignment;
    for (const Region& each : regions) {
      CHECK(each.offset >= kHeadBytes);
      CHECK(each.offset + each.nbytes >= each.offset && each.offset + each.nbytes <= device);
      for (std::uint64_t at = 0; at < each.nbytes; at += alignment) {
        CHECK(units.insert((each.offset + at) / alignment).second);
      }
    }
  }
  CHECK(accepted > rounds / 1000);  // or the checks behind the first ones were never reached
}

TEST(the_newest_whole_superblock_counts) {
  const Written seven = written({}, 7);
  const Written eight = written({}, 8);
  const Bytes nothing(kSuperblockBytes);
  Bytes torn = eight.block;
  std::fill(torn.begin() + 256, torn.end(), 0);

  auto both = read_superblocks({eight.block, seven.block}, kDevice);
  CHECK_EQ(both.newest()->generation, 8u);
  CHECK_EQ(both.previous()->generation, 7u);
  auto interrupted = read_superblocks({torn, seven.block}, kDevice);
  CHECK_EQ(interrupted.newest()->generation, 7u);
  CHECK(interrupted.previous() == nullptr);
  CHECK(interrupted.refusal() == nullptr);
  auto first = read_superblocks({nothing, seven.block}, kDevice);
  CHECK_EQ(first.newest()->generation, 7u);
  auto none = read_superblocks({nothing, std::span<const std::uint8_t>()}, kDevice);
  CHECK(none.newest() == nullptr && none.refusal() == nullptr);
  // Swapped slots: written to their ends, and impossible.
  CHECK(read_superblocks({seven.block, eight.block}, kDevice).refusal() != nullptr);

  // A file that was cut off must not look like the generation before.
  Written far = written({}, 8);
  far.superblock.capacity = 0;
  far.superblock.table_offset = 32 * kHeadBytes;
  far.seal();
  Written near = written({}, 7);
  near.superblock.capacity = 0;
  near.seal();
  CHECK(read_superblocks({far.block, near.block}, 8 * kHeadBytes).refusal() != nullptr);
}

TEST(space_is_handed_out_once) {
  std::mt19937_64 random(check::seed());
  for (int round = 0; round < 200; ++round) {
    const std::uint64_t alignment = std::uint64_t{4096} << random() % 3;
    const std::uint64_t end = kHeadBytes + random() % 64 * 4096 + random() % 4096;
    Space space(end, alignment);
    std::set<std::uint64_t> used;
    const auto use = [&](std::uint64_t offset, std::uint64_t nbytes) {
      bool fresh = true;
      for (std::uint64_t at = 0; at < nbytes; at += alignment) fresh &= used.insert((offset + at) / alignment).second;
      return fresh;
    };
    std::vector<Extent> given;
    for (int i = 0; i < 3; ++i) {
      const Extent extent{(kHeadBytes + random() % 64 * 4096) / alignment * alignment, random() % 20000};
      given.push_back(extent);
      use(extent.offset, extent.nbytes);
    }
    space.add(given);
    while (true) {
      const std::uint64_t longest = space.longest();
      const std::uint64_t nbytes = random() % 30000 + 1;
      const auto at = space.take(nbytes);
      if (!at) {
        CHECK(round_up(nbytes, alignment) > longest);
        if (longest == 0) break;
        CHECK(use(*space.take(longest), longest));
        continue;
      }
      CHECK(round_up(nbytes, alignment) <= longest);
      CHECK(*at % alignment == 0 && *at >= kHeadBytes && *at + nbytes <= end);
      CHECK(use(*at, nbytes));
    }
    CHECK(!space.take(1));
    CHECK(space.take(0).has_value());
    CHECK(!space.take(UINT64_MAX));
  }
}

TEST(utf8_is_told_from_other_bytes) {
  for (const char* good :
       {"", "a", "\xC3\xBC", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\xEF\xBF\xBF", "\xF4\x8F\xBF\xBF"}) {
    CHECK(is_utf8(good));
  }
  for (const char* bad : {"\x80", "\xC3", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
                          "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82", "\xE2\x82z", "\xFF"}) {
    CHECK(!is_utf8(bad));
  }
}
