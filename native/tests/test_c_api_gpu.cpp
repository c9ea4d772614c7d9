// The C interface with memory of a GPU, on the libcuda for tests.
#include <gpunvme/gpunvme.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "fake.h"
#include "files.h"

using namespace testing;

namespace {

// Initialised, and at the end nothing is left on the GPU.
class Library {
 public:
  Library() {
    Fake::instance().reset();
    before_ = Fake::instance().counters();
    CHECK_EQ(gpunvme_init(GPUNVME_API_VERSION), GPUNVME_OK);
  }
  ~Library() {
    if (!over_) gpunvme_shutdown();
  }
  void check() {
    over_ = true;
    CHECK_EQ(gpunvme_shutdown(), GPUNVME_OK);
    const FakeCudaCounters now = Fake::instance().counters();
    CHECK_EQ(now.live_streams, before_.live_streams);
    CHECK_EQ(now.live_events, before_.live_events);
    CHECK_EQ(now.live_allocations, before_.live_allocations);
    CHECK_EQ(now.live_host_allocations, before_.live_host_allocations);
    CHECK_EQ(now.page_locked_bytes, before_.page_locked_bytes);
    CHECK_EQ(now.pending_operations, 0u);
  }

 private:
  FakeCudaCounters before_;
  bool over_ = false;
};

struct TestFile {
  Directory directory;
  std::string path = directory / "file";
  Bytes bytes;
  gpunvme_handle source = 0;

  explicit TestFile(std::uint64_t nbytes) : bytes(pattern(nbytes, 1)) {
    write_file(path, bytes);
    CHECK_EQ(gpunvme_open(path.c_str(), GPUNVME_READ_WRITE, &source), GPUNVME_OK);
  }
  ~TestFile() { gpunvme_close(source); }
};

struct Stream {
  explicit Stream(int device) : device(device) {
    gpunvme::cuda_check(Fake::instance().stream_create(device, 1, &handle), "fake_cuda_stream_create");
  }
  ~Stream() {
    Fake::instance().stream_synchronize(device, handle);
    Fake::instance().stream_destroy(handle);
  }
  int device;
  void* handle = nullptr;
};

void* at(std::uint64_t address) { return reinterpret_cast<void*>(address); }

std::string message() { return gpunvme_last_error()->message; }

constexpr std::int64_t kLimit = 60'000;

}  // namespace

TEST(reads_writes_and_gathers) {
  Library library;
  {
    const TestFile file(3 * kMiB + 5);
    Stream stream(1);
    DeviceMemory memory(1, 3 * kMiB + 5);
    for (const std::uint64_t nbytes : {0ul, 100ul, 65536ul, 3 * kMiB}) {
      gpunvme_report report;
      CHECK_EQ(gpunvme_read(file.source, 5, nbytes, at(memory.address()), 1, stream.handle, kLimit, &report),
               GPUNVME_OK);
      CHECK_EQ(first_difference(memory.bytes().data(), file.bytes.data() + 5, nbytes), -1);
      CHECK_EQ(report.nbytes, nbytes);
      CHECK_EQ(report.bounced_bytes, nbytes);
    }
    const std::int64_t offsets[] = {77, 0, static_cast<std::int64_t>(2 * kMiB)};
    CHECK_EQ(gpunvme_gather(file.source, offsets, 3, 4096, at(memory.address()), 1, nullptr, kLimit, nullptr),
             GPUNVME_OK);
    for (int i = 0; i < 3; ++i) {
      CHECK_EQ(first_difference(memory.bytes().data() + i * 4096, file.bytes.data() + offsets[i], 4096), -1);
    }
    memory.put(pattern(3 * kMiB + 5, 2));
    CHECK_EQ(gpunvme_write(file.source, 1, 3 * kMiB, at(memory.address()), 1, stream.handle, kLimit, nullptr),
             GPUNVME_OK);
    Bytes expected = file.bytes;
    put(expected, 1, pattern(3 * kMiB, 2), 0, 3 * kMiB);
    CHECK_EQ(first_difference(read_file(file.path), expected), -1);
  }
  library.check();
}

