// gpunvme for C and C++: bytes between files and memory of the host or of a GPU, by libgpunvme. No Python is involved.
//
//   gpunvme_handle weights;
//   gpunvme_init(GPUNVME_API_VERSION);
//   if (gpunvme_open("weights.bin", GPUNVME_READ_ONLY, &weights) != GPUNVME_OK ||
//       gpunvme_read(weights, 0, nbytes, memory, GPUNVME_HOST, NULL, GPUNVME_FOREVER, NULL) != GPUNVME_OK) {
//     fprintf(stderr, "%s\n", gpunvme_last_error()->message);
//   }
//   gpunvme_shutdown();
//
// `cc program.c $(gpunvme config --cflags --libs)` compiles it. docs/c-api.md tells more.
//
// What can be opened
//   Regular files, and block devices for reading. A namespace that the kernel's NVMe driver holds is its block device,
//   /dev/nvme0n1. Controllers that are driven from user space (the `nvme` path, `gpu-nvme`) are brought up by the
//   Python package only: their URIs are refused here with GPUNVME_EUNSUPPORTED. All transfers go by the `host` path:
//   page cache and O_DIRECT, through page-locked memory where a GPU is at the other end.
//
// Units
//   Offsets and sizes are bytes, times milliseconds. A transfer is complete or an error: there are no short reads.
//
// Memory
//   An address and a device: GPUNVME_HOST for host memory, else the ordinal of the GPU that the memory was allocated
//   on (cudaMalloc, cuMemAlloc). `stream` is a CUstream or cudaStream_t of that GPU, NULL for its default stream: the
//   transfer starts after the work that is queued there now, and when it is done, the bytes are there for every
//   stream. It is ignored for host memory. The caller owns all memory that is passed, and keeps it until the transfer
//   is done; what a failed read leaves in it is undefined.
//
// Deadlines
//   `timeout_ms` counts from the call; GPUNVME_FOREVER is none. At the deadline a transfer is stopped. A function
//   returns only when nothing touches the caller's memory any more, so it may return later than that: a request that is
//   with the drive is waited for, and so is the caller's own stream.
//
// Threads
//   Every function may be called from any thread, on the same handle too. One that is closed while another thread uses
//   it stays valid for the call that runs. Threads must not be cancelled (pthread_cancel) inside a call.
//
// Handles
//   Numbers that are never given out twice: one that was closed, or never was, is GPUNVME_EINVAL. 0 is none.
//
// Errors
//   Functions return GPUNVME_OK or one of the negative values of gpunvme_status; gpunvme_last_error() tells more. Where
//   a function fails, it leaves its results as they were. No C++ exception leaves the library.
//
// Processes
//   A forked child may read from the sources that its parent opened, into host memory. Transfers and layer loaders are
//   the parent's alone.
#ifndef GPUNVME_GPUNVME_H_
#define GPUNVME_GPUNVME_H_

#ifndef __CUDACC_RTC__  // host code only

#include <stdint.h>

// The interface that this header describes. It changes when a program that was compiled against an earlier one would
// no longer work; the library is called libgpunvme.so.<version>.
#define GPUNVME_API_VERSION 1

#if defined(__GNUC__)
#define GPUNVME_API __attribute__((visibility("default")))
#else
#define GPUNVME_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum gpunvme_status {
  GPUNVME_OK = 0,
  GPUNVME_EINVAL = -1,         // an argument or a handle makes no sense
  GPUNVME_ENOTINIT = -2,       // gpunvme_init() was not called, or gpunvme_shutdown() was
  GPUNVME_ERANGE = -3,         // the source does not have that range
  GPUNVME_EFILE = -4,          // the operating system refused: gpunvme_error.system_error is the errno
  GPUNVME_ETRUNCATED = -5,     // the file ended before the bytes that it had when the transfer began
  GPUNVME_ECUDA = -6,          // a CUDA call failed, or CUDA cannot be used here
  GPUNVME_ETIMEDOUT = -7,      // not complete by its deadline
  GPUNVME_ECANCELED = -8,      // stopped by gpunvme_close() or gpunvme_shutdown()
  GPUNVME_EAGAIN = -9,         // gpunvme_wait() only: it is still moving, wait again
  GPUNVME_ENOMEM = -10,        // no memory, of the host or of the GPU
  GPUNVME_EUNSUPPORTED = -11,  // this library cannot do that
  GPUNVME_EINTERNAL = -12,     // a mistake in the library
  GPUNVME_ECATALOG = -13,      // there is no catalog, or it is damaged
  GPUNVME_ECHANGED = -14       // the catalog was changed meanwhile, and what was read may not be its: open it again
} gpunvme_status;

