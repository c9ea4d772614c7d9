#include "faults.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "gpunvme/nvme_spec.h"

namespace gpunvme::soft {
namespace {

struct Name {
  const char* name;
  std::uint64_t value;  // milliseconds where the text gives none
  bool takes_value;
};

// In the order of Fault.
constexpr std::array<Name, kFaults> kNames = {{
    {"delay", 10, true},
    {"reorder", 0, false},
    {"drop", 0, false},
    {"duplicate-cqe", 0, false},
    {"unknown-cid", 0, false},
    {"stale-phase", 0, false},
    {"error", 0, true},
    {"cfs", 0, false},
    {"device-gone", 0, false},
    {"cq-stall", 0, false},
    {"torn-cqe", 0, false},
    {"slow", 1, true},
    {"short-ready", 1000, true},
}};

[[noreturn]] void refuse(const std::string& text, const std::string& why) {
  throw std::invalid_argument("faults: \"" + text + "\": " + why);
}

// SplitMix64: every bit of the result depends on every bit of the number.
std::uint64_t mix(std::uint64_t number) {
  number += 0x9E3779B97F4A7C15u;
  number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9u;
  number = (number ^ number >> 27) * 0x94D049BB133111EBu;
  return number ^ number >> 31;
}

std::uint64_t parse_number(const std::string& text, const std::string& digits, int base) {
  char* end = nullptr;
  errno = 0;
  const std::uint64_t value = std::strtoull(digits.c_str(), &end, base);
  if (digits.empty() || *end != '\0' || errno != 0 || digits[0] == '-' || digits[0] == '+') {
    refuse(text, "\"" + digits + "\" is not a number");
  }
  return value;
}

}  // namespace

const char* fault_name(Fault fault) { return kNames[static_cast<std::size_t>(fault)].name; }

FaultPlan::Rule FaultPlan::parse(const std::string& text) {
  Rule rule;
  std::string name = text;
  if (const std::size_t mark = text.find_first_of("@#"); mark != std::string::npos) {
    name = text.substr(0, mark);
    const std::string amount = text.substr(mark + 1);
    if (text[mark] == '#') {
      rule.number = parse_number(text, amount, 10);
      if (rule.number == 0) refuse(text, "commands are counted from 1");
    } else {
      char* end = nullptr;
      rule.rate = std::strtod(amount.c_str(), &end);
      if (amount.empty() || *end != '\0' || !(rule.rate >= 0 && rule.rate <= 1)) {
        refuse(text, "a rate is a number from 0 to 1");
      }
    }
  }
  std::string value;
  const std::size_t colon = name.find(':');
  if (colon != std::string::npos) {
    value = name.substr(colon + 1);
    name.resize(colon);
  }
  std::string known;
  for (std::size_t i = 0; i < kFaults; ++i) {
    known += (i == 0 ? "" : ", ") + std::string(kNames[i].name);
    if (name != kNames[i].name) continue;
    rule.fault = static_cast<Fault>(i);
    rule.value = kNames[i].value;
    if (rule.fault == Fault::kError) {
      if (colon == std::string::npos) refuse(text, "it needs a status, SCT << 8 | SC: error:0x281");
      std::uint16_t flags = 0;
      if (!value.empty() && value.back() == '!') {
        flags = nvme::kStatusDnr;
        value.pop_back();
      }
      rule.value = parse_number(text, value, 0);
      if (rule.value == 0 || rule.value > 0x7FF) refuse(text, "a status is 0x001 to 0x7FF");
      rule.value |= flags;
    } else if (colon != std::string::npos) {
      if (!kNames[i].takes_value) refuse(text, std::string(kNames[i].name) + " takes no value");
      rule.value = parse_number(text, value, 10);
      if (rule.value > 3600'000) refuse(text, "an hour (3600000 ms) is the most");
    }
    return rule;
  }
  refuse(text, "there is no such fault; there are " + known);
}

FaultPlan::FaultPlan(const std::string& text, std::uint64_t seed) : seed_(seed) {
  for (std::size_t from = 0; from < text.size();) {
    const std::size_t comma = std::min(text.find(',', from), text.size());
    rules_.push_back(parse(text.substr(from, comma - from)));
    from = comma + 1;
  }
}

bool FaultPlan::fires(const Rule& rule, std::size_t index, std::uint64_t number) const {
  if (rule.number != 0) return rule.number == number;
  if (rule.rate >= 1) return true;
  const std::uint64_t hash = mix(mix(seed_ + index * 0x632BE59BD9B4E019u) ^ number);
  return std::ldexp(static_cast<double>(hash >> 11), -53) < rule.rate;
}

Decision FaultPlan::decide() {
  const std::uint64_t number = commands_.fetch_add(1, std::memory_order_relaxed) + 1;
  Decision decision;
  decision.hash = static_cast<std::uint32_t>(mix(seed_ ^ number));
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    const Rule& rule = rules_[i];
    if (rule.fault == Fault::kShortReady || !fires(rule, i, number)) continue;
    decision.faults |= static_cast<std::uint16_t>(1u << static_cast<unsigned>(rule.fault));
    if (rule.fault == Fault::kError) decision.error = static_cast<std::uint16_t>(rule.value);
    if (rule.fault == Fault::kDelay || rule.fault == Fault::kSlow)
      decision.late += std::chrono::milliseconds(rule.value);
  }
  return decision;
}

Decision FaultPlan::decide_admin() {
  Decision decision;
  const std::uint64_t number = admin_commands_.fetch_add(1, std::memory_order_relaxed) + 1;
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    if (rules_[i].fault != Fault::kSlow || !fires(rules_[i], i, number)) continue;
    decision.faults = static_cast<std::uint16_t>(1u << static_cast<unsigned>(Fault::kSlow));
    decision.late += std::chrono::milliseconds(rules_[i].value);
  }
  return decision;
}

std::chrono::milliseconds FaultPlan::ready_delay() {
  const std::uint64_t number = enablings_.fetch_add(1, std::memory_order_relaxed) + 1;
  std::chrono::milliseconds delay{0};
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    if (rules_[i].fault == Fault::kShortReady && fires(rules_[i], i, number)) {
      delay += std::chrono::milliseconds(rules_[i].value);
    }
  }
  return delay;
}

}  // namespace gpunvme::soft
