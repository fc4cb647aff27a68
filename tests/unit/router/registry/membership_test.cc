// What a worker says on its Join stream, without the stream.
#include "router/registry/membership.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "simulation/fake_clock.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

using internal::v1::RouterMessage;
using internal::v1::WorkerMessage;
using ::testing::HasSubstr;

WorkerMessage Hello(const std::string& id, const std::string& role = "unified") {
  WorkerMessage message;
  internal::v1::Hello& hello = *message.mutable_hello();
  hello.set_worker_id(id);
  hello.set_incarnation(1);
  hello.set_role(role);
  hello.set_address("127.0.0.1:1");
  hello.set_num_blocks(100);
  hello.mutable_capability()->set_model("m");
  hello.mutable_capability()->set_block_size(16);
  return message;
}

class MembershipTest : public ::testing::Test {
 protected:
  std::unique_ptr<Membership> Make() {
    return std::make_unique<Membership>(
        "router-1", &registry_, &index_,
        [this](RouterMessage message) { sent_.push_back(std::move(message)); });
  }

  FakeClock clock_;
  PrefixIndex index_;
  Registry registry_{{.model = "m"}, &index_, &clock_};
  std::vector<RouterMessage> sent_;
};

// Each prefill worker has a key of its own, the same on every stay; nobody else has one.
TEST_F(MembershipTest, PrefillWorkersAreToldWhatTheRouterVouchesWith) {
  const auto key_of = [this](const std::string& id, const std::string& role) {
    sent_.clear();
    auto membership = Make();
    EXPECT_OK(membership->Handle(Hello(id, role)));
    const auto* worker = registry_.view()->Find(id);
    EXPECT_EQ(worker->identity->vouch_key, sent_.at(0).welcome().vouch_key());
    return sent_.at(0).welcome().vouch_key();
  };
  const std::string key = key_of("p0", "prefill");
  EXPECT_EQ(key.size(), 32u);
  EXPECT_EQ(key_of("p0", "prefill"), key);
  EXPECT_NE(key_of("p1", "prefill"), key);
  EXPECT_EQ(key_of("d0", "decode"), "");
  EXPECT_EQ(key_of("u0", "unified"), "");
}

TEST_F(MembershipTest, HelloIsWelcomedAndReportsAndEventsArrive) {
  auto membership = Make();
  ASSERT_OK(membership->Handle(Hello("u")));
  ASSERT_EQ(sent_.size(), 1u);
  EXPECT_EQ(sent_[0].welcome().router_id(), "router-1");
  WorkerMessage load;
  load.mutable_load()->set_running(3);
  load.mutable_load()->add_links()->set_peer_worker_id("d");
  ASSERT_OK(membership->Handle(load));
  EXPECT_EQ(registry_.view()->Find("u")->load->running, 3);
  EXPECT_EQ(registry_.view()->Find("u")->load->links.count("d"), 1u);
  WorkerMessage blocks;
  blocks.mutable_blocks()->add_stored(Hash128{1, 2}.ToBytes());
  ASSERT_OK(membership->Handle(blocks));
  EXPECT_EQ(index_.size(), 1u);
  WorkerMessage draining;
  draining.mutable_draining();
  ASSERT_OK(membership->Handle(draining));
  EXPECT_TRUE(registry_.view()->Find("u")->draining);
}

TEST_F(MembershipTest, LosingItIsLeaving) {
  auto membership = Make();
  ASSERT_OK(membership->Handle(Hello("u")));
  membership.reset();
  EXPECT_TRUE(registry_.view()->workers.empty());
  auto next = Make();
  ASSERT_OK(next->Handle(Hello("u")));
  next->Leave();
  next->Leave();
  EXPECT_TRUE(registry_.view()->workers.empty());
}

TEST_F(MembershipTest, WhatIsNoProperConversationIsRefused) {
  WorkerMessage load;
  load.mutable_load();
  EXPECT_EQ(MessageOf(Make()->Handle(load)), "the first message must be hello");
  auto membership = Make();
  ASSERT_OK(membership->Handle(Hello("u")));
  EXPECT_EQ(MessageOf(membership->Handle(Hello("u"))), "hello must come only once");
  WorkerMessage blocks;
  blocks.mutable_blocks()->add_removed("short");
  EXPECT_THAT(MessageOf(membership->Handle(blocks)), HasSubstr("16 bytes"));
  EXPECT_THAT(MessageOf(Make()->Handle(Hello("v", "boss"))), HasSubstr("got 'boss'"));
  EXPECT_THAT(MessageOf(Make()->Handle(Hello(""))), HasSubstr("hello.worker_id"));
}

TEST_F(MembershipTest, TextsAreBoundedAndOfOneLine) {
  const auto refusal = [this](const WorkerMessage& message) {
    const std::string line = MessageOf(Make()->Handle(message));
    EXPECT_LT(line.size(), 200u);
    EXPECT_EQ(line.find('\n'), std::string::npos);
    return line;
  };
  WorkerMessage huge = Hello("u");
  huge.mutable_hello()->mutable_capability()->set_dtype(std::string(30 << 20, 'x'));
  EXPECT_THAT(refusal(huge), HasSubstr("hello.capability.dtype must have at most 256 bytes"));
  EXPECT_THAT(refusal(Hello("u\n12:00 router: forged")), HasSubstr("control characters"));
  EXPECT_THAT(refusal(Hello(std::string(1000, 'x'))), HasSubstr("hello.worker_id"));
  WorkerMessage address = Hello("u");
  address.mutable_hello()->set_metrics_address(std::string(1000, 'x'));
  EXPECT_THAT(refusal(address), HasSubstr("hello.metrics_address"));
  auto membership = Make();
  ASSERT_OK(membership->Handle(Hello("u")));
  WorkerMessage load;
  load.mutable_load()->add_links()->set_peer_worker_id(std::string(1000, 'x'));
  EXPECT_THAT(MessageOf(membership->Handle(load)), HasSubstr("load.links.peer_worker_id"));
}

TEST_F(MembershipTest, ADrainReachesTheWorker) {
  auto membership = Make();
  ASSERT_OK(membership->Handle(Hello("u")));
  ASSERT_OK(registry_.Drain("u"));
  ASSERT_EQ(sent_.size(), 2u);
  EXPECT_TRUE(sent_[1].has_drain());
}

}  // namespace
}  // namespace tandem::router