// What went wrong in a thread's latest call that failed.
typedef struct gpunvme_error {
  int32_t code;          // gpunvme_status
  int32_t system_error;  // errno, or 0
  int64_t offset;        // in the source, or -1
  char message[1008];    // what, where, and what to do; ends with 0. File names are as they were given, maybe no UTF-8
} gpunvme_error;

// A source, a transfer or a layer loader.
typedef uint64_t gpunvme_handle;

#define GPUNVME_HOST (-1)
#define GPUNVME_FOREVER INT64_C(-1)

// How a source is opened.
#define GPUNVME_READ_ONLY 0u
#define GPUNVME_READ_WRITE 1u  // a file that exists
#define GPUNVME_CREATE 2u      // read and write a file that is made, or emptied

// What a transfer did, counted where it was done.
typedef struct gpunvme_report {
  const char* path;         // "host"; never freed
  uint64_t nbytes;          // moved: the three below together
  uint64_t direct_bytes;    // read or written O_DIRECT
  uint64_t cached_bytes;    // copied out of the page cache, or into it
  uint64_t buffered_bytes;  // through the page cache, which had to read them first
  uint64_t bounced_bytes;   // of all these, through memory of the library's
  double seconds;
  uint64_t reserved[4];  // 0
} gpunvme_report;

// A region of a source, in a table that the caller makes. A device that is described by blocks: bytes are LBA × block
// size.
typedef struct gpunvme_kind {
  uint64_t kind;          // its number, unique in the table
  uint64_t start;         // its first byte in the source
  uint64_t length;        // bytes
  uint64_t record_bytes;  // what records are counted in; 0 counts as 1
} gpunvme_kind;

// A range of a source that belongs to a layer.
typedef struct gpunvme_extent {
  uint64_t layer;     // from 0, without gaps
  uint64_t offset;    // in the source
  uint64_t length;    // bytes
  uint64_t position;  // where it goes, from the start of the layer's memory
} gpunvme_extent;

// Makes the library ready. Give GPUNVME_API_VERSION. May be called again, also by other parts of a program: as many
// calls of gpunvme_shutdown() end it.
//
// GPUNVME_EINVAL: the program was compiled for another interface.
GPUNVME_API int gpunvme_init(uint32_t api_version);

// Undoes one gpunvme_init(). The last one stops every transfer (GPUNVME_ECANCELED for those who wait), waits until
// nothing touches the callers' memory, destroys loaders, closes sources and ends the library's threads.
GPUNVME_API int gpunvme_shutdown(void);

// What happened in this thread's latest call that failed; code is GPUNVME_OK if none did. Never NULL. The library owns
// it; the next failure in this thread writes over it.
GPUNVME_API const gpunvme_error* gpunvme_last_error(void);

// Opens a file or, for reading, a block device. `path` is copied.
//
// GPUNVME_EFILE, GPUNVME_EINVAL, GPUNVME_EUNSUPPORTED: see above.
GPUNVME_API int gpunvme_open(const char* path, uint32_t mode, gpunvme_handle* source);

// Opens a catalog (docs/catalog-format.md) on a file or block device for reading, as it is now. Whoever changes it
// later leaves these regions as they are at first, and may overwrite them with its second change: from then on whatever
// is read is GPUNVME_ECHANGED. The handle is a source, too.
//
// GPUNVME_ECATALOG: there is no catalog, or it is damaged. GPUNVME_ECHANGED: it changed as often as it was looked at.
GPUNVME_API int gpunvme_open_catalog(const char* path, gpunvme_handle* catalog);

// The regions of a catalog: up to `capacity` of them into `table`, and how many there are into `entries`.
GPUNVME_API int gpunvme_catalog_kinds(gpunvme_handle catalog, gpunvme_kind* table, uint64_t capacity,
                                      uint64_t* entries);

// The number of the region that is called so (UTF-8). GPUNVME_EINVAL: there is none.
GPUNVME_API int gpunvme_catalog_find(gpunvme_handle catalog, const char* name, uint64_t* kind);

// The size of a source now.
GPUNVME_API int gpunvme_size(gpunvme_handle source, uint64_t* nbytes);

// Closes a source: transfers and loaders that use it go on. Or gives up a transfer: it is stopped, and waited for.
// Loaders are destroyed instead.
GPUNVME_API int gpunvme_close(gpunvme_handle handle);

