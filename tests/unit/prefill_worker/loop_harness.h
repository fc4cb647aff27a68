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
#include "simulation/fake_clock.h"
#include "simulation/fake_engine.h"
#include "tests/fakes/recorded_spans.h"
#include "tests/support/paths.h"

namespace tandem::prefill {

// Copies what is pushed into the receiver's pool once it is ready, at Finish at the latest, and
// reports a transfer done when the test says so. Watches the contract: nothing is pushed twice or
// after the end, all is pushed before Finish, and sources stay unchanged until done.
class FakeKvSender : public kvtransfer::KvSender {
 public:
  FakeKvSender(KvRegion source, KvRegion target, EventInbox* inbox)
      : source_(source), target_(target), inbox_(inbox) {}

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    TANDEM_RETURN_IF_ERROR(open_error);
    const auto key = std::pair(target.id.value.low, target.epoch);
    EXPECT_TRUE(transfers_.emplace(key, Transfer{.target = std::move(target)}).second);
    return absl::OkStatus();
  }

  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) override {
    // A launched step may outlive its transfer: such a push is ignored.
    const auto it = transfers_.find({id.value.low, epoch});
    if (it == transfers_.end() || it->second.aborted) return;
    Transfer& transfer = it->second;
    EXPECT_FALSE(transfer.finished);
    ASSERT_EQ(blocks.size(), ordinals.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
      EXPECT_TRUE(
          transfer.pushed.emplace(std::pair(layer, ordinals[i]), Piece{blocks[i], ready, {}})
              .second);
    }
    SendReady(&transfer);
  }

  void Finish(const TransferId& id, uint64_t epoch) override {
    Transfer& transfer = transfers_.at({id.value.low, epoch});
    SendReady(&transfer);
    for (const auto& [place, piece] : transfer.pushed) EXPECT_TRUE(piece.sent());
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

  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    return engine::FakeBlockDigests(source_, blocks);
  }
  std::map<std::string, KvLink> Links() const override { return {}; }

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
    inbox_->Push(KvShipped{id, epoch, status, kvtransfer::TransferStats{.transport = "tcp"}});
    transfers_.erase(it);
  }

  bool aborted(const TransferId& id, uint64_t epoch) const {
    return transfers_.at({id.value.low, epoch}).aborted;
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
  // Of a layer, those whose event is true.
  size_t num_ready(const TransferId& id, uint64_t epoch, int layer) const {
    size_t count = 0;
    for (const auto& [place, piece] : transfers_.at({id.value.low, epoch}).pushed) {
      if (place.first == layer && (piece.ready == nullptr || piece.ready->Ready())) ++count;
    }
    return count;
  }

  bool complete_at_once = true;
  absl::Status open_error;

 private:
  struct Piece {
    int32_t block = 0;  // of the source
    std::shared_ptr<const ReadyEvent> ready;
    std::string bytes;  // as they were when they were copied
    bool sent() const { return !bytes.empty(); }
  };
  struct Transfer {
    kvtransfer::KvSendTarget target;
    std::map<std::pair<int, int32_t>, Piece> pushed;  // by (layer, ordinal)
    bool finished = false;
    bool aborted = false;
  };
  void SendReady(Transfer* transfer) {
    for (auto& [place, piece] : transfer->pushed) {
      if (piece.sent() || (piece.ready != nullptr && !piece.ready->Ready())) continue;
      piece.bytes.assign(reinterpret_cast<const char*>(source_.Block(place.first, piece.block)),
                         BlockBytes());
      const int32_t to = transfer->target.target_blocks.at(static_cast<size_t>(place.second));
      std::memcpy(target_.Block(place.first, to), piece.bytes.data(), piece.bytes.size());
    }
  }
  size_t BlockBytes() const { return source_.layout.BlockLayerBytes(); }

  const KvRegion source_;
  const KvRegion target_;
  EventInbox* const inbox_;
  std::map<std::pair<uint64_t, uint64_t>, Transfer> transfers_;
};

// Notes what is expected and cancelled; a test moves the bytes and says what becomes of them.
class FakeKvReceiver : public kvtransfer::KvReceiver {
 public:
  explicit FakeKvReceiver(EventInbox* inbox) : inbox_(inbox) {}

