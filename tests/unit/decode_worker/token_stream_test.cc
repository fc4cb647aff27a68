#include "decode_worker/token_stream.h"

#include <atomic>
#include <thread>

#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

TokenEvent Token(int id, FinishReason finish = FinishReason::kNone) {
  TokenEvent event;
  event.token_ids.push_back(id);
  event.logprobs.push_back({.token = id});
  event.cached_tokens = id;
  event.drafts = {2 * id, id};
  event.finish_reason = finish;
  return event;
}

TEST(TokenStreamTest, TellsOnceThatTheTakerIsIdleAndMergesMeanwhile) {
  TokenStream stream(nullptr, nullptr);
  EXPECT_TRUE(stream.Append(Token(1)));
  auto first = stream.Take();
  ASSERT_TRUE(std::holds_alternative<TokenEvent>(first));
  // A write is in flight now: what comes is merged, nobody is to be woken.
  EXPECT_FALSE(stream.Append(Token(2)));
  EXPECT_FALSE(stream.Append(Token(3, FinishReason::kStop)));
  EXPECT_FALSE(stream.End(absl::OkStatus()));
  EXPECT_EQ(stream.pending(), 2u);
  auto second = stream.Take();
  const TokenEvent& event = std::get<TokenEvent>(second);
  EXPECT_EQ(event.token_ids, (std::vector<int32_t>{2, 3}));
  ASSERT_EQ(event.logprobs.size(), 2u);
  EXPECT_EQ(event.logprobs[1].token, 3);
  EXPECT_EQ(event.finish_reason, FinishReason::kStop);
  EXPECT_EQ(event.cached_tokens, 3);
  EXPECT_EQ(event.drafts.drafted, 2 * (2 + 3));
  EXPECT_EQ(event.drafts.accepted, 2 + 3);
  EXPECT_TRUE(std::get<absl::Status>(stream.Take()).ok());
}

TEST(TokenStreamTest, TokensOvertakeProgress) {
  TokenStream stream(nullptr, nullptr);
  TokenEvent progress;
  progress.computed_tokens = 16;
  EXPECT_TRUE(stream.Append(progress));
  EXPECT_EQ(stream.pending(), 0u);  // a reader is not behind for it
  progress.computed_tokens = 32;
  EXPECT_FALSE(stream.Append(progress));
  EXPECT_EQ(std::get<TokenEvent>(stream.Take()).computed_tokens, 32);
  EXPECT_FALSE(stream.Append(progress));
  EXPECT_FALSE(stream.Append(Token(1)));
  auto item = stream.Take();
  EXPECT_EQ(std::get<TokenEvent>(item).computed_tokens, std::nullopt);
  EXPECT_EQ(std::get<TokenEvent>(item).token_ids, (std::vector<int32_t>{1}));
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
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        got.insert(got.end(), event->token_ids.begin(), event->token_ids.end());
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
