// Sends the conversations of a workload: open loop, closed loop, or in static batches.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "cli/bench/bench_client.h"
#include "cli/bench/recorder.h"
#include "cli/bench/workload.h"
#include "common/base/clock.h"
#include "common/base/inbox.h"

namespace tandem::cli {

struct RunnerOptions {
  // Open loop: each conversation is due at its `at_s`, whatever the server does. Otherwise as soon
  // as another has ended.
  bool open_loop = false;
  int max_concurrency = 0;      // conversations at once; 0: no limit
  bool static_batches = false;  // the next max_concurrency start when the last of these has ended
  absl::Duration timeout = absl::Seconds(600);  // for one answer
  std::string cache_salt;
  uint64_t seed = 0;  // of the tokens
  uint32_t vocab_size = 1;
};

struct RunProgress {
  absl::Duration elapsed;
  size_t ended = 0;  // conversations
  size_t failed = 0;
  size_t running = 0;
  int64_t output_tokens = 0;
};

struct RunOutcome {
  std::vector<RequestRecord> records;  // in the order of their ends
  absl::Duration duration;
  bool stopped = false;
};

// One run at a time; only Stop() may be called from another thread.
class BenchRunner {
 public:
  // Sees how far the run is, some times a second.
  using OnProgress = std::function<void(const RunProgress&)>;

  // `client` and `clock` outlive this.
  BenchRunner(const RunnerOptions& options, BenchClient* client, Clock* clock)
      : options_(options), client_(client), clock_(clock) {}

  // Returns when every conversation has ended. A turn that fails ends its conversation.
  RunOutcome Run(std::span<const Conversation> workload, const OnProgress& on_progress = {});
  // The run ends early: what runs is cancelled and not recorded.
  void Stop();

 private:
  struct Prepared {
    size_t conversation = 0;
    size_t turn = 0;
    BenchRequest request;
  };
  struct Ended {
    RequestRecord record;
    std::vector<uint32_t> prompt_and_answer;
  };

  // `said`: the conversation up to here.
  Prepared Prepare(size_t conversation, size_t turn, std::vector<uint32_t> said) const;
  void StartDue();
  // When the next conversation is due and has a place; InfiniteFuture: an answer must end first.
  absl::Time NextDue() const;
  void Send(Prepared prepared, absl::Time intended);
  void Take(Ended ended, RunOutcome* outcome);
  void FreePlace(absl::Time at);

  const RunnerOptions options_;
  BenchClient* const client_;
  Clock* const clock_;

  // Of the run, by its thread.
  std::span<const Conversation> workload_;
  absl::Time start_;
  size_t next_ = 0;  // conversation
  std::optional<Prepared> prepared_;
  std::deque<absl::Time> free_;  // since when each free place is; unused where there is no limit
  size_t running_ = 0;
  RunProgress progress_;

  std::atomic<int64_t> output_tokens_ = 0;
  std::atomic<bool> stopping_ = false;
  Inbox<Ended> inbox_{0};  // of which every item is pushed beyond its capacity
};

}  // namespace tandem::cli
