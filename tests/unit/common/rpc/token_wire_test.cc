// The tables of common/base beside the messages that repeat their names.
#include "common/rpc/token_wire.h"

#include <algorithm>
#include <set>
#include <string>

#include "google/protobuf/descriptor.h"
#include "gtest/gtest.h"

#include "common/base/sampling_ranges.h"
#include "common/base/status.h"
#include "common/rpc/load_wire.h"
#include "common/rpc/sampling_check.h"
#include "common/rpc/status.h"

namespace tandem {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

std::set<std::string> FieldsOfType(const Descriptor* message, FieldDescriptor::CppType type) {
  std::set<std::string> names;
  for (int i = 0; i < message->field_count(); ++i) {
    if (message->field(i)->cpp_type() == type) names.insert(message->field(i)->name());
  }
  return names;
}

TEST(StageTable, HoldsTheDoubleFieldsOfTiming) {
  std::set<std::string> stages;
  for (const StageInfo& info : kStages) stages.insert(std::string(info.name));
  EXPECT_EQ(stages, FieldsOfType(v1::Timing::descriptor(), FieldDescriptor::CPPTYPE_DOUBLE));
}

TEST(StageTable, EveryStageAndEveryOtherFieldSurvivesTheWire) {
  Timing timing;
  double value = 1;
  for (const StageInfo& info : kStages) timing.stages[info.stage] = value++;
  timing.kv_bytes = 100;
  timing.prefill_worker = "p";
  timing.decode_worker = "d";
  timing.transport = "tcp";
  timing.prefill_attempts = 2;
  timing.preemptions = 3;
  timing.migrations = 4;
  timing.returned_tokens = 5;
  v1::Timing proto;
  TimingToProto(timing, &proto);
  // No field is at its default, so none was forgotten.
  std::vector<const FieldDescriptor*> set;
  proto.GetReflection()->ListFields(proto, &set);
  EXPECT_EQ(static_cast<int>(set.size()), v1::Timing::descriptor()->field_count());
  const Timing back = TimingFromProto(proto);
  for (const StageInfo& info : kStages) {
    EXPECT_EQ(back.stages[info.stage], timing.stages[info.stage]) << info.name;
  }
  v1::Timing again;
  TimingToProto(back, &again);
  EXPECT_EQ(again.SerializeAsString(), proto.SerializeAsString());
}

TEST(SamplingTable, HoldsTheFloatFieldsOfSamplingParams) {
  std::set<std::string> ranges;
  for (const SamplingRange& range : kSamplingRanges) ranges.insert(std::string(range.name));
  EXPECT_EQ(ranges, FieldsOfType(v1::SamplingParams::descriptor(), FieldDescriptor::CPPTYPE_FLOAT));
}

TEST(SamplingTable, EveryRangeIsAppliedToItsField) {
  const google::protobuf::Reflection* reflection = v1::SamplingParams::GetReflection();
  for (const SamplingRange& range : kSamplingRanges) {
    const std::string name(range.name);
    const auto* field = v1::SamplingParams::descriptor()->FindFieldByName(name);
    v1::SamplingParams sampling;
    reflection->SetFloat(&sampling, field, range.high);
    EXPECT_TRUE(CheckSamplingRanges(sampling).ok()) << name;
    reflection->SetFloat(&sampling, field, range.low);
    EXPECT_EQ(CheckSamplingRanges(sampling).ok(), range.low_included) << name;
    reflection->SetFloat(&sampling, field, range.low - 1);
    const absl::Status low = CheckSamplingRanges(sampling);
    EXPECT_EQ(low.code(), absl::StatusCode::kInvalidArgument) << name;
    ASSERT_EQ(FieldViolations(low).size(), 1u);
    EXPECT_EQ(FieldViolations(low)[0].field, "sampling." + name);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      reflection->SetFloat(&sampling, field, bad);
      EXPECT_FALSE(CheckSamplingRanges(sampling).ok()) << name << " " << bad;
    }
  }
}

TEST(TokenWire, AnEventSurvivesTheWire) {
  TokenEvent event;
  event.token_ids = {1, 2};
  event.logprobs = {{1, -0.5f, {{7, -1.0f}}}, {2, -0.25f, {}}};
  event.prompt_logprobs = {{3, -2.0f, {}}};
  event.finish_reason = FinishReason::kLength;
  event.cached_tokens = 16;
  event.timing.emplace().kv_bytes = 5;
  event.drafts = {6, 4};
  internal::v1::TokenEvent proto;
  proto.add_token_ids(99);  // is overwritten
  TokenEventToProto(event, &proto);
  const TokenEvent back = TokenEventFromProto(proto);
  EXPECT_EQ(back.token_ids, event.token_ids);
  ASSERT_EQ(back.logprobs.size(), 2u);
  ASSERT_EQ(back.logprobs[0].top.size(), 1u);
  EXPECT_EQ(back.logprobs[0].top[0].token, 7);
  EXPECT_EQ(back.logprobs[1].logprob, -0.25f);
  EXPECT_EQ(back.prompt_logprobs.size(), 1u);
  EXPECT_EQ(back.finish_reason, FinishReason::kLength);
  EXPECT_EQ(back.cached_tokens, 16);
  EXPECT_EQ(back.timing.value().kv_bytes, 5u);
  EXPECT_EQ(back.drafts.drafted, 6);
  EXPECT_EQ(back.drafts.accepted, 4);
}

TEST(TokenWire, FinishReasonsHaveTheSameValuesOnBothSides) {
  for (const FinishReason reason :
       {FinishReason::kNone, FinishReason::kStop, FinishReason::kLength, FinishReason::kAbort}) {
    EXPECT_EQ(FinishReasonFromProto(FinishReasonToProto(reason)), reason);
  }
}

TEST(LoadWire, NoFieldIsForgotten) {
  LoadReport report;
  report.running = 1;
  report.waiting = 2;
  report.waiting_tokens = 3;
  report.blocks_free = 4;
  report.blocks_cached = 5;
  report.blocks_used = 6;
  report.blocks_quarantined = 7;
  report.prefill_tokens_per_second = 8;
  report.decode_step_milliseconds = 9;
  report.prefill_fit_tokens = 12;
  report.saturated_tokens_per_second = 16;
  report.admits_blocks = 11;
  report.promised_blocks = 13;
  report.promised_sequences = 14;
  report.prefill_backlog = {{"p", 15}};
  report.links["d"] = {.bytes_per_second = 10,
                       .transport = "tcp",
                       .test = {.small_rate = 1,
                                .medium_rate = 2,
                                .large_rate = 3,
                                .large_bytes = 4,
                                .latency_seconds = 5},
                       .least_bytes_per_second = 6,
                       .slow = true,
                       .refused = true,
                       .note = "why"};
  report.prefill_failures = {{"p", {.in_a_row = 2, .seconds_ago = 0.5}}};
  const internal::v1::LoadReport proto = LoadReportToProto(report);
  std::vector<const FieldDescriptor*> set;
  proto.GetReflection()->ListFields(proto, &set);
  EXPECT_EQ(static_cast<int>(set.size()), proto.GetDescriptor()->field_count());
  EXPECT_EQ(LoadReportToProto(LoadReportFromProto(proto)).SerializeAsString(),
            proto.SerializeAsString());
}

}  // namespace
}  // namespace tandem
