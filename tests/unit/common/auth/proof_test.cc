#include "common/auth/proof.h"

#include <set>

#include "gtest/gtest.h"

#include "common/base/hmac.h"
#include "common/base/log_limiter.h"

namespace tandem {
namespace {

std::string Hex(std::string_view bytes) {
  std::string hex;
  for (const char c : bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += {kDigits[static_cast<unsigned char>(c) >> 4], kDigits[c & 15]};
  }
  return hex;
}

TEST(Hmac, IsThatOfRfc4231) {
  EXPECT_EQ(Hex(HmacSha256("Jefe", "what do ya want for nothing?")),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT_EQ(HmacSha256("", "m").size(), 32u);
}

TEST(Proof, ProvesWhatItWasMadeFor) {
  const std::string nonce = MakeNonce();
  const std::string proof = Prove("s", ProofPurpose::kKvSender, {"prefill-0", nonce});
  EXPECT_EQ(proof.size(), kProofBytes);
  EXPECT_TRUE(CheckProof("s", ProofPurpose::kKvSender, {"prefill-0", nonce}, proof));
}

TEST(Proof, ProvesNothingElse) {
  const std::string nonce = MakeNonce();
  const std::string proof = Prove("s", ProofPurpose::kKvSender, {"prefill-0", nonce});
  EXPECT_FALSE(CheckProof("other", ProofPurpose::kKvSender, {"prefill-0", nonce}, proof));
  // Sent back to whom it came from, or taken to another place.
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kKvReceiver, {"prefill-0", nonce}, proof));
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kRpcKey, {"prefill-0", nonce}, proof));
  // By another, or again.
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kKvSender, {"prefill-1", nonce}, proof));
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kKvSender, {"prefill-0", MakeNonce()}, proof));
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kKvSender, {"prefill-0", nonce}, ""));
  EXPECT_FALSE(CheckProof("s", ProofPurpose::kKvSender, {"prefill-0", nonce}, proof.substr(1)));
}

TEST(Proof, PartsDoNotRunTogether) {
  EXPECT_NE(Prove("s", ProofPurpose::kRpcKey, {"ab", "c"}),
            Prove("s", ProofPurpose::kRpcKey, {"a", "bc"}));
}

TEST(Proof, NoncesDoNotRepeat) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(MakeNonce());
  EXPECT_EQ(seen.size(), 1000u);
}

TEST(Proof, WhoListensBeyondLoopbackNeedsASecret) {
  for (const char* local : {"127.0.0.1:1", "[::1]:1", "localhost:0"}) {
    EXPECT_TRUE(RequireSecretBeyondLoopback("", "--listen", local).ok()) << local;
  }
  for (const char* reachable : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1"}) {
    EXPECT_FALSE(RequireSecretBeyondLoopback("", "--listen", reachable).ok()) << reachable;
    EXPECT_TRUE(RequireSecretBeyondLoopback("s", "--listen", reachable).ok()) << reachable;
  }
}

TEST(LogLimiter, LetsABurstThroughThenOneLineASecond) {
  LogLimiter limiter;
  const absl::Time start = absl::UnixEpoch();
  int lines = 0;
  for (int i = 0; i < 1000; ++i) lines += limiter.AllowAt(start);
  EXPECT_EQ(lines, 10);
  for (int i = 0; i < 1000; ++i) lines += limiter.AllowAt(start + absl::Milliseconds(10 * i));
  EXPECT_EQ(lines, 19);
  EXPECT_TRUE(limiter.AllowAt(start + absl::Seconds(100)));
  EXPECT_EQ(limiter.Withheld(), " (and 1981 lines like it)");
  EXPECT_EQ(limiter.Withheld(), "");
}

}  // namespace
}  // namespace tandem
