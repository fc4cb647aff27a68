// tandem.v1.Inference: text in, text out.
//
// Thread-safe. Nothing blocks; rendering and tokenising run in the call's thread and are bounded by
// the size limits. Generate, Chat and Tokenize take raw bytes (see message_wire.h). Streams are
// GenerateReactors.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

#include "router/api/request_wire.h"
#include "router/core/router_core.h"
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
  // `core` outlives this.
  InferenceService(const InferenceServiceOptions& options, RouterCore* core)
      : options_(options), core_(core) {}

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

 private:
  RequestLimits Limits() const;
  absl::Time DeadlineOf(const grpc::CallbackServerContext& context, absl::Time now) const;
  // `read` makes the request from the message; called at once.
  template <typename Message, typename Read>
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Begin(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer& bytes, Read read);
  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;

  const InferenceServiceOptions options_;
  RouterCore* const core_;
};

}  // namespace tandem::router