  const std::string& address() const override { return address_; }
  absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                     std::vector<int32_t> blocks,
                                     const std::string& sender) override {
    EXPECT_TRUE(expected.emplace(std::pair(id.value.low, epoch), std::move(blocks)).second);
    senders.push_back(sender);
    last_id = id;
    return "token";
  }
  void Cancel(const TransferId& id, uint64_t epoch) override {
    cancelled.emplace(id.value.low, epoch);
  }
  uint64_t BytesArrived(const TransferId& /*id*/, uint64_t /*epoch*/) const override {
    return bytes_arrived;
  }

  void Seal(const Wanted& wanted, uint64_t bytes) {
    kvtransfer::TransferStats stats{.bytes = bytes, .transport = "tcp"};
    inbox_->Push(KvSealed{wanted.target.id, wanted.target.epoch, stats});
  }
  void Fail(const Wanted& wanted, const absl::Status& why) {
    inbox_->Push(KvFailed{wanted.target.id, wanted.target.epoch, why});
  }
  void Quiet(const Wanted& wanted) { inbox_->Push(KvQuiet{wanted.target.id, wanted.target.epoch}); }
  bool WasCancelled(const Wanted& wanted) const {
    return cancelled.contains({wanted.target.id.value.low, wanted.target.epoch});
  }

  std::map<std::pair<uint64_t, uint64_t>, std::vector<int32_t>> expected;
  std::set<std::pair<uint64_t, uint64_t>> cancelled;
  std::vector<std::string> senders;  // that were named, in order
  TransferId last_id;
  uint64_t bytes_arrived = 0;

 private:
  EventInbox* const inbox_;
  const std::string address_ = "127.0.0.1:2";
};

struct HarnessOptions {
  int num_blocks = 64;
  int block_size = 16;
  int max_num_batched_tokens = 64;
  int max_num_seqs = 8;
  int max_waiting = 1024;
  bool caching = true;
  int max_in_flight = 1;
  engine::ModelRunner* runner = nullptr;  // instead of the fake engine's
};

class LoopHarness {
 public:
  explicit LoopHarness(HarnessOptions options = {})
      : options_(options),
        remote_(kRemoteBlocks, options.block_size),
        remote_runner_(remote_.region(), {}),
        engine({.num_blocks = options.num_blocks,
                .block_size = options.block_size,
                .caching = options.caching,
                .model = {
                    .max_num_batched_tokens = options.max_num_batched_tokens,
                    .before_run =
                        [this](const engine::Batch& batch) {
                          return before_run ? before_run(batch) : absl::OkStatus();
                        },
                    .item_status =
                        [this](const engine::BatchItem& item) {
                          return item_status ? item_status(item) : absl::OkStatus();
                        },
                    .max_in_flight = options.max_in_flight,
                    .breaks =
                        [this](const engine::BatchItem& item) { return breaks && breaks(item); }}}),
        inbox(4096),
        sender(engine.memory.region(), remote_.region(), &inbox),
        receiver(&inbox),
        metrics(&engine.metrics) {
    LoopOptions loop_options;
    loop_options.limits = {options_.max_num_batched_tokens, options_.max_num_seqs};
    loop_options.layout = engine.memory.region().layout;
    loop_options.max_waiting = options_.max_waiting;
    loop_options.returns.worker_id = "p0";
    loop_options.returns.kv_transport = "tcp";
    loop_options.returns.block_size = options_.block_size;
    loop_options.worker_id = "p0";
    LoopParts parts;
    parts.runner = options.runner != nullptr ? options.runner : &engine.runner();
    parts.pool = &pool;
    parts.cache = &cache;
    parts.sender = &sender;
    parts.receiver = &receiver;
    parts.clock = &clock;
    parts.metrics = &metrics;
    parts.inbox = &inbox;
    parts.spans = &spans;
    worker::Reports told;
    told.load = [this](const LoadReport& load) { reports.push_back(load); };
    told.blocks = [this](const engine::BlockEvents& events, bool) {
      block_events.push_back(events);
    };
    loop = std::make_unique<Loop>(loop_options, parts, told);
  }

  // A request as the service would build it. The receiver holds the first `first_block` blocks.
  Work MakeWork(std::vector<int32_t> tokens, int first_block = 0) {
    Work work;
    work.id = ++last_id_;
    work.tokens = std::move(tokens);
    work.arrived = clock.Now();
    work.first_block = first_block;
    work.target.id = TransferId{{1, work.id}};
    work.target.transport = "tcp";
    work.target.peer_worker_id = "d0";
    const int blocks = BlocksFor(static_cast<int>(work.tokens.size()), options_.block_size);
    for (int i = first_block; i < blocks; ++i) {
      work.target.target_blocks.push_back(next_remote_++ % kRemoteBlocks);
    }
    work.reply = [this, id = work.id](absl::StatusOr<Outcome> outcome) {
      EXPECT_TRUE(replies.emplace(id, std::move(outcome)).second) << "two replies";
    };
    return work;
  }

