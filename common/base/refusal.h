// Why a decode worker did not take a request, or gave it back before its first token, through no
// fault of the request's.
//
// Travels as a payload of the status, which common/rpc/status.h carries over the wire; the router
// acts on it and clients never see it. Functions are thread-safe.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"

namespace tandem {

// Of one route.
inline constexpr int kMaxPrefillWorkers = 16;

struct Refusal {
  enum class Reason {
    kBlocks,     // KV blocks are short
    kSequences,  // max_num_seqs sequences are here
    kInbox,      // too much arrived at once
    kPrefill,    // the prefill workers of the route were full or lost; the decode worker was not
    kLeaving,    // it drains or stops
  };
  Reason reason = Reason::kBlocks;
  // Blocks, of kBlocks and kSequences: what it takes, and what LoadReport::admits_blocks would say.
  int needed = 0;
  int available = 0;
  // Of kPrefill: which were lost with the request; bit i: the route's i-th, of kMaxPrefillWorkers.
  uint32_t lost = 0;
};

absl::Status WithRefusal(absl::Status status, const Refusal& refusal);
// Nothing where the status has none, or one that makes no sense.
std::optional<Refusal> RefusalOf(const absl::Status& status);

}  // namespace tandem
