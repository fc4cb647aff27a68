// tandem.v1.Inference: text in, text out.
//
// Thread-safe. Nothing blocks. What grows with what a client sends (parsing, rendering, tokenising
// and back) runs on a small pool and not in gRPC's threads, which all streams share: neighbours'
// tokens do not wait for it. When the pool is behind, requests are refused. Generate, Chat and
// Tokenize take raw bytes (see message_wire.h). Streams are GenerateReactors.
//
// With a KeyRing every call needs an API key, which is looked at before anything else of it, and
// counts as one request of that key's.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

#include "common/base/work_pool.h"
#include "router/api/request_wire.h"
#include "router/core/router_core.h"
#include "router/keys/key_ring.h"
#include "tandem/v1/inference.grpc.pb.h"

namespace tandem::router {

struct InferenceServiceOptions {
  size_t max_prompt_bytes = 4u << 20;
  bool normalize_prompts = false;
  int max_priority = 2;                                // see RequestLimits
  absl::Duration request_timeout = absl::Minutes(10);  // no request may take longer
  int max_streams = 4096;                              // open at once
  int text_threads = 2;
  size_t max_waiting_texts = 256;  // for those threads
};

class InferenceService
    : public v1::Inference::WithRawCallbackMethod_Generate<
          v1::Inference::WithRawCallbackMethod_Chat<v1::Inference::WithRawCallbackMethod_Tokenize<
              v1::Inference::WithCallbackMethod_Detokenize<
                  v1::Inference::WithCallbackMethod_ListModels<v1::Inference::Service>>>>> {
 public:
  // `core` and `keys` outlive this; `keys` null: open to anyone.
  InferenceService(const InferenceServiceOptions& options, RouterCore* core, KeyRing* keys)
      : options_(options),
        core_(core),
        keys_(keys),
        pool_(options.text_threads, options.max_waiting_texts) {}

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
  using Holder = std::shared_ptr<const KeyHolder>;  // null where no key is needed

  absl::StatusOr<Holder> Admit(const grpc::CallbackServerContext& context) const;
  // `holder` may be null.
  RequestLimits Limits(const KeyHolder* holder = nullptr) const;
  absl::Time DeadlineOf(const grpc::CallbackServerContext& context, absl::Time now) const;
  // What can be said of a request before it is read. In an overload most requests end here, so it
  // costs next to nothing, and they wait behind no other's tokenising.
  absl::Status MayJoin(const grpc::ByteBuffer& bytes, absl::Time deadline) const;
  // `read` makes the request from the message; called at once.
  template <typename Message, typename Read>
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Begin(grpc::CallbackServerContext* context,
                                                    const grpc::ByteBuffer& bytes, Read read);
  // `work` answers the call on the pool, if its key is let in.
  grpc::ServerUnaryReactor* OnPool(grpc::CallbackServerContext* context,
                                   std::function<absl::Status()> work);
  absl::Status DoDetokenize(const v1::DetokenizeRequest& request,
                            v1::DetokenizeResponse* response) const;
  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;

  const InferenceServiceOptions options_;
  RouterCore* const core_;
  KeyRing* const keys_;
  WorkPool pool_;
};

}  // namespace tandem::router
