// The public functions: arguments checked, handles looked up, everything else elsewhere.
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>

#include "catalog_source.h"
#include "gpunvme/gpunvme.h"
#include "layer_loader.h"
#include "library.h"
#include "memory_place.h"
#include "refusal.h"
#include "source.h"
#include "transfer.h"

using namespace gpunvme;
using namespace gpunvme::capi;

namespace {

// A public function that is none of init, shutdown and last_error.
template <typename Body>
int call(const Body& body) noexcept {
  return guarded([&] {
    const Call in_progress;
    body();
  });
}

void require(const void* result, const char* name) {
  if (result == nullptr) throw Refusal(GPUNVME_EINVAL, std::string(name) + " is NULL");
}

std::uint64_t product(std::uint64_t count, std::uint64_t nbytes) {
  std::uint64_t total = 0;
  if (__builtin_mul_overflow(count, nbytes, &total)) {
    throw Refusal(GPUNVME_EINVAL,
                  std::to_string(count) + " × " + std::to_string(nbytes) + " bytes are more than any memory has");
  }
  return total;
}

const gpunvme_kind& kind_in(const gpunvme_kind* table, std::uint64_t entries, std::uint64_t kind) {
  const gpunvme_kind* found = nullptr;
  for (std::uint64_t i = 0; i < entries; ++i) {
    if (table[i].kind != kind) continue;
    if (found != nullptr) throw Refusal(GPUNVME_EINVAL, "the table has two regions of kind " + std::to_string(kind));
    found = &table[i];
  }
  if (found == nullptr) throw Refusal(GPUNVME_EINVAL, "the table has no region of kind " + std::to_string(kind));
  return *found;
}

}  // namespace

