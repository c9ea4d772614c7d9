// The C interface as a C99 program sees it: what it promises, and what it refuses.
#include <gpunvme/gpunvme.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern char* mkdtemp(char* name);
extern int setenv(const char* name, const char* value, int replace);
extern int rmdir(const char* name);
extern int truncate(const char* name, long length);
extern unsigned alarm(unsigned seconds);

#define FILE_BYTES (3u * 1024 * 1024 + 77)
static char directory[256];
static char path[300];
static unsigned char* expected;
static unsigned char* memory;  // as large, and 64 bytes

#define CHECK(condition)                                                                                    \
  do {                                                                                                      \
    if (!(condition)) {                                                                                     \
      printf("FAILED %s:%d: not %s (%s)\n", __FILE__, __LINE__, #condition, gpunvme_last_error()->message); \
      exit(1);                                                                                              \
    }                                                                                                       \
  } while (0)

// The call fails with that code, which is also the last error's, and says so in these words.
#define CHECK_FAILS(call, expected_code, words)                                                                        \
  do {                                                                                                                 \
    const int code_of_call = (call);                                                                                   \
    if (code_of_call != (expected_code) || gpunvme_last_error()->code != (expected_code) ||                            \
        strstr(gpunvme_last_error()->message, (words)) == NULL) {                                                      \
      printf("FAILED %s:%d: %s is %d (%s)\n", __FILE__, __LINE__, #call, code_of_call, gpunvme_last_error()->message); \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)

static gpunvme_handle opened(uint32_t mode) {
  gpunvme_handle source = 0;
  CHECK(gpunvme_open(path, mode, &source) == GPUNVME_OK);
  CHECK(source != 0);
  return source;
}

static void forget(void) { memset(memory, 0xa5, FILE_BYTES + 64); }

static void needs_init(void) {
  gpunvme_handle source = 0;
  uint64_t nbytes = 0;
  CHECK(gpunvme_last_error()->code == GPUNVME_OK);
  CHECK_FAILS(gpunvme_open(path, GPUNVME_READ_ONLY, &source), GPUNVME_ENOTINIT, "gpunvme_init()");
  CHECK_FAILS(gpunvme_size(1, &nbytes), GPUNVME_ENOTINIT, "gpunvme_init()");
  CHECK_FAILS(gpunvme_shutdown(), GPUNVME_ENOTINIT, "as often");
  CHECK_FAILS(gpunvme_init(GPUNVME_API_VERSION + 1), GPUNVME_EINVAL, "compile it again");
  // Two users; the first who leaves takes nothing from the other.
  CHECK(gpunvme_init(GPUNVME_API_VERSION) == GPUNVME_OK);
  CHECK(gpunvme_init(GPUNVME_API_VERSION) == GPUNVME_OK);
  source = opened(GPUNVME_READ_ONLY);
  CHECK(gpunvme_shutdown() == GPUNVME_OK);
  CHECK(gpunvme_size(source, &nbytes) == GPUNVME_OK && nbytes == FILE_BYTES);
  CHECK(gpunvme_shutdown() == GPUNVME_OK);
  CHECK_FAILS(gpunvme_size(source, &nbytes), GPUNVME_ENOTINIT, "gpunvme_shutdown()");
  CHECK(gpunvme_init(GPUNVME_API_VERSION) == GPUNVME_OK);
  CHECK_FAILS(gpunvme_size(source, &nbytes), GPUNVME_EINVAL, "was closed");
}

static void reads(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  gpunvme_report report;
  const uint64_t sizes[] = {0, 1, 4096, 65536, 65537, FILE_BYTES - 5};
  size_t i;
  for (i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    forget();
    memset(&report, 0xff, sizeof report);
    CHECK(gpunvme_read(source, 5, sizes[i], memory, GPUNVME_HOST, NULL, GPUNVME_FOREVER, &report) == GPUNVME_OK);
    CHECK(memcmp(memory, expected + 5, sizes[i]) == 0);
    CHECK(memory[sizes[i]] == 0xa5);
    CHECK(report.nbytes == sizes[i] && strcmp(report.path, "host") == 0 && report.seconds >= 0);
    CHECK(report.direct_bytes + report.cached_bytes + report.buffered_bytes == sizes[i]);
    CHECK(report.reserved[0] == 0 && report.reserved[3] == 0);
  }
  CHECK(gpunvme_read(source, FILE_BYTES, 0, NULL, GPUNVME_HOST, NULL, 60000, NULL) == GPUNVME_OK);
  CHECK_FAILS(gpunvme_read(source, 1, FILE_BYTES, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, path);
  CHECK_FAILS(gpunvme_read(source, -1, 1, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "offset -1");
  CHECK_FAILS(gpunvme_read(source, INT64_MIN, 1, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "asked");
  CHECK_FAILS(gpunvme_read(source, INT64_MAX, UINT64_MAX, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "");
  CHECK_FAILS(gpunvme_read(source, 0, 8, NULL, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "NULL");
  CHECK_FAILS(gpunvme_read(source, 0, 8, memory, -2, NULL, 60000, NULL), GPUNVME_EINVAL, "GPUNVME_HOST");
  CHECK_FAILS(gpunvme_read(source, 0, 8, memory, GPUNVME_HOST, NULL, -2, NULL), GPUNVME_EINVAL, "GPUNVME_FOREVER");
  CHECK_FAILS(gpunvme_read(source, 0, 8, (void*)(UINTPTR_MAX - 3), GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL,
              "no memory has 8 bytes");
  CHECK(gpunvme_read(source, 0, 8, memory, GPUNVME_HOST, NULL, INT64_MAX, NULL) == GPUNVME_OK);
  CHECK(gpunvme_close(source) == GPUNVME_OK);
  CHECK_FAILS(gpunvme_close(source), GPUNVME_EINVAL, "was closed");
  CHECK_FAILS(gpunvme_read(source, 0, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "was closed");
  CHECK_FAILS(gpunvme_close(0), GPUNVME_EINVAL, "never given out");
  CHECK_FAILS(gpunvme_close(UINT64_MAX), GPUNVME_EINVAL, "never given out");
}

static void refuses_to_open(void) {
  gpunvme_handle source = 42;
  char missing[320];
  sprintf(missing, "%s/none", directory);
  CHECK_FAILS(gpunvme_open(missing, GPUNVME_READ_ONLY, &source), GPUNVME_EFILE, missing);
  CHECK(gpunvme_last_error()->system_error == 2);  // ENOENT
  CHECK_FAILS(gpunvme_open(directory, GPUNVME_READ_ONLY, &source), GPUNVME_EFILE, "cannot open");
  CHECK_FAILS(gpunvme_open("/dev/null", GPUNVME_READ_ONLY, &source), GPUNVME_EFILE, "not a regular file");
  CHECK_FAILS(gpunvme_open("nvme+soft:x?nsid=1", GPUNVME_READ_ONLY, &source), GPUNVME_EUNSUPPORTED, "block device");
  CHECK_FAILS(gpunvme_open(path, 3, &source), GPUNVME_EINVAL, "mode 3");
  CHECK_FAILS(gpunvme_open(NULL, GPUNVME_READ_ONLY, &source), GPUNVME_EINVAL, "NULL");
  CHECK_FAILS(gpunvme_open(path, GPUNVME_READ_ONLY, NULL), GPUNVME_EINVAL, "NULL");
  CHECK(source == 42);
  {
    // Longer than the message: the reason must still be in it.
    char* name = malloc(5001);
    memset(name, 'n', 5000);
    name[5000] = 0;
    CHECK_FAILS(gpunvme_open(name, GPUNVME_READ_ONLY, &source), GPUNVME_EFILE, "too long");
    free(name);
  }
}

static void reads_unfinished(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  gpunvme_handle transfers[3] = {0, 0, 0};
  gpunvme_report report;
  int result;
  int i;
  forget();
  for (i = 0; i < 3; ++i) {
    CHECK(gpunvme_read_async(source, i << 20, 1 << 20, memory + ((size_t)i << 20), GPUNVME_HOST, NULL, 60000,
                             &transfers[i]) == GPUNVME_OK);
  }
  CHECK(gpunvme_close(source) == GPUNVME_OK);
  do {
    result = gpunvme_wait(transfers[0], 0, &report);
  } while (result == GPUNVME_EAGAIN);
  CHECK(result == GPUNVME_OK && report.nbytes == 1 << 20);
  CHECK(gpunvme_wait(transfers[1], GPUNVME_FOREVER, NULL) == GPUNVME_OK);
  CHECK(memcmp(memory, expected, 2 << 20) == 0);
  CHECK_FAILS(gpunvme_wait(transfers[1], 0, NULL), GPUNVME_EINVAL, "was closed");
  CHECK(gpunvme_close(transfers[2]) == GPUNVME_OK);
  CHECK_FAILS(gpunvme_wait(transfers[2], 0, NULL), GPUNVME_EINVAL, "was closed");
  CHECK_FAILS(gpunvme_read_async(source, 0, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "NULL");
}

static void gathers(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  enum { COUNT = 300, ROW = 1000 };
  int64_t offsets[COUNT];
  gpunvme_report report;
  int i;
  forget();
  for (i = 0; i < COUNT; ++i) offsets[i] = (int64_t)i * 7919 % (FILE_BYTES - ROW);
  CHECK(gpunvme_gather(source, offsets, COUNT, ROW, memory, GPUNVME_HOST, NULL, 60000, &report) == GPUNVME_OK);
  CHECK(report.nbytes == COUNT * ROW);
  for (i = 0; i < COUNT; ++i) CHECK(memcmp(memory + i * ROW, expected + offsets[i], ROW) == 0);
  // Rows too large to be gathered one by one.
  offsets[0] = 1 << 20;
  offsets[1] = 3;
  CHECK(gpunvme_gather(source, offsets, 2, 1 << 20, memory, GPUNVME_HOST, NULL, 60000, NULL) == GPUNVME_OK);
  CHECK(memcmp(memory, expected + (1 << 20), 1 << 20) == 0);
  CHECK(memcmp(memory + (1 << 20), expected + 3, 1 << 20) == 0);
  CHECK(gpunvme_gather(source, NULL, 0, 8, NULL, GPUNVME_HOST, NULL, 60000, NULL) == GPUNVME_OK);
  CHECK_FAILS(gpunvme_gather(source, NULL, 1, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "offsets");
  CHECK_FAILS(gpunvme_gather(source, offsets, 1, 0, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "0");
  CHECK_FAILS(gpunvme_gather(source, offsets, UINT64_MAX / 8, 16, memory, GPUNVME_HOST, NULL, 60000, NULL),
              GPUNVME_EINVAL, "more than any memory");
  offsets[1] = -8;
  CHECK_FAILS(gpunvme_gather(source, offsets, 2, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE,
              "read number 1");
  offsets[1] = FILE_BYTES - 7;
  CHECK_FAILS(gpunvme_gather(source, offsets, 2, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE,
              "read number 1");
  CHECK(gpunvme_close(source) == GPUNVME_OK);
}

static void reads_kinds(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  const gpunvme_kind table[] = {{7, 512, 1000, 100},    {UINT64_MAX, 4096, 4096, 0},
                                {9, 0, 10, 3},          {10, FILE_BYTES - 4, 8, 1},
                                {11, 0, 4, 1},          {11, 8, 4, 1},
                                {12, UINT64_MAX, 8, 1}, {13, 8, UINT64_MAX, 1}};
  const uint64_t entries = sizeof table / sizeof *table;
#define KIND(kind, index, count) \
  gpunvme_kind_read(source, table, entries, kind, index, count, memory, GPUNVME_HOST, NULL, 60000, NULL)
  forget();
  CHECK(KIND(7, 2, 3) == GPUNVME_OK);
  CHECK(memcmp(memory, expected + 512 + 200, 300) == 0 && memory[300] == 0xa5);
  CHECK(KIND(UINT64_MAX, 4095, 1) == GPUNVME_OK);
  CHECK(memory[0] == expected[4096 + 4095]);
  CHECK(KIND(7, 10, 0) == GPUNVME_OK);
  CHECK_FAILS(KIND(7, 9, 2), GPUNVME_ERANGE, "10 records");
  CHECK_FAILS(KIND(7, UINT64_MAX, 2), GPUNVME_ERANGE, "10 records");
  CHECK_FAILS(KIND(8, 0, 1), GPUNVME_EINVAL, "no region of kind 8");
  CHECK_FAILS(KIND(9, 0, 1), GPUNVME_EINVAL, "whole number of records");
  CHECK_FAILS(KIND(10, 0, 1), GPUNVME_ERANGE, path);
  CHECK_FAILS(KIND(11, 0, 1), GPUNVME_EINVAL, "two regions");
  CHECK_FAILS(KIND(12, 0, 1), GPUNVME_ERANGE, "beyond the end");
  CHECK_FAILS(KIND(13, 0, 1), GPUNVME_ERANGE, "asked for");
  CHECK_FAILS(gpunvme_kind_read(source, NULL, 1, 7, 0, 1, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL,
              "table");
  CHECK(gpunvme_close(source) == GPUNVME_OK);
}

static void writes(void) {
  char out[320];
  gpunvme_handle file = 0;
  gpunvme_handle reader = 0;
  uint64_t nbytes = 0;
  gpunvme_report report;
  sprintf(out, "%s/out", directory);
  CHECK(gpunvme_open(out, GPUNVME_CREATE, &file) == GPUNVME_OK);
  CHECK(gpunvme_write(file, 3, FILE_BYTES, expected, GPUNVME_HOST, NULL, 60000, &report) == GPUNVME_OK);
  CHECK(report.nbytes == FILE_BYTES);
  CHECK(gpunvme_sync(file) == GPUNVME_OK);
  CHECK(gpunvme_size(file, &nbytes) == GPUNVME_OK && nbytes == FILE_BYTES + 3);
  CHECK(gpunvme_open(out, GPUNVME_READ_ONLY, &reader) == GPUNVME_OK);
  forget();
  CHECK(gpunvme_read(reader, 3, FILE_BYTES, memory, GPUNVME_HOST, NULL, 60000, NULL) == GPUNVME_OK);
  CHECK(memcmp(memory, expected, FILE_BYTES) == 0);
  CHECK_FAILS(gpunvme_write(reader, 0, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EFILE, "READ_WRITE");
  CHECK_FAILS(gpunvme_write(file, -1, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "no file");
  CHECK_FAILS(gpunvme_write(file, INT64_MAX, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "no file");
  CHECK_FAILS(gpunvme_write(file, 0, UINT64_MAX, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EINVAL, "no memory");
  // Larger than any file system has files: refused, and the file is as it was.
  CHECK_FAILS(gpunvme_write(file, INT64_MAX - 8, 8, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_EFILE, "no room");
  CHECK(gpunvme_size(file, &nbytes) == GPUNVME_OK && nbytes == FILE_BYTES + 3);
  // Cut off behind our back: what is not there any more is an error.
  CHECK(truncate(out, 100) == 0);
  CHECK_FAILS(gpunvme_read(reader, 0, 101, memory, GPUNVME_HOST, NULL, 60000, NULL), GPUNVME_ERANGE, "100 bytes");
  CHECK(gpunvme_close(reader) == GPUNVME_OK);
  CHECK(gpunvme_close(file) == GPUNVME_OK);
  remove(out);
}

static void loads_layers(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  enum { LAYERS = 7 };
  gpunvme_extent extents[2 * LAYERS];
  uint32_t slots;
  uint64_t i;
  for (i = 0; i < LAYERS; ++i) {
    // Two parts a layer, in the other order in memory, with a gap.
    gpunvme_extent head = {0, 0, 1000, 200000};
    gpunvme_extent body = {0, 0, 100000, 4096};
    head.layer = body.layer = i;
    head.offset = i * 300000;
    body.offset = i * 300000 + 150000 + i;
    extents[2 * i] = head;
    extents[2 * i + 1] = body;
  }
  for (slots = 1; slots <= LAYERS + 1; ++slots) {
    gpunvme_handle loader = 0;
    CHECK(gpunvme_layer_loader_init(source, extents, 2 * LAYERS, slots, GPUNVME_HOST, &loader) == GPUNVME_OK);
    for (i = 0; i < 4 * LAYERS; ++i) {
      // Two passes, then any order, some of them twice.
      const uint64_t layer = i < 2 * LAYERS ? i % LAYERS : i * i * 3 % LAYERS;
      void* address = NULL;
      uint64_t nbytes = 0;
      CHECK(gpunvme_layer_loader_load_layer(loader, layer, NULL, 60000, &address, &nbytes) == GPUNVME_OK);
      CHECK(nbytes == 201000);
      CHECK(memcmp((char*)address + 200000, expected + layer * 300000, 1000) == 0);
      CHECK(memcmp((char*)address + 4096, expected + layer * 300000 + 150000 + layer, 100000) == 0);
    }
    {
      void* address = NULL;
      CHECK_FAILS(gpunvme_layer_loader_load_layer(loader, LAYERS, NULL, 60000, &address, NULL), GPUNVME_ERANGE,
                  "0 to 6");
      CHECK_FAILS(gpunvme_layer_loader_load_layer(loader, 0, NULL, 60000, NULL, NULL), GPUNVME_EINVAL, "address");
      CHECK_FAILS(gpunvme_close(loader), GPUNVME_EINVAL, "a layer loader");
      CHECK_FAILS(gpunvme_wait(loader, 0, NULL), GPUNVME_EINVAL, "a layer loader, not for a transfer");
      CHECK(gpunvme_layer_loader_destroy(loader) == GPUNVME_OK);
      CHECK_FAILS(gpunvme_layer_loader_load_layer(loader, 0, NULL, 60000, &address, NULL), GPUNVME_EINVAL, "closed");
      CHECK_FAILS(gpunvme_layer_loader_destroy(loader), GPUNVME_EINVAL, "closed");
      CHECK(address == NULL);
    }
  }
  CHECK(gpunvme_close(source) == GPUNVME_OK);
}

static void refuses_layers(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  gpunvme_handle loader = 0;
  gpunvme_extent extents[2] = {{0, 0, 100, 0}, {1, 100, 100, 0}};
#define INIT(count, slots) gpunvme_layer_loader_init(source, extents, count, slots, GPUNVME_HOST, &loader)
  CHECK_FAILS(INIT(0, 2), GPUNVME_EINVAL, "no extents");
  CHECK_FAILS(INIT(2, 0), GPUNVME_EINVAL, "slots");
  CHECK_FAILS(INIT(2, 1025), GPUNVME_EINVAL, "slots");
  CHECK_FAILS(gpunvme_layer_loader_init(source, NULL, 2, 2, GPUNVME_HOST, &loader), GPUNVME_EINVAL, "NULL");
  CHECK_FAILS(gpunvme_layer_loader_init(source, extents, 2, 2, -7, &loader), GPUNVME_EINVAL, "device -7");
  CHECK_FAILS(gpunvme_layer_loader_init(source, extents, 2, 2, GPUNVME_HOST, NULL), GPUNVME_EINVAL, "loader");
  CHECK_FAILS(gpunvme_layer_loader_init(77777, extents, 2, 2, GPUNVME_HOST, &loader), GPUNVME_EINVAL, "handle 77777");
  extents[1].layer = UINT64_MAX;
  CHECK_FAILS(INIT(2, 2), GPUNVME_EINVAL, "extent 1 is of layer");
  extents[0].layer = extents[1].layer = 1;
  extents[1].position = 100;
  CHECK_FAILS(INIT(2, 2), GPUNVME_EINVAL, "layer 0 has no extent");
  extents[0].layer = extents[1].layer = 0;
  extents[1].position = 99;
  CHECK_FAILS(INIT(2, 2), GPUNVME_EINVAL, "two extents of layer 0");
  extents[1].position = UINT64_MAX;
  CHECK_FAILS(INIT(2, 2), GPUNVME_EINVAL, "position");
  extents[1].position = INT64_MAX - 100;
  CHECK_FAILS(INIT(2, 2), GPUNVME_ENOMEM, "host memory");
  extents[1].position = 100;
  extents[1].length = 0;
  CHECK_FAILS(INIT(2, 2), GPUNVME_EINVAL, "no bytes");
  extents[1].length = FILE_BYTES;
  CHECK_FAILS(INIT(2, 2), GPUNVME_ERANGE, "asked for");
  extents[1].offset = UINT64_MAX;
  CHECK_FAILS(INIT(2, 2), GPUNVME_ERANGE, "beyond the end");
  CHECK(loader == 0);
  CHECK(gpunvme_close(source) == GPUNVME_OK);
}

// A file that is cut off while its layers are loaded: an error, and the layers that are still there can be loaded.
static void a_layer_that_is_gone(void) {
  char out[320];
  gpunvme_handle file = 0;
  gpunvme_handle loader = 0;
  void* address = NULL;
  int i;
  gpunvme_extent extents[4];
  for (i = 0; i < 4; ++i) {
    const gpunvme_extent extent = {(uint64_t)i, (uint64_t)i << 19, 1 << 19, 0};
    extents[i] = extent;
  }
  sprintf(out, "%s/layers", directory);
  CHECK(gpunvme_open(out, GPUNVME_CREATE, &file) == GPUNVME_OK);
  CHECK(gpunvme_write(file, 0, 2 << 20, expected, GPUNVME_HOST, NULL, 60000, NULL) == GPUNVME_OK);
  CHECK(gpunvme_layer_loader_init(file, extents, 4, 2, GPUNVME_HOST, &loader) == GPUNVME_OK);
  CHECK(gpunvme_layer_loader_load_layer(loader, 1, NULL, 60000, &address, NULL) == GPUNVME_OK);
  CHECK(gpunvme_layer_loader_load_layer(loader, 0, NULL, 60000, &address, NULL) == GPUNVME_OK);
  CHECK(truncate(out, 3 << 19) == 0);
  CHECK_FAILS(gpunvme_layer_loader_load_layer(loader, 3, NULL, 60000, &address, NULL), GPUNVME_ETRUNCATED, out);
  CHECK(gpunvme_layer_loader_load_layer(loader, 2, NULL, 60000, &address, NULL) == GPUNVME_OK);
  CHECK(memcmp(address, expected + (2 << 19), 1 << 19) == 0);
  CHECK_FAILS(gpunvme_layer_loader_load_layer(loader, 3, NULL, 60000, &address, NULL), GPUNVME_ETRUNCATED, out);
  CHECK(gpunvme_layer_loader_destroy(loader) == GPUNVME_OK);
  CHECK(gpunvme_close(file) == GPUNVME_OK);
  remove(out);
}

// Where there is no GPU and no driver, host memory works, and a GPU is refused with the reason.
static void without_a_gpu(void) {
  const gpunvme_handle source = opened(GPUNVME_READ_ONLY);
  gpunvme_handle loader = 0;
  const gpunvme_extent extent = {0, 0, 100, 0};
  CHECK_FAILS(gpunvme_read(source, 0, 8, memory, 0, NULL, 60000, NULL), GPUNVME_ECUDA, "libcuda");
  CHECK_FAILS(gpunvme_layer_loader_init(source, &extent, 1, 1, 0, &loader), GPUNVME_ECUDA, "libcuda");
  CHECK(gpunvme_read(source, 0, 8, memory, GPUNVME_HOST, (void*)1, 60000, NULL) == GPUNVME_OK);
  CHECK(gpunvme_close(source) == GPUNVME_OK);
}

#define RUN(test)                  \
  do {                             \
    test();                        \
    printf("ok      %s\n", #test); \
  } while (0)

int main(void) {
  const char* temporary = getenv("TMPDIR");
  FILE* file;
  size_t i;
  alarm(240);
  setenv("GPUNVME_LIBCUDA", "/no/libcuda.so", 1);
  sprintf(directory, "%.200s/gpunvme-test-XXXXXX", temporary != NULL ? temporary : "/var/tmp");
  if (mkdtemp(directory) == NULL) return 1;
  sprintf(path, "%s/file", directory);
  expected = malloc(FILE_BYTES);
  memory = malloc(FILE_BYTES + 64);
  for (i = 0; i < FILE_BYTES; ++i) expected[i] = (unsigned char)((i * 2654435761u) >> 13);
  file = fopen(path, "wb");
  if (file == NULL || fwrite(expected, 1, FILE_BYTES, file) != FILE_BYTES || fclose(file) != 0) return 1;
  RUN(needs_init);  // and leaves it initialised
  RUN(reads);
  RUN(refuses_to_open);
  RUN(reads_unfinished);
  RUN(gathers);
  RUN(reads_kinds);
  RUN(writes);
  RUN(loads_layers);
  RUN(refuses_layers);
  RUN(a_layer_that_is_gone);
  RUN(without_a_gpu);
  CHECK(gpunvme_shutdown() == GPUNVME_OK);
  free(expected);
  free(memory);
  remove(path);
  rmdir(directory);
  return 0;
}
