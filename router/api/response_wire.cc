#include "router/api/response_wire.h"

#include "common/auth/voucher.h"
#include "common/rpc/token_wire.h"

namespace tandem::router {

void DecodeRequestToProto(const Route& route, const Request& request,
                          std::span<const int32_t> generated, internal::v1::DecodeRequest* out) {
  *out = *request.message;
  out->mutable_token_ids()->Reserve(static_cast<int>(request.tokens.size() + generated.size()));
  out->mutable_token_ids()->Add(request.tokens.begin(), request.tokens.end());
  if (!generated.empty()) {
    out->set_prompt_length(static_cast<uint32_t>(out->token_ids_size()));
    out->mutable_token_ids()->Add(generated.begin(), generated.end());
    out->mutable_sampling()->clear_prompt_logprobs();  // the client has them
    out->clear_progress();
  }
  internal::v1::Route* proto = out->mutable_route();
  for (const Route::Worker& prefill : route.prefill) {
    internal::v1::PrefillCandidate* candidate = proto->add_prefill();
    candidate->set_worker_id(prefill.id);
    candidate->set_address(prefill.address);
    candidate->set_voucher(Vouch(prefill.vouch_key, route.decode.id, route.decode.kv_address));
    candidate->set_return_address(prefill.return_address);
  }
  proto->set_reason(route.reason);
  proto->set_may_lose(static_cast<uint32_t>(route.may_lose));
  proto->set_predicted_cached_tokens(static_cast<uint32_t>(route.predicted_cached_tokens));
}

void ResponseToProto(const std::string& request_id, const GenerateResponse& response,
                     v1::GenerateResponse* out) {
  out->Clear();
  out->set_request_id(request_id);
  out->set_text(response.text);
  out->mutable_token_ids()->Add(response.token_ids.begin(), response.token_ids.end());
  for (const TokenLogprob& logprob : response.logprobs) {
    LogprobToProto(logprob, out->add_logprobs());
  }
  for (const TokenLogprob& logprob : response.prompt_logprobs) {
    LogprobToProto(logprob, out->add_prompt_logprobs());
  }
  out->set_finish_reason(FinishReasonToProto(response.finish_reason));
  v1::Usage* usage = out->mutable_usage();
  usage->set_prompt_tokens(static_cast<uint32_t>(response.prompt_tokens));
  usage->set_cached_tokens(static_cast<uint32_t>(response.cached_tokens));
  usage->set_completion_tokens(static_cast<uint32_t>(response.completion_tokens));
  usage->set_drafted_tokens(static_cast<uint32_t>(response.drafts.drafted));
  usage->set_accepted_tokens(static_cast<uint32_t>(response.drafts.accepted));
  if (response.timing.has_value()) TimingToProto(*response.timing, out->mutable_timing());
  if (response.computed_tokens.has_value()) {
    v1::PromptProgress* progress = out->mutable_progress();
    progress->set_computed_tokens(static_cast<uint32_t>(*response.computed_tokens));
    progress->set_total_tokens(static_cast<uint32_t>(response.prompt_tokens));
  }
}

}  // namespace tandem::router
