// How tokens leave the decode loop, and what a slow reader does to its own sequence.
//
// Not thread-safe: part of the loop. Readers take on other threads (see TokenStream).
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "decode_worker/decode_metrics.h"
#include "decode_worker/sequence.h"
#include "decode_worker/stream_waker.h"

namespace tandem::decode {

struct PublisherOptions {
  size_t max_pending_tokens = 4096;                // a reader further behind pauses its sequence
  absl::Duration pause_limit = absl::Seconds(60);  // a longer pause ends it
};

class Publisher {
 public:
  // Both outlive this. `waker` null: readers are woken by Flush() itself.
  Publisher(PublisherOptions options, StreamWaker* waker, DecodeMetrics* metrics);

  // Appends the sequence's next token and sends it on its way, unless its reader has it (`sent`).
  // True: it is the last one, and the caller ends the sequence.
  bool Emit(Sequence* sequence, TokenLogprob token, absl::Time now, bool sent = false);
  // Tells the reader how far the prompt is, where it wants to know and has no token yet.
  void EmitProgress(const Sequence& sequence);
  // The last that the reader hears; counts and measures the request. OK after a last token.
  void End(const Sequence& sequence, const absl::Status& status, absl::Time now);
  // The same for a request that never became a sequence.
  void Refuse(std::shared_ptr<TokenStream> stream, const absl::Status& status);
  // Lets a sequence go on whose reader has caught up. ABORTED: it was paused for too long.
  absl::Status CheckReader(Sequence* sequence, absl::Time now);
  // Has the readers woken that were idle when something came for them. Once per step, so that the
  // waker's lock is taken once.
  void Flush();

 private:
  void Measure(const Sequence& sequence, absl::Time now);
  void CountFailed(const absl::Status& status);
  // Flush() wakes the reader of this stream as well.
  void WakeLater(std::shared_ptr<TokenStream> stream) { idle_.push_back(std::move(stream)); }

  const PublisherOptions options_;
  StreamWaker* const waker_;
  DecodeMetrics* const metrics_;
  std::vector<std::shared_ptr<TokenStream>> idle_;
};

}  // namespace tandem::decode
