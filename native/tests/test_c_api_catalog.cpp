// The C interface on catalogs, and on what only looks like one.
#include <gpunvme/gpunvme.h>

#include "catalog/crc32.h"
#include "catalog/serialise.h"
#include "check.h"
#include "files.h"

using namespace testing;
using gpunvme::catalog::Region;
using gpunvme::catalog::Superblock;

namespace {

constexpr std::uint64_t kFirst = gpunvme::catalog::kHeadBytes;

// A catalog with two regions, as a writer leaves it.
struct Image {
  Directory directory;
  std::string path = directory / "catalog";
  Bytes bytes = pattern(4 * kMiB, 1);
  Superblock superblock;
  std::vector<Region> regions;

  Image() {
    std::fill(bytes.begin(), bytes.begin() + kFirst, 0);
    Region rows;
    rows.kind = 7;
    rows.offset = kFirst;
    rows.nbytes = 100'000;
    rows.record_bytes = 100;
    rows.name = "rows";
    Region blob;
    blob.kind = 9;
    blob.offset = kFirst + 2 * 65536;
    blob.nbytes = 5;
    regions = {rows, blob};
    superblock.id[0] = 42;
    superblock.alignment = 4096;
    superblock.table_offset = 3 * kMiB;
    generation(1);
  }
  // Written into the slot that is its own.
  void generation(std::uint64_t number) {
    superblock.generation = number;
    superblock.regions = static_cast<std::uint32_t>(regions.size());
    superblock.table_offset = 3 * kMiB + number % 2 * 65536;
    const auto table = gpunvme::catalog::serialise_table(regions, number);
    superblock.table_bytes = table.size();
    superblock.table_crc32 = gpunvme::catalog::crc32(table);
    std::copy(table.begin(), table.end(), bytes.begin() + static_cast<std::ptrdiff_t>(superblock.table_offset));
    const auto head = gpunvme::catalog::serialise_superblock(superblock);
    std::copy(head.begin(), head.end(),
              bytes.begin() + static_cast<std::ptrdiff_t>(gpunvme::catalog::kSlots[number % 2]));
    write();
  }
  // In place: a layer that is read ahead must not find the file empty.
  void write() const {
    const Descriptor fd(path, O_WRONLY | O_CREAT);
    CHECK_EQ(pwrite(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    CHECK_EQ(ftruncate(fd, static_cast<off_t>(bytes.size())), 0);
  }
};

struct Library {
  Library() { CHECK_EQ(gpunvme_init(GPUNVME_API_VERSION), GPUNVME_OK); }
  ~Library() { gpunvme_shutdown(); }
};

int read_kind(gpunvme_handle catalog, std::uint64_t kind, std::uint64_t index, std::uint64_t count, void* to) {
  return gpunvme_kind_read(catalog, nullptr, 0, kind, index, count, to, GPUNVME_HOST, nullptr, 60'000, nullptr);
}

}  // namespace

TEST(regions_by_number_and_name) {
  const Library library;
  const Image image;
  gpunvme_handle catalog = 0;
  CHECK_EQ(gpunvme_open_catalog(image.path.c_str(), &catalog), GPUNVME_OK);
  gpunvme_kind table[3] = {};
  std::uint64_t entries = 0;
  CHECK_EQ(gpunvme_catalog_kinds(catalog, table, 3, &entries), GPUNVME_OK);
  CHECK_EQ(entries, 2u);
  CHECK_EQ(table[0].kind, 7u);
  CHECK_EQ(table[0].start, kFirst);
  CHECK_EQ(table[0].length, 100'000u);
  CHECK_EQ(table[0].record_bytes, 100u);
  CHECK_EQ(table[2].length, 0u);
  CHECK_EQ(gpunvme_catalog_kinds(catalog, nullptr, 0, &entries), GPUNVME_OK);
  CHECK_EQ(entries, 2u);
  std::uint64_t kind = 0;
  CHECK_EQ(gpunvme_catalog_find(catalog, "rows", &kind), GPUNVME_OK);
  CHECK_EQ(kind, 7u);
  CHECK_EQ(gpunvme_catalog_find(catalog, "", &kind), GPUNVME_EINVAL);
  CHECK_EQ(gpunvme_catalog_find(catalog, "columns", &kind), GPUNVME_EINVAL);
  Bytes bytes(300);
  CHECK_EQ(read_kind(catalog, 7, 997, 3, bytes.data()), GPUNVME_OK);
  CHECK_EQ(first_difference(bytes.data(), image.bytes.data() + kFirst + 99'700, 300), -1);
  CHECK_EQ(read_kind(catalog, 9, 0, 5, bytes.data()), GPUNVME_OK);
  CHECK_EQ(first_difference(bytes.data(), image.bytes.data() + kFirst + 2 * 65536, 5), -1);
  CHECK_EQ(read_kind(catalog, 7, 998, 3, bytes.data()), GPUNVME_ERANGE);
  CHECK_EQ(read_kind(catalog, 8, 0, 1, bytes.data()), GPUNVME_EINVAL);
  // A table of the caller's own still counts, and a source that has none has no regions.
  gpunvme_handle plain = 0;
  CHECK_EQ(gpunvme_open(image.path.c_str(), GPUNVME_READ_ONLY, &plain), GPUNVME_OK);
  CHECK_EQ(read_kind(plain, 7, 0, 1, bytes.data()), GPUNVME_EINVAL);
  CHECK_EQ(gpunvme_catalog_find(plain, "rows", &kind), GPUNVME_EINVAL);
  CHECK_EQ(gpunvme_close(plain), GPUNVME_OK);
  CHECK_EQ(gpunvme_close(catalog), GPUNVME_OK);
}

TEST(a_reader_keeps_its_generation_until_it_may_be_overwritten) {
  const Library library;
  Image image;
  gpunvme_handle catalog = 0;
  CHECK_EQ(gpunvme_open_catalog(image.path.c_str(), &catalog), GPUNVME_OK);
  std::uint8_t bytes[100];
  image.generation(2);
  CHECK_EQ(read_kind(catalog, 7, 0, 1, bytes), GPUNVME_OK);
  image.generation(3);
  CHECK_EQ(read_kind(catalog, 7, 0, 1, bytes), GPUNVME_ECHANGED);
  gpunvme_handle again = 0;
  CHECK_EQ(gpunvme_open_catalog(image.path.c_str(), &again), GPUNVME_OK);
  CHECK_EQ(read_kind(again, 7, 0, 1, bytes), GPUNVME_OK);
}

// Whichever function reads: what the handle was opened on, or an error, and never the next generation's bytes.
TEST(all_that_reads_notices_that_a_catalog_was_changed) {
  const Library library;
  Image image;
  gpunvme_handle catalog = 0;
  CHECK_EQ(gpunvme_open_catalog(image.path.c_str(), &catalog), GPUNVME_OK);
  const gpunvme_extent extents[] = {{0, kFirst, 1000, 0}, {1, kFirst + 1000, 1000, 0}, {2, kFirst + 2000, 1000, 0}};
  const std::int64_t offset = kFirst;
  std::uint8_t bytes[100];
  gpunvme_handle loaders[2] = {};
  gpunvme_handle transfer = 0;
  void* layer = nullptr;
  const auto expect = [&](int result) {
    CHECK_EQ(gpunvme_read(catalog, offset, 100, bytes, GPUNVME_HOST, nullptr, 60'000, nullptr), result);
    CHECK_EQ(gpunvme_gather(catalog, &offset, 1, 100, bytes, GPUNVME_HOST, nullptr, 60'000, nullptr), result);
    CHECK_EQ(gpunvme_read_async(catalog, offset, 100, bytes, GPUNVME_HOST, nullptr, 60'000, &transfer), GPUNVME_OK);
    CHECK_EQ(gpunvme_wait(transfer, GPUNVME_FOREVER, nullptr), result);
    CHECK_EQ(gpunvme_wait(transfer, GPUNVME_FOREVER, nullptr), GPUNVME_EINVAL);
    for (const gpunvme_handle loader : loaders) {
      CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 1, nullptr, 60'000, &layer, nullptr), result);
      CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 2, nullptr, 60'000, &layer, nullptr), result);
    }
  };
  for (std::uint32_t slots = 1; slots <= 2; ++slots) {
    CHECK_EQ(gpunvme_layer_loader_init(catalog, extents, 3, slots, GPUNVME_HOST, &loaders[slots - 1]), GPUNVME_OK);
    CHECK_EQ(gpunvme_layer_loader_load_layer(loaders[slots - 1], 0, nullptr, 60'000, &layer, nullptr), GPUNVME_OK);
  }
  image.generation(2);
  expect(GPUNVME_OK);
  // Layer 2 is in a slot, and stays what it is; the others have to be read.
  image.generation(3);
  for (const gpunvme_handle loader : loaders) {
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 2, nullptr, 60'000, &layer, nullptr), GPUNVME_OK);
    CHECK_EQ(first_difference(static_cast<std::uint8_t*>(layer), image.bytes.data() + kFirst + 2000, 1000), -1);
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 0, nullptr, 60'000, &layer, nullptr), GPUNVME_ECHANGED);
  }
  expect(GPUNVME_ECHANGED);
  expect(GPUNVME_ECHANGED);
  // A handle of the file alone knows nothing of generations.
  gpunvme_handle plain = 0;
  CHECK_EQ(gpunvme_open(image.path.c_str(), GPUNVME_READ_ONLY, &plain), GPUNVME_OK);
  CHECK_EQ(gpunvme_read(plain, offset, 100, bytes, GPUNVME_HOST, nullptr, 60'000, nullptr), GPUNVME_OK);
}

TEST(what_is_no_catalog_is_refused) {
  const Library library;
  Image image;
  gpunvme_handle catalog = 0;
  const Bytes good = image.bytes;
  const std::string empty = image.directory / "empty";
  write_file(empty, {});
  CHECK_EQ(gpunvme_open_catalog(empty.c_str(), &catalog), GPUNVME_ECATALOG);
  CHECK_EQ(gpunvme_open_catalog((image.directory / "none").c_str(), &catalog), GPUNVME_EFILE);
  CHECK_EQ(gpunvme_open_catalog(nullptr, &catalog), GPUNVME_EINVAL);
  check::Random random(3);
  for (int round = 0; round < check::rounds(60); ++round) {
    image.bytes = good;
    // Any byte that a checksum covers, or the end cut off before the table's.
    const std::uint64_t table = 3 * kMiB + 65536;
    if (random.one_in(6)) {
      image.bytes.resize(random.below(table));
    } else {
      const std::uint64_t at = random.one_in(2) ? 65536 + random.below(64) : table + random.below(64);
      image.bytes[at] = static_cast<std::uint8_t>(image.bytes[at] ^ random.between(1, 255));
    }
    image.write();
    CHECK_EQ(gpunvme_open_catalog(image.path.c_str(), &catalog), GPUNVME_ECATALOG);
    CHECK_EQ(catalog, 0u);
  }
}
