#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "baselines.h"

namespace gpunvme::baselines {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

// Runs `work(begin, end)` over [0, count) by `threads` threads that take `step` at a time; seconds.
double share(std::uint64_t count, std::uint64_t step, unsigned threads,
             const std::function<void(std::uint64_t, std::uint64_t)>& work) {
  std::atomic<std::uint64_t> next{0};
  std::atomic<int> error{0};
  const double start = now();
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i) {
    running.emplace_back([&] {
      try {
        for (;;) {
          const std::uint64_t begin = next.fetch_add(step);
          if (begin >= count) break;
          work(begin, std::min(count, begin + step));
        }
      } catch (const std::system_error& failure) {
        error = failure.code().value();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  if (error != 0) fail(error, "baseline");
  return now() - start;
}

// How many random blocks a thread takes at a time: many, but so few that every thread has several turns.
std::uint64_t turn(std::uint64_t count, unsigned threads) {
  return std::clamp<std::uint64_t>(count / (std::uint64_t{8} * std::max(1u, threads)), 1, 256);
}

void pread_all(int fd, std::uint8_t* to, std::uint64_t nbytes, std::uint64_t offset) {
  while (nbytes > 0) {
    const iovec vector{to, nbytes};
    const ssize_t got = preadv(fd, &vector, 1, static_cast<off_t>(offset));
    if (got <= 0) fail(got < 0 ? errno : EIO, "preadv");
    to += got;
    offset += static_cast<std::uint64_t>(got);
    nbytes -= static_cast<std::uint64_t>(got);
  }
}

struct DirectFile {
  DirectFile(const std::string& path, bool write) {
    fd = open(path.c_str(), (write ? O_WRONLY | O_CREAT : O_RDONLY) | O_DIRECT | O_CLOEXEC, 0666);
    if (fd < 0) fail(errno, "open O_DIRECT");
  }
  ~DirectFile() { close(fd); }
  int fd;
};

// Keeps `depth` requests in flight until `count` are done.
double pump(unsigned depth, std::uint64_t count, std::uint64_t each,
            const std::function<void(io_uring_sqe*, std::uint64_t)>& prepare) {
  io_uring ring{};
  const int error = io_uring_queue_init(depth, &ring, 0);
  if (error < 0) fail(-error, "io_uring_setup");
  const double start = now();
  std::uint64_t next = 0;
  std::uint64_t done = 0;
  int failed = 0;
  while (done < count && failed == 0) {
    for (; next < count && next - done < depth; ++next) prepare(io_uring_get_sqe(&ring), next);
    io_uring_submit_and_wait(&ring, 1);
    unsigned head = 0;
    unsigned seen = 0;
    io_uring_cqe* entry = nullptr;
    io_uring_for_each_cqe(&ring, head, entry) {
      if (entry->res < 0) failed = -entry->res;
      // Short only at the end of the file, and the callers' ranges end before it.
      if (entry->res >= 0 && static_cast<std::uint64_t>(entry->res) < each && done + seen + 1 < count) failed = EIO;
      ++seen;
    }
    io_uring_cq_advance(&ring, seen);
    done += seen;
  }
  const double seconds = now() - start;
  io_uring_queue_exit(&ring);
  if (failed != 0) fail(failed, "O_DIRECT");
  return seconds;
}

}  // namespace

double pread_sequential(int fd, std::uint64_t address, std::uint64_t nbytes, std::uint64_t chunk, unsigned threads) {
  auto* to = reinterpret_cast<std::uint8_t*>(address);
  return share(nbytes, chunk, threads,
               [&](std::uint64_t begin, std::uint64_t end) { pread_all(fd, to + begin, end - begin, begin); });
}

double pread_random(int fd, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count, std::uint64_t each,
                    unsigned threads) {
  auto* to = reinterpret_cast<std::uint8_t*>(address);
  return share(count, turn(count, threads), threads, [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t i = begin; i < end; ++i) {
      pread_all(fd, to + i * each, each, static_cast<std::uint64_t>(offsets[i]));
    }
  });
}

double mmap_copy(int fd, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count, std::uint64_t each,
                 unsigned threads) {
  struct stat status {};
  if (fstat(fd, &status) != 0) fail(errno, "fstat");
  auto* to = reinterpret_cast<std::uint8_t*>(address);
  const double start = now();
  const auto size = static_cast<std::size_t>(status.st_size);
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) fail(errno, "mmap");
  const auto* from = static_cast<const std::uint8_t*>(mapped);
  if (offsets == nullptr) {
    share(each, 2u << 20, threads,
          [&](std::uint64_t begin, std::uint64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
  } else {
    share(count, turn(count, threads), threads, [&](std::uint64_t begin, std::uint64_t end) {
      for (std::uint64_t i = begin; i < end; ++i) std::memcpy(to + i * each, from + offsets[i], each);
    });
  }
  munmap(mapped, size);
  return now() - start;
}

double direct_sequential(const std::string& path, bool write, std::uint64_t address, std::uint64_t nbytes,
                         std::uint64_t chunk, unsigned depth) {
  const DirectFile file(path, write);
  auto* memory = reinterpret_cast<std::uint8_t*>(address);
  return pump(depth, (nbytes + chunk - 1) / chunk, chunk, [&](io_uring_sqe* entry, std::uint64_t i) {
    const std::uint64_t offset = i * chunk;
    const auto length = static_cast<unsigned>(std::min(chunk, nbytes - offset));
    if (write) {
      io_uring_prep_write(entry, file.fd, memory + offset, length, offset);
    } else {
      io_uring_prep_read(entry, file.fd, memory + offset, length, offset);
    }
  });
}

double direct_random(const std::string& path, std::uint64_t address, const std::int64_t* offsets, std::uint64_t count,
                     std::uint64_t each, unsigned depth) {
  const DirectFile file(path, false);
  auto* memory = reinterpret_cast<std::uint8_t*>(address);
  return pump(depth, count, each, [&](io_uring_sqe* entry, std::uint64_t i) {
    io_uring_prep_read(entry, file.fd, memory + i * each, static_cast<unsigned>(each),
                       static_cast<std::uint64_t>(offsets[i]));
  });
}

}  // namespace gpunvme::baselines
