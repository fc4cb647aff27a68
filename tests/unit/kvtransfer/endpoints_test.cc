// Both ends in one process, over each transport: what a transfer does when nothing or something
// ordinary goes wrong.
#include <algorithm>
#include <memory>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/ready_event.h"
#include "common/metrics/metrics.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::_;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

class KvEndpoints : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Transports, KvEndpoints,
                         ::testing::Values("tcp", "shm", "staged", "cuda_ipc", "nccl", "shm_ring",
                                           "cards_ring"),
                         [](const auto& info) { return info.param; });

TEST_P(KvEndpoints, ShipsBlocksAndSeals) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  const std::vector<int32_t> from = {3, 4, 5, 9};
  const std::vector<int32_t> to = {7, 8, 1, 30};
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, to)));
  ends.PushAll(id, 1, from);
  ends.sender->Finish(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.failed, 0);
  EXPECT_EQ(got.stats.bytes, 4 * SmallLayout().BlockBytes());
  EXPECT_EQ(got.stats.transport, ends.transport);
  EXPECT_LE(got.stats.first_byte, got.stats.last_byte);
  ends.ExpectEqualBlocks(from, to);
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_OK(sent.status);
  EXPECT_EQ(sent.stats.bytes, got.stats.bytes);
  EXPECT_EQ(ends.sender->Counters().transfers, 1);
  EXPECT_EQ(ends.receiver->Counters().transfers, 1);
  // Nothing else of the target pool was touched.
  for (const int block : {0, 2, 6, 9, 29, 31}) {
    EXPECT_EQ(ends.target.BlockBytes(block), std::string(SmallLayout().BlockBytes(), '\xee'));
  }
}

TEST_P(KvEndpoints, RandomLayoutsAndBlocks) {
  std::mt19937_64 random(21);
  for (int round = 0; round < 12; ++round) {
    constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                                DType::kFloat8E4M3};
    const KvLayout layout = {1 + static_cast<int>(random() % 6), 1 + static_cast<int>(random() % 4),
                             8 << (random() % 4), 16 << (random() % 3), kTypes[random() % 4]};
    const int source_blocks = 1 + static_cast<int>(random() % 64);
    const int target_blocks = source_blocks + static_cast<int>(random() % 64);
    Ends ends(GetParam(), layout, source_blocks, target_blocks);
    ends.Start();
    // Several transfers at once, into different blocks.
    const auto all = RandomBlocks(&random, target_blocks, static_cast<size_t>(target_blocks));
    struct Shipment {
      TransferId id;
      std::vector<int32_t> from, to;
    };
    std::vector<Shipment> shipments;
    size_t used = 0;
    while (used < all.size() && shipments.size() < 5) {
      const size_t count = std::min<size_t>(
          {1 + random() % 32, all.size() - used, static_cast<size_t>(source_blocks)});
      shipments.push_back({TransferId::Random(),
                           RandomBlocks(&random, source_blocks, count),
                           {all.begin() + static_cast<ptrdiff_t>(used),
                            all.begin() + static_cast<ptrdiff_t>(used + count)}});
      used += count;
      const Shipment& shipment = shipments.back();
      ASSERT_OK(ends.sender->Open(ends.Expect(shipment.id, 1, shipment.to)));
    }
    // Layers interleaved over the transfers, each layer's blocks in random chunks and orders.
    for (int layer = 0; layer < layout.num_layers; ++layer) {
      for (const Shipment& shipment : shipments) {
        const auto count = static_cast<int>(shipment.from.size());
        auto order = RandomBlocks(&random, count, shipment.from.size());
        if (random() % 2 == 0) std::sort(order.begin(), order.end());
        std::vector<int32_t> blocks;
        for (const int32_t ordinal : order) {
          blocks.push_back(shipment.from[static_cast<size_t>(ordinal)]);
        }
        const size_t cut = random() % (order.size() + 1);
        ends.sender->Push(shipment.id, 1, layer, std::span(blocks).first(cut),
                          std::span(order).first(cut));
        ends.sender->Push(shipment.id, 1, layer, std::span(blocks).subspan(cut),
                          std::span(order).subspan(cut));
      }
    }
    for (const Shipment& shipment : shipments) ends.sender->Finish(shipment.id, 1);
    for (const Shipment& shipment : shipments) {
      EXPECT_EQ(ends.record.AwaitQuiet(shipment.id, 1).sealed, 1);
      EXPECT_OK(ends.record.AwaitDone(shipment.id, 1).status);
      ends.ExpectEqualBlocks(shipment.from, shipment.to);
    }
    EXPECT_EQ(ends.sender->Counters().connections_opened, 1);
  }
}

