#include "router/dispatch/routed_ledger.h"

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/sanitizer.h"

namespace tandem::router {
namespace {

TEST(RoutedLedger, IsTheDifferenceToTheLastReport) {
  const absl::Time start = absl::UnixEpoch();
  const auto at = [&](int ms) { return start + absl::Milliseconds(ms); };
  RoutedLedger ledger(absl::Milliseconds(50));
  RoutedWork work;
  work.sequences = 1;
  work.prefill_tokens = 100;
  ledger.Add("a", 1, at(0), work);
  ledger.Add("a", 2, at(100), work);
  ledger.Add("b", 2, at(100), work);
  EXPECT_EQ(ledger.Since("a", absl::InfinitePast()).prefill_tokens, 200);
  // A report at 120 ms contains the first, and may not contain the second.
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, 1);
  EXPECT_EQ(ledger.Since("a", at(120)).prefill_tokens, 100);
  // The second was refused: it never ran.
  ledger.Remove(2);
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, 0);
  EXPECT_EQ(ledger.Since("b", start).sequences, 0);
  // The first ends: the report still counts it, the next one will not.
  ledger.End(1, at(130));
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, -1);
  // Once, however soon after the end it comes.
  EXPECT_EQ(ledger.Since("a", at(131)).sequences, 0);
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  // Begun and ended between two reports: no difference.
  ledger.Add("a", 3, at(210), work);
  ledger.End(3, at(220));
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  EXPECT_EQ(ledger.Since("a", at(200)).prefill_tokens, 0);
  EXPECT_EQ(ledger.Since("a", start).total, 3u);
  EXPECT_EQ(ledger.Since("unknown", start).total, 0u);
}

// A turn of a conversation may be over 30 ms after it was routed, and the next one comes at once.
TEST(RoutedLedger, AShortOneLeavesItsWorkerIdle) {
  const auto at = [&](int ms) { return absl::UnixEpoch() + absl::Milliseconds(ms); };
  RoutedLedger ledger(absl::Milliseconds(50));
  RoutedWork work;
  work.sequences = 1;
  work.blocks = 7;
  ledger.Add("a", 1, at(0), work);
  EXPECT_EQ(ledger.Since("a", at(20)).sequences, 1) << "that report may not contain it";
  ledger.End(1, at(30));
  EXPECT_EQ(ledger.Since("a", at(20)).sequences, -1);
  EXPECT_EQ(ledger.Since("a", at(20)).blocks, -7);
  EXPECT_EQ(ledger.Since("a", at(40)).sequences, 0);
}

// The sums that are kept against adding up all that was routed, under random events.
TEST(RoutedLedger, KeepsTheSumsOfPlainEntries) {
  struct Plain {
    std::string worker;
    uint64_t request;
    int sequences;
    absl::Time began, ended = absl::InfiniteFuture();
  };
  std::mt19937 random(4);
  absl::Time now = absl::UnixEpoch();
  std::map<std::string, absl::Time> reported = {{"a", now}, {"b", now}, {"c", now}};
  std::vector<Plain> all;
  RoutedLedger ledger(absl::Milliseconds(50));
  const auto steps = static_cast<uint64_t>(SanitizerShare(5000));
  for (uint64_t step = 1; step < steps; ++step) {
    now += absl::Milliseconds(random() % 20);
    switch (random() % 4) {
      case 0:
      case 1:
        for (const char* worker : {"a", "b", "c"}) {
          if (random() % 2 == 0) continue;
          RoutedWork work;
          work.sequences = static_cast<int>(random() % 5);
          ledger.Add(worker, step, now, work);
          all.push_back({worker, step, work.sequences, now});
        }
        break;
      case 2: {
        const uint64_t request = random() % step;
        ledger.End(request, now);
        for (Plain& plain : all) {
          if (plain.request == request) plain.ended = std::min(plain.ended, now);
        }
        break;
      }
      default:
        reported[std::string(1, static_cast<char>('a' + random() % 3))] = now;
        if (const uint64_t request = random() % step; random() % 8 == 0) {
          ledger.Remove(request);
          std::erase_if(all, [&](const Plain& plain) {
            return plain.request == request && plain.ended == absl::InfiniteFuture();
          });
        }
    }
    for (const auto& [worker, at] : reported) {
      const absl::Time known = at - absl::Milliseconds(50);
      int sum = 0;
      for (const Plain& plain : all) {
        if (plain.worker != worker) continue;
        const bool ended = plain.ended < absl::InfiniteFuture();
        if (ended && plain.ended >= at && plain.began <= at) sum -= plain.sequences;
        if (!ended && plain.began >= known) sum += plain.sequences;
      }
      ASSERT_EQ(ledger.Since(worker, at).sequences, sum) << step << worker;
    }
  }
}

}  // namespace
}  // namespace tandem::router
