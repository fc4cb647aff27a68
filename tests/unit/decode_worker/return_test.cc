// Blocks that a prefill worker asks back: what is offered, what is sent, and how long it is kept.
#include "gtest/gtest.h"

#include "tests/unit/decode_worker/loop_harness.h"

namespace tandem::decode {
namespace {

HarnessOptions ReturnOptions() {
  HarnessOptions options;
  options.num_blocks = 32;
  options.loop.admission.limits = {options.block_size, 8, 64};
  options.loop.admission.local_prefill_max_tokens = 4;
  return options;
}

// A first turn of 12 tokens, computed here, with an answer of 13; the KV of 24 tokens, 6 blocks of
// 4, is cached. Then a second of 20 tokens more.
class DecodeReturns : public testing::Test {
 protected:
  void SetUp() override {
    const Client& first = h_.Submit(MakePrompt(12), Greedy(13));
    h_.StepAll();
    h_.ExpectFinished(first);
    second_ = first.prompt;
    const std::vector<int32_t> answer = first.Tokens();
    second_.insert(second_.end(), answer.begin(), answer.end());
    for (int i = 0; i < 20; ++i) second_.push_back(500 + i);
    h_.return_address = "host:99";
  }
  FakeCall& SubmitSecond() {
    client_ = &h_.Submit(second_, Greedy(4), 1);
    h_.Step();
    EXPECT_EQ(h_.caller.calls.size(), 1u);
    return *h_.caller.calls[0];
  }
  void Want(const FakeCall& call, int first_block, int count) {
    BlocksWanted wanted{.call_id = call.call.call_id, .first_block = first_block};
    wanted.target.id = TransferId{{7, 7}};
    wanted.target.epoch = 1;
    wanted.target.address = call.call.peer.return_address;
    wanted.target.peer_worker_id = "p0";
    for (int i = 0; i < count; ++i) wanted.target.target_blocks.push_back(100 + i);
    h_.inbox.Push(wanted);
    h_.Step();
  }
  void Given(const absl::Status& status) {
    h_.inbox.Push(KvGiven{TransferId{{7, 7}}, 1, status, {.bytes = 10, .transport = "tcp"}});
    h_.Step();
  }
  // What was pushed for block `first_block + i` of the prompt is what a prefill of it would be.
  void ExpectTrue(const FakeGiver::Transfer& transfer, int first_block, int count) {
    engine::FakeKvMemory memory(32, 4, kLayers);
    engine::FakeModelRunner far(memory.region(), engine::FakeModelOptions{kVocab});
    std::vector<int32_t> table(16);
    for (int i = 0; i < 16; ++i) table[static_cast<size_t>(i)] = i;
    engine::Batch batch;
    const int length = static_cast<int>(second_.size());
    batch.items.push_back({.tokens = second_,
                           .start = 0,
                           .num_tokens = length,
                           .prompt_length = length,
                           .block_table = table});
    ASSERT_TRUE(far.Run(batch).ok());
    ASSERT_EQ(transfer.pushed.size(), static_cast<size_t>(count * kLayers));
    const KvRegion& here = h_.engine.memory.region();
    for (const auto& [place, block] : transfer.pushed) {
      EXPECT_EQ(std::memcmp(here.Block(place.first, block),
                            memory.region().Block(place.first, first_block + place.second),
                            here.layout.BlockLayerBytes()),
                0)
          << "layer " << place.first << ", ordinal " << place.second;
    }
  }

  LoopHarness h_{ReturnOptions()};
  std::vector<int32_t> second_;
  Client* client_ = nullptr;
};

TEST_F(DecodeReturns, TheLastTurnsAnswerIsGiven) {
  FakeCall& call = SubmitSecond();
  EXPECT_TRUE(call.call.gives_back);
  EXPECT_EQ(call.call.first_block, 6);
  Want(call, 3, 3);
  ASSERT_EQ(h_.giver.transfers.size(), 1u);
  const FakeGiver::Transfer& transfer = h_.giver.transfers[0];
  EXPECT_EQ(transfer.target.address, "host:99");
  EXPECT_TRUE(transfer.finished);
  ExpectTrue(transfer, 3, 3);
  EXPECT_EQ(h_.loop->num_transfers(), 2u);
  EXPECT_EQ(h_.last_load.links.at("p0").bytes_per_second, 5e8);
  Given(absl::OkStatus());
  h_.Serve(call);
  h_.StepAll();
  h_.ExpectFinished(*client_);
  h_.ExpectNoLeak();
}

TEST_F(DecodeReturns, OneCallIsGivenOnce) {
  FakeCall& call = SubmitSecond();
  Want(call, 0, 6);
  Want(call, 0, 6);
  EXPECT_EQ(h_.giver.transfers.size(), 1u);
  Given(absl::OkStatus());
  h_.Serve(call);
  h_.StepAll();
  h_.ExpectNoLeak();
}

TEST_F(DecodeReturns, NothingIsOfferedWithoutAnAddress) {
  h_.return_address = "";
  EXPECT_FALSE(SubmitSecond().call.gives_back);
}

// The sequence is gone, and its blocks are not until the sender has let go of them.
TEST_F(DecodeReturns, BlocksAreKeptUntilTheSenderIsDone) {
  FakeCall& call = SubmitSecond();
  Want(call, 0, 6);
  h_.Cancel(*client_);
  h_.Step();
  EXPECT_TRUE(h_.giver.transfers.at(0).aborted);
  h_.Quiet(call);
  h_.Step();
  EXPECT_EQ(h_.loop->num_sequences(), 0u);
  EXPECT_EQ(h_.pool.counts().used, 6);
  h_.cache.Clear();
  EXPECT_EQ(h_.pool.counts().used, 6);
  Given(absl::CancelledError("aborted"));
  EXPECT_EQ(h_.pool.counts().used, 0);
  h_.ExpectNoLeak();
}

TEST_F(DecodeReturns, WhoeverIsNotWaitedForGetsNothing) {
  FakeCall& call = SubmitSecond();
  h_.Serve(call);
  h_.StepAll();
  Want(call, 0, 6);  // late
  EXPECT_TRUE(h_.giver.transfers.empty());
  h_.ExpectNoLeak();
}

}  // namespace
}  // namespace tandem::decode