TEST_P(KvEndpoints, NoBlocksSealsAtOnce) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {})));
  ends.sender->Finish(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.stats.bytes, 0);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
}

TEST_P(KvEndpoints, WhatIsPushedTwiceIsSentOnce) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5, 6})));
  ends.PushAll(id, 1, {1});
  ends.PushAll(id, 1, {1, 2});
  ends.sender->Finish(id, 1);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
  ends.ExpectEqualBlocks({1, 2}, {5, 6});
  EXPECT_EQ(ends.sender->Counters().bytes, 2 * SmallLayout().BlockBytes());
}

// Says when somebody waits for it.
class WatchedEvent final : public ReadyEvent {
 public:
  bool Ready() const override { return event_.Ready(); }
  bool WaitFor(absl::Duration timeout) const override {
    if (!waited_.HasBeenNotified()) waited_.Notify();  // the peer's one thread
    return event_.WaitFor(timeout);
  }
  void AwaitWaiter() const {
    ASSERT_TRUE(waited_.WaitForNotificationWithTimeout(kPatience)) << "nobody waits";
  }
  void Set() { event_.Set(); }

 private:
  mutable absl::Notification waited_;
  HostEvent event_;
};

TEST_P(KvEndpoints, BlocksAreReadOnceTheyAreReady) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  const auto ready = std::make_shared<WatchedEvent>();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {9})));
  const std::vector<int32_t> block = {4};
  const std::vector<int32_t> ordinal = {0};
  for (int layer = 0; layer < 3; ++layer) ends.sender->Push(id, 1, layer, block, ordinal, ready);
  ends.sender->Finish(id, 1);
  ready->AwaitWaiter();
  // Computed only now: whoever read the blocks before would ship, and seal, what they held then.
  ends.source.FillRandom(99);
  ready->Set();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  ends.ExpectEqualBlocks({4}, {9});
}

TEST_P(KvEndpoints, AnAbortDoesNotWaitForTheCompute) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  const auto never = std::make_shared<HostEvent>();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {9})));
  ends.sender->Push(id, 1, 0, std::vector<int32_t>{4}, std::vector<int32_t>{0}, never);
  ends.sender->Abort(id, 1);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
}

TEST_P(KvEndpoints, WhatIsCountedIsExported) {
  Metrics metrics;
  Ends ends(GetParam());
  ends.receiver_options.metrics = &metrics;
  ends.sender_options.metrics = &metrics;
  ends.sender_options.slow_link_bytes_per_second = 1e18;  // no link is that fast
  ends.sender_options.link_test_time = absl::Milliseconds(1);
  ends.Start();
  for (const uint64_t epoch : {1, 2}) {
    const TransferId id = TransferId::Random();
    ASSERT_OK(ends.sender->Open(ends.Expect(id, epoch, {9})));
    ends.PushAll(id, epoch, {4});
    ends.sender->Finish(id, epoch);
    EXPECT_OK(ends.record.AwaitDone(id, epoch).status);
  }
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("tandem_kv_transfers_total{end=\"receiver\"} 2"));
  EXPECT_THAT(text, HasSubstr("tandem_kv_slow_links_total{end=\"sender\"} 1"));
  EXPECT_THAT(text,
              HasSubstr("tandem_kv_failures_total{end=\"sender\",reason=\"digest_mismatch\"} 0"));
}

