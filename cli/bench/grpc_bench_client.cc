// A call is written and read on gRPC's own few threads. Its reactions do nothing but take the time
// and hand the ids on, so that reading one stream delays the others by microseconds.
#include "cli/bench/grpc_bench_client.h"

#include <algorithm>
#include <utility>

#include "grpcpp/grpcpp.h"

#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"

namespace tandem::cli {

// Owns itself from Launch() to OnDone().
class GrpcBenchClient::Call : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Call(GrpcBenchClient* client, std::shared_ptr<AnswerSink> sink)
      : client_(client), sink_(std::move(sink)) {}

  void Launch(v1::Inference::Stub* stub, const BenchRequest& request) {
    const GrpcBenchClientOptions& options = client_->options_;
    message_.set_model(options.model);
    message_.mutable_token_ids()->mutable_ids()->Add(request.prompt.begin(), request.prompt.end());
    *message_.mutable_sampling() = options.sampling;
    message_.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(request.output_tokens));
    message_.mutable_options()->set_cache_salt(request.cache_salt);
    context_.set_deadline(absl::ToChronoTime(absl::Now() + request.timeout));
    stub->async()->Generate(&context_, &message_, this);
    StartRead(&response_);
    StartCall();
  }

  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (response_.token_ids_size() > 0) {
      sink_->OnTokens(
          {response_.token_ids().data(), static_cast<size_t>(response_.token_ids_size())});
    }
    usage_.cached_tokens = static_cast<int>(response_.usage().cached_tokens());
    if (response_.has_timing()) usage_.stages = TimingFromProto(response_.timing()).stages;
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    sink_->OnEnd(FromGrpcStatus(status), usage_);
    client_->Ended(this);
    delete this;
  }

 private:
  GrpcBenchClient* const client_;
  const std::shared_ptr<AnswerSink> sink_;
  grpc::ClientContext context_;
  v1::GenerateRequest message_;
  v1::GenerateResponse response_;
  AnswerUsage usage_;
};

GrpcBenchClient::GrpcBenchClient(GrpcBenchClientOptions options) : options_(std::move(options)) {
  for (int i = 0; i < std::max(1, options_.connections); ++i) {
    channels_.push_back(MakeChannel(options_.server));
    stubs_.push_back(v1::Inference::NewStub(channels_.back()));
  }
}

GrpcBenchClient::~GrpcBenchClient() {
  CancelAll();
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(this, &GrpcBenchClient::Idle));
}

absl::StatusOr<BenchModel> GrpcBenchClient::Describe() {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  v1::ListModelsResponse response;
  TANDEM_RETURN_IF_ERROR(FromGrpcStatus(stubs_.front()->ListModels(&context, {}, &response)));
  // So that no request pays for the others' connections.
  for (const auto& channel : channels_) {
    channel->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(2)));
  }
  for (const v1::Model& model : response.models()) {
    if (options_.model.empty() || model.id() == options_.model) {
      return BenchModel{model.id(), model.vocab_size(), model.max_model_len()};
    }
  }
  return NotFound("model '{}' is not served", options_.model);
}

void GrpcBenchClient::Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) {
  auto* call = new Call(this, std::move(sink));
  v1::Inference::Stub* stub;
  {
    absl::MutexLock lock(&mutex_);
    running_.insert(call);
    stub = stubs_[next_stub_++ % stubs_.size()].get();
  }
  call->Launch(stub, request);
}

void GrpcBenchClient::CancelAll() {
  absl::MutexLock lock(&mutex_);
  for (Call* call : running_) call->Cancel();
}

void GrpcBenchClient::Ended(Call* call) {
  absl::MutexLock lock(&mutex_);
  running_.erase(call);
}

}  // namespace tandem::cli