TEST(a_read_waits_for_the_stream_and_for_nobody_longer_than_told) {
  Library library;
  {
    const TestFile file(kMiB);
    DeviceMemory memory(0, kMiB, 1);
    DeviceMemory seen(0, kMiB, 0);
    Stream stream(0);  // whose end waits for what still uses them
    // A kernel of the caller's that still reads the memory when the transfer is asked for.
    Fake::instance().launch_copy(0, stream.handle, seen.address(), memory.address(), kMiB, 100'000);
    gpunvme_handle transfer = 0;
    CHECK_EQ(gpunvme_read_async(file.source, 0, kMiB, at(memory.address()), 0, stream.handle, kLimit, &transfer),
             GPUNVME_OK);
    const int first = gpunvme_wait(transfer, 0, nullptr);
    CHECK_EQ(first, GPUNVME_EAGAIN);
    gpunvme_report report;
    CHECK_EQ(gpunvme_wait(transfer, GPUNVME_FOREVER, &report), GPUNVME_OK);
    CHECK_EQ(report.nbytes, kMiB);
    CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
    CHECK_EQ(first_difference(seen.bytes(), Bytes(kMiB, 1)), -1);
    // A deadline that passes while the stream is still busy.
    Fake::instance().launch_copy(0, stream.handle, seen.address(), memory.address(), kMiB, 200'000);
    CHECK_EQ(gpunvme_read(file.source, 0, kMiB, at(memory.address()), 0, stream.handle, 20, nullptr),
             GPUNVME_ETIMEDOUT);
    // Given up: when close returns, nothing writes there any more.
    Fake::instance().launch_copy(0, stream.handle, seen.address(), memory.address(), kMiB, 50'000);
    CHECK_EQ(gpunvme_read_async(file.source, 0, kMiB, at(memory.address()), 0, stream.handle, kLimit, &transfer),
             GPUNVME_OK);
    CHECK_EQ(gpunvme_close(transfer), GPUNVME_OK);
    Fake::instance().stream_synchronize(0, stream.handle);
    memory.put(Bytes(kMiB, 3));
    Fake::instance().wait_idle();
    CHECK_EQ(first_difference(memory.bytes(), Bytes(kMiB, 3)), -1);
  }
  library.check();
}

TEST(memory_that_is_not_what_it_is_said_to_be) {
  Library library;
  {
    const TestFile file(kMiB);
    DeviceMemory memory(0, 8192);
    Bytes host(8192);
    const auto read = [&](void* to, std::uint64_t nbytes, int device) {
      return gpunvme_read(file.source, 0, nbytes, to, device, nullptr, kLimit, nullptr);
    };
    CHECK_EQ(read(at(memory.address()), 8192, 1), GPUNVME_EINVAL);
    CHECK(message().find("is on device 0") != std::string::npos);
    CHECK_EQ(read(host.data(), 8192, 0), GPUNVME_EINVAL);
    CHECK(message().find("no memory of a GPU") != std::string::npos);
    CHECK_EQ(read(at(memory.address()), kMiB, 0), GPUNVME_EINVAL);
    CHECK(message().find("last byte") != std::string::npos);
    CHECK_EQ(read(at(memory.address()), 8192, 2), GPUNVME_EINVAL);
    CHECK(message().find("2 GPU(s)") != std::string::npos);
    CHECK_EQ(read(nullptr, 8192, 0), GPUNVME_EINVAL);
    CHECK_EQ(read(at(memory.address()), 8192, 0), GPUNVME_OK);
  }
  library.check();
}

TEST(what_the_driver_refuses_is_an_error_and_leaves_nothing) {
  for (const char* function : {"cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuMemcpyHtoDAsync", "cuMemAlloc"}) {
    for (std::uint64_t k = 1; k <= 3; ++k) {
      Library library;
      {
        const TestFile file(2 * kMiB);
        DeviceMemory memory(0, 2 * kMiB);
        Fake::instance().fail_call(function, k, 999);
        const gpunvme_extent extents[] = {{0, 0, kMiB, 0}, {1, kMiB, kMiB, 0}, {2, 77, kMiB, 0}};
        gpunvme_handle loader = 0;
        int worst = gpunvme_layer_loader_init(file.source, extents, 3, 2, 0, &loader);
        for (std::uint64_t layer = 0; loader != 0 && layer < 3; ++layer) {
          void* address = nullptr;
          worst = std::min(worst, gpunvme_layer_loader_load_layer(loader, layer, nullptr, kLimit, &address, nullptr));
        }
        const int read = gpunvme_read(file.source, 0, 2 * kMiB, at(memory.address()), 0, nullptr, kLimit, nullptr);
        CHECK(worst == GPUNVME_OK || worst == GPUNVME_ECUDA);
        CHECK(read == GPUNVME_OK || read == GPUNVME_ECUDA);
        if (read == GPUNVME_OK) CHECK_EQ(first_difference(memory.bytes(), file.bytes), -1);
        if (loader != 0) CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
      }
      library.check();
    }
  }
}

TEST(a_write_that_fails_takes_back_what_the_file_grew_by) {
  Library library;
  {
    const TestFile file(kMiB);
    DeviceMemory memory(0, 4 * kMiB);
    Fake::instance().fail_call("cuMemcpyDtoHAsync", 2, 999);
    CHECK_EQ(gpunvme_write(file.source, 512 * kKiB, 4 * kMiB, at(memory.address()), 0, nullptr, kLimit, nullptr),
             GPUNVME_ECUDA);
    std::uint64_t size = 0;
    CHECK_EQ(gpunvme_size(file.source, &size), GPUNVME_OK);
    CHECK_EQ(size, kMiB);
  }
  library.check();
}

TEST(a_ring_that_does_not_fit) {
  Library library;
  {
    const TestFile file(kMiB);
    Fake::instance().set_memory_limit(0, 2 * kMiB);
    const gpunvme_extent extents[] = {{0, 0, kMiB, 0}, {1, 0, kMiB, 0}, {2, 0, kMiB, 0}};
    gpunvme_handle loader = 0;
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents, 3, 3, 0, &loader), GPUNVME_ENOMEM);
    CHECK(message().find("device 0") != std::string::npos);
    CHECK_EQ(loader, 0u);
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents, 3, 2, 0, &loader), GPUNVME_OK);
    CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
  }
  library.check();
}

