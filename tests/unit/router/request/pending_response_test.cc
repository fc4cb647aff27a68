#include "router/request/pending_response.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;

TokenEvent Event(std::vector<int32_t> tokens) {
  TokenEvent event;
  event.token_ids = std::move(tokens);
  return event;
}

TEST(PendingResponse, MergesEventsInOrder) {
  PendingResponse pending;
  EXPECT_TRUE(pending.empty());
  pending.Append(Event({1, 2}), "a");
  pending.Append(Event({3}), "b");
  EXPECT_FALSE(pending.empty());
  const GenerateResponse response = pending.Take();
  EXPECT_THAT(response.token_ids, ElementsAre(1, 2, 3));
  EXPECT_EQ(response.text, "ab");
  EXPECT_TRUE(pending.empty());
}

TEST(PendingResponse, IsFullByTokensOrByText) {
  PendingResponse tokens, text;
  tokens.Append(Event(std::vector<int32_t>(PendingResponse::kMaxTokens - 1, 1)), "");
  EXPECT_FALSE(tokens.full());
  tokens.Append(Event({1}), "");
  EXPECT_TRUE(tokens.full());
  text.AppendText(std::string(PendingResponse::kMaxTextBytes, 'x'));
  EXPECT_TRUE(text.full());
  text.Clear();
  EXPECT_FALSE(text.full());
}

TEST(PendingResponse, OnlyTheNewestProgressIsWorthAMessageAndTokensOvertakeIt) {
  TokenEvent progress;
  PendingResponse pending;
  progress.computed_tokens = 0;
  pending.Append(progress, "");
  EXPECT_FALSE(pending.empty());
  progress.computed_tokens = 16;
  pending.Append(progress, "");
  EXPECT_EQ(pending.Take().computed_tokens, 16);
  EXPECT_TRUE(pending.empty());
  pending.Append(progress, "");
  pending.Append(Event({1}), "a");
  const GenerateResponse response = pending.Take();
  EXPECT_EQ(response.computed_tokens, std::nullopt);
  EXPECT_THAT(response.token_ids, ElementsAre(1));
}

TEST(PendingResponse, AFinishReasonAloneIsWorthAMessage) {
  PendingResponse pending;
  pending.SetFinishReason(FinishReason::kStop);
  EXPECT_FALSE(pending.empty());
}

}  // namespace
}  // namespace tandem::router
