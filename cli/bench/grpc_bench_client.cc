// A call is written and read on a few threads, one per connection. Its reactions do nothing but
// take the time and hand the ids on, so that reading one stream delays the others by microseconds.
//
// gRPC's callback API would need no threads here, but its own sleep: after a second without an
// event each of them looks away for 100 ms (version 1.51, completion_queue_cc.cc), and a first
// token that comes after a second or more would be seen 100 ms late.
#include "cli/bench/grpc_bench_client.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "grpcpp/grpcpp.h"

#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"

namespace tandem::cli {

// A channel, and the thread that reads what comes over it.
struct GrpcBenchClient::Connection {
  explicit Connection(const PublicServer& server)
      : channel(MakeChannel(server)), stub(v1::Inference::NewStub(channel)) {}
  ~Connection() {
    queue.Shutdown();
    thread.join();
  }
  void Run();

  const std::shared_ptr<grpc::Channel> channel;
  const std::unique_ptr<v1::Inference::Stub> stub;
  grpc::CompletionQueue queue;
  std::thread thread{[this] { Run(); }};
};

// Owns itself from Launch() to the end of its stream. At any time one operation is under way, whose
// completion is Proceed().
class GrpcBenchClient::Call {
 public:
  Call(GrpcBenchClient* client, std::shared_ptr<AnswerSink> sink)
      : client_(client), sink_(std::move(sink)) {}

  void Launch(Connection* connection, const BenchRequest& request) {
    const GrpcBenchClientOptions& options = client_->options_;
    v1::GenerateRequest message;
    message.set_model(options.model);
    message.mutable_token_ids()->mutable_ids()->Add(request.prompt.begin(), request.prompt.end());
    *message.mutable_sampling() = options.sampling;
    message.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(request.output_tokens));
    message.mutable_options()->set_cache_salt(request.cache_salt);
    context_.set_deadline(absl::ToChronoTime(absl::Now() + request.timeout));
    ShowKey(options.server, &context_);
    reader_ = connection->stub->PrepareAsyncGenerate(&context_, message, &connection->queue);
    reader_->StartCall(this);
  }

  void Cancel() { context_.TryCancel(); }

  void Proceed(bool ok) {
    switch (step_) {
      case Step::kStart:
        step_ = ok ? Step::kRead : Step::kFinish;
        break;
      case Step::kRead:
        if (ok) {
          OnMessage();
        } else {
          step_ = Step::kFinish;
        }
        break;
      case Step::kFinish:
        sink_->OnEnd(FromGrpcStatus(status_), usage_);
        client_->Ended(this);
        delete this;
        return;
    }
    if (step_ == Step::kRead) {
      reader_->Read(&response_, this);
    } else {
      reader_->Finish(&status_, this);
    }
  }

 private:
  enum class Step { kStart, kRead, kFinish };

  void OnMessage() {
    if (response_.token_ids_size() > 0) {
      sink_->OnTokens(
          {response_.token_ids().data(), static_cast<size_t>(response_.token_ids_size())});
    }
    usage_.cached_tokens = static_cast<int>(response_.usage().cached_tokens());
    if (response_.has_timing()) usage_.stages = TimingFromProto(response_.timing()).stages;
  }

  GrpcBenchClient* const client_;
  const std::shared_ptr<AnswerSink> sink_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientAsyncReader<v1::GenerateResponse>> reader_;
  Step step_ = Step::kStart;  // under way
  v1::GenerateResponse response_;
  grpc::Status status_;
  AnswerUsage usage_;
};

void GrpcBenchClient::Connection::Run() {
  void* call = nullptr;
  bool ok = false;
  while (queue.Next(&call, &ok)) static_cast<Call*>(call)->Proceed(ok);
}

GrpcBenchClient::GrpcBenchClient(GrpcBenchClientOptions options) : options_(std::move(options)) {
  for (int i = 0; i < std::max(1, options_.connections); ++i) {
    connections_.push_back(std::make_unique<Connection>(options_.server));
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
  ShowKey(options_.server, &context);
  v1::ListModelsResponse response;
  TANDEM_RETURN_IF_ERROR(
      FromGrpcStatus(connections_.front()->stub->ListModels(&context, {}, &response)));
  // So that no request pays for the others' connections.
  for (const auto& connection : connections_) {
    connection->channel->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(2)));
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
  Connection* connection;
  {
    absl::MutexLock lock(&mutex_);
    running_.insert(call);
    connection = connections_[next_connection_++ % connections_.size()].get();
  }
  call->Launch(connection, request);
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
