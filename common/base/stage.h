// The stages of a request, stamped along one path: those with `in_ttft` follow each other without a
// gap or an overlap, and `delivery` is whatever the others leave, so they make up `ttft`.
//
// This is the one table from which timing messages, metrics, the command line's answers and the
// README's list are made. Adding a stage means one line here and one field in
// tandem.v1.Timing; tests compare the two.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace tandem {

enum class Stage {
  kTokenize,
  kQueue,
  kFailedAttempts,
  kPrefillQueue,
  kKvReturn,
  kPrefill,
  kPrefillCall,
  kDelivery,
  kKvTransferTotal,
  kKvTransferExposed,
  kFirstDecodeStep,
  kPreempted,
  kPaused,
  kMigration,
  kTtft,
  kTotal,
};

struct StageInfo {
  Stage stage;
  // Label of tandem_request_stage_seconds{stage} and field of tandem.v1.Timing.
  std::string_view name;
  std::string_view help;
  // Known even for a request that ended before its first token.
  bool without_token = false;
  bool in_ttft = false;
};

inline constexpr std::array<StageInfo, 16> kStages = {{
    {Stage::kTokenize, "tokenize", "chat template and tokenizer, in the router", true, true},
    {Stage::kQueue, "queue", "in the router and at the decode worker, before blocks were reserved",
     false, true},
    {Stage::kFailedAttempts, "failed_attempts",
     "with workers that refused, failed or were lost before the first token", false, true},
    {Stage::kPrefillQueue, "prefill_queue", "at the worker that prefilled, before its first chunk",
     false, true},
    {Stage::kKvReturn, "kv_return",
     "blocks of earlier turns on their way back from the decode worker, or awaited in vain", false,
     true},
    {Stage::kPrefill, "prefill", "first chunk started to first token sampled", false, true},
    {Stage::kPrefillCall, "prefill_call", "the way to the prefill worker and back", false, true},
    {Stage::kDelivery, "delivery", "the rest: between router and decode worker, and to the client",
     false, true},
    {Stage::kKvTransferTotal, "kv_transfer_total", "first block pushed to last block sealed"},
    {Stage::kKvTransferExposed, "kv_transfer_exposed",
     "first token sampled to last block sealed, or lost"},
    {Stage::kFirstDecodeStep, "first_decode_step", "sequence runnable on decode to second token"},
    {Stage::kPreempted, "preempted", "after the first token: blocks given up to the next token"},
    {Stage::kPaused, "paused", "not computed or not read because the client was slow"},
    {Stage::kMigration, "migration",
     "last token of a decode worker lost or left to next from another; 0 for nearly all"},
    {Stage::kTtft, "ttft", "request received to first message written"},
    {Stage::kTotal, "total", "request received to last message written", true},
}};

// Milliseconds of one request by stage; 0 where a stage did not happen or is not known yet.
class StageTimes {
 public:
  double& operator[](Stage stage) { return ms_[static_cast<size_t>(stage)]; }
  double operator[](Stage stage) const { return ms_[static_cast<size_t>(stage)]; }

 private:
  std::array<double, kStages.size()> ms_ = {};
};

// StageTimes and metrics index by the enumerator's value.
constexpr bool StagesAreInOrder() {
  for (size_t i = 0; i < kStages.size(); ++i) {
    if (static_cast<size_t>(kStages[i].stage) != i) return false;
  }
  return true;
}
static_assert(StagesAreInOrder());

}  // namespace tandem
