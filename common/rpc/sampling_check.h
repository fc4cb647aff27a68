// tandem.v1.SamplingParams against the table of common/base/sampling_ranges.h. Pure functions, used
// by the router for clients and by workers for any peer.
#pragma once

#include "absl/status/status.h"

#include "tandem/v1/inference.pb.h"

namespace tandem {

// INVALID_ARGUMENT with the field "sampling.<name>" for a float outside of its range, NaN and
// infinity included, for top_k below kMinTopK, and for more than kMaxLogprobs alternatives. Unset
// fields pass.
absl::Status CheckSamplingRanges(const v1::SamplingParams& sampling);

}  // namespace tandem