// What the loader is for: kernels that are queued and still run read each layer as it is, on one stream or several, in
// order or not, while the next ones are read.
TEST(a_slot_is_not_overwritten_while_a_kernel_reads_it) {
  constexpr std::uint64_t kLayers = 9;
  constexpr std::uint64_t kBytes = 300'000;
  for (std::uint32_t slots = 1; slots <= 4; ++slots) {
    Library library;
    {
      const TestFile file(kLayers * kBytes);
      std::vector<gpunvme_extent> extents;
      for (std::uint64_t i = 0; i < kLayers; ++i) extents.push_back({i, i * kBytes, kBytes, 0});
      check::Random random(slots);
      Fake::instance().set_copy_time(20, 300, 0, check::seed());
      Stream streams[2] = {Stream(0), Stream(0)};
      gpunvme_handle loader = 0;
      CHECK_EQ(gpunvme_layer_loader_init(file.source, extents.data(), kLayers, slots, 0, &loader), GPUNVME_OK);
      const int loads = check::rounds(40);
      DeviceMemory seen(0, static_cast<std::uint64_t>(loads) * kBytes);
      std::vector<std::uint64_t> layers;
      for (int i = 0; i < loads; ++i) {
        const auto number = static_cast<std::uint64_t>(i);
        layers.push_back(i < loads / 2 ? number % kLayers : random.below(kLayers));
        void* const stream = streams[random.below(2)].handle;
        void* address = nullptr;
        std::uint64_t nbytes = 0;
        CHECK_EQ(gpunvme_layer_loader_load_layer(loader, layers.back(), stream, kLimit, &address, &nbytes), GPUNVME_OK);
        CHECK_EQ(nbytes, kBytes);
        Fake::instance().launch_copy(0, stream, seen.address() + number * kBytes,
                                     reinterpret_cast<std::uint64_t>(address), kBytes, random.below(4) * 1000);
      }
      for (const Stream& stream : streams) Fake::instance().stream_synchronize(0, stream.handle);
      CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
      const Bytes bytes = seen.bytes();
      for (std::size_t i = 0; i < layers.size(); ++i) {
        CHECK_EQ(first_difference(bytes.data() + i * kBytes, file.bytes.data() + layers[i] * kBytes, kBytes), -1);
      }
    }
    library.check();
  }
}

TEST(as_many_layers_as_there_are_slots_are_read_ahead) {
  Library library;
  {
    const TestFile file(5 * kMiB);
    std::vector<gpunvme_extent> extents;
    for (std::uint64_t i = 0; i < 5; ++i) extents.push_back({i, i * kMiB, kMiB, 0});
    const auto arrives = [](std::uint64_t nbytes) {
      const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (Fake::instance().counters().bytes_to_device < nbytes && std::chrono::steady_clock::now() < give_up) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // and no more than that
      CHECK_EQ(Fake::instance().counters().bytes_to_device, nbytes);
    };
    gpunvme_handle loader = 0;
    void* address = nullptr;
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents.data(), 5, 3, 0, &loader), GPUNVME_OK);
    arrives(3 * kMiB);
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 0, nullptr, kLimit, &address, nullptr), GPUNVME_OK);
    arrives(3 * kMiB);
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 1, nullptr, kLimit, &address, nullptr), GPUNVME_OK);
    arrives(4 * kMiB);
    // Elsewhere: it, and the two behind it, of which the first one of the pass is not there any more.
    // What was given up for them may take a moment to end; each call looks again.
    for (int i = 0; i < 1000 && Fake::instance().counters().bytes_to_device < 6 * kMiB; ++i) {
      CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 4, nullptr, kLimit, &address, nullptr), GPUNVME_OK);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    arrives(6 * kMiB);
    CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
  }
  library.check();
}

