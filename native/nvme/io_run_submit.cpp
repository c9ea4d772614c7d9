// Parts become commands, commands become done.
#include <algorithm>
#include <stdexcept>

#include "io_run.h"

namespace gpunvme {
namespace {

// Commands that are submitted before the controller is told, so that it begins early and is told seldom.
constexpr unsigned kRingEvery = 32;

}  // namespace

bool IoRun::submit() {
  if (ending()) {
    end_unsubmitted();
    return false;
  }
  const std::uint32_t most = options_.depth != 0 ? options_.depth : ~0u;
  unsigned sent = 0;
  Part part;
  while (in_flight_ < most && next_part(part) && send(part)) {
    if (++sent % kRingEvery == 0) ring();
    if (ending()) break;
  }
  if (sent != 0) ring();
  return sent != 0;
}

void IoRun::ring() {
  for (Use& use : uses_) {
    if (use.unrung) use.queue->pair().ring();
    use.unrung = false;
  }
}

// What is to be submitted next. It stays where it is until consume().
bool IoRun::next_part(Part& part) {
  for (;;) {
    if (!retries_.empty()) {
      part = retries_.front();
      return true;
    }
    if (!issuing_.empty()) {
      Bounce& bounce = *issuing_.front();
      const std::uint64_t left = std::min(bounce.end - bounce.next.at, bounce.work->bytes_left(bounce.next));
      part = {bounce.work, &bounce, bounce.next, bounce.work->simple ? left : std::min(left, max_bytes_), 1, false};
      return true;
    }
    if (work_ == works_.size()) return false;
    const Work& work = works_[work_];
    const std::uint64_t left = work.bytes_left(place_);
    part = {&work, nullptr, place_, work.simple ? left : std::min(left, max_bytes_), 1, false};
    if (work.nbytes == 0 || work.piece_at(place_.at).memory->kind() == IoMemory::Kind::kMapped) return true;
    if (!begin_bounce(part)) return false;
    if (ending()) return false;
  }
}

// The first `nbytes` of a part that next_part() gave are on their way.
void IoRun::consume(const Part& part, std::uint64_t nbytes) {
  if (part.again) {
    Part& front = retries_.front();
    if (nbytes == part.nbytes) {
      retries_.pop_front();
    } else {
      front.nbytes -= nbytes;
      front.work->advance(front.place, nbytes);
      if (front.bounce != nullptr) ++front.bounce->outstanding;
    }
  } else if (part.bounce != nullptr) {
    Bounce& bounce = *part.bounce;
    ++bounce.outstanding;
    bounce.work->advance(bounce.next, nbytes);
    if (bounce.next.at == bounce.end) issuing_.pop_front();
  } else {
    if (nbytes <= part.work->bytes_left(place_)) {
      part.work->advance(place_, nbytes);
    } else {
      part.work->skip(place_, nbytes);  // a bounce of many items
    }
    if (place_.at == part.work->nbytes) {
      ++work_;
      place_ = {};
    }
  }
}

// The queue with the fewest commands of ours that has a slot; one with commands in quarantine only if all have.
IoRun::Use* IoRun::choose(std::uint32_t& slot) {
  constexpr std::uint64_t kTrouble = std::uint64_t{1} << 32;
  const auto filled = [](const Use& use) {
    return use.in_flight + (use.queue->pair().state().stuck.load_relaxed() != 0 ? kTrouble : 0);
  };
  Use* best = nullptr;
  std::uint64_t least = ~std::uint64_t{0};
  for (Use& use : uses_) {
    const std::uint64_t here = filled(use);
    if (here >= least) continue;
    best = &use;
    least = here;
  }
  slot = best->queue->pair().claim();
  if (slot != QueuePair::kNoSlot) return best;
  for (Use& use : uses_) {
    if (&use == best || (filled(use) >= kTrouble && least < kTrouble)) continue;
    slot = use.queue->pair().claim();
    if (slot != QueuePair::kNoSlot) return &use;
  }
  return nullptr;
}

// Writes PRPs for as many whole blocks of the part as they can say, and the rest of the command. How many bytes.
std::uint64_t IoRun::describe(const Part& part, const PrpList& list, nvme::Sqe& sqe) const {
  const Work& work = *part.work;
  sqe.opcode = work.opcode;
  sqe.nsid = options_.nsid;
  std::uint64_t nbytes = part.nbytes;
  for (;;) {
    PrpBuilder prps(list, options_.page_bytes);
    std::uint64_t described = 0;
    if (part.bounce != nullptr) {
      const IoMemory& memory = staging_->memory();
      const std::uint64_t offset = staging_->offset(part.bounce->slot) + (part.place.at - part.bounce->begin);
      while (described < nbytes) {
        const auto extent = memory.extent(offset + described, nbytes - described);
        const std::uint64_t taken = prps.add(extent.iova, extent.nbytes);
        described += taken;
        if (taken < extent.nbytes) break;
      }
    } else if (nbytes != 0) {
      described = work.build(prps, part.place.at, nbytes);
    }
    if (described == nbytes) {
      sqe.prp1 = prps.prp1();
      sqe.prp2 = prps.prp2();
      break;
    }
    // Once more, exactly: PRP2 says something else when there are fewer pages.
    nbytes = work.simple ? 0 : described >> lba_shift_ << lba_shift_;
    if (nbytes == 0) return 0;
  }
  if (work.simple) {
    sqe.cdw10 = work.cdw[0];
    sqe.cdw11 = work.cdw[1];
    sqe.cdw12 = work.cdw[2];
    sqe.cdw13 = work.cdw[3];
    sqe.cdw14 = work.cdw[4];
    sqe.cdw15 = work.cdw[5];
  } else {
    const std::uint64_t lba = work.lba_at(part.place, lba_shift_);
    sqe.cdw10 = static_cast<std::uint32_t>(lba);
    sqe.cdw11 = static_cast<std::uint32_t>(lba >> 32);
    sqe.cdw12 = options_.cdw12 | static_cast<std::uint32_t>((nbytes >> lba_shift_) - 1);
  }
  return nbytes;
}

// False if there is no room now. A part may be sent in pieces, or turn out to need a bounce.
bool IoRun::send(const Part& part) {
  std::uint32_t slot = 0;
  Use* const use = choose(slot);
  if (use == nullptr) return false;
  const QueuePair& pair = use->queue->pair();
  nvme::Sqe sqe{};
  const std::uint64_t nbytes = describe(part, use->queue->prp_list(slot), sqe);
  if (nbytes == 0 && part.nbytes != 0) {
    pair.release(slot);
    if (part.bounce == nullptr) return begin_bounce(part);
    error_ =
        std::make_exception_ptr(std::invalid_argument("the queue's memory for PRP lists is too small for a block"));
    return false;
  }
  Command* command = nullptr;
  if (spare_commands_.empty()) {
    command = &commands_.emplace_back();
  } else {
    command = spare_commands_.back();
    spare_commands_.pop_back();
  }
  // Whoever reaps it must find these.
  IoQueue::Tag& tag = use->queue->tag(slot);
  tag.command.store(command, std::memory_order_relaxed);
  tag.run.store(id_, std::memory_order_relaxed);
  if (pair.submit(slot, sqe) != Submitted::kOk) {
    pair.release(slot);
    spare_commands_.push_back(command);
    return false;
  }
  *command = {part, use, sqe.cid, now_ + timeout_, use->newest, nullptr};
  command->part.nbytes = nbytes;
  (use->newest != nullptr ? use->newest->newer : use->oldest) = command;
  use->newest = command;
  ++use->in_flight;
  use->unrung = true;
  ++in_flight_;
  ++counts_.commands;
  consume(part, nbytes);
  return true;
}

// All queues, also where nothing of ours is in flight: others' completions are what makes room.
bool IoRun::reap() {
  bool any = false;
  for (Use& use : uses_) any |= reap(use);
  return any;
}

bool IoRun::reap(Use& use) {
  const QueuePair& pair = use.queue->pair();
  bool others = false;
  const std::uint32_t read = pair.reap([&](std::uint32_t slot, std::uint16_t status) {
    const IoQueue::Tag& tag = use.queue->tag(slot);
    if (tag.run.load(std::memory_order_relaxed) == id_) {
      finished_.push_back({static_cast<Command*>(tag.command.load(std::memory_order_relaxed)), status});
    } else {
      others = true;
    }
  });
  // Release: whoever sees it finds the slots done.
  if (others) use.queue->handed().fetch_add(1, std::memory_order_release);
  // Not under the reaper's lock: there may be copies to make.
  for (const Finished& finished : finished_) {
    pair.release(pair.slot_of(finished.command->cid));
    complete(*finished.command, finished.status);
  }
  const bool any = !finished_.empty();
  finished_.clear();
  const std::uint64_t handed = use.queue->handed().load(std::memory_order_acquire);
  if (handed != use.handed_seen) {
    use.handed_seen = handed;
    harvest(use);
    return true;
  }
  return any || read != 0;
}

// Commands that another run has reaped for us.
void IoRun::harvest(Use& use) {
  for (Command* command = use.oldest; command != nullptr;) {
    Command& looked_at = *command;
    command = command->newer;
    Completion completion;
    if (use.queue->pair().poll(looked_at.cid, completion)) complete(looked_at, completion.status);
  }
}

// The slot has been given back.
void IoRun::complete(Command& command, std::uint16_t status) {
  unlink(command);
  spare_commands_.push_back(&command);
  const Part& part = command.part;
  if (nvme::status_code(status) == nvme::kStatusSuccess) {
    if (part.bounce == nullptr) counts_.mapped_bytes += part.nbytes;
    part_done(part);
  } else if (!nvme::status_dnr(status) && part.tries < kMostTries && !ending()) {
    submit_again(part, true);
  } else {
    fail(command, status, Failed::Kind::kStatus);
  }
}

void IoRun::submit_again(const Part& part, bool counts) {
  retries_.push_back(part);
  retries_.back().again = true;
  if (counts) ++retries_.back().tries;
  ++counts_.retried;
}

void IoRun::unlink(Command& command) {
  Use& use = *command.use;
  (command.older != nullptr ? command.older->newer : use.oldest) = command.newer;
  (command.newer != nullptr ? command.newer->older : use.newest) = command.older;
  --use.in_flight;
  --in_flight_;
}

}  // namespace gpunvme
