#include "common/rpc/token_wire.h"

#include <array>
#include <string>

#include "google/protobuf/descriptor.h"

#include "common/base/check.h"

namespace tandem {
namespace {

using google::protobuf::FieldDescriptor;
using LogprobMessages = google::protobuf::RepeatedPtrField<v1::TokenLogprob>;

// The field of tandem.v1.Timing that holds a stage. Looked up by name, once, so that a stage is
// written down in kStages and in the message and nowhere else.
const FieldDescriptor* TimingField(Stage stage) {
  static const auto fields = [] {
    std::array<const FieldDescriptor*, kStages.size()> found;
    for (const StageInfo& info : kStages) {
      const auto* field = v1::Timing::descriptor()->FindFieldByName(std::string(info.name));
      TANDEM_CHECK(field != nullptr && field->cpp_type() == FieldDescriptor::CPPTYPE_DOUBLE,
                   "tandem.v1.Timing has no double field {}", info.name);
      found[static_cast<size_t>(info.stage)] = field;
    }
    return found;
  }();
  return fields[static_cast<size_t>(stage)];
}

void LogprobsToProto(const std::vector<TokenLogprob>& logprobs, LogprobMessages* out) {
  out->Reserve(static_cast<int>(logprobs.size()));
  for (const TokenLogprob& logprob : logprobs) LogprobToProto(logprob, out->Add());
}

std::vector<TokenLogprob> LogprobsFromProto(const LogprobMessages& protos) {
  std::vector<TokenLogprob> out;
  out.reserve(static_cast<size_t>(protos.size()));
  for (const v1::TokenLogprob& proto : protos) out.push_back(LogprobFromProto(proto));
  return out;
}

}  // namespace

void LogprobToProto(const TokenLogprob& logprob, v1::TokenLogprob* out) {
  out->set_token_id(static_cast<uint32_t>(logprob.token));
  out->set_logprob(logprob.logprob);
  for (const TokenLogprob::Alternative& alternative : logprob.top) {
    v1::Alternative* top = out->add_top();
    top->set_token_id(static_cast<uint32_t>(alternative.token));
    top->set_logprob(alternative.logprob);
  }
}

TokenLogprob LogprobFromProto(const v1::TokenLogprob& proto) {
  TokenLogprob logprob;
  logprob.token = static_cast<int32_t>(proto.token_id());
  logprob.logprob = proto.logprob();
  logprob.top.reserve(static_cast<size_t>(proto.top_size()));
  for (const v1::Alternative& top : proto.top()) {
    logprob.top.push_back({static_cast<int32_t>(top.token_id()), top.logprob()});
  }
  return logprob;
}

v1::FinishReason FinishReasonToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kAbort:
      return v1::FINISH_REASON_ABORT;
    case FinishReason::kNone:
      break;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

FinishReason FinishReasonFromProto(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return FinishReason::kStop;
    case v1::FINISH_REASON_LENGTH:
      return FinishReason::kLength;
    case v1::FINISH_REASON_ABORT:
      return FinishReason::kAbort;
    default:
      return FinishReason::kNone;
  }
}

void TimingToProto(const Timing& timing, v1::Timing* out) {
  for (const StageInfo& info : kStages) {
    out->GetReflection()->SetDouble(out, TimingField(info.stage), timing.stages[info.stage]);
  }
  out->set_kv_bytes(timing.kv_bytes);
  out->set_prefill_worker(timing.prefill_worker);
  out->set_decode_worker(timing.decode_worker);
  out->set_transport(timing.transport);
  out->set_prefill_attempts(static_cast<uint32_t>(timing.prefill_attempts));
  out->set_returned_tokens(static_cast<uint32_t>(timing.returned_tokens));
  out->set_preemptions(static_cast<uint32_t>(timing.preemptions));
  out->set_migrations(static_cast<uint32_t>(timing.migrations));
}

Timing TimingFromProto(const v1::Timing& proto) {
  Timing timing;
  for (const StageInfo& info : kStages) {
    timing.stages[info.stage] = proto.GetReflection()->GetDouble(proto, TimingField(info.stage));
  }
  timing.kv_bytes = proto.kv_bytes();
  timing.prefill_worker = proto.prefill_worker();
  timing.decode_worker = proto.decode_worker();
  timing.transport = proto.transport();
  timing.prefill_attempts = static_cast<int>(proto.prefill_attempts());
  timing.returned_tokens = static_cast<int>(proto.returned_tokens());
  timing.preemptions = static_cast<int>(proto.preemptions());
  timing.migrations = static_cast<int>(proto.migrations());
  return timing;
}

void TokenEventToProto(const TokenEvent& event, internal::v1::TokenEvent* out) {
  out->Clear();
  out->mutable_token_ids()->Add(event.token_ids.begin(), event.token_ids.end());
  LogprobsToProto(event.logprobs, out->mutable_logprobs());
  LogprobsToProto(event.prompt_logprobs, out->mutable_prompt_logprobs());
  out->set_finish_reason(FinishReasonToProto(event.finish_reason));
  out->set_cached_tokens(static_cast<uint32_t>(event.cached_tokens));
  if (event.timing.has_value()) TimingToProto(*event.timing, out->mutable_timing());
  if (event.computed_tokens.has_value()) {
    out->set_computed_tokens(static_cast<uint32_t>(*event.computed_tokens));
  }
  out->set_drafted_tokens(static_cast<uint32_t>(event.drafts.drafted));
  out->set_accepted_tokens(static_cast<uint32_t>(event.drafts.accepted));
}

TokenEvent TokenEventFromProto(const internal::v1::TokenEvent& proto) {
  TokenEvent event;
  event.token_ids.assign(proto.token_ids().begin(), proto.token_ids().end());
  event.logprobs = LogprobsFromProto(proto.logprobs());
  event.prompt_logprobs = LogprobsFromProto(proto.prompt_logprobs());
  event.finish_reason = FinishReasonFromProto(proto.finish_reason());
  event.cached_tokens = static_cast<int>(proto.cached_tokens());
  if (proto.has_timing()) event.timing = TimingFromProto(proto.timing());
  if (proto.has_computed_tokens())
    event.computed_tokens = static_cast<int>(proto.computed_tokens());
  event.drafts = {static_cast<int>(proto.drafted_tokens()),
                  static_cast<int>(proto.accepted_tokens())};
  return event;
}

}  // namespace tandem
