// What the engine is measured against: plain readers as a good programmer would write them in an hour, and the
// machine's own limits. They share no code with the engine.
#pragma once

#include <cstdint>
#include <string>

namespace gpunvme::baselines {

// Each returns the seconds that it took, and throws std::system_error or std::runtime_error.

// `threads` threads take chunks of [0, nbytes) in turn and preadv them to `address`.
double pread_sequential(int fd, std::uint64_t address, std::uint64_t nbytes, std::uint64_t chunk, unsigned threads);

// `threads` threads take reads of `each` bytes in turn and preadv them, packed in order, to `address`.
double pread_random(int fd, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count, std::uint64_t each,
                    unsigned threads);

// The file is mapped, and threads memcpy out of it; offsets null: the first `each` bytes of it in one sequence.
double mmap_copy(int fd, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count, std::uint64_t each,
                 unsigned threads);

// O_DIRECT by one io_uring with `depth` requests in flight. `address` must be aligned as the drive demands.
double direct_sequential(const std::string& path, bool write, std::uint64_t address, std::uint64_t nbytes,
                         std::uint64_t chunk, unsigned depth);
double direct_random(const std::string& path, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count,
                     std::uint64_t each, unsigned depth);

// Bytes per second of repeated large copies from page-locked host memory to a GPU.
double h2d_ceiling(int device, std::uint64_t nbytes);

}  // namespace gpunvme::baselines
