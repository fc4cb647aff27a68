// The first token of one prefill attempt, and how far the prompt is before it, on their way to the
// reader, beside the loop's step: the thread that brings them sends them. The loop, to which
// everything else of the sequence belongs, hears afterwards that the token is out; of an attempt
// that it has given up nothing goes out any more.
//
// Thread-safe.
#pragma once

#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/token_event.h"
#include "decode_worker/token_stream.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::decode {

struct PrefillOutcome;

// Whether a sequence ends with its newest token, `generated` of whose `length` tokens are not the
// prompt's. kNone: it goes on.
FinishReason EndAfter(const engine::SamplingParams& sampling, int generated, int length,
                      int max_length, int32_t token);

// Adds what the reply to a call that took `call` says to what is known of the times before.
void AddOutcome(const PrefillOutcome& outcome, absl::Duration call, Timing* timing);

class FirstToken {
 public:
  // `timing`: until `began_at`, when the attempt began.
  FirstToken(std::shared_ptr<TokenStream> stream, engine::SamplingParams sampling,
             int prompt_length, int arrived_length, int max_length, Timing timing,
             absl::Time began_at);

  // The thread that brings it: so many tokens of the prompt are computed. After the first token
  // nothing happens.
  void SendProgress(int computed_tokens);
  // The thread of the reply, which came at `now`. False: the loop has given the attempt up.
  bool Send(const PrefillOutcome& outcome, absl::Time now);
  // The loop: from here on nothing is sent. True: the token is out already.
  bool Close();

 private:
  bool Append(TokenEvent event, bool token);
  TokenEvent MakeEvent(const PrefillOutcome& outcome, absl::Time now) const;

  const std::shared_ptr<TokenStream> stream_;
  const engine::SamplingParams sampling_;
  const int prompt_length_;
  const int arrived_length_;
  const int max_length_;
  const Timing timing_;
  const absl::Time began_at_;
  absl::Mutex mutex_;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool sent_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem::decode
