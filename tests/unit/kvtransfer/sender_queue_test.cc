// Whose turn it is among transfers to one peer, counted in frames.
#include "kvtransfer/channel/sender_queue.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "gtest/gtest.h"

namespace tandem::kvtransfer {
namespace {

constexpr int kLayers = 28;
constexpr size_t kLayerBytes = 32 << 10;  // of one block
constexpr size_t kFrameBytes = 1 << 20;   // 32 blocks of one layer, or one block of all
constexpr int kBlocksPerFrame = kFrameBytes / kLayerBytes;

TransferKey Key(uint64_t n) { return {TransferId{{1, n}}, 1}; }

class SenderQueueTest : public ::testing::Test {
 protected:
  void Open(const TransferKey& key) {
    KvSendTarget target;
    target.id = key.id;
    target.epoch = key.epoch;
    queue_.Push(OpenItem{std::move(target)});
  }
  // As SenderPeer::Push does for blocks that are cached: all layers, a frame at a time.
  void PushAll(const TransferKey& key, int blocks,
               const std::shared_ptr<const ReadyEvent>& ready = nullptr) {
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int at = 0; at < blocks; at += kBlocksPerFrame) {
        std::vector<int32_t> run(static_cast<size_t>(std::min(blocks - at, kBlocksPerFrame)));
        std::iota(run.begin(), run.end(), at);
        queue_.Push(PushItem{key, PushedRun{layer, 1, at, run}, ready});
      }
    }
  }
  void Ship(const TransferKey& key, int blocks) {
    Open(key);
    PushAll(key, blocks);
    queue_.Push(FinishItem{key});
  }
  // Frames that are sent until FINISH of `key` is.
  int FramesUntilFinish(const TransferKey& key) {
    int frames = 0;
    while (true) {
      const std::optional<SendItem> item = queue_.TakeItem(/*may_open=*/true);
      if (!item.has_value()) return -1;
      if (std::holds_alternative<PushItem>(*item)) ++frames;
      const auto* finish = std::get_if<FinishItem>(&*item);
      if (finish != nullptr && finish->key == key) return frames;
    }
  }

  SenderQueue queue_{kLayerBytes, kFrameBytes};
};

TEST_F(SenderQueueTest, AFewBlocksDoNotWaitForALongPrefix) {
  Ship(Key(1), 4);
  const int alone = FramesUntilFinish(Key(1));
  Ship(Key(2), 1024);  // 16k tokens, cached
  Ship(Key(3), 4);
  const int behind = FramesUntilFinish(Key(3));
  EXPECT_LE(behind, 3 * alone) << "frames, " << alone << " alone";
}

TEST_F(SenderQueueTest, LargeTransfersShareTheLink) {
  Ship(Key(1), 256);
  Ship(Key(2), 256);
  Ship(Key(3), 1);
  Ship(Key(4), 64);
  std::map<uint64_t, size_t> pieces;
  for (int frames = 0; frames < 4 * 20;) {
    const std::optional<SendItem> item = queue_.TakeItem(/*may_open=*/true);
    ASSERT_TRUE(item.has_value());
    const auto* push = std::get_if<PushItem>(&*item);
    if (push == nullptr) continue;
    ++frames;
    pieces[push->key.id.value.low] +=
        push->run.source_blocks.size() * static_cast<size_t>(push->run.layer_count);
  }
  EXPECT_EQ(pieces[3], size_t{kLayers});
  EXPECT_NEAR(static_cast<double>(pieces[1]), static_cast<double>(pieces[2]), 32);
  EXPECT_NEAR(static_cast<double>(pieces[1]), static_cast<double>(pieces[4]), 32);
}

TEST_F(SenderQueueTest, BlocksThatAreNotComputedHoldUpNobodyElse) {
  const auto ready = std::make_shared<HostEvent>();
  Open(Key(1));
  PushAll(Key(1), 4, ready);
  queue_.Push(FinishItem{Key(1)});
  Ship(Key(2), 4);
  EXPECT_GT(FramesUntilFinish(Key(2)), 0);
  EXPECT_FALSE(queue_.TakeItem(/*may_open=*/true).has_value());
  ready->Set();
  EXPECT_GT(FramesUntilFinish(Key(1)), 0);
  EXPECT_TRUE(queue_.empty());
}

TEST_F(SenderQueueTest, OneTransfersItemsKeepTheirOrder) {
  Ship(Key(1), 40);
  Ship(Key(2), 40);
  int next_layer = 0;
  while (const std::optional<SendItem> item = queue_.TakeItem(/*may_open=*/true)) {
    const auto* push = std::get_if<PushItem>(&*item);
    if (push == nullptr || push->key != Key(1)) continue;
    EXPECT_GE(push->run.layer_begin, next_layer);
    next_layer = push->run.layer_begin;
  }
  EXPECT_EQ(next_layer, kLayers - 1);
}

// Without a connection: what is to be opened waits, what is left of transfers that are over goes.
TEST_F(SenderQueueTest, NothingIsOpenedWithoutAConnection) {
  Open(Key(1));
  EXPECT_FALSE(queue_.TakeItem(/*may_open=*/false).has_value());
  queue_.Push(FinishItem{Key(2)});
  const std::optional<SendItem> left = queue_.TakeItem(/*may_open=*/false);
  ASSERT_TRUE(left.has_value());
  EXPECT_TRUE(std::holds_alternative<FinishItem>(*left));
  EXPECT_FALSE(queue_.TakeItem(/*may_open=*/false).has_value());
  const std::optional<SendItem> open = queue_.TakeItem(/*may_open=*/true);
  ASSERT_TRUE(open.has_value());
  EXPECT_TRUE(std::holds_alternative<OpenItem>(*open));
  EXPECT_TRUE(queue_.empty());
}

TEST_F(SenderQueueTest, WhatIsOverIsDropped) {
  Ship(Key(1), 4);
  Ship(Key(2), 4);
  Ship(Key(3), 4);
  EXPECT_TRUE(queue_.TakeOpen(Key(1)).has_value());
  EXPECT_FALSE(queue_.TakeOpen(Key(1)).has_value());
  queue_.Drop(Key(3));
  EXPECT_GT(FramesUntilFinish(Key(2)), 0);
  EXPECT_TRUE(queue_.empty());
}

}  // namespace
}  // namespace tandem::kvtransfer