extern "C" {

int gpunvme_init(uint32_t api_version) {
  return guarded([&] { library_init(api_version); });
}

int gpunvme_shutdown(void) {
  return guarded([] { library_shutdown(); });
}

const gpunvme_error* gpunvme_last_error(void) { return last_error(); }

int gpunvme_open(const char* path, uint32_t mode, gpunvme_handle* source) {
  return call([&] {
    require(source, "source");
    *source = add_handle(Source::open(path, mode));
  });
}

int gpunvme_open_catalog(const char* path, gpunvme_handle* catalog) {
  return call([&] {
    require(catalog, "catalog");
    *catalog = add_handle(CatalogSource::open(path));
  });
}

int gpunvme_catalog_kinds(gpunvme_handle catalog, gpunvme_kind* table, uint64_t capacity, uint64_t* entries) {
  return call([&] {
    require(entries, "entries");
    if (capacity > 0) require(table, "table");
    const auto found = find<CatalogSource>(catalog);
    const auto& kinds = found->kinds();
    for (std::uint64_t i = 0; i < capacity && i < kinds.size(); ++i) table[i] = kinds[i];
    *entries = kinds.size();
  });
}

int gpunvme_catalog_find(gpunvme_handle catalog, const char* name, uint64_t* kind) {
  return call([&] {
    require(name, "name");
    require(kind, "kind");
    *kind = find<CatalogSource>(catalog)->kind_of(name);
  });
}

int gpunvme_size(gpunvme_handle source, uint64_t* nbytes) {
  return call([&] {
    require(nbytes, "nbytes");
    *nbytes = find<Source>(source)->file()->size();
  });
}

int gpunvme_close(gpunvme_handle handle) {
  return call([&] {
    const auto object = find_object(handle);
    if (dynamic_cast<const LayerLoader*>(object.get()) != nullptr) refuse_handle(*object, "a source or a transfer");
    if (!remove_handle(handle)) throw Refusal(GPUNVME_EINVAL, "another thread was faster to close the handle");
    object->stop();
  });
}

int gpunvme_read(gpunvme_handle source, int64_t offset, uint64_t nbytes, void* to, int32_t device, void* stream,
                 int64_t timeout_ms, gpunvme_report* report) {
  return call([&] {
    const Deadline deadline(timeout_ms);
    const auto from = find<Source>(source);
    const std::uint64_t at = from->checked_range(offset, nbytes);
    read(*from, at, checked_place(to, nbytes, device, stream), deadline, report);
    from->check_current();
  });
}

int gpunvme_read_async(gpunvme_handle source, int64_t offset, uint64_t nbytes, void* to, int32_t device, void* stream,
                       int64_t timeout_ms, gpunvme_handle* transfer) {
  return call([&] {
    require(transfer, "transfer");
    const Deadline deadline(timeout_ms);
    const auto from = find<Source>(source);
    const std::uint64_t at = from->checked_range(offset, nbytes);
    *transfer = add_handle(begin_read(from, at, checked_place(to, nbytes, device, stream), deadline));
  });
}

int gpunvme_wait(gpunvme_handle transfer, int64_t timeout_ms, gpunvme_report* report) {
  return call([&] {
    const Deadline until(timeout_ms);
    const auto waited_for = find<Transfer>(transfer);
    if (!waited_for->wait(until)) throw Refusal(GPUNVME_EAGAIN, "the transfer is still moving: wait again");
    remove_handle(transfer);
    fill_report(report, waited_for->job());
    throw_failure(waited_for->job());
    waited_for->source().check_current();
  });
}

int gpunvme_write(gpunvme_handle source, int64_t offset, uint64_t nbytes, const void* from, int32_t device,
                  void* stream, int64_t timeout_ms, gpunvme_report* report) {
  return call([&] {
    const Deadline deadline(timeout_ms);
    const auto to = find<Source>(source);
    write(*to, offset, checked_place(from, nbytes, device, stream), deadline, report);
  });
}

int gpunvme_sync(gpunvme_handle source) {
  return call([&] {
    const auto file = find<Source>(source)->file();
    if (fsync(file->fd()) != 0) throw file_failure(errno, "fsync", file->name());
  });
}

int gpunvme_gather(gpunvme_handle source, const int64_t* offsets, uint64_t count, uint64_t nbytes, void* to,
                   int32_t device, void* stream, int64_t timeout_ms, gpunvme_report* report) {
  return call([&] {
    const Deadline deadline(timeout_ms);
    const auto from = find<Source>(source);
    if (nbytes == 0) throw Refusal(GPUNVME_EINVAL, "nbytes is 0: each read must have at least one byte");
    if (count > 0) require(offsets, "offsets");
    gather(*from, offsets, count, nbytes, checked_place(to, product(count, nbytes), device, stream), deadline, report);
    from->check_current();
  });
}

int gpunvme_kind_read(gpunvme_handle source, const gpunvme_kind* table, uint64_t entries, uint64_t kind, uint64_t index,
                      uint64_t count, void* to, int32_t device, void* stream, int64_t timeout_ms,
                      gpunvme_report* report) {
  return call([&] {
    const Deadline deadline(timeout_ms);
    const auto from = find<Source>(source);
    const auto* const catalog = dynamic_cast<const CatalogSource*>(from.get());
    if (table == nullptr && entries == 0 && catalog != nullptr) {
      table = catalog->kinds().data();
      entries = catalog->kinds().size();
    }
    if (entries > 0) require(table, "table");
    const gpunvme_kind& region = kind_in(table, entries, kind);
    const std::uint64_t record = region.record_bytes == 0 ? 1 : region.record_bytes;
    const std::string which = "region " + std::to_string(kind);
    if (region.length % record != 0) {
      throw Refusal(GPUNVME_EINVAL, which + ": " + std::to_string(region.length) +
                                        " bytes are no whole number of records of " + std::to_string(record));
    }
    const std::uint64_t records = region.length / record;
    if (index > records || count > records - index) {
      throw Refusal(GPUNVME_ERANGE, which + " has " + std::to_string(records) + " records; " + std::to_string(count) +
                                        " from number " + std::to_string(index) + " were asked for");
    }
    if (region.start > INT64_MAX) throw Refusal(GPUNVME_ERANGE, which + " begins beyond the end of any file");
    const std::uint64_t start = from->checked_range(static_cast<std::int64_t>(region.start), region.length);
    read(*from, start + index * record, checked_place(to, count * record, device, stream), deadline, report);
    from->check_current();
  });
}

int gpunvme_layer_loader_init(gpunvme_handle source, const gpunvme_extent* extents, uint64_t count, uint32_t slots,
                              int32_t device, gpunvme_handle* loader) {
  return call([&] {
    require(loader, "loader");
    const auto from = find<Source>(source);
    *loader = add_handle(std::make_shared<LayerLoader>(from, extents, count, slots, device));
  });
}

int gpunvme_layer_loader_load_layer(gpunvme_handle loader, uint64_t layer, void* stream, int64_t timeout_ms,
                                    void** address, uint64_t* nbytes) {
  return call([&] {
    require(address, "address");
    const Deadline deadline(timeout_ms);
    const auto found = find<LayerLoader>(loader)->load(layer, stream, deadline);
    *address = reinterpret_cast<void*>(found.address);
    if (nbytes != nullptr) *nbytes = found.nbytes;
  });
}

int gpunvme_layer_loader_destroy(gpunvme_handle loader) {
  return call([&] {
    const auto found = find<LayerLoader>(loader);
    if (!remove_handle(loader)) throw Refusal(GPUNVME_EINVAL, "another thread was faster to destroy the loader");
    found->stop();
  });
}

}  // extern "C"
