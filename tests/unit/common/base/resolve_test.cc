#include "common/base/resolve.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::ElementsAre;

TEST(OneOfEach, HasOneEntryForEachHost) {
  EXPECT_THAT(OneOfEach("n", {"10.0.0.2", "10.0.0.1", "10.0.0.2"}, {}),
              ElementsAre("10.0.0.1", "10.0.0.2"));
  EXPECT_THAT(OneOfEach("n", {}, {"fd00::2", "fd00::1"}), ElementsAre("fd00::1", "fd00::2"));
  EXPECT_THAT(OneOfEach("n", {"10.0.0.1"}, {}), ElementsAre("10.0.0.1"));
  // Hosts with one of each.
  EXPECT_THAT(OneOfEach("n", {"10.0.0.1", "10.0.0.2"}, {"fd00::1", "fd00::2"}),
              ElementsAre("10.0.0.1", "10.0.0.2"));
  EXPECT_THAT(OneOfEach("n", {"10.0.0.1"}, {"fd00::1", "fd00::2"}),
              ElementsAre("fd00::1", "fd00::2"));
  // One host, perhaps reached by one of them only.
  EXPECT_THAT(OneOfEach("localhost", {"127.0.0.1"}, {"::1"}), ElementsAre("localhost"));
}

TEST(ResolveHosts, AnswersForNumbersAndNames) {
  const auto number = ResolveHosts("192.0.2.7");
  ASSERT_OK(number);
  EXPECT_THAT(*number, ElementsAre("192.0.2.7"));
  const auto number6 = ResolveHosts("2001:db8::7");
  ASSERT_OK(number6);
  EXPECT_THAT(*number6, ElementsAre("2001:db8::7"));
  const auto name = ResolveHosts("localhost");
  ASSERT_OK(name);
  EXPECT_THAT(*name, ElementsAre(testing::AnyOf("localhost", "127.0.0.1", "::1")));
}

// A name service that does not answer.
TEST(Resolver, StopsWhileTheServiceIsAsked) {
  const auto answers = std::make_shared<absl::Notification>();
  const auto asked = std::make_shared<absl::Notification>();
  Resolver resolver([answers, asked](const std::string&) {
    asked->Notify();
    answers->WaitForNotification();
    return absl::StatusOr<std::vector<std::string>>(std::vector<std::string>{"late"});
  });
  std::thread stopper([&] {
    asked->WaitForNotification();
    resolver.Stop();
  });
  EXPECT_TRUE(absl::IsCancelled(resolver.Hosts("a.name").status()));
  stopper.join();
  answers->Notify();
}

TEST(Resolver, WhatComesAfterAStopIsNoAnswer) {
  for (int i = 0; i < 100; ++i) {
    Resolver* stopped = nullptr;
    Resolver resolver([&stopped](const std::string& host) {
      stopped->Stop();
      return absl::StatusOr<std::vector<std::string>>(std::vector<std::string>{host});
    });
    stopped = &resolver;
    ASSERT_TRUE(absl::IsCancelled(resolver.Hosts("a.name").status()));
  }
}

TEST(Resolver, AsksNobodyOnceItWasStopped) {
  const auto asked = std::make_shared<absl::Notification>();
  Resolver resolver([asked](const std::string& host) {
    asked->Notify();
    return absl::StatusOr<std::vector<std::string>>(std::vector<std::string>{host});
  });
  resolver.Stop();
  EXPECT_TRUE(absl::IsCancelled(resolver.Hosts("a.name").status()));
  EXPECT_FALSE(asked->WaitForNotificationWithTimeout(absl::Milliseconds(50)));
}

TEST(Resolver, AnswersAsItIsAnswered) {
  Resolver resolver([](const std::string& host) {
    return host == "none" ? absl::StatusOr<std::vector<std::string>>(absl::UnavailableError("none"))
                          : std::vector<std::string>{host + "-0", host + "-1"};
  });
  const auto hosts = resolver.Hosts("h");
  ASSERT_OK(hosts);
  EXPECT_THAT(*hosts, ElementsAre("h-0", "h-1"));
  EXPECT_TRUE(absl::IsUnavailable(resolver.Hosts("none").status()));
}

TEST(ResolveHosts, SaysWhatIsNotKnown) {
  // Longer than a part of a name may be, so that no name service is asked.
  const std::string name(70, 'x');
  const auto unknown = ResolveHosts(name);
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(unknown.status().message()), testing::HasSubstr(name));
}

}  // namespace
}  // namespace tandem
