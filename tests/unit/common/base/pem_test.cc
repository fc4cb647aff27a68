#include "common/base/pem.h"

#include <string>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/certificates.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string Refusal(const std::string& chain, const std::string& key, absl::Time now) {
  const auto checked = CheckCertificateAndKey(chain, key, now);
  EXPECT_FALSE(checked.ok());
  return std::string(checked.status().message());
}

TEST(PemTest, ACertificateHoldsForItsTimeWithItsKey) {
  const TestCa ca("a");
  const TestCertificate own = ca.Issue(absl::Hours(2));
  const absl::Time now = absl::Now();
  for (const std::string& chain : {own.certificate, own.certificate + ca.certificate(),
                                   "a comment\n" + own.certificate + "\n"}) {
    const auto until = CheckCertificateAndKey(chain, own.key, now);
    ASSERT_OK(until);
    EXPECT_GT(*until, now + absl::Minutes(119));
    EXPECT_LT(*until, now + absl::Minutes(121));
  }
  EXPECT_THAT(Refusal(own.certificate, own.key, now + absl::Hours(3)), HasSubstr("has expired at"));
  EXPECT_THAT(Refusal(own.certificate, own.key, now - absl::Hours(2)),
              HasSubstr("holds only from"));
  EXPECT_THAT(Refusal(own.certificate, ca.Issue().key, now), HasSubstr("not that of"));
  EXPECT_THAT(Refusal(ca.certificate() + own.certificate, own.key, now), HasSubstr("not that of"))
      << "the own one comes first";
}

TEST(PemTest, WhatIsNoPemIsToldWithoutQuotingIt) {
  const TestCa ca("a");
  const TestCertificate own = ca.Issue();
  const absl::Time now = absl::Now();
  const std::string half = own.certificate.substr(0, own.certificate.size() / 2);
  for (const std::string& bad :
       {std::string(), std::string("hello"), own.key, half, own.certificate + half}) {
    EXPECT_FALSE(CheckCertificates(bad).ok()) << bad;
    EXPECT_THAT(Refusal(bad, own.key, now), HasSubstr("no PEM text of certificates"));
  }
  EXPECT_OK(CheckCertificates(own.certificate + ca.certificate()));
  for (const std::string& bad :
       {std::string(), own.certificate, own.key.substr(0, own.key.size() / 2)}) {
    const std::string refusal = Refusal(own.certificate, bad, now);
    EXPECT_THAT(refusal, HasSubstr("no PEM text of a private key"));
    EXPECT_THAT(refusal, Not(HasSubstr("BEGIN")));
  }
}

}  // namespace
}  // namespace tandem
