// A prefill loop with a fake model, a fake KV sender and a clock that tests move; no threads.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "common/base/status.h"
#include "prefill_worker/loop.h"
#include "tests/fakes/fake_clock.h"
#include "tests/fakes/fake_model_runner.h"
#include "tests/support/paths.h"

namespace tandem::prefill {

// Copies what is pushed into the receiver's pool at once, and reports a transfer done when the test
// says so. Watches the contract: nothing is pushed twice or after the end, all is pushed before
// Finish, and sources stay unchanged until done.
class FakeKvSender : public kvtransfer::KvSender {
 public:
  FakeKvSender(KvRegion source, KvRegion target, PrefillInbox* inbox)
      : source_(source), target_(target), inbox_(inbox) {}

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    TANDEM_RETURN_IF_ERROR(open_error);
    const auto key = std::pair(target.id.value.low, target.epoch);
    EXPECT_TRUE(transfers_.emplace(key, Transfer{.target = std::move(target)}).second);
    return absl::OkStatus();
  }

  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> blocks,
            std::span<const int32_t> ordinals) override {
    Transfer& transfer = transfers_.at({id.value.low, epoch});
    EXPECT_FALSE(transfer.finished || transfer.aborted);
    ASSERT_EQ(blocks.size(), ordinals.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
      std::string bytes(reinterpret_cast<const char*>(source_.Block(layer, blocks[i])),
                        BlockBytes());
      const int32_t to = transfer.target.target_blocks.at(static_cast<size_t>(ordinals[i]));
      std::memcpy(target_.Block(layer, to), bytes.data(), bytes.size());
      EXPECT_TRUE(
          transfer.pushed.emplace(std::pair(layer, ordinals[i]), Piece{blocks[i], std::move(bytes)})
              .second);
    }
  }

  void Finish(const TransferId& id, uint64_t epoch) override {
    Transfer& transfer = transfers_.at({id.value.low, epoch});
    EXPECT_EQ(transfer.pushed.size(), transfer.target.target_blocks.size() *
                                          static_cast<size_t>(source_.layout.num_layers));
    transfer.finished = true;
    if (complete_at_once) Complete(id, epoch, absl::OkStatus());
  }

  void Abort(const TransferId& id, uint64_t epoch) override {
    const auto it = transfers_.find({id.value.low, epoch});
    if (it == transfers_.end()) return;
    it->second.aborted = true;
    if (complete_at_once) Complete(id, epoch, absl::AbortedError("aborted by its sender"));
  }

  std::vector<std::pair<std::string, double>> LinkRates() const override { return {}; }

  // The end of a transfer, as a transport thread reports it.
  void Complete(const TransferId& id, uint64_t epoch, const absl::Status& status) {
    const auto it = transfers_.find({id.value.low, epoch});
    ASSERT_TRUE(it != transfers_.end());
    const Transfer& transfer = it->second;
    for (const auto& [place, piece] : transfer.pushed) {
      EXPECT_EQ(std::memcmp(piece.bytes.data(), source_.Block(place.first, piece.block),
                            piece.bytes.size()),
                0)
          << "block " << piece.block << " changed before its transfer was done";
    }
    inbox_->Push(PrefillShipped{id, epoch, status, kvtransfer::TransferStats{.transport = "tcp"}});
    transfers_.erase(it);
  }

  size_t num_open() const { return transfers_.size(); }
  std::vector<std::pair<TransferId, uint64_t>> open() const {
    std::vector<std::pair<TransferId, uint64_t>> keys;
    for (const auto& [key, transfer] : transfers_) {
      keys.emplace_back(transfer.target.id, transfer.target.epoch);
    }
    return keys;
  }
  size_t num_pushed(const TransferId& id, uint64_t epoch) const {
    return transfers_.at({id.value.low, epoch}).pushed.size();
  }

  bool complete_at_once = true;
  absl::Status open_error;

 private:
  struct Piece {
    int32_t block = 0;  // of the source
    std::string bytes;  // as they were when it was pushed
  };
  struct Transfer {
    kvtransfer::KvSendTarget target;
    std::map<std::pair<int, int32_t>, Piece> pushed;  // by (layer, ordinal)
    bool finished = false;
    bool aborted = false;
  };
  size_t BlockBytes() const { return source_.layout.BlockLayerBytes(); }

  const KvRegion source_;
  const KvRegion target_;
  PrefillInbox* const inbox_;
  std::map<std::pair<uint64_t, uint64_t>, Transfer> transfers_;
};

struct LoopSetup {
  int num_blocks = 64;
  int block_size = 16;
  int max_num_batched_tokens = 64;
  int max_num_seqs = 8;
  int max_waiting = 1024;
  bool prefix_caching = true;
  engine::ModelRunner* model = nullptr;  // instead of the harness's own
};

class PrefillHarness {
 public:
  explicit PrefillHarness(LoopSetup setup = {})
      : setup_(setup),
        memory(setup.num_blocks, setup.block_size),
        remote(kRemoteBlocks, setup.block_size),
        runner(memory.region(),
               {.max_num_batched_tokens = setup.max_num_batched_tokens,
                .before_run = [this](const engine::Batch& batch) { return BeforeRun(batch); },
                .item_status =
                    [this](const engine::BatchItem& item) {
                      return item_status ? item_status(item) : absl::OkStatus();
                    }}),
        remote_runner(remote.region(), {}),
        pool(setup.num_blocks),
        cache(&pool, setup.block_size, setup.prefix_caching),
        inbox(4096),
        sender(memory.region(), remote.region(), &inbox),
        worker_metrics(&metrics) {
    PrefillLoopOptions options;
    options.limits = {setup_.max_num_batched_tokens, setup_.max_num_seqs};
    options.layout = memory.region().layout;
    options.max_waiting = setup_.max_waiting;
    options.worker_id = "p0";
    PrefillLoopParts parts{setup.model != nullptr ? setup.model : &runner,
                           &pool,
                           &cache,
                           &sender,
                           &clock,
                           &worker_metrics,
                           &inbox};
    PrefillLoopHooks hooks{.report = [this](const PrefillLoad& load) { reports.push_back(load); },
                           .blocks = [this](const engine::BlockEvents& events,
                                            bool) { block_events.push_back(events); }};
    loop = std::make_unique<PrefillLoop>(options, parts, hooks);
  }

