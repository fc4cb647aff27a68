#include <optional>
#include <thread>

#include "absl/strings/cord.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/block_hash.h"
#include "common/base/inbox.h"
#include "common/base/nearest_name.h"
#include "common/base/rate_meter.h"
#include "common/base/refusal.h"
#include "common/base/transfer_id.h"
#include "common/base/work_pool.h"

namespace tandem {
namespace {

TEST(BlockHash, ChainsOverParentsAndSeeds) {
  std::vector<int32_t> tokens(70);
  for (int i = 0; i < 70; ++i) tokens[i] = i * 31;
  const Hash128 seed = BlockHashSeed("secret", "model", "salt");
  const auto hashes = HashTokenBlocks(seed, tokens, 16);
  ASSERT_EQ(hashes.size(), 4u);  // the 6 tokens beyond the last full block have none
  EXPECT_EQ(hashes[0], ChainBlockHash(seed, std::span(tokens).first(16)));
  EXPECT_EQ(hashes[1], ChainBlockHash(hashes[0], std::span(tokens).subspan(16, 16)));

  tokens[0] += 1;  // every later hash depends on the first token
  const auto changed = HashTokenBlocks(seed, tokens, 16);
  for (int i = 0; i < 4; ++i) EXPECT_NE(hashes[i], changed[i]);
}

TEST(BlockHash, SeedPartsDoNotRunTogether) {
  EXPECT_NE(BlockHashSeed("ab", "c", ""), BlockHashSeed("a", "bc", ""));
  EXPECT_NE(BlockHashSeed("s", "m", ""), BlockHashSeed("s", "m", "salt"));
}

TEST(BlockHash, BytesRoundTrip) {
  const Hash128 hash{0x0123456789abcdefULL, 0xfedcba9876543210ULL};
  Hash128 back;
  ASSERT_TRUE(Hash128::FromBytes(hash.ToBytes(), &back));
  EXPECT_EQ(back, hash);
  EXPECT_EQ(hash.ToHex(), "0123456789abcdeffedcba9876543210");
  EXPECT_FALSE(Hash128::FromBytes("short", &back));
}

TEST(NearestName, FindsTyposAndShortenedNamesOnly) {
  const std::vector<std::string> names = {"--max-model-len", "--max-num-seqs", "--block-size"};
  EXPECT_EQ(NearestName("--max-model-length", names), "--max-model-len");
  EXPECT_EQ(NearestName("--blocksize", names), "--block-size");
  EXPECT_EQ(NearestName("--frobnicate", names), std::nullopt);
}

TEST(Inbox, RefusesNewWorkWhenFullButLosesNoCompletion) {
  Inbox<int> inbox(2);
  EXPECT_TRUE(inbox.TryPush(1));
  EXPECT_TRUE(inbox.TryPush(2));
  EXPECT_FALSE(inbox.TryPush(3));
  inbox.Push(4);
  EXPECT_THAT(inbox.Drain(absl::ZeroDuration()), testing::ElementsAre(1, 2, 4));
  inbox.Close();
  EXPECT_FALSE(inbox.TryPush(5));
  EXPECT_TRUE(inbox.Drain(absl::InfiniteDuration()).empty());  // closed: does not wait
}

TEST(Inbox, DrainWakesForAnItemOfAnotherThread) {
  Inbox<int> inbox(8);
  std::thread producer([&] { inbox.Push(7); });
  EXPECT_THAT(inbox.Drain(absl::InfiniteDuration()), testing::ElementsAre(7));
  producer.join();
}

TEST(TransferId, RandomIdsDifferAndRoundTrip) {
  const TransferId a = TransferId::Random(), b = TransferId::Random();
  EXPECT_NE(a, b);
  TransferId back;
  ASSERT_TRUE(TransferId::FromBytes(a.ToBytes(), &back));
  EXPECT_EQ(a, back);
}

TEST(RateMeterTest, ShortBatchesCountOnlyUntilALargeOne) {
  RateMeter meter;
  EXPECT_EQ(meter.TokensPerSecond(), 0);
  meter.AddStep(10, absl::Milliseconds(10));
  EXPECT_NEAR(meter.TokensPerSecond(), 1000, 1e-6);
  meter.AddStep(500, absl::Milliseconds(50));
  EXPECT_NEAR(meter.TokensPerSecond(), 10000, 1e-6);
  for (int i = 0; i < 100; ++i) meter.AddStep(10, absl::Milliseconds(10));
  EXPECT_NEAR(meter.TokensPerSecond(), 10000, 1e-6);
  for (int i = 0; i < 100; ++i) meter.AddStep(500, absl::Milliseconds(100));
  EXPECT_NEAR(meter.TokensPerSecond(), 5000, 1);
  EXPECT_NEAR(meter.Tokens(), 5000, 1);
}

TEST(SaturatedRateTest, OnlyFilledBatchesSayHowFastAQueueGoesDown) {
  SaturatedRate rate;
  // 10 ms whatever the batch holds, and 10 ms more per 1,000 tokens. Many prompts, each alone:
  for (int i = 0; i < 100; ++i) rate.AddStep(60, 8000, absl::Milliseconds(10.6));
  EXPECT_EQ(rate.TokensPerSecond(), 0);
  // The first filled one makes what the others use.
  rate.AddStep(8000, 8000, absl::Seconds(2));
  rate.AddStep(8000, 8000, absl::Milliseconds(90));
  rate.AddStep(2000, 8000, absl::Milliseconds(30));
  EXPECT_EQ(rate.TokensPerSecond(), 0) << "two are few";
  rate.AddStep(8000, 8000, absl::Milliseconds(90));
  EXPECT_NEAR(rate.TokensPerSecond(), 85'700, 1000);
  for (int i = 0; i < 100; ++i) rate.AddStep(60, 8000, absl::Milliseconds(10.6));
  EXPECT_NEAR(rate.TokensPerSecond(), 85'700, 1000);
}

TEST(Refusal, ComesBackAsItWasAndNothingElseDoes) {
  const absl::Status status = absl::ResourceExhaustedError("full");
  EXPECT_FALSE(RefusalOf(status).has_value());
  const std::optional<Refusal> got =
      RefusalOf(WithRefusal(status, {Refusal::Reason::kLeaving, 7, 3}));
  ASSERT_TRUE(got.has_value());
  EXPECT_EQ(got->reason, Refusal::Reason::kLeaving);
  EXPECT_EQ(got->needed, 7);
  EXPECT_EQ(got->available, 3);
  for (const char* bad : {"", "0", "0 1", "0 1 2 ", "0 1 -2", "99 1 2", "0 1 99999999999", "x"}) {
    absl::Status forged = status;
    forged.SetPayload("tandem.internal/refusal", absl::Cord(bad));
    EXPECT_FALSE(RefusalOf(forged).has_value()) << bad;
  }
}

TEST(WorkPool, RefusesWhatIsTooMuchAndDoesAllThatItTook) {
  int done = 0;
  {
    absl::Notification started, go_on;
    WorkPool pool(1, 2);
    ASSERT_TRUE(pool.TryRun([&] {
      started.Notify();
      go_on.WaitForNotification();
    }));
    started.WaitForNotification();
    EXPECT_TRUE(pool.TryRun([&] { ++done; }));
    EXPECT_TRUE(pool.TryRun([&] { ++done; }));
    EXPECT_FALSE(pool.TryRun([&] { ++done; }));
    go_on.Notify();
  }
  EXPECT_EQ(done, 2);
}

}  // namespace
}  // namespace tandem
