// Tokens, finish reasons and timing <-> messages, for workers, router and command line. Pure
// functions.
//
// FromProto does not check: ids may lie outside of any vocabulary.
#pragma once

#include "common/base/token_event.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tandem/v1/inference.pb.h"

namespace tandem {

void LogprobToProto(const TokenLogprob& logprob, v1::TokenLogprob* out);
TokenLogprob LogprobFromProto(const v1::TokenLogprob& proto);

v1::FinishReason FinishReasonToProto(FinishReason reason);
FinishReason FinishReasonFromProto(v1::FinishReason reason);

// Stages go by the names of kStages.
void TimingToProto(const Timing& timing, v1::Timing* out);
Timing TimingFromProto(const v1::Timing& proto);

// `out` is overwritten.
void TokenEventToProto(const TokenEvent& event, internal::v1::TokenEvent* out);
TokenEvent TokenEventFromProto(const internal::v1::TokenEvent& proto);

}  // namespace tandem
