// tandem.v1.Inference for the command line: one streamed answer at a time, collected.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"

#include "common/rpc/public_server.h"
#include "tandem/v1/inference.grpc.pb.h"

namespace tandem::cli {

// All that one request gave, also where it failed half-way.
struct Answer {
  absl::Status status;
  // The messages of the stream as one: texts, ids and logprobs joined, the last usage and timing.
  v1::GenerateResponse whole;
  // As the client saw it: from the call to the first message of the answer, and to the last one.
  absl::Duration to_first;
  absl::Duration to_last;

  bool ok() const { return status.ok(); }
  // The server's time to first token; the client's, where the stream ended before that was told.
  double TtftMs() const;
  // From the first token to the end, as the server saw it, or the client.
  double DecodeMs() const;
  // Of that, for each token after the first; 0 where there is none.
  double TpotMs() const;
  // Tokens after the first, over the time they took; 0 where there is no telling.
  double TokensPerSecond() const;
};

// One call at a time; Cancel() from any thread. Every call shows the server's API key.
class InferenceClient {
 public:
  // Sees each piece of text as it comes.
  using OnText = std::function<void(const std::string&)>;
  // How far the prompt is, where the request asks (RequestOptions.progress): before any text.
  using OnProgress = std::function<void(const v1::PromptProgress&)>;

  explicit InferenceClient(PublicServer server);

  // `timeout` may be infinite.
  Answer Generate(const v1::GenerateRequest& request, absl::Duration timeout, const OnText& on_text,
                  const OnProgress& on_progress = nullptr);
  Answer Chat(const v1::ChatRequest& request, absl::Duration timeout, const OnText& on_text,
              const OnProgress& on_progress = nullptr);
  // What the cluster serves. Fails at once where no server is, and after some seconds at most.
  absl::StatusOr<v1::Model> GetModel();
  // Tokens of the rendered conversation, and the longest sequence that the model takes.
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::ChatRequest& request);
  // Cancels the running call; false if there is none.
  bool Cancel();

 private:
  template <typename Request, typename Method>
  Answer Call(const Request& request, Method method, absl::Duration timeout, const OnText& on_text,
              const OnProgress& on_progress);
  // While it runs, Cancel cancels `context`; null: none.
  void SetRunning(grpc::ClientContext* context);

  const PublicServer server_;
  const std::unique_ptr<v1::Inference::Stub> stub_;
  absl::Mutex mutex_;
  grpc::ClientContext* running_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

// "stop", "length", "abort", "" (not finished).
std::string FinishReasonName(v1::FinishReason reason);
// {"text", "token_ids", "finish_reason", "usage", "timing", "tokens_per_second", "request_id"} and
// "logprobs", "prompt_logprobs" where there are any. Times are milliseconds and end with _ms.
nlohmann::ordered_json AnswerJson(const Answer& answer);
// `json` on one line; bytes that are no UTF-8 are replaced.
std::string JsonLine(const nlohmann::ordered_json& json);
// "[12 prompt tokens (8 cached), 5 generated, TTFT 12.3 ms, 45.6 tok/s, prefill-0 -> decode-1,
// ...]"; without the workers where the stream was stopped before it told them.
std::string DescribeCost(const Answer& answer);
// Turn, prompt tokens, cached tokens, TTFT, tokens/s, prefill worker, decode worker, KV bytes
// shipped, transport.
std::string RenderTurnTable(const std::vector<Answer>& answers);

}  // namespace tandem::cli
