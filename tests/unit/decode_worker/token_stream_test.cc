#include "decode_worker/token_stream.h"

#include <atomic>
#include <thread>

#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

TokenDelta Token(int id, FinishReason finish = FinishReason::kNone) {
  TokenDelta delta;
  delta.tokens.emplace_back();
  delta.tokens.back().token = id;
  delta.cached_tokens = id;
  delta.finish = finish;
  return delta;
}

TEST(TokenStreamTest, TellsOnceThatTheTakerIsIdleAndMergesMeanwhile) {
  TokenStream stream(nullptr, nullptr);
  EXPECT_TRUE(stream.Append(Token(1)));
  auto first = stream.Take();
  ASSERT_TRUE(std::holds_alternative<TokenDelta>(first));
  // A write is in flight now: what comes is merged, nobody is to be woken.
  EXPECT_FALSE(stream.Append(Token(2)));
  EXPECT_FALSE(stream.Append(Token(3, FinishReason::kStop)));
  EXPECT_FALSE(stream.End(absl::OkStatus()));
  EXPECT_EQ(stream.pending(), 2u);
  auto second = stream.Take();
  const TokenDelta& delta = std::get<TokenDelta>(second);
  ASSERT_EQ(delta.tokens.size(), 2u);
  EXPECT_EQ(delta.tokens[0].token, 2);
  EXPECT_EQ(delta.tokens[1].token, 3);
  EXPECT_EQ(delta.finish, FinishReason::kStop);
  EXPECT_EQ(delta.cached_tokens, 3);
  EXPECT_TRUE(std::get<absl::Status>(stream.Take()).ok());
}

TEST(TokenStreamTest, TheEndIsForAnIdleTakerToo) {
  TokenStream stream(nullptr, nullptr);
  EXPECT_TRUE(std::holds_alternative<std::monostate>(stream.Take()));
  EXPECT_TRUE(stream.End(absl::AbortedError("why")));
  EXPECT_TRUE(absl::IsAborted(std::get<absl::Status>(stream.Take())));
}

TEST(TokenStreamTest, TellsWhenDrainedIfAsked) {
  int drained = 0;
  TokenStream stream(nullptr, [&] { ++drained; });
  (void)stream.Append(Token(1));
  stream.Take();
  EXPECT_EQ(drained, 0);
  (void)stream.Append(Token(2));
  stream.NotifyWhenDrained();
  stream.Take();
  EXPECT_EQ(drained, 1);
  (void)stream.Append(Token(3));
  stream.Take();
  EXPECT_EQ(drained, 1);
}

// A writer and a taker on threads of their own: no token is lost, none comes twice.
TEST(TokenStreamTest, KeepsOrderBetweenThreads) {
  constexpr int kTokens = 20000;
  std::vector<int> got;
  std::atomic<bool> ended = false;
  TokenStream* self = nullptr;
  const auto pump = [&] {
    bool more = true;
    while (more) {
      TokenStream::Item item = self->Take();
      if (std::holds_alternative<std::monostate>(item)) return;
      if (auto* delta = std::get_if<TokenDelta>(&item)) {
        for (const engine::TokenLogprob& token : delta->tokens) got.push_back(token.token);
      } else {
        ended = true;
        more = false;
      }
    }
  };
  absl::Mutex mutex;
  bool wanted = false;
  TokenStream stream(
      [&] {
        absl::MutexLock lock(&mutex);
        wanted = true;
      },
      nullptr);
  self = &stream;
  std::thread taker([&] {
    while (!ended) {
      mutex.LockWhen(absl::Condition(&wanted));
      wanted = false;
      mutex.Unlock();
      pump();
    }
  });
  const auto wake = [&](bool idle) {
    if (idle) stream.Wake();
  };
  for (int i = 0; i < kTokens; ++i) wake(stream.Append(Token(i)));
  wake(stream.End(absl::OkStatus()));
  taker.join();
  ASSERT_EQ(got.size(), static_cast<size_t>(kTokens));
  for (int i = 0; i < kTokens; ++i) ASSERT_EQ(got[static_cast<size_t>(i)], i);
}

}  // namespace
}  // namespace tandem::decode
