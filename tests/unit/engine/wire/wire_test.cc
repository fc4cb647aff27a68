#include "engine/wire/wire.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/token_wire.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kVocab = 1000;

v1::SamplingParams Valid() {
  v1::SamplingParams proto;
  proto.set_max_tokens(7);
  return proto;
}

std::string SamplingError(const std::function<void(v1::SamplingParams*)>& change) {
  v1::SamplingParams proto = Valid();
  change(&proto);
  const absl::Status status = SamplingFromProto(proto, {}, kVocab).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(status.message());
}

TEST(Wire, TokensRoundTrip) {
  ProtoTokens ids;
  TokensToProto(std::vector<int32_t>{3, 0, 999}, &ids);
  const auto tokens = TokensFromProto(ids, kVocab, "token_ids");
  ASSERT_OK(tokens);
  EXPECT_THAT(*tokens, ElementsAre(3, 0, 999));
}

TEST(Wire, TokenOutOfVocabularyNamesItsPosition) {
  ProtoTokens ids;
  for (const uint32_t id : {1u, 2u, 1000u, 4u}) ids.Add(id);
  const absl::Status status = TokensFromProto(ids, kVocab, "token_ids").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "token_ids[2] is 1000; the vocabulary has 1000 tokens (ids 0 to 999)");
  ids.Set(2, std::numeric_limits<uint32_t>::max());  // would be -1 as int32
  EXPECT_FALSE(TokensFromProto(ids, kVocab, "token_ids").ok());
}

TEST(Wire, UnsetSamplingFieldsTakeDefaults) {
  const auto sampling = SamplingFromProto(Valid(), {}, kVocab);
  ASSERT_OK(sampling);
  EXPECT_EQ(sampling->temperature, 1.0f);
  EXPECT_EQ(sampling->top_p, 1.0f);
  EXPECT_EQ(sampling->max_tokens, 7);
  EXPECT_EQ(sampling->logprobs, -1);
  EXPECT_EQ(sampling->prompt_logprobs, -1);
}

TEST(Wire, SamplingRoundTrips) {
  SamplingParams in;
  in.temperature = 0.5f;
  in.top_p = 0.9f;
  in.top_k = 40;
  in.min_p = 0.1f;
  in.repetition_penalty = 1.25f;
  in.presence_penalty = -0.5f;
  in.frequency_penalty = 0.75f;
  in.seed = 0xfedcba9876543210;
  in.max_tokens = 100;
  in.min_tokens = 3;
  in.eos_token_ids = {1, 2};
  in.stop_token_ids = {5};
  in.ignore_eos = true;
  in.logprobs = 0;
  in.prompt_logprobs = 20;
  ProtoTokens eos;
  TokensToProto(in.eos_token_ids, &eos);
  const auto out = SamplingFromProto(SamplingToProto(in), eos, kVocab);
  ASSERT_OK(out);
  EXPECT_EQ(out->temperature, in.temperature);
  EXPECT_EQ(out->top_p, in.top_p);
  EXPECT_EQ(out->top_k, in.top_k);
  EXPECT_EQ(out->min_p, in.min_p);
  EXPECT_EQ(out->repetition_penalty, in.repetition_penalty);
  EXPECT_EQ(out->presence_penalty, in.presence_penalty);
  EXPECT_EQ(out->frequency_penalty, in.frequency_penalty);
  EXPECT_EQ(out->seed, in.seed);
  EXPECT_EQ(out->max_tokens, in.max_tokens);
  EXPECT_EQ(out->min_tokens, in.min_tokens);
  EXPECT_EQ(out->eos_token_ids, in.eos_token_ids);
  EXPECT_EQ(out->stop_token_ids, in.stop_token_ids);
  EXPECT_EQ(out->ignore_eos, in.ignore_eos);
  EXPECT_EQ(out->logprobs, in.logprobs);
  EXPECT_EQ(out->prompt_logprobs, in.prompt_logprobs);
}

TEST(Wire, BadSamplingNamesTheField) {
  const float nan = std::nanf("");
  const float inf = std::numeric_limits<float>::infinity();
  using P = v1::SamplingParams;
  EXPECT_THAT(
      SamplingError([&](P* p) { p->set_temperature(nan); }),
      HasSubstr("sampling.temperature must be a finite number >= 0 (0 is greedy), got nan"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_temperature(inf); }), HasSubstr("temperature"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_temperature(-1); }), HasSubstr("temperature"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_top_p(0); }), HasSubstr("sampling.top_p"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_top_p(nan); }), HasSubstr("sampling.top_p"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_top_k(-2); }), HasSubstr("sampling.top_k"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_min_p(1.5); }), HasSubstr("sampling.min_p"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_repetition_penalty(0); }),
              HasSubstr("sampling.repetition_penalty"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_presence_penalty(nan); }),
              HasSubstr("sampling.presence_penalty"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_frequency_penalty(2.5); }),
              HasSubstr("sampling.frequency_penalty"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_max_tokens(0); }), HasSubstr("sampling.max_tokens"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_min_tokens(4'000'000'000u); }),
              HasSubstr("sampling.min_tokens"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_logprobs(21); }),
              HasSubstr("sampling.logprobs must be at most 20, got 21"));
  EXPECT_THAT(SamplingError([&](P* p) { p->set_prompt_logprobs(99); }),
              HasSubstr("sampling.prompt_logprobs"));
  EXPECT_THAT(SamplingError([&](P* p) { p->add_stop_token_ids(kVocab); }),
              HasSubstr("sampling.stop_token_ids[0]"));
  EXPECT_THAT(SamplingError([&](P* p) {
                for (int i = 0; i <= kMaxEndTokenIds; ++i) p->add_stop_token_ids(1);
              }),
              HasSubstr("sampling.stop_token_ids may hold 1024 ids, got 1025"));
}

TEST(Wire, LogprobsRoundTripAndAreChecked) {
  TokenLogprob in;
  in.token = 5;
  in.logprob = -1.5f;
  in.top = {{5, -1.5f}, {7, -2.0f}};
  v1::TokenLogprob proto;
  LogprobToProto(in, &proto);
  const auto out = LogprobFromProto(proto, kVocab, "first_token");
  ASSERT_OK(out);
  EXPECT_EQ(out->token, 5);
  EXPECT_EQ(out->logprob, -1.5f);
  ASSERT_EQ(out->top.size(), 2u);
  EXPECT_EQ(out->top[1].token, 7);
  EXPECT_EQ(out->top[1].logprob, -2.0f);
  proto.mutable_top(1)->set_token_id(kVocab);
  EXPECT_THAT(std::string(LogprobFromProto(proto, kVocab, "first_token").status().message()),
              HasSubstr("first_token.top[1].token_id is 1000"));
}

}  // namespace
}  // namespace tandem::engine
