#include "decode_worker/decode_service.h"

#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "engine/wire/wire.h"

namespace tandem::decode {
namespace {

// More candidates than any router names; a longer list is cut.
constexpr int kMaxCandidates = 16;

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return v1::FINISH_REASON_UNSPECIFIED;
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

void TimesToProto(const WorkerTimes& times, v1::Timing* out) {
  out->set_queue(times.decode_queue);
  out->set_prefill_queue(times.prefill_queue);
  out->set_prefill(times.prefill);
  out->set_kv_transfer_total(times.kv_transfer_total);
  out->set_kv_transfer_exposed(times.kv_transfer_exposed);
  out->set_first_decode_step(times.first_decode_step);
  out->set_kv_bytes(times.kv_bytes);
  out->set_prefill_worker(times.prefill_worker);
  out->set_transport(times.transport);
  out->set_prefill_attempts(static_cast<uint32_t>(times.prefill_attempts));
  out->set_preemptions(static_cast<uint32_t>(times.preemptions));
}

void DeltaToProto(const TokenDelta& delta, bool logprobs, internal::v1::TokenEvent* out) {
  out->Clear();
  for (const engine::TokenLogprob& token : delta.tokens) {
    out->add_token_ids(static_cast<uint32_t>(token.token));
    if (logprobs) *out->add_logprobs() = engine::LogprobToProto(token);
  }
  for (const engine::TokenLogprob& token : delta.prompt_logprobs) {
    *out->add_prompt_logprobs() = engine::LogprobToProto(token);
  }
  out->set_finish_reason(ToProto(delta.finish));
  out->set_cached_tokens(static_cast<uint32_t>(delta.cached_tokens));
  if (delta.times.has_value()) TimesToProto(*delta.times, out->mutable_timing());
}

absl::StatusOr<DecodeWork> WorkFromProto(const internal::v1::DecodeRequest& request,
                                         int vocab_size) {
  DecodeWork work;
  TANDEM_ASSIGN_OR_RETURN(work.tokens,
                          engine::TokensFromProto(request.token_ids(), vocab_size, "token_ids"));
  TANDEM_ASSIGN_OR_RETURN(
      work.sampling,
      engine::SamplingFromProto(request.sampling(), request.eos_token_ids(), vocab_size));
  work.request_id = request.request_id();
  work.cache_salt = request.cache_salt();
  work.priority = request.priority();
  for (const auto& candidate : request.route().prefill()) {
    if (static_cast<int>(work.prefill.size()) == kMaxCandidates) break;
    work.prefill.push_back({candidate.worker_id(), candidate.address()});
  }
  return work;
}

// One call. Lives until gRPC is done with it; the loop reaches it only through its TokenStream,
// which it ends exactly once.
class GenerateReactor final : public grpc::ServerWriteReactor<internal::v1::TokenEvent> {
 public:
  explicit GenerateReactor(DecodeInbox* inbox) : inbox_(inbox) {}

  void Start(DecodeWork work) {
    id_ = work.id;
    logprobs_ = work.sampling.logprobs >= 0;
    stream_ =
        std::make_shared<TokenStream>([this] { Pump(); }, [inbox = inbox_] { inbox->Wake(); });
    // The stream may end, and this object with it, before TryPush returns.
    DecodeInbox* inbox = inbox_;
    DecodeEvent event = WorkArrived{std::move(work), stream_};
    if (inbox->TryPush(std::move(event))) return;
    Reject(inbox->closed() ? Unavailable("the worker stops")
                           : ResourceExhausted("the worker's inbox is full"));
  }
  void Reject(const absl::Status& status) { End(status); }

  // Thread of gRPC, or of the loop when nothing is in flight; never two at once (see
  // TokenStream::Take).
  void Pump() {
    while (true) {
      TokenStream::Item item = stream_->Take();
      if (auto* delta = std::get_if<TokenDelta>(&item)) {
        if (broken_) continue;
        DeltaToProto(*delta, logprobs_, &event_);
        StartWrite(&event_);
        return;
      }
      if (auto* status = std::get_if<absl::Status>(&item)) End(*status);
      return;
    }
  }

  void OnWriteDone(bool ok) override {
    if (!ok && !broken_) {
      broken_ = true;
      inbox_->Push(WorkCancelled{id_});
    }
    Pump();
  }
  void OnCancel() override { inbox_->Push(WorkCancelled{id_}); }
  void OnDone() override { delete this; }

 private:
  void End(const absl::Status& status) {
    Finish(ToGrpcStatus(absl::IsResourceExhausted(status)
                            ? WithRetryAfter(status, absl::Milliseconds(100))
                            : status));
  }

  DecodeInbox* const inbox_;
  uint64_t id_ = 0;
  bool logprobs_ = false;
  bool broken_ = false;  // the peer is gone: tokens are dropped until the loop ends the stream
  std::shared_ptr<TokenStream> stream_;
  internal::v1::TokenEvent event_;  // being written
};

}  // namespace

DecodeService::DecodeService(DecodeInbox* inbox, Clock* clock, int vocab_size)
    : inbox_(inbox), clock_(clock), vocab_size_(vocab_size) {}

grpc::ServerWriteReactor<internal::v1::TokenEvent>* DecodeService::Generate(
    grpc::CallbackServerContext* context, const internal::v1::DecodeRequest* request) {
  auto* reactor = new GenerateReactor(inbox_);
  absl::StatusOr<DecodeWork> work = WorkFromProto(*request, vocab_size_);
  if (!work.ok()) {
    reactor->Reject(work.status());
    return reactor;
  }
  work->id = ++last_id_;
  work->arrived = clock_->Now();
  // By what is left of it: the loop's clock does not follow a wall clock that is set.
  work->deadline = work->arrived + (absl::FromChrono(context->deadline()) - absl::Now());
  reactor->Start(*std::move(work));
  return reactor;
}

}  // namespace tandem::decode
