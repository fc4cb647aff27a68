// What a benchmark remembers of each request.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "cli/bench/bench_client.h"
#include "common/base/clock.h"

namespace tandem::cli {

struct TokenArrival {
  absl::Time at;
  int tokens = 0;  // that came in one message
};

struct RequestRecord {
  size_t conversation = 0;
  size_t turn = 0;
  // When it should have been sent: at its place in the schedule of an open loop; in a closed one
  // when the answer came that it waited for. All latencies count from here, so that a server or a
  // client that falls behind cannot hide it.
  absl::Time intended;
  absl::Time sent;
  std::vector<TokenArrival> arrivals;
  absl::Time ended;
  absl::Status status;
  int prompt_tokens = 0;
  AnswerUsage usage;

  int output_tokens() const;
};

// Fills one record while an answer comes; see AnswerSink for who calls.
class Recorder : public AnswerSink {
 public:
  using OnEnded = std::function<void(RequestRecord record, std::vector<uint32_t> answer)>;

  // `token_count` counts the tokens of all requests; both pointers outlive this.
  Recorder(RequestRecord record, Clock* clock, std::atomic<int64_t>* token_count, OnEnded on_ended)
      : clock_(clock),
        token_count_(token_count),
        on_ended_(std::move(on_ended)),
        record_(std::move(record)) {}

  void OnTokens(std::span<const uint32_t> ids) override;
  void OnEnd(const absl::Status& status, const AnswerUsage& usage) override;

 private:
  Clock* const clock_;
  std::atomic<int64_t>* const token_count_;
  const OnEnded on_ended_;
  RequestRecord record_;
  std::vector<uint32_t> answer_;
};

}  // namespace tandem::cli
