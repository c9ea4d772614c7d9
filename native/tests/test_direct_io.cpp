// Both ways of O_DIRECT at depth, side by side: the ring and the threads must be indistinguishable but for speed.
#include <map>
#include <set>

#include "check.h"
#include "direct_io.h"
#include "files.h"

using namespace testing;
using gpunvme::DirectQueue;
using gpunvme::DirectRequest;
using gpunvme::DirectResult;

namespace {

// Calls a test with each kind of queue.
template <typename Function>
void with_both(unsigned depth, Function function) {
  for (const bool threads : {false, true}) {
    if (threads) setenv("GPUNVME_IO", "threads", 1);
    const auto queue = DirectQueue::make(depth);
    unsetenv("GPUNVME_IO");
    CHECK_EQ(queue->is_io_uring(), !threads && gpunvme::io_uring_refusal().empty());
    function(*queue);
  }
}

// All results, by tag.
std::map<std::uint64_t, int> reap_all(DirectQueue& queue) {
  std::map<std::uint64_t, int> found;
  while (queue.in_flight() > 0) {
    DirectResult results[3];
    const std::size_t count = queue.reap(results, 3, std::chrono::milliseconds(100));
    for (std::size_t i = 0; i < count; ++i) {
      const auto tag = reinterpret_cast<std::uint64_t>(results[i].tag);
      CHECK(!found.contains(tag));
      found[tag] = results[i].result;
    }
  }
  return found;
}

void* tag(std::uint64_t number) { return reinterpret_cast<void*>(number); }

}  // namespace

TEST(reads_and_writes_at_depth) {
  const Directory directory;
  const std::string path = directory / "file";
  const Bytes bytes = pattern(64 * 8192, 1);
  with_both(16, [&](DirectQueue& queue) {
    write_file(path, Bytes(bytes.size(), 0));
    const Descriptor fd(path, O_RDWR);
    Memory from(bytes.size());
    std::memcpy(from.data(), bytes.data(), bytes.size());
    Memory to(bytes.size());
    for (const bool write : {true, false}) {
      std::map<std::uint64_t, int> found;
      std::uint64_t next = 0;
      while (next < 64) {
        while (next < 64 && queue.room()) {
          queue.push({fd, write, (write ? from : to).data() + next * 8192, 8192, next * 8192, tag(next)});
          ++next;
        }
        CHECK(queue.in_flight() <= 16);
        DirectResult results[5];
        const std::size_t count = queue.reap(results, 5, std::chrono::milliseconds(100));
        for (std::size_t i = 0; i < count; ++i)
          found[reinterpret_cast<std::uint64_t>(results[i].tag)] = results[i].result;
      }
      found.merge(reap_all(queue));
      CHECK_EQ(found.size(), 64u);
      for (const auto& [number, result] : found) CHECK_EQ(result, 8192);
    }
    CHECK_EQ(first_difference(read_file(path), bytes), -1);
    CHECK_EQ(first_difference(to, bytes), -1);
  });
}

TEST(o_direct_requests) {
  const Directory directory;
  if (!has_direct(directory.path())) SKIP(directory.path() + " has no O_DIRECT");
  const std::string path = directory / "file";
  const Bytes bytes = pattern(kMiB + 100, 1);
  write_file(path, bytes);
  make_cold(path);
  with_both(4, [&](DirectQueue& queue) {
    const Descriptor fd(path, O_RDONLY | O_DIRECT);
    Memory memory(3 * kMiB);
    queue.push({fd, false, memory.data(), 64 * kKiB, 0, tag(1)});
    queue.push({fd, false, memory.data() + kMiB, 8192, kMiB, tag(2)});          // across the end
    queue.push({fd, false, memory.data() + 2 * kMiB, 4096, 2 * kMiB, tag(3)});  // behind it
    queue.push({fd, false, memory.data() + 2 * kMiB + 1, 4096, 1, tag(4)});     // not aligned
    const auto found = reap_all(queue);
    CHECK_EQ(found.at(1), static_cast<int>(64 * kKiB));
    CHECK_EQ(found.at(2), 100);
    CHECK_EQ(found.at(3), 0);
    CHECK_EQ(found.at(4), -EINVAL);
    CHECK_EQ(first_difference(memory.data(), bytes.data(), 64 * kKiB), -1);
    CHECK_EQ(first_difference(memory.data() + kMiB, bytes.data() + kMiB, 100), -1);
  });
}

TEST(errors_come_back_as_results) {
  const Directory directory;
  const std::string path = directory / "file";
  write_file(path, pattern(8192, 1));
  with_both(8, [&](DirectQueue& queue) {
    const Descriptor read_only(path, O_RDONLY);
    Memory memory(8192);
    queue.push({-1, false, memory.data(), 4096, 0, tag(1)});
    queue.push({1 << 20, true, memory.data(), 4096, 0, tag(2)});
    queue.push({read_only, true, memory.data(), 4096, 0, tag(3)});
    queue.push({read_only, false, nullptr, 4096, 0, tag(4)});
    queue.push({read_only, false, memory.data(), 4096, 4096, tag(5)});
    const auto found = reap_all(queue);
    CHECK_EQ(found.at(1), -EBADF);
    CHECK_EQ(found.at(2), -EBADF);
    CHECK_EQ(found.at(3), -EBADF);
    CHECK_EQ(found.at(4), -EFAULT);
    CHECK_EQ(found.at(5), 4096);  // one that fails does not take others with it
  });
}

TEST(a_slow_request_does_not_hold_back_others) {
  with_both(8, [](DirectQueue& queue) {
    int slow[2];
    require(pipe(slow) == 0, "pipe");
    const Directory directory;
    const std::string path = directory / "file";
    write_file(path, pattern(4096, 1));
    const Descriptor fd(path);
    Memory memory(8192);
    // Nothing can be read from the pipe yet. (Offset -1: the pipe's own.)
    if (queue.is_io_uring()) queue.push({slow[0], false, memory.data(), 1, ~std::uint64_t{0}, tag(1)});
    for (std::uint64_t number = 2; number < 6; ++number) {
      queue.push({fd, false, memory.data() + 4096, 4096, 0, tag(number)});
    }
    std::set<std::uint64_t> found;
    while (found.size() < 4) {
      DirectResult results[8];
      const std::size_t count = queue.reap(results, 8, std::chrono::milliseconds(100));
      for (std::size_t i = 0; i < count; ++i) found.insert(reinterpret_cast<std::uint64_t>(results[i].tag));
    }
    CHECK(!found.contains(1));
    require(write(slow[1], "x", 1) == 1, "write");
    reap_all(queue);
    CHECK_EQ(queue.in_flight(), 0u);
    close(slow[0]);
    close(slow[1]);
  });
}

TEST(reaping_nothing_returns) {
  with_both(4, [](DirectQueue& queue) {
    DirectResult results[4];
    CHECK(queue.room());
    CHECK_EQ(queue.reap(results, 4, std::chrono::microseconds(0)), 0u);
    if (queue.in_flight() == 0) CHECK_EQ(queue.reap(results, 4, std::chrono::microseconds(100)), 0u);
  });
}
