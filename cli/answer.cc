// How an answer is shown: JSON, one line, a table.
#include <cmath>

#include "fmt/format.h"

#include "cli/inference_client.h"
#include "cli/table.h"
#include "common/config/bytes.h"
#include "common/rpc/token_wire.h"

namespace tandem::cli {
namespace {

using nlohmann::ordered_json;
using Logprobs = google::protobuf::RepeatedPtrField<v1::TokenLogprob>;

ordered_json LogprobsJson(const Logprobs& logprobs) {
  ordered_json out = ordered_json::array();
  for (const v1::TokenLogprob& entry : logprobs) {
    ordered_json top = ordered_json::array();
    for (const v1::Alternative& alternative : entry.top()) {
      top.push_back({{"token_id", alternative.token_id()}, {"logprob", alternative.logprob()}});
    }
    out.push_back({{"token_id", entry.token_id()}, {"logprob", entry.logprob()}, {"top", top}});
  }
  return out;
}

// To the microsecond, which is more than clocks of two machines agree on.
double Rounded(double milliseconds) { return std::round(milliseconds * 1e3) / 1e3; }

ordered_json TimingJson(const Answer& answer) {
  const Timing timing = TimingFromProto(answer.whole.timing());
  ordered_json out;
  for (const StageInfo& info : kStages) {
    out[fmt::format("{}_ms", info.name)] = Rounded(timing.stages[info.stage]);
  }
  out["decode_ms"] = Rounded(answer.DecodeMs());
  out["tpot_ms"] = Rounded(answer.TpotMs());
  out["kv_bytes"] = timing.kv_bytes;
  out["prefill_worker"] = timing.prefill_worker;
  out["decode_worker"] = timing.decode_worker;
  out["transport"] = timing.transport;
  out["returned_tokens"] = timing.returned_tokens;
  out["prefill_attempts"] = timing.prefill_attempts;
  out["preemptions"] = timing.preemptions;
  out["migrations"] = timing.migrations;
  return out;
}

std::string OrDash(const std::string& text) { return text.empty() ? "-" : text; }

}  // namespace

std::string FinishReasonName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_ABORT:
      return "abort";
    default:
      return "";
  }
}

ordered_json AnswerJson(const Answer& answer) {
  const v1::GenerateResponse& whole = answer.whole;
  ordered_json out;
  out["text"] = whole.text();
  out["token_ids"] = std::vector<uint32_t>(whole.token_ids().begin(), whole.token_ids().end());
  out["finish_reason"] = FinishReasonName(whole.finish_reason());
  out["usage"] = {{"prompt_tokens", whole.usage().prompt_tokens()},
                  {"cached_tokens", whole.usage().cached_tokens()},
                  {"completion_tokens", whole.usage().completion_tokens()},
                  {"drafted_tokens", whole.usage().drafted_tokens()},
                  {"accepted_tokens", whole.usage().accepted_tokens()}};
  out["timing"] = TimingJson(answer);
  out["tokens_per_second"] = Rounded(answer.TokensPerSecond());
  out["request_id"] = whole.request_id();
  if (!whole.logprobs().empty()) out["logprobs"] = LogprobsJson(whole.logprobs());
  if (!whole.prompt_logprobs().empty()) {
    out["prompt_logprobs"] = LogprobsJson(whole.prompt_logprobs());
  }
  return out;
}

std::string JsonLine(const ordered_json& json) {
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

std::string DescribeCost(const Answer& answer) {
  const v1::Usage& usage = answer.whole.usage();
  const v1::Timing& timing = answer.whole.timing();
  const double rate = answer.TokensPerSecond();
  std::string figures = fmt::format(
      "{} prompt tokens ({} cached), {} generated, TTFT {:.1f} ms{}", usage.prompt_tokens(),
      usage.cached_tokens(), usage.completion_tokens(), answer.TtftMs(),
      rate > 0 ? fmt::format(", {:.1f} tok/s", rate) : "");  // one token has none
  if (usage.drafted_tokens() > 0) {
    figures += fmt::format(", {} of {} drafted tokens accepted", usage.accepted_tokens(),
                           usage.drafted_tokens());
  }
  if (!answer.whole.has_timing()) return fmt::format("[stopped: {}, at the client]", figures);
  return fmt::format("[{}, {} -> {}, {} of KV by {}]", figures, OrDash(timing.prefill_worker()),
                     OrDash(timing.decode_worker()),
                     FormatBytes(static_cast<int64_t>(timing.kv_bytes())),
                     OrDash(timing.transport()));
}

std::string RenderTurnTable(const std::vector<Answer>& answers) {
  std::vector<std::vector<std::string>> rows = {{"turn", "prompt tokens", "cached tokens",
                                                 "TTFT (ms)", "tokens/s", "prefill worker",
                                                 "decode worker", "KV bytes shipped", "transport"}};
  for (const Answer& answer : answers) {
    const v1::Usage& usage = answer.whole.usage();
    const v1::Timing& timing = answer.whole.timing();
    const double rate = answer.TokensPerSecond();
    rows.push_back({std::to_string(rows.size()), std::to_string(usage.prompt_tokens()),
                    std::to_string(usage.cached_tokens()), fmt::format("{:.1f}", answer.TtftMs()),
                    rate > 0 ? fmt::format("{:.1f}", rate) : "-", OrDash(timing.prefill_worker()),
                    OrDash(timing.decode_worker()), std::to_string(timing.kv_bytes()),
                    OrDash(timing.transport())});
  }
  return RenderTable(rows);
}

}  // namespace tandem::cli
