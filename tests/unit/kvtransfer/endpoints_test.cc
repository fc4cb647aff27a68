// Both ends over loopback TCP: what a transfer does when nothing or something ordinary goes wrong.
#include <algorithm>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

TEST(KvEndpoints, ShipsBlocksAndSeals) {
  Ends ends;
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
  EXPECT_EQ(got.stats.transport, "tcp");
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

TEST(KvEndpoints, RandomLayoutsAndBlocks) {
  std::mt19937_64 random(21);
  for (int round = 0; round < 12; ++round) {
    constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    const KvLayout layout = {1 + static_cast<int>(random() % 6), 1 + static_cast<int>(random() % 4),
                             8 << (random() % 4), 16 << (random() % 3), kTypes[random() % 3]};
    const int source_blocks = 1 + static_cast<int>(random() % 64);
    const int target_blocks = source_blocks + static_cast<int>(random() % 64);
    Ends ends(layout, source_blocks, target_blocks);
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
    EXPECT_EQ(ends.sender->Counters().channels_opened, 1);
  }
}

TEST(KvEndpoints, NoBlocksSealsAtOnce) {
  Ends ends;
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {})));
  ends.sender->Finish(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.stats.bytes, 0);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
}

TEST(KvEndpoints, WhatIsPushedTwiceIsSentOnce) {
  Ends ends;
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

TEST(KvEndpoints, EpochsAreSeparate) {
  Ends ends;
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

TEST(KvEndpoints, CancelTellsTheSenderAndItsQuietReleasesTheBlocks) {
  Ends ends;
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

TEST(KvEndpoints, AbortFailsTheReceiver) {
  Ends ends;
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

TEST(KvEndpoints, EitherEndDies) {
  Ends ends;
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

TEST(KvEndpoints, LinkRatesNameThePeer) {
  Ends ends;
  ends.Start();
  EXPECT_TRUE(ends.sender->LinkRates().empty());
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {})));
  ends.sender->Finish(id, 1);
  EXPECT_OK(ends.record.AwaitDone(id, 1).status);
  ASSERT_EQ(ends.sender->LinkRates().size(), 1u);
  EXPECT_EQ(ends.sender->LinkRates()[0].first, "decode-0");
  EXPECT_GT(ends.sender->LinkRates()[0].second, 0);
}

TEST(KvEndpoints, AnotherCapabilityIsRefused) {
  Ends ends;
  ends.sender_options.capability_digest = "other";
  ends.Start();
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {5})));
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_EQ(sent.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(sent.status.ToString(),
              HasSubstr("capability digest: decode-0 has cap, prefill-0 has other"));
  EXPECT_EQ(ends.sender->Counters().refused_channels, 1);
}

// Callbacks may call the endpoint that calls them.
TEST(KvEndpoints, CallbacksMayCallBack) {
  Ends ends;
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
