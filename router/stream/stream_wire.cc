#include "router/stream/stream_wire.h"

namespace tandem::router {
namespace {

using LogprobMessages = google::protobuf::RepeatedPtrField<v1::TokenLogprob>;

std::vector<TokenLogprob> ReadLogprobs(const LogprobMessages& messages) {
  std::vector<TokenLogprob> out;
  out.reserve(static_cast<size_t>(messages.size()));
  for (const v1::TokenLogprob& message : messages) {
    TokenLogprob& logprob = out.emplace_back();
    logprob.token_id = static_cast<int32_t>(message.token_id());
    logprob.logprob = message.logprob();
    for (const v1::Alternative& top : message.top()) {
      logprob.top.push_back({static_cast<int32_t>(top.token_id()), top.logprob()});
    }
  }
  return out;
}

void FillLogprobs(const std::vector<TokenLogprob>& logprobs, LogprobMessages* out) {
  for (const TokenLogprob& logprob : logprobs) {
    v1::TokenLogprob* message = out->Add();
    message->set_token_id(static_cast<uint32_t>(logprob.token_id));
    message->set_logprob(logprob.logprob);
    for (const TokenAlternative& top : logprob.top) {
      v1::Alternative* alternative = message->add_top();
      alternative->set_token_id(static_cast<uint32_t>(top.token_id));
      alternative->set_logprob(top.logprob);
    }
  }
}

FinishReason ReadFinishReason(v1::FinishReason reason) {
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

v1::FinishReason FinishReasonMessage(FinishReason reason) {
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

void FillTiming(const RequestTiming& timing, v1::Timing* out) {
  out->set_queue(timing.queue);
  out->set_tokenize(timing.tokenize);
  out->set_prefill_queue(timing.worker.prefill_queue);
  out->set_prefill(timing.worker.prefill);
  out->set_kv_transfer_total(timing.worker.kv_transfer_total);
  out->set_kv_transfer_exposed(timing.worker.kv_transfer_exposed);
  out->set_first_decode_step(timing.worker.first_decode_step);
  out->set_ttft(timing.ttft);
  out->set_total(timing.total);
  out->set_kv_bytes(timing.worker.kv_bytes);
  out->set_prefill_worker(timing.worker.prefill_worker);
  out->set_decode_worker(timing.decode_worker);
  out->set_transport(timing.worker.transport);
}

}  // namespace

void FillDecodeRequest(const Assignment& assignment, const Request& request,
                       internal::v1::DecodeRequest* out) {
  *out = *request.message;
  internal::v1::Route* route = out->mutable_route();
  for (const Assignment::Prefill& prefill : assignment.prefill) {
    internal::v1::PrefillCandidate* candidate = route->add_prefill();
    candidate->set_worker_id(prefill.worker_id);
    candidate->set_address(prefill.address);
  }
  route->set_reason(assignment.reason);
  route->set_predicted_cached_tokens(static_cast<uint32_t>(assignment.predicted_cached_tokens));
}

TokenEvent ReadTokenEvent(const internal::v1::TokenEvent& event) {
  TokenEvent out;
  out.token_ids.assign(event.token_ids().begin(), event.token_ids().end());
  out.logprobs = ReadLogprobs(event.logprobs());
  out.prompt_logprobs = ReadLogprobs(event.prompt_logprobs());
  out.finish_reason = ReadFinishReason(event.finish_reason());
  out.cached_tokens = static_cast<int>(event.cached_tokens());
  if (event.has_timing()) {
    const internal::v1::WorkerTiming& timing = event.timing();
    out.timing = WorkerTiming{
        timing.decode_queue(),      timing.prefill_queue(),       timing.prefill(),
        timing.kv_transfer_total(), timing.kv_transfer_exposed(), timing.first_decode_step(),
        timing.kv_bytes(),          timing.prefill_worker(),      timing.transport()};
  }
  return out;
}

void FillResponse(const std::string& request_id, const StreamUpdate& update,
                  v1::GenerateResponse* out) {
  out->set_request_id(request_id);
  out->set_text(update.text);
  out->mutable_token_ids()->Add(update.token_ids.begin(), update.token_ids.end());
  FillLogprobs(update.logprobs, out->mutable_logprobs());
  FillLogprobs(update.prompt_logprobs, out->mutable_prompt_logprobs());
  out->set_finish_reason(FinishReasonMessage(update.finish_reason));
  v1::Usage* usage = out->mutable_usage();
  usage->set_prompt_tokens(static_cast<uint32_t>(update.prompt_tokens));
  usage->set_cached_tokens(static_cast<uint32_t>(update.cached_tokens));
  usage->set_completion_tokens(static_cast<uint32_t>(update.completion_tokens));
  if (update.timing.has_value()) FillTiming(*update.timing, out->mutable_timing());
}

}  // namespace tandem::router