// Reads [offset, offset + nbytes) of a source to `to` and returns when the bytes are there. `report` may be NULL.
GPUNVME_API int gpunvme_read(gpunvme_handle source, int64_t offset, uint64_t nbytes, void* to, int32_t device,
                             void* stream, int64_t timeout_ms, gpunvme_report* report);

// The same, unfinished. Every transfer is ended by gpunvme_wait(), gpunvme_close() or gpunvme_shutdown(); until then
// the memory is the library's to write. The source may be closed meanwhile. `stream` must live until then.
GPUNVME_API int gpunvme_read_async(gpunvme_handle source, int64_t offset, uint64_t nbytes, void* to, int32_t device,
                                   void* stream, int64_t timeout_ms, gpunvme_handle* transfer);

// Waits for a transfer at most `timeout_ms` (0: only looks), and ends it: the handle is invalid after every result but
// GPUNVME_EAGAIN and GPUNVME_EINVAL. Of several threads that wait for one transfer, all get its result. `report` may be
// NULL; it is also filled in where the transfer failed.
GPUNVME_API int gpunvme_wait(gpunvme_handle transfer, int64_t timeout_ms, gpunvme_report* report);

// Writes memory to [offset, offset + nbytes) of a source, which grows as needed. A full disk is found before anything
// is written, where the file system can reserve space; a file that grew is cut back when the write fails. The bytes
// need not be on the drive when it returns: see gpunvme_sync().
GPUNVME_API int gpunvme_write(gpunvme_handle source, int64_t offset, uint64_t nbytes, const void* from, int32_t device,
                              void* stream, int64_t timeout_ms, gpunvme_report* report);

// Returns when everything that was written to a source is on its drive (fsync).
GPUNVME_API int gpunvme_sync(gpunvme_handle source);

// Reads `count` ranges of `nbytes` bytes each, at `offsets` (host memory), packed in order to `to`, which has
// count × nbytes bytes.
GPUNVME_API int gpunvme_gather(gpunvme_handle source, const int64_t* offsets, uint64_t count, uint64_t nbytes, void* to,
                               int32_t device, void* stream, int64_t timeout_ms, gpunvme_report* report);

// Reads records [index, index + count) of region `kind` of a table of `entries` regions. The table is only looked at
// during the call. NULL and 0 entries are a catalog's own.
//
// GPUNVME_EINVAL: the table has no such region, or two, or its length is no multiple of its record.
// GPUNVME_ERANGE: the region has no such records, or does not lie in the source.
GPUNVME_API int gpunvme_kind_read(gpunvme_handle source, const gpunvme_kind* table, uint64_t entries, uint64_t kind,
                                  uint64_t index, uint64_t count, void* to, int32_t device, void* stream,
                                  int64_t timeout_ms, gpunvme_report* report);

// Makes a loader of layers that do not all fit into memory: a ring of `slots` (1 to 1024), each as large as the largest
// layer, allocated on `device`, and starts to read the first ones. What is in the ring is kept, what comes next is read
// ahead, past the last layer from the first on; with one slot nothing is read ahead. `extents` is copied; the source
// may be closed. Positions that differ from their offsets by multiples of 4096 bytes spare host memory a copy.
//
// GPUNVME_EINVAL: a layer has no extent, or extents of a layer overlap where they go.
// GPUNVME_ENOMEM: the ring does not fit.
GPUNVME_API int gpunvme_layer_loader_init(gpunvme_handle source, const gpunvme_extent* extents, uint64_t count,
                                          uint32_t slots, int32_t device, gpunvme_handle* loader);

// Waits for a layer, in any order, and gives its memory, which is the loader's: `*address` on its device, `*nbytes` to
// the end of the layer's last extent (may be NULL). It stays as it is until the next call for this loader; then it may
// be overwritten, but not before the work that was queued on `stream` by the time of that call. So: load a layer, queue
// what computes with it on `stream`, load the next. In host memory: be done with it before the next call. `stream` must
// live until the next call. Calls for one loader take turns.
//
// GPUNVME_ETIMEDOUT: not there by then; it is still being read, and can be asked for again.
GPUNVME_API int gpunvme_layer_loader_load_layer(gpunvme_handle loader, uint64_t layer, void* stream, int64_t timeout_ms,
                                                void** address, uint64_t* nbytes);

// Stops what it reads, waits for it, and frees the ring. The caller's own work with the last layer must be over.
GPUNVME_API int gpunvme_layer_loader_destroy(gpunvme_handle loader);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // __CUDACC_RTC__
#endif  // GPUNVME_GPUNVME_H_
