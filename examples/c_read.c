// Reads a file into memory in one piece, and random rows of it, and says how the bytes came.
//
//   cc -o c_read c_read.c $(gpunvme config --cflags --libs) && ./c_read weights.bin
#include <gpunvme/gpunvme.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define ROW 64
#define ROWS 1000

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, gpunvme_last_error()->message);
  gpunvme_shutdown();
  return 1;
}

static void say(const char* what, const gpunvme_report* report) {
  printf("%s: %" PRIu64 " bytes in %.1f ms by %s: %" PRIu64 " from the page cache, %" PRIu64 " O_DIRECT\n", what,
         report->nbytes, report->seconds * 1e3, report->path, report->cached_bytes, report->direct_bytes);
}

int main(int argc, char** argv) {
  gpunvme_handle file;
  gpunvme_report report;
  uint64_t nbytes;
  uint64_t i;
  int64_t offsets[ROWS];
  static char rows[ROWS][ROW];
  char* memory;

  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  if (gpunvme_init(GPUNVME_API_VERSION) != GPUNVME_OK) return failed("gpunvme_init");
  if (gpunvme_open(argv[1], GPUNVME_READ_ONLY, &file) != GPUNVME_OK) return failed("gpunvme_open");
  if (gpunvme_size(file, &nbytes) != GPUNVME_OK) return failed("gpunvme_size");
  memory = malloc(nbytes + 1);
  if (memory == NULL) return 1;
  if (gpunvme_read(file, 0, nbytes, memory, GPUNVME_HOST, NULL, 60000, &report) != GPUNVME_OK) return failed("read");
  say("read", &report);

  if (nbytes >= ROW) {
    for (i = 0; i < ROWS; ++i) offsets[i] = (int64_t)(i * 2654435761u % (nbytes - ROW + 1));
    if (gpunvme_gather(file, offsets, ROWS, ROW, rows, GPUNVME_HOST, NULL, 60000, &report) != GPUNVME_OK) {
      return failed("gather");
    }
    say("gather", &report);
    for (i = 0; i < ROWS; ++i) {
      if (rows[i][0] != memory[offsets[i]]) return 3;
    }
  }
  free(memory);
  gpunvme_close(file);
  gpunvme_shutdown();
  return 0;
}
