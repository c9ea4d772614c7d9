#include "job.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <tuple>

#include "engine.h"

namespace gpunvme {
namespace {

constexpr std::uint64_t kMiB = 1u << 20;
// Windows of a GPU transfer are as large as the pieces that page-locked copies are fastest with; in host memory
// smaller ones are as fast and share out better.
constexpr std::uint64_t kLargestWindow = 4 * kMiB;
constexpr std::uint64_t kLargestHostWindow = 2 * kMiB;
constexpr std::uint64_t kSmallestWindow = 256u << 10;
// Segments this near to each other are read as one range: reading the gap costs less than another request.
constexpr std::uint64_t kNear = 4096;
// More pieces than this waiting: copy some before more windows are looked at. Keeps memory bounded.
constexpr std::size_t kManyPieces = 4096;
std::atomic<std::uint64_t> next_id{1};

std::uint64_t window_size(std::uint64_t nbytes, int device) {
  const std::uint64_t share = nbytes / (Engine::kMostWorkers * 4);
  const std::uint64_t largest = device == kHost ? kLargestHostWindow : kLargestWindow;
  return std::clamp(std::bit_ceil(share | 1), kSmallestWindow, largest);
}

}  // namespace

Extent::Overlap Extent::overlap(std::uint64_t from, std::uint64_t to) const {
  const Segment* end = segments + count;
  const Segment* first = std::partition_point(
      segments, end, [from](const Segment& segment) { return segment.offset + segment.nbytes <= from; });
  const Segment* last = std::partition_point(first, end, [to](const Segment& segment) { return segment.offset < to; });
  return {first, last};
}

std::uint64_t Extent::wanted(std::uint64_t from, std::uint64_t to) const {
  std::uint64_t nbytes = 0;
  const auto [first, last] = overlap(from, to);
  for (const Segment* segment = first; segment != last; ++segment) {
    nbytes += std::min(to, segment->offset + segment->nbytes) - std::max(from, segment->offset);
  }
  return nbytes;
}

Counts& Counts::operator+=(const Counts& other) {
  direct += other.direct;
  cached += other.cached;
  buffered += other.buffered;
  bounced += other.bounced;
  mapped += other.mapped;
  return *this;
}

std::shared_ptr<Job> Job::make(Options options) {
  std::shared_ptr<Job> job(new Job(options));
  if (options.device != kHost) CudaContextScope scope(options.device);  // fails now rather than in a worker
  const auto engine = Engine::instance();
  job->engine_ = engine;
  engine->attach(job);
  return job;
}

Job::Job(Options options) : options_(options), process_(getpid()), id_(next_id.fetch_add(1)) {}

CUevent Job::record_event() {
  if (options_.device == kHost || !options_.stream) return nullptr;
  CudaContextScope scope(options_.device);
  CUevent event = nullptr;
  cuda_check(cuda().EventCreate(&event, kEventDisableTiming), "cuEventCreate");
  events_.push_back(event);
  cuda_check(cuda().EventRecord(event, reinterpret_cast<CUstream>(*options_.stream)), "cuEventRecord");
  return event;
}

Job::~Job() {
  if (events_.empty() || process_ != getpid()) return;
  try {
    CudaContextScope scope(options_.device);
    for (CUevent event : events_) cuda().EventDestroy(event);
  } catch (const Failure&) {
    // The context is gone, and the event with it.
  }
}

std::uint32_t Job::add_file(std::shared_ptr<SourceFile> file) {
  std::lock_guard lock(mutex_);
  files_.push_back(std::move(file));
  return static_cast<std::uint32_t>(files_.size() - 1);
}

SourceFile& Job::file(std::uint32_t number) const {
  std::lock_guard lock(mutex_);
  return *files_[number];
}

void Job::add(std::vector<Segment> segments) {
  const CUevent event = record_event();
  std::size_t before = 0;
  std::size_t after = 0;
  {
    std::lock_guard lock(mutex_);
    if (failure_) throw *failure_;
    std::erase_if(segments, [](const Segment& segment) { return segment.nbytes == 0; });
    std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
      return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
    });
    segments_.push_back(std::move(segments));
    before = windows_.size();
    add_extents(segments_.back(), event);
    after = windows_.size();
  }
  announce(after - before);
}

void Job::add_extents(const std::vector<Segment>& segments, CUevent event) {
  std::uint64_t total = 0;
  for (const Segment& segment : segments) total += segment.nbytes;
  const std::uint64_t window = window_size(total, options_.device);
  const std::uint64_t near = options_.direction == Direction::kRead ? kNear : 0;
  for (std::size_t i = 0; i < segments.size();) {
    Extent extent{segments[i].file, segments[i].offset, segments[i].offset, &segments[i], 0, event};
    for (; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      const bool joins = segment.file == extent.file && segment.offset >= extent.end &&
                         segment.offset - extent.end <= (extent.count == 0 ? 0 : near);
      if (!joins) break;
      extent.end = segment.offset + segment.nbytes;
      ++extent.count;
    }
    extents_.push_back(extent);
    const auto kind = options_.direction == Direction::kRead ? Piece::Kind::kWindow : Piece::Kind::kWrite;
    // Cut at multiples of the window in the file, so that all but the ends suit O_DIRECT.
    const std::uint64_t step = options_.direction == Direction::kRead ? window : std::min(window, kMiB);
    for (std::uint64_t at = extent.begin; at < extent.end;) {
      const std::uint64_t next = std::min(extent.end, (at / step + 1) * step);
      windows_.push_back({kind, &extents_.back(), nullptr, at, next});
      at = next;
    }
  }
}