TEST_P(KvEndpoints, EpochsAreSeparate) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  const KvSendTarget first = ends.Expect(id, 1, {5});
  const KvSendTarget second = ends.Expect(id, 2, {6});
  EXPECT_NE(first.token, second.token);
  ASSERT_OK(ends.sender->Open(first));
  ASSERT_OK(ends.sender->Open(second));
  ends.PushAll(id, 2, {2});
  ends.PushAll(id, 1, {1});
  ends.sender->Finish(id, 2);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 2).sealed, 1);
  EXPECT_EQ(ends.record.Received(id, 1).quiet, 0);
  ends.sender->Finish(id, 1);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  ends.ExpectEqualBlocks({1, 2}, {5, 6});
}

TEST_P(KvEndpoints, CancelTellsTheSenderAndItsQuietReleasesTheBlocks) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  const TransferId marker = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(marker, 1, {})));
  ends.sender->Finish(marker, 1);
  EXPECT_OK(ends.record.AwaitDone(marker, 1).status);  // so the first one is open as well
  ends.receiver->Cancel(id, 1);
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_EQ(sent.status.code(), absl::StatusCode::kCancelled);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed + got.failed, 0);
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 2, {5})));
  ends.PushAll(id, 2, {1});
  ends.sender->Finish(id, 2);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 2).sealed, 1);
  ends.ExpectEqualBlocks({1}, {5});
}

TEST_P(KvEndpoints, AbortFailsTheReceiver) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  const TransferId marker = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(marker, 1, {})));
  ends.sender->Finish(marker, 1);
  EXPECT_OK(ends.record.AwaitDone(marker, 1).status);
  ends.sender->Abort(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.failed, 1);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
}

TEST_P(KvEndpoints, EitherEndDies) {
  Ends ends(GetParam());
  ends.Start();
  const TransferId id = TransferId::Random();
  const TransferId marker = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  ASSERT_OK(ends.sender->Open(ends.Expect(marker, 1, {})));
  ends.sender->Finish(marker, 1);
  EXPECT_OK(ends.record.AwaitDone(marker, 1).status);
  ends.sender.reset();
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).status.code(), absl::StatusCode::kUnavailable);

  ends.StartSender();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 2, {5})));
  ASSERT_OK(ends.sender->Open(ends.Expect(marker, 2, {})));
  ends.sender->Finish(marker, 2);
  EXPECT_OK(ends.record.AwaitDone(marker, 2).status);
  ends.receiver.reset();
  EXPECT_EQ(ends.record.AwaitDone(id, 2).status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 2).failed, 1);

  // A new receiver, another port.
  ends.StartReceiver();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 3, {5})));
  ends.PushAll(id, 3, {1});
  ends.sender->Finish(id, 3);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 3).sealed, 1);
}

TEST_P(KvEndpoints, LinksNameThePeerAndWhatTheSelfTestFound) {
  Ends ends(GetParam());
  ends.sender_options.link_test_time = absl::Seconds(1);
  ends.Start();
  EXPECT_TRUE(ends.sender->Links().empty());
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {})));
  ends.sender->Finish(id, 1);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
  const std::map<std::string, KvLink> links = ends.sender->Links();
  ASSERT_THAT(links, ElementsAre(Pair("decode-0", _)));
  const KvLink& link = links.at("decode-0");
  EXPECT_EQ(link.transport, ends.transport);
  EXPECT_GT(link.test.latency_seconds, 0);
  EXPECT_GT(link.test.small_rate, 0);
  EXPECT_EQ(link.bytes_per_second, link.test.rate());
  EXPECT_FALSE(link.refused);
  EXPECT_EQ(link.note, "");
  // Scratch memory of the transport's own was all that it wrote.
  const auto memory = ends.target.memory();
  EXPECT_TRUE(
      std::all_of(memory.begin(), memory.end(), [](std::byte b) { return b == std::byte{0xee}; }));
}

