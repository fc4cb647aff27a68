#include "common/rpc/sampling_check.h"

#include <cstdint>
#include <string>

#include "google/protobuf/descriptor.h"

#include "common/base/check.h"
#include "common/base/sampling_ranges.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem {
namespace {

using google::protobuf::FieldDescriptor;

absl::Status CheckAlternatives(const char* field, uint32_t value) {
  if (value <= static_cast<uint32_t>(kMaxLogprobs)) return absl::OkStatus();
  return BadField(field, "must be at most {}, got {}", kMaxLogprobs, value);
}

}  // namespace

// Over the table and the descriptor, so that no field's range stands in code.
absl::Status CheckSamplingRanges(const v1::SamplingParams& sampling) {
  const google::protobuf::Reflection* reflection = sampling.GetReflection();
  for (const SamplingRange& range : kSamplingRanges) {
    const auto* field = sampling.GetDescriptor()->FindFieldByName(std::string(range.name));
    TANDEM_CHECK(field != nullptr && field->cpp_type() == FieldDescriptor::CPPTYPE_FLOAT,
                 "tandem.v1.SamplingParams has no float field {}", range.name);
    if (!reflection->HasField(sampling, field)) continue;
    const float value = reflection->GetFloat(sampling, field);
    if (range.Contains(value)) continue;
    return BadField(fmt::format("sampling.{}", range.name), "must be {}, got {}", range.accepted,
                    value);
  }
  if (sampling.top_k() < kMinTopK) {
    return BadField("sampling.top_k", "must be >= 1, or 0 or -1 for all tokens, got {}",
                    sampling.top_k());
  }
  TANDEM_RETURN_IF_ERROR(CheckAlternatives("sampling.logprobs", sampling.logprobs()));
  return CheckAlternatives("sampling.prompt_logprobs", sampling.prompt_logprobs());
}

}  // namespace tandem