void Job::add_gather(std::uint32_t file, const std::int64_t* offsets, std::uint64_t count, std::uint64_t nbytes,
                     std::uint64_t address) {
  const std::uint64_t size = this->file(file).size();
  const std::uint64_t regions = FileMapping::regions(size);
  const CUevent event = record_event();
  std::size_t pieces = 0;
  {
    std::lock_guard lock(mutex_);
    if (failure_) throw *failure_;
    Gather gather{file, offsets, count, nbytes, address, FileMapping::kDenseHits, size, event, nullptr};
    if (count >= regions * FileMapping::kDenseHits) gather.dense = 0;
    // Asking once for a region pays when several reads fall into it.
    if (count >= regions * 8) gather.regions = std::make_unique<std::atomic<std::uint8_t>[]>(regions);
    gathers_.push_back(std::move(gather));
    const std::uint64_t step = std::max<std::uint64_t>(1, window_size(count * nbytes, kHost) / nbytes);
    for (std::uint64_t at = 0; at < count; at += step, ++pieces) {
      copies_.push_back({Piece::Kind::kGather, nullptr, &gathers_.back(), at, std::min(count, at + step)});
    }
  }
  announce(pieces);
}

void Job::seal() {
  bool ended = false;
  {
    std::lock_guard lock(mutex_);
    sealed_ = true;
    ended = end_if_idle();
  }
  if (ended) detach();
}

void Job::stop(const Failure& failure) {
  bool ended = false;
  {
    std::lock_guard lock(mutex_);
    if (done_) return;
    if (!failure_) failure_ = failure;
    stopped_.store(true, std::memory_order_relaxed);
    windows_.clear();
    direct_.clear();
    copies_.clear();
    ended = end_if_idle();
  }
  if (ended) detach();
}

bool Job::end_if_idle() {
  if (done_ || taken_ != 0) return false;
  if (!failure_ && (!sealed_ || !windows_.empty() || !direct_.empty() || !copies_.empty())) return false;
  done_ = true;
  end_ = std::chrono::steady_clock::now();
  ended_.notify_all();
  return true;
}

void Job::announce(std::size_t pieces) {
  if (pieces == 0) return;
  if (const auto engine = engine_.lock()) engine->announce(pieces);
}

void Job::detach() {
  if (const auto engine = engine_.lock()) engine->detach(this);
}

bool Job::done() const {
  std::lock_guard lock(mutex_);
  return done_;
}

bool Job::wait_for(std::chrono::duration<double> limit) {
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, limit, [this] { return done_; });
}

std::optional<Failure> Job::failure() const {
  std::lock_guard lock(mutex_);
  return failure_;
}

Counts Job::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

double Job::seconds() const {
  std::lock_guard lock(mutex_);
  const auto end = done_ ? end_ : std::chrono::steady_clock::now();
  return std::chrono::duration<double>(end - start_).count();
}

unsigned Job::workers() const {
  std::lock_guard lock(mutex_);
  return static_cast<unsigned>(std::popcount(participants_));
}

std::optional<Piece> Job::take(const Room& room, unsigned worker) {
  if (options_.timeout && !stopped() && std::chrono::steady_clock::now() - start_ > *options_.timeout) {
    stop(Failure(FailureKind::kDeadline, "the transfer was not complete by its deadline"));
  }
  std::lock_guard lock(mutex_);
  const auto pop = [&](std::deque<Piece>& queue) {
    const Piece piece = queue.front();
    queue.pop_front();
    ++taken_;
    participants_ |= std::uint64_t{1} << (worker % 64);
    return piece;
  };
  if (!direct_.empty() && (room.direct || (room.direct_if_idle && copies_.empty()))) return pop(direct_);
  const bool copy = !copies_.empty() && room.copy;
  if (options_.direction == Direction::kWrite) {
    if (!windows_.empty() && room.direct) return pop(windows_);
  } else if (!windows_.empty() && copies_.size() + direct_.size() < kManyPieces && (looking_ == 0 || !copy)) {
    // One worker looks ahead, so that the drive is found work early; the others copy what was found in memory.
    ++looking_;
    return pop(windows_);
  }
  if (copy) return pop(copies_);
  return std::nullopt;
}

void Job::push(const std::vector<Piece>& pieces, bool takes_one) {
  if (pieces.empty()) return;
  {
    std::lock_guard lock(mutex_);
    if (failure_) return;
    for (const Piece& piece : pieces) {
      (piece.kind == Piece::Kind::kDirect ? direct_ : copies_).push_back(piece);
    }
  }
  announce(pieces.size() - (takes_one ? 1 : 0));
}

void Job::finish_window() {
  {
    std::lock_guard lock(mutex_);
    --looking_;
  }
  finish({});
}

void Job::finish(const Counts& counts) {
  bool ended = false;
  {
    std::lock_guard lock(mutex_);
    counts_ += counts;
    --taken_;
    ended = end_if_idle();
  }
  if (ended) detach();
}

}  // namespace gpunvme
