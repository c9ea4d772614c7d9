// Faults on purpose: which of them a command gets, from names, rates and a seed.
//
//   name[@rate|#n],…    rate: 0 to 1 of the commands; #n: exactly the n-th; neither: every one
//
// Commands are I/O commands, counted over all I/O queues from when the plan was set. What a command gets depends on the
// seed and on its number alone, so that a run can be repeated.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace gpunvme::soft {

enum class Fault : std::uint8_t {
  kDelay,         // delay:MS       that one completion is late
  kReorder,       //                completed after commands that came later
  kDrop,          //                executed, never completed
  kDuplicateCqe,  //                completed twice
  kUnknownCid,    //                before its completion, one of a command that nobody sent
  kStalePhase,    //                the entry is there with the previous phase tag, and with the right one only later
  kError,         // error:0xSSS[!] not executed; ends with SCT << 8 | SC, "!" sets Do Not Retry
  kCfs,           //                CSTS.CFS is set, nothing completes until a reset
  kDeviceGone,    //                registers read as all ones, nothing happens any more
  kCqStall,       //                completions of that queue are held until a reset, or for a second
  kTornCqe,       //                DW0 to 2 of the entry are there before DW3
  kSlow,          // slow:MS        every completion is late, admin commands' too
  kShortReady,    // short-ready:MS CSTS.RDY comes late, or never if that exceeds CAP.TO; n counts enablings
};
inline constexpr std::size_t kFaults = 13;

const char* fault_name(Fault fault);

// What one command gets.
struct Decision {
  std::uint16_t faults = 0;  // a bit for each Fault
  std::uint16_t error = 0;   // 15-bit status
  std::uint32_t hash = 0;    // for choices that a fault has to make
  std::chrono::microseconds late{0};

  bool any() const { return faults != 0; }
  bool has(Fault fault) const { return (faults >> static_cast<unsigned>(fault) & 1) != 0; }
  void remove(Fault fault) { faults &= static_cast<std::uint16_t>(~(1u << static_cast<unsigned>(fault))); }
};

class FaultPlan {
 public:
  // Throws std::invalid_argument: what is wrong, and which names there are.
  FaultPlan(const std::string& text, std::uint64_t seed);
  FaultPlan() : FaultPlan("", 0) {}

  bool active() const { return !rules_.empty(); }
  // For the next I/O command.
  Decision decide();
  // What an admin command gets: only `slow`.
  Decision decide_admin();
  // How late this enabling is ready.
  std::chrono::milliseconds ready_delay();

 private:
  struct Rule {
    Fault fault = Fault::kDelay;
    double rate = 1;  // of the commands, where `number` is 0
    std::uint64_t number = 0;
    std::uint64_t value = 0;  // milliseconds or status
  };

  static Rule parse(const std::string& text);
  bool fires(const Rule& rule, std::size_t index, std::uint64_t number) const;

  std::vector<Rule> rules_;
  std::uint64_t seed_;
  std::atomic<std::uint64_t> commands_{0};
  std::atomic<std::uint64_t> admin_commands_{0};
  std::atomic<std::uint64_t> enablings_{0};
};

}  // namespace gpunvme::soft
