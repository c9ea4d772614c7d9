// The control side of libcufile_fake.so: a libcufile for tests, which misbehaves when it is told to.
//
// It moves bytes between files and the device memory of libcuda_fake.so (GPUNVME_LIBCUDA names it), and keeps the books
// that the real one keeps. Where it is stricter: a call without a current context is an error, and a read through a
// registration whose memory was freed since goes where the DMA of real hardware would go, not to the memory that has
// the address now.
//
// Settings, by name; the environment variable GPUNVME_FAKE_CUFILE sets them when the library is loaded, as in
// "mode=1,open_hang_ms=60000", so that child processes have them too:
//
//   version          what cuFileGetVersion says, 1160 for 1.16
//   udev             1: as cuFile 1.15 does, it registers only files whose file system udev's database has
//                    (ID_FS_USAGE), here in the folder that GPUNVME_FAKE_UDEV names
//   mode             what carries I/O: 0 compatibility, 1 nvidia-fs, 2 P2PDMA; 3: in turn 0 and 1
//   props            what the driver's properties promise, in the same numbers
//   count            0: I/O is not counted anywhere
//   stats            0: no statistics can be switched on; 2: they are of another GPU; 3: an old, shorter layout
//   open_hang_ms     cuFileDriverOpen takes so long
//   open_error       and fails with this
//   short            no read or write moves more bytes than this
//   delay_us         each read or write takes so long
//   errno            what errno is when -1 is returned
//   batch_at_once    completions that one cuFileBatchIOGetStatus hands out at most
//   batch_hang       completions do not come until this is 0 again
//   too_much         bytes that reads and writes claim to have moved beyond what was asked for
#pragma once

#include <cstdint>

#include "abi.h"

FAKE_CUFILE_API void fake_cufile_reset();
FAKE_CUFILE_API int fake_cufile_set(const char* name, long long value);
// The k-th next call of a function (without "cuFile": "Read", "BufRegister", or "entry" for one of a batch) fails with
// this code: a CUfileOpError where it returns one, the returned value itself for Read, Write, their Async and entries.
FAKE_CUFILE_API void fake_cufile_fail(const char* function, std::uint64_t k, long long code);
FAKE_CUFILE_API std::uint64_t fake_cufile_calls(const char* function);
// Where it is as strict as cuFile 1.15: memory that is registered is named by the base of its registration, and any
// other by its own address, without an offset. Batches and stream order in compatibility mode, where
// cuFileBatchIOSubmit of 1.15 does not return, are counted: batches_in_compat, streams_in_compat.
//
// live_handles, live_buffers, live_streams, live_batches, open; registered_io, stale_io, unaligned_io,
// busy_deregistrations.
FAKE_CUFILE_API std::uint64_t fake_cufile_counter(const char* name);
