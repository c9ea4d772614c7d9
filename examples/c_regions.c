// Lists the regions of a catalog, reads records of one by its name, and goes through it in pieces that are read ahead.
//
//   gpunvme pack model.safetensors regions.bin
//   cc -o c_regions c_regions.c $(gpunvme config --cflags --libs) && ./c_regions regions.bin embed.weight
#include <gpunvme/gpunvme.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define PIECES 8
#define MOST_REGIONS 1024

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, gpunvme_last_error()->message);
  gpunvme_shutdown();
  return 1;
}

static uint64_t sum(const unsigned char* bytes, uint64_t nbytes) {
  uint64_t total = 0;
  while (nbytes-- > 0) total += *bytes++;
  return total;
}

int main(int argc, char** argv) {
  static gpunvme_kind regions[MOST_REGIONS];
  gpunvme_handle catalog, loader;
  gpunvme_extent pieces[PIECES];
  gpunvme_kind* region = NULL;
  uint64_t kind, entries, i, at, nbytes, read = 0, loaded = 0;
  unsigned char* memory;
  void* piece;

  if (argc != 3) {
    fprintf(stderr, "usage: %s CATALOG REGION\n", argv[0]);
    return 2;
  }
  if (gpunvme_init(GPUNVME_API_VERSION) != GPUNVME_OK) return failed("gpunvme_init");
  if (gpunvme_open_catalog(argv[1], &catalog) != GPUNVME_OK) return failed("gpunvme_open_catalog");
  if (gpunvme_catalog_kinds(catalog, regions, MOST_REGIONS, &entries) != GPUNVME_OK) return failed("catalog_kinds");
  if (gpunvme_catalog_find(catalog, argv[2], &kind) != GPUNVME_OK) return failed("gpunvme_catalog_find");
  for (i = 0; i < entries && i < MOST_REGIONS; ++i) {
    printf("%" PRIu64 ": %" PRIu64 " bytes, records of %" PRIu64 "\n", regions[i].kind, regions[i].length,
           regions[i].record_bytes);
    if (regions[i].kind == kind) region = &regions[i];
  }
  if (region == NULL || region->length == 0) return 3;

  // All records at once. With a table of your own in place of NULL, 0 this works on any file or block device.
  memory = malloc(region->length);
  if (memory == NULL) return 1;
  if (gpunvme_kind_read(catalog, NULL, 0, kind, 0, region->length / region->record_bytes, memory, GPUNVME_HOST, NULL,
                        60000, NULL) != GPUNVME_OK) {
    return failed("gpunvme_kind_read");
  }
  read = sum(memory, region->length);
  free(memory);

  // The same in pieces, two of them in memory at a time. On a GPU: its number in place of GPUNVME_HOST, and a stream.
  for (i = at = 0; at < region->length; ++i, at += nbytes) {
    nbytes = region->length / PIECES + 1;
    if (nbytes > region->length - at) nbytes = region->length - at;
    pieces[i].layer = i;
    pieces[i].offset = region->start + at;
    pieces[i].length = nbytes;
    pieces[i].position = 0;
  }
  entries = i;
  if (gpunvme_layer_loader_init(catalog, pieces, entries, 2, GPUNVME_HOST, &loader) != GPUNVME_OK) {
    return failed("gpunvme_layer_loader_init");
  }
  for (i = 0; i < entries; ++i) {
    if (gpunvme_layer_loader_load_layer(loader, i, NULL, 60000, &piece, &nbytes) != GPUNVME_OK) {
      return failed("gpunvme_layer_loader_load_layer");
    }
    loaded += sum(piece, nbytes);
  }
  printf("%s: sum %" PRIu64 " at once, %" PRIu64 " in %" PRIu64 " pieces\n", argv[2], read, loaded, entries);
  gpunvme_layer_loader_destroy(loader);
  gpunvme_close(catalog);
  gpunvme_shutdown();
  return read == loaded ? 0 : 4;
}
