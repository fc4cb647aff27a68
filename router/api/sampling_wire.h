// tandem.v1.SamplingParams: validation, and the model's defaults for what is unset. Pure functions.
#pragma once

#include "absl/status/status.h"

#include "router/request/served_model.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::router {

inline constexpr int kMaxStopStrings = 16;
inline constexpr size_t kMaxStopBytes = 1024;

// INVALID_ARGUMENT with the field "sampling.<name>" for anything out of range, NaN or infinite, or
// beyond `room` (tokens that fit behind the prompt, at least 1).
absl::Status CheckSampling(const ServedModel& model, int room, const v1::SamplingParams& sampling);

// Fills every optional field but the logprobs, where unset means none: from generation_config.json,
// else the API's default; a random seed; max_tokens is `room` unless set.
void FillSamplingDefaults(const ServedModel& model, int room, v1::SamplingParams* sampling);

}  // namespace tandem::router
