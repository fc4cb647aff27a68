// Values of the engine <-> protobuf messages, for both workers. Functions without state:
// thread-safe.
//
// What comes from the wire is validated here once more, because a worker must survive any peer.
// Errors are INVALID_ARGUMENT with a google.rpc.BadRequest: they name the field (as a proto path
// below the request), the position where there is one, the limit and what was got.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::engine {

// Most stop or end-of-sequence ids per request.
inline constexpr int kMaxEndTokenIds = 1024;

using ProtoTokens = google::protobuf::RepeatedField<uint32_t>;

// `field` names the ids in errors, e.g. "token_ids": "token_ids[17] is 151936; the vocabulary has
// 151936 tokens (ids 0 to 151935)". May be empty.
absl::StatusOr<std::vector<int32_t>> TokensFromProto(const ProtoTokens& ids, int vocab_size,
                                                     std::string_view field);
void TokensToProto(std::span<const int32_t> tokens, ProtoTokens* ids);

// Unset optional fields take the defaults of tandem.v1.SamplingParams; max_tokens must be set.
// `stop` strings are the router's: not read.
absl::StatusOr<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto,
                                                 const ProtoTokens& eos_token_ids, int vocab_size);
// Sets every field; eos ids are a field of the request.
v1::SamplingParams SamplingToProto(const SamplingParams& sampling);

// Checked: ids within the vocabulary, at most kMaxLogprobs alternatives. The way back is
// LogprobToProto of common/rpc/token_wire.h.
absl::StatusOr<TokenLogprob> LogprobFromProto(const v1::TokenLogprob& proto, int vocab_size,
                                              std::string_view field);

}  // namespace tandem::engine