TEST_P(KvEndpoints, ALinkBelowTheFloorIsRefusedAndTriedAgain) {
  Ends ends(GetParam());
  ends.sender_options.link_test_time = absl::Milliseconds(10);
  ends.sender_options.min_link_bytes_per_second = 1e18;  // no link is that fast
  ends.sender_options.refused_for = absl::InfiniteDuration();
  ends.Start();
  const TransferId id = ends.ShipOne();
  const absl::Status status = ends.record.AwaitDone(id, 1).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.ToString(),
              AllOf(HasSubstr("the link from prefill-0 to decode-0 over " + ends.transport),
                    HasSubstr("less than the 1000000000.000 of --min-kv-link-gbps")));
  ASSERT_EQ(ends.sender->Links().count("decode-0"), 1u);
  const KvLink link = ends.sender->Links().at("decode-0");
  EXPECT_TRUE(link.refused);
  EXPECT_GT(link.test.best_rate(), 0);
  EXPECT_THAT(link.note, HasSubstr("--min-kv-link-gbps"));
  EXPECT_EQ(ends.sender->Counters().refused_connections, 1u);
  EXPECT_EQ(ends.sender->Counters().slow_links, 1u);
  ends.receiver->Cancel(id, 1);
  ends.record.AwaitQuiet(id, 1);
  // Whoever asks after a while hears of no refusal, and may try.
  ends.sender = nullptr;
  ends.sender_options.refused_for = absl::ZeroDuration();
  ends.StartSender();
  const TransferId again = ends.ShipOne();
  EXPECT_FALSE(ends.record.AwaitDone(again, 1).status.ok());
  EXPECT_FALSE(ends.sender->Links().at("decode-0").refused);
}

TEST_P(KvEndpoints, ALinkBelowTheFloorIsWarnedOfWhereThatIsWanted) {
  Ends ends(GetParam());
  ends.sender_options.link_test_time = absl::Milliseconds(10);
  ends.sender_options.min_link_bytes_per_second = 1e18;
  ends.sender_options.refuse_slow_links = false;
  ends.Start();
  EXPECT_OK(ends.record.AwaitDone(ends.ShipOne(), 1).status);
  const KvLink link = ends.sender->Links().at("decode-0");
  EXPECT_TRUE(link.slow);
  EXPECT_FALSE(link.refused);
  EXPECT_EQ(ends.sender->Counters().slow_links, 1u);
}

// Each peer has a thread and a link rate of its own.
TEST_P(KvEndpoints, AWorkerThatIsStartedAgainLeavesNoPeerBehind) {
  constexpr size_t kStarts = 8;
  Ends ends(GetParam());
  ends.StartSender();
  for (size_t i = 0; i < kStarts; ++i) {
    ends.StartReceiver();  // at another port, after the one before has ended
    const TransferId id = ends.ShipOne();
    EXPECT_OK(ends.record.AwaitDone(id, 1).status);
    ends.receiver.reset();
    absl::SleepFor(absl::Milliseconds(20));  // until the sender has noticed
  }
  // Should it notice late, the next start drops two.
  EXPECT_LT(ends.sender->Links().size(), kStarts / 2);
}

TEST_P(KvEndpoints, AnotherCapabilityIsRefused) {
  Ends ends(GetParam());
  ends.sender_options.capability_digest = "other";
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_EQ(sent.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sent.status.ToString(),
              HasSubstr("capability digest of decode-0 and prefill-0 differ"));
  EXPECT_EQ(ends.sender->Counters().refused_connections, 1);
}

// Callbacks may call the endpoint that calls them.
TEST_P(KvEndpoints, CallbacksMayCallBack) {
  Ends ends(GetParam());
  auto on_sealed = ends.receiver_options.on_sealed;
  ends.receiver_options.on_sealed = [&](const TransferId& id, uint64_t epoch,
                                        const TransferStats& stats) {
    ends.receiver->Cancel(id, epoch);
    on_sealed(id, epoch, stats);
  };
  auto on_done = ends.sender_options.on_done;
  ends.sender_options.on_done = [&](const TransferId& id, uint64_t epoch,
                                    const absl::Status& status, const TransferStats& stats) {
    ends.sender->Abort(id, epoch);
    on_done(id, epoch, status, stats);
  };
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  ends.PushAll(id, 1, {1});
  ends.sender->Finish(id, 1);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
}

}  // namespace
}  // namespace tandem::kvtransfer