  // A request as the service would build it. The receiver holds the first `first_block` blocks.
  PrefillWork Work(std::vector<int32_t> tokens, int first_block = 0) {
    PrefillWork work;
    work.id = ++last_id_;
    work.tokens = std::move(tokens);
    work.arrived = clock.Now();
    work.first_block = first_block;
    work.target.id = TransferId{{1, work.id}};
    work.target.transport = "tcp";
    work.target.peer_worker_id = "d0";
    const int blocks =
        (static_cast<int>(work.tokens.size()) + setup_.block_size - 1) / setup_.block_size;
    for (int i = first_block; i < blocks; ++i) {
      work.target.target_blocks.push_back(next_remote_++ % kRemoteBlocks);
    }
    work.reply = [this, id = work.id](absl::StatusOr<PrefillOutcome> outcome) {
      EXPECT_TRUE(replies.emplace(id, std::move(outcome)).second) << "two replies";
    };
    return work;
  }

  uint64_t Submit(PrefillWork work) {
    const uint64_t id = work.id;
    EXPECT_TRUE(inbox.TryPush(PrefillArrived{std::move(work)}));
    return id;
  }

  // Turns until nothing is left to compute.
  void RunToEnd() {
    for (int i = 0; i < 10'000; ++i) {
      clock.Advance(absl::Milliseconds(1));
      const bool computed = loop->Step(absl::ZeroDuration());
      if (!computed && loop->Load().waiting_tokens == 0) break;
    }
    loop->Step(absl::ZeroDuration());  // takes the last completions
  }

  void Step() {
    clock.Advance(absl::Milliseconds(1));
    loop->Step(absl::ZeroDuration());
  }

  // The token that a decode worker would draw next from the blocks that it received: right only if
  // every layer of every block is.
  int32_t NextTokenAtReceiver(const PrefillWork& work, std::vector<int32_t> blocks_before = {}) {
    std::vector<int32_t> table = std::move(blocks_before);
    table.insert(table.end(), work.target.target_blocks.begin(), work.target.target_blocks.end());
    table.push_back(kRemoteBlocks - 1);  // room for one token more
    std::vector<int32_t> tokens = work.tokens;
    tokens.push_back(replies.at(work.id)->first_token.token);
    engine::Batch batch;
    batch.items.push_back({.tokens = tokens,
                           .start = static_cast<int>(work.tokens.size()),
                           .num_tokens = 1,
                           .prompt_length = static_cast<int>(work.tokens.size()),
                           .block_table = table,
                           .sampling = &work.sampling});
    return remote_runner.Run(batch)->items[0].token.token;
  }

  // Both of them, as one engine without a cluster draws them.
  static std::vector<int32_t> Expected(const PrefillWork& work) {
    engine::SamplingParams sampling = work.sampling;
    sampling.max_tokens = 2;
    return engine::FakeReferenceTokens(work.tokens, sampling, 1 << 20);
  }

  void ExpectRight(const PrefillWork& work, std::vector<int32_t> blocks_before = {}) {
    ASSERT_TRUE(replies.contains(work.id));
    ASSERT_OK(replies.at(work.id));
    EXPECT_EQ(replies.at(work.id)->first_token.token, Expected(work)[0]);
    EXPECT_EQ(NextTokenAtReceiver(work, std::move(blocks_before)), Expected(work)[1]);
  }

  absl::StatusCode Code(uint64_t id) const {
    const auto it = replies.find(id);
    EXPECT_TRUE(it != replies.end()) << "no reply";
    return it == replies.end() ? absl::StatusCode::kUnknown : it->second.status().code();
  }

  void ExpectNothingHeld() {
    EXPECT_EQ(pool.NumAvailable(), setup_.num_blocks);
    EXPECT_EQ(sender.num_open(), 0u);
    EXPECT_EQ(loop->Load().running, 0);
    EXPECT_EQ(loop->Load().waiting, 0);
  }

 private:
  static constexpr int kRemoteBlocks = 1024;
  absl::Status BeforeRun(const engine::Batch& batch) {
    return before_run ? before_run(batch) : absl::OkStatus();
  }
  const LoopSetup setup_;
  uint64_t last_id_ = 0;
  int32_t next_remote_ = 0;

 public:
  std::function<absl::Status(const engine::Batch&)> before_run;
  std::function<absl::Status(const engine::BatchItem&)> item_status;
  engine::FakeKvMemory memory;
  engine::FakeKvMemory remote;
  engine::FakeModelRunner runner;
  engine::FakeModelRunner remote_runner;
  engine::BlockPool pool;
  engine::PrefixCache cache;
  PrefillInbox inbox;
  FakeKvSender sender;
  FakeClock clock;
  Metrics metrics;
  WorkerMetrics worker_metrics;
  std::map<uint64_t, absl::StatusOr<PrefillOutcome>> replies;
  std::vector<PrefillLoad> reports;
  std::vector<engine::BlockEvents> block_events;
  std::unique_ptr<PrefillLoop> loop;
};

}  // namespace tandem::prefill