  // The same of a caller that gives the blocks before `first_block` back: notes what it is asked
  // for in `wanted`, and has the true blocks in its pool (GiveBack).
  Work MakeWorkOfHolder(std::vector<int32_t> tokens, int first_block) {
    Work work = MakeWork(std::move(tokens), first_block);
    work.want = [this](const Wanted& asked) { wanted.push_back(asked); };
    return work;
  }
  // Writes what was asked for into this worker's pool, as `tokens` have it.
  void GiveBack(const Wanted& asked, const std::vector<int32_t>& tokens) {
    std::vector<int32_t> table = CallersBlocks(static_cast<int>(tokens.size()));
    engine::Batch batch;
    batch.items.push_back({.tokens = tokens,
                           .start = 0,
                           .num_tokens = static_cast<int>(tokens.size()),
                           .prompt_length = static_cast<int>(tokens.size()),
                           .block_table = table});
    ASSERT_OK(remote_runner_.Run(batch));
    const KvRegion& here = engine.memory.region();
    for (size_t i = 0; i < asked.target.target_blocks.size(); ++i) {
      const int32_t from = table[static_cast<size_t>(asked.first_block) + i];
      for (int layer = 0; layer < here.layout.num_layers; ++layer) {
        std::memcpy(here.Block(layer, asked.target.target_blocks[i]),
                    remote_.region().Block(layer, from), here.layout.BlockLayerBytes());
      }
    }
  }
  // Where the caller holds a prompt: the upper half of its pool.
  std::vector<int32_t> CallersBlocks(int tokens) const {
    std::vector<int32_t> blocks;
    for (int i = 0; i < BlocksFor(tokens, options_.block_size); ++i) {
      blocks.push_back(kRemoteBlocks / 2 + i);
    }
    return blocks;
  }

  uint64_t Submit(Work work) {
    const uint64_t id = work.id;
    EXPECT_TRUE(inbox.TryPush(WorkArrived{std::move(work)}));
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
  int32_t NextTokenAtReceiver(const Work& work, std::vector<int32_t> blocks_before = {}) {
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
    return remote_runner_.Run(batch)->items[0].token.token;
  }

  // Both of them, as one engine without a cluster draws them.
  static std::vector<int32_t> Expected(const Work& work) {
    engine::SamplingParams sampling = work.sampling;
    sampling.max_tokens = 2;
    return engine::FakeReferenceTokens(work.tokens, sampling, 1 << 20);
  }

  void ExpectRight(const Work& work, std::vector<int32_t> blocks_before = {}) {
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
    EXPECT_EQ(pool.NumAvailable(), options_.num_blocks);
    EXPECT_EQ(sender.num_open(), 0u);
    EXPECT_EQ(loop->Load().running, 0);
    EXPECT_EQ(loop->Load().waiting, 0);
    EXPECT_EQ(loop->num_returns(), 0u);
  }

 private:
  static constexpr int kRemoteBlocks = 1024;

  const HarnessOptions options_;
  engine::FakeKvMemory remote_;  // the decode worker's pool
  engine::FakeModelRunner remote_runner_;
  uint64_t last_id_ = 0;
  int32_t next_remote_ = 0;

 public:
  std::function<absl::Status(const engine::Batch&)> before_run;  // as in FakeModelOptions
  std::function<absl::Status(const engine::BatchItem&)> item_status;
  std::function<bool(const engine::BatchItem&)> breaks;
  FakeClock clock;
  RecordedSpans spans;
  engine::FakeEngine engine;
  engine::BlockPool& pool = engine.pool;
  engine::PrefixCache& cache = engine.cache;
  engine::FakeModelRunner& runner = engine.fake;
  EventInbox inbox;
  FakeKvSender sender;
  FakeKvReceiver receiver;
  PrefillMetrics metrics;
  WorkerMetrics& worker_metrics = metrics.worker;
  std::vector<Wanted> wanted;
  std::map<uint64_t, absl::StatusOr<Outcome>> replies;
  std::vector<LoadReport> reports;
  std::vector<engine::BlockEvents> block_events;
  std::unique_ptr<Loop> loop;
};

}  // namespace tandem::prefill
