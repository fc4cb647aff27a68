// The stages of a request: one table from which timing, metrics and docs are made.
#pragma once

#include <array>
#include <string_view>

namespace tandem {

enum class Stage {
  kTokenize,
  kQueue,
  kPrefillQueue,
  kPrefill,
  kKvTransferTotal,
  kKvTransferExposed,
  kFirstDecodeStep,
  kTtft,
  kTotal,
};

struct StageInfo {
  Stage stage;
  std::string_view
      name;  // label of tandem_request_stage_seconds{stage} and field of tandem.v1.Timing
  std::string_view help;
};

inline constexpr std::array<StageInfo, 9> kStages = {{
    {Stage::kTokenize, "tokenize", "chat template and tokenizer, in the router"},
    {Stage::kQueue, "queue", "in the router and at the decode worker, before blocks were reserved"},
    {Stage::kPrefillQueue, "prefill_queue", "at the worker that prefilled, before its first chunk"},
    {Stage::kPrefill, "prefill", "first chunk started to first token sampled"},
    {Stage::kKvTransferTotal, "kv_transfer_total", "first block pushed to last block sealed"},
    {Stage::kKvTransferExposed, "kv_transfer_exposed", "first token sampled to last block sealed"},
    {Stage::kFirstDecodeStep, "first_decode_step", "sequence runnable on decode to second token"},
    {Stage::kTtft, "ttft", "request received to first message written"},
    {Stage::kTotal, "total", "request received to last message written"},
}};

}  // namespace tandem
