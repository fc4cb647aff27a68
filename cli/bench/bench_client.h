// The seam between a benchmark and the protocol that it measures.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/stage.h"

namespace tandem::cli {

struct BenchModel {
  std::string id;
  uint32_t vocab_size = 0;
  uint32_t max_model_len = 0;  // tokens
};

struct BenchRequest {
  std::vector<uint32_t> prompt;
  int output_tokens = 0;
  std::string cache_salt;
  absl::Duration timeout;
};

// What an answer says of itself at its end; zeros where it ended too early.
struct AnswerUsage {
  int cached_tokens = 0;  // prompt tokens that were not computed for it
  // As a server counts them whose tokens are not known; 0: those that were sent, and that came.
  int prompt_tokens = 0;
  int output_tokens = 0;
  StageTimes stages;
};

// Hears of one answer: OnTokens each time some have come, then OnEnd once, one at a time, from any
// thread.
class AnswerSink {
 public:
  virtual ~AnswerSink() = default;
  virtual void OnTokens(std::span<const uint32_t> ids) = 0;
  virtual void OnEnd(const absl::Status& status, const AnswerUsage& usage) = 0;
};

// Thread-safe. Sampling and the model belong to the client's construction.
class BenchClient {
 public:
  virtual ~BenchClient() = default;
  // Connects, and says what is served.
  virtual absl::StatusOr<BenchModel> Describe() = 0;
  // Sends and returns at once.
  virtual void Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) = 0;
  // Ends all running answers early; each still gets its OnEnd.
  virtual void CancelAll() = 0;
};

}  // namespace tandem::cli
