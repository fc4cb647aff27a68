#include "router/dispatch/routed_ledger.h"

#include "gtest/gtest.h"

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
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  // Begun and ended between two reports: no difference.
  ledger.Add("a", 3, at(210), work);
  ledger.End(3, at(220));
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  EXPECT_EQ(ledger.Since("a", at(200)).prefill_tokens, 0);
  EXPECT_EQ(ledger.Since("a", start).total, 3u);
  EXPECT_EQ(ledger.Since("unknown", start).total, 0u);
}

}  // namespace
}  // namespace tandem::router