TEST(a_layer_that_is_late_can_be_asked_for_again) {
  Library library;
  {
    const TestFile file(2 * kMiB);
    const gpunvme_extent extents[] = {{0, 0, kMiB, 0}, {1, kMiB, kMiB, 0}};
    gpunvme_handle loader = 0;
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents, 2, 1, 0, &loader), GPUNVME_OK);
    DeviceMemory elsewhere(0, kMiB);
    Stream stream(0);
    void* address = nullptr;
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 0, stream.handle, kLimit, &address, nullptr), GPUNVME_OK);
    Fake::instance().launch_fill(0, stream.handle, elsewhere.address(), 1, kMiB, 200'000);
    void* const before = address;
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 1, stream.handle, 20, &address, nullptr), GPUNVME_ETIMEDOUT);
    CHECK_EQ(address, before);
    CHECK_EQ(gpunvme_layer_loader_load_layer(loader, 1, stream.handle, kLimit, &address, nullptr), GPUNVME_OK);
    Bytes bytes(kMiB);
    Fake::instance().peek(bytes.data(), reinterpret_cast<std::uint64_t>(address), kMiB);
    CHECK_EQ(first_difference(bytes.data(), file.bytes.data() + kMiB, kMiB), -1);
    CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
  }
  library.check();
}

TEST(a_layer_that_was_given_up_can_be_asked_for_again) {
  Library library;
  {
    const TestFile file(6 * kMiB);
    std::vector<gpunvme_extent> extents;
    for (std::uint64_t i = 0; i < 6; ++i) extents.push_back({i, i * kMiB, kMiB, 0});
    DeviceMemory elsewhere(0, kMiB);
    Stream stream(0);
    gpunvme_handle loader = 0;
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents.data(), 6, 2, 0, &loader), GPUNVME_OK);
    void* address = nullptr;
    const auto load = [&](std::uint64_t layer, std::int64_t limit) {
      return gpunvme_layer_loader_load_layer(loader, layer, stream.handle, limit, &address, nullptr);
    };
    CHECK_EQ(load(0, kLimit), GPUNVME_OK);
    Fake::instance().launch_fill(0, stream.handle, elsewhere.address(), 1, kMiB, 300'000);
    CHECK_EQ(load(3, 30), GPUNVME_ETIMEDOUT);  // 3 and 4 wait behind the stream
    CHECK_EQ(load(1, 30), GPUNVME_ETIMEDOUT);  // and are given up, but cannot be over yet
    CHECK_EQ(load(3, kLimit), GPUNVME_OK);
    Bytes bytes(kMiB);
    Fake::instance().peek(bytes.data(), reinterpret_cast<std::uint64_t>(address), kMiB);
    CHECK_EQ(first_difference(bytes.data(), file.bytes.data() + 3 * kMiB, kMiB), -1);
    CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_OK);
  }
  library.check();
}

TEST(a_shutdown_ends_what_is_under_way) {
  Library library;
  const TestFile file(kMiB);
  {
    DeviceMemory memory(0, kMiB);
    DeviceMemory elsewhere(0, kMiB);
    Stream stream(0);
    const gpunvme_extent extents[] = {{0, 0, kMiB, 0}, {1, 0, kMiB, 0}};
    gpunvme_handle loader = 0;
    gpunvme_handle transfer = 0;
    CHECK_EQ(gpunvme_layer_loader_init(file.source, extents, 2, 2, 0, &loader), GPUNVME_OK);
    Fake::instance().launch_fill(0, stream.handle, elsewhere.address(), 1, kMiB, 100'000);
    CHECK_EQ(gpunvme_read_async(file.source, 0, kMiB, at(memory.address()), 0, stream.handle, kLimit, &transfer),
             GPUNVME_OK);
    std::atomic<int> result{1};
    std::thread waiting([&] { result = gpunvme_wait(transfer, GPUNVME_FOREVER, nullptr); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(gpunvme_shutdown(), GPUNVME_OK);
    waiting.join();
    // It was in time, or stopped, or asked too late.
    CHECK(result == GPUNVME_ECANCELED || result == GPUNVME_OK || result == GPUNVME_ENOTINIT);
    CHECK_EQ(gpunvme_init(GPUNVME_API_VERSION), GPUNVME_OK);
    CHECK_EQ(gpunvme_wait(transfer, 0, nullptr), GPUNVME_EINVAL);
    CHECK_EQ(gpunvme_layer_loader_destroy(loader), GPUNVME_EINVAL);
  }
  library.check();
}
