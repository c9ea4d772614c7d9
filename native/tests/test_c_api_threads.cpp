// The C interface under many threads, senseless arguments, and fork.
#include <gpunvme/gpunvme.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "files.h"

using namespace testing;

namespace {

constexpr std::uint64_t kBytes = 2 * kMiB + 3;

struct Shared {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes = pattern(kBytes, 1);

  Shared() {
    write_file(path, bytes);
    CHECK_EQ(gpunvme_init(GPUNVME_API_VERSION), GPUNVME_OK);
  }
  ~Shared() { gpunvme_shutdown(); }
  gpunvme_handle open() const {
    gpunvme_handle source = 0;
    CHECK_EQ(gpunvme_open(path.c_str(), GPUNVME_READ_ONLY, &source), GPUNVME_OK);
    return source;
  }
};

// Runs it in threads; what one of them throws is thrown here.
template <typename Body>
void in_threads(std::size_t count, const Body& body) {
  std::vector<std::exception_ptr> failures(count);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        body(i);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

bool among(int code, std::initializer_list<int> codes) {
  return std::find(codes.begin(), codes.end(), code) != codes.end();
}

}  // namespace

TEST(threads_share_a_source_and_have_errors_of_their_own) {
  const Shared shared;
  const gpunvme_handle source = shared.open();
  in_threads(4, [&](std::size_t thread) {
    check::Random random(thread);
    for (int i = 0; i < check::rounds(60); ++i) {
      const std::uint64_t offset = random.below(kBytes);
      const std::uint64_t nbytes = random.below(kBytes - offset + 1);
      Bytes bytes(nbytes);
      CHECK_EQ(gpunvme_read(source, static_cast<std::int64_t>(offset), nbytes, bytes.data(), GPUNVME_HOST, nullptr,
                            60'000, nullptr),
               GPUNVME_OK);
      CHECK_EQ(first_difference(bytes.data(), shared.bytes.data() + offset, nbytes), -1);
      const auto mine = static_cast<std::int64_t>(kBytes + thread + 1);
      std::uint8_t byte = 0;
      CHECK_EQ(gpunvme_read(source, mine, 1, &byte, GPUNVME_HOST, nullptr, 60'000, nullptr), GPUNVME_ERANGE);
      std::this_thread::yield();
      CHECK(std::string(gpunvme_last_error()->message).find("offset " + std::to_string(mine)) != std::string::npos);
    }
  });
}

TEST(threads_grow_one_file) {
  const Shared shared;
  const std::string out = shared.directory / "out";
  gpunvme_handle file = 0;
  CHECK_EQ(gpunvme_open(out.c_str(), GPUNVME_CREATE, &file), GPUNVME_OK);
  constexpr std::uint64_t kPart = 100'003;
  constexpr std::uint64_t kParts = 12;
  in_threads(3, [&](std::size_t thread) {
    for (std::uint64_t part = thread; part < kParts; part += 3) {
      const auto offset = static_cast<std::int64_t>(part * kPart);
      CHECK_EQ(gpunvme_write(file, offset, kPart, shared.bytes.data() + offset, GPUNVME_HOST, nullptr, 60'000, nullptr),
               GPUNVME_OK);
      // Others that fail behind it take nothing away: they had no time at all.
      const int late = gpunvme_write(file, offset + static_cast<std::int64_t>(kPart), 10,
                                     shared.bytes.data() + offset + kPart, GPUNVME_HOST, nullptr, 0, nullptr);
      CHECK(among(late, {GPUNVME_OK, GPUNVME_ETIMEDOUT}));
    }
  });
  const Bytes written = read_file(out);
  CHECK(written.size() >= kParts * kPart);
  CHECK_EQ(first_difference(written.data(), shared.bytes.data(), kParts * kPart), -1);
}

// Every handle may be closed by anybody at any time: calls end well or say that it was closed, and nothing crashes.
TEST(handles_are_closed_while_others_use_them) {
  // Of what is read and not waited for, by threads. Freed when the library was shut down: nobody writes there any more.
  std::vector<std::unique_ptr<Bytes>> all_kept[4];
  const Shared shared;
  constexpr std::size_t kHandles = 6;
  std::atomic<gpunvme_handle> handles[kHandles] = {};
  std::atomic<std::uint64_t> done{0};
  in_threads(4, [&](std::size_t thread) {
    check::Random random(100 + thread);
    const gpunvme_extent extents[] = {{0, 0, 70'000, 0}, {1, 70'000, 70'000, 4464}, {2, 5, 10, 0}};
    auto& kept = all_kept[thread];
    for (int i = 0; i < check::rounds(300); ++i) {
      auto& place = handles[random.below(kHandles)];
      const gpunvme_handle handle = place.load();
      Bytes bytes(70'000);
      void* address = nullptr;
      int code = GPUNVME_OK;
      switch (random.below(7)) {
        case 0: {
          gpunvme_handle made = shared.open();
          made = place.exchange(made);
          if (made != 0) code = gpunvme_close(made);
          break;
        }
        case 1: {
          gpunvme_handle loader = 0;
          code = gpunvme_layer_loader_init(handle, extents, 3, 2, GPUNVME_HOST, &loader);
          if (code == GPUNVME_OK) {
            const gpunvme_handle before = place.exchange(loader);
            gpunvme_close(before);
            gpunvme_layer_loader_destroy(before);
          }
          break;
        }
        case 2:
          code = gpunvme_read(handle, 7, bytes.size(), bytes.data(), GPUNVME_HOST, nullptr, 60'000, nullptr);
          if (code == GPUNVME_OK) CHECK_EQ(first_difference(bytes.data(), shared.bytes.data() + 7, bytes.size()), -1);
          break;
        case 3: {
          kept.push_back(std::make_unique<Bytes>(70'000));
          gpunvme_handle transfer = 0;
          code = gpunvme_read_async(handle, 0, 70'000, kept.back()->data(), GPUNVME_HOST, nullptr, 60'000, &transfer);
          if (code == GPUNVME_OK) place.exchange(transfer);  // for others to wait for, or close
          break;
        }
        case 4:
          code = gpunvme_wait(handle, static_cast<std::int64_t>(random.below(2)), nullptr);
          break;
        case 5:
          code = gpunvme_layer_loader_load_layer(handle, random.below(3), nullptr, 60'000, &address, nullptr);
          break;
        default:
          code = random.one_in(2) ? gpunvme_close(handle) : gpunvme_layer_loader_destroy(handle);
      }
      CHECK(among(code, {GPUNVME_OK, GPUNVME_EINVAL, GPUNVME_EAGAIN, GPUNVME_ECANCELED}));
      done.fetch_add(code == GPUNVME_OK);
    }
  });
  CHECK(done > 0);
}

TEST(senseless_arguments) {
  const Shared shared;
  const gpunvme_handle source = shared.open();
  check::Random random(7);
  std::uint8_t memory[4096];
  const auto number = [&]() -> std::uint64_t {
    return random.pick<std::uint64_t>({0, 1, 8, 4096, kBytes - 4096, kBytes, kBytes + 1, INT64_MAX, UINT64_C(1) << 63,
                                       UINT64_MAX - 4095, UINT64_MAX, random.below(UINT64_MAX)});
  };
  const auto small = [&] { return random.pick<std::uint64_t>({0, 1, 100, 4096, UINT64_MAX, UINT64_C(1) << 63}); };
  const auto offset = [&] { return static_cast<std::int64_t>(number()); };
  const auto device = [&] { return random.pick<std::int32_t>({-1, -1, -1, -2, INT32_MIN}); };
  const auto timeout = [&] { return random.pick<std::int64_t>({-1, 60'000, INT64_MAX, -2, INT64_MIN}); };
  const auto handle = [&] { return random.one_in(8) ? number() + 1'000'000 : source; };
  const auto to = [&]() -> void* { return random.one_in(8) ? nullptr : memory; };
  int good = 0;
  for (int i = 0; i < check::rounds(4000); ++i) {
    gpunvme_handle made = 0;
    void* address = nullptr;
    const std::int64_t offsets[2] = {offset(), offset()};
    const gpunvme_kind table[2] = {{number(), number(), number(), small()}, {1, number(), small(), number()}};
    gpunvme_extent extents[2] = {{small(), number(), small(), small()}, {small(), number(), small(), small()}};
    int code = GPUNVME_OK;
    switch (random.below(8)) {
      case 0:
        code = gpunvme_read(handle(), offset(), small(), to(), device(), memory, timeout(), nullptr);
        break;
      case 1:
        // The memory holds two rows of a half each; more must be refused by the file's size or for want of memory.
        code = gpunvme_gather(handle(), offsets, random.below(3),
                              random.pick<std::uint64_t>({0, 1, 2048, UINT64_C(1) << 63, UINT64_MAX}), to(), device(),
                              nullptr, timeout(), nullptr);
        break;
      case 2:
        code = gpunvme_gather(handle(), nullptr, small(), small(), to(), device(), nullptr, timeout(), nullptr);
        break;
      case 3:
        code = gpunvme_kind_read(handle(), random.one_in(9) ? nullptr : table, random.below(3), 1, number(),
                                 random.below(2), random.one_in(2) ? nullptr : memory, device(), nullptr, timeout(),
                                 nullptr);
        break;
      case 4:
        code = gpunvme_write(handle(), offset(), small(), to(), device(), nullptr, timeout(), nullptr);
        break;
      case 5:
        code = gpunvme_layer_loader_init(handle(), extents, random.below(3), static_cast<std::uint32_t>(small()),
                                         device(), &made);
        if (code == GPUNVME_OK) {
          CHECK(made != 0);
          code = gpunvme_layer_loader_load_layer(made, small(), nullptr, 60'000, &address, nullptr);
          CHECK_EQ(gpunvme_layer_loader_destroy(made), GPUNVME_OK);
        }
        break;
      case 6:
        code = gpunvme_wait(handle(), timeout(), nullptr);
        break;
      default:
        code = gpunvme_close(number() + 1'000'000);
    }
    CHECK(code <= 0 && code != GPUNVME_EINTERNAL && code >= GPUNVME_ECHANGED);
    if (code == GPUNVME_OK) ++good;
    if (code != GPUNVME_OK) {
      CHECK_EQ(gpunvme_last_error()->code, code);
      CHECK(gpunvme_last_error()->message[0] != 0);
    }
  }
  CHECK(good > 0);
  // And the library is as good as before.
  Bytes bytes(kBytes);
  CHECK_EQ(gpunvme_read(source, 0, kBytes, bytes.data(), GPUNVME_HOST, nullptr, 60'000, nullptr), GPUNVME_OK);
  CHECK_EQ(first_difference(bytes, shared.bytes), -1);
}

TEST(a_shutdown_among_reads) {
  for (int round = 0; round < check::rounds(10); ++round) {
    const Shared shared;
    const gpunvme_handle source = shared.open();
    in_threads(3, [&](std::size_t thread) {
      if (thread == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(round));
        CHECK_EQ(gpunvme_shutdown(), GPUNVME_OK);
        return;
      }
      Bytes bytes(kBytes);
      int code = GPUNVME_OK;
      while (code == GPUNVME_OK) {
        code = gpunvme_read(source, 0, kBytes, bytes.data(), GPUNVME_HOST, nullptr, 60'000, nullptr);
      }
      CHECK(among(code, {GPUNVME_ENOTINIT, GPUNVME_ECANCELED}));
    });
  }
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // see test_fork.cpp
TEST(a_forked_child_reads_with_its_parents_source) {
  const Shared shared;
  const gpunvme_handle source = shared.open();
  Bytes bytes(kBytes);
  const gpunvme_extent extent = {0, 0, kBytes, 0};
  gpunvme_handle loader = 0;
  gpunvme_handle transfer = 0;
  CHECK_EQ(gpunvme_layer_loader_init(source, &extent, 1, 1, GPUNVME_HOST, &loader), GPUNVME_OK);
  CHECK_EQ(gpunvme_read_async(source, 0, kBytes, bytes.data(), GPUNVME_HOST, nullptr, 60'000, &transfer), GPUNVME_OK);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    Bytes other(kBytes);
    while (!stop) gpunvme_read(source, 0, kBytes, other.data(), GPUNVME_HOST, nullptr, 60'000, nullptr);
  });
  for (int i = 0; i < check::rounds(5); ++i) {
    const int status = check::in_child([&] {
      Bytes mine(kBytes);
      CHECK_EQ(gpunvme_read(source, 0, kBytes, mine.data(), GPUNVME_HOST, nullptr, 60'000, nullptr), GPUNVME_OK);
      CHECK_EQ(first_difference(mine, shared.bytes), -1);
      void* address = nullptr;
      CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 0, nullptr, 60'000, &address, nullptr), GPUNVME_EINVAL);
      CHECK(std::string(gpunvme_last_error()->message).find("parent") != std::string::npos);
      CHECK_EQ(gpunvme_wait(transfer, 60'000, nullptr), GPUNVME_EINVAL);
      CHECK_EQ(gpunvme_shutdown(), GPUNVME_OK);
    });
    CHECK_EQ(status, 0);
  }
  stop = true;
  busy.join();
  CHECK_EQ(gpunvme_wait(transfer, 60'000, nullptr), GPUNVME_OK);
  CHECK_EQ(first_difference(bytes, shared.bytes), -1);
  CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
}
#endif
