// tandem.v1.Inference: text in, text out.
//
// Thread-safe. Nothing blocks; rendering and tokenising run in the call's thread and are bounded by
// the size limits. Generate, Chat and Tokenize take raw bytes (see message_wire.h).
#pragma once

#include <atomic>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"

#include "router/registry/registry.h"
#include "router/request_wire.h"
#include "router/served_model.h"
#include "router/stream/request_stream.h"
#include "tandem/v1/inference.grpc.pb.h"

namespace tandem::router {

struct InferenceServiceOptions {
  size_t max_prompt_bytes = 4u << 20;
  bool normalize_prompts = false;
  absl::Duration request_timeout = absl::Minutes(10);  // for clients without a deadline
};

class InferenceService
    : public v1::Inference::WithRawCallbackMethod_Generate<
          v1::Inference::WithRawCallbackMethod_Chat<v1::Inference::WithRawCallbackMethod_Tokenize<
              v1::Inference::WithCallbackMethod_Detokenize<
                  v1::Inference::WithCallbackMethod_ListModels<v1::Inference::Service>>>>> {
 public:
  // All outlive this.
  InferenceService(const InferenceServiceOptions& options, const ServedModel* model,
                   const Registry* registry, const StreamContext& context)
      : options_(options), model_(model), registry_(registry), context_(context) {}

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Chat(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

  // New requests are refused with UNAVAILABLE from now on.
  void StopAccepting() { accepting_ = false; }
  // Waits until no stream is left; false after `timeout`.
  bool AwaitIdle(absl::Duration timeout);
  int running() const;

 private:
  class Stream;

  RequestLimits Limits() const;
  absl::Time DeadlineOf(const grpc::CallbackServerContext& context, absl::Time now) const;
  // `read` makes the request from the bytes; called at once.
  template <typename Message, typename Read>
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Begin(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer& bytes, Read read);
  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;
  void StreamBegan();
  void StreamEnded();
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; }

  const InferenceServiceOptions options_;
  const ServedModel* const model_;
  const Registry* const registry_;
  const StreamContext context_;
  std::atomic<bool> accepting_{true};
  mutable absl::Mutex mutex_;
  int running_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace tandem::router
