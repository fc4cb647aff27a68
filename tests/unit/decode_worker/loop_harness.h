// A decode loop between fakes that a test steps by hand: prefill workers and senders that do what
// the test says, and readers that read when it says so. One thread, a clock that stands still.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "decode_worker/loop.h"
#include "simulation/fake_clock.h"
#include "simulation/fake_engine.h"
#include "tests/fakes/recorded_spans.h"

namespace tandem::decode {

inline constexpr int kVocab = 1000;
inline constexpr int kLayers = 2;

// Notes what is expected and cancelled; nothing is moved here.
class FakeReceiver : public kvtransfer::KvReceiver {
 public:
  const std::string& address() const override { return address_; }
  absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                     std::vector<int32_t> blocks,
                                     const std::string& sender) override {
    senders[id.ToHex()] = sender;
    EXPECT_TRUE(expected.emplace(id.ToHex(), blocks).second) << "a transfer id was used twice";
    EXPECT_GE(epoch, 1u);
    return "token";
  }
  void Cancel(const TransferId& id, uint64_t) override { cancelled.insert(id.ToHex()); }

  uint64_t BytesArrived(const TransferId& id, uint64_t) const override {
    const auto it = arrived.find(id.ToHex());
    return it == arrived.end() ? 0 : it->second;
  }

  std::map<std::string, uint64_t> arrived;               // by transfer
  std::map<std::string, std::vector<int32_t>> expected;  // by transfer
  std::map<std::string, std::string> senders;            // by transfer
  std::set<std::string> cancelled;

 private:
  std::string address_ = "127.0.0.1:1";
};

// Notes what is given back, and reads it when a test says so.
class FakeGiver : public kvtransfer::KvSender {
 public:
  struct Transfer {
    kvtransfer::KvSendTarget target;
    std::map<std::pair<int, int32_t>, int32_t> pushed;  // (layer, ordinal) -> own block
    bool finished = false;
    bool aborted = false;
  };

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    transfers.push_back({.target = std::move(target)});
    return absl::OkStatus();
  }
  void Push(const TransferId& id, uint64_t /*epoch*/, int layer, std::span<const int32_t> blocks,
            std::span<const int32_t> ordinals,
            std::shared_ptr<const ReadyEvent> /*ready*/) override {
    for (size_t i = 0; i < blocks.size(); ++i) Of(id).pushed[{layer, ordinals[i]}] = blocks[i];
  }
  void Finish(const TransferId& id, uint64_t /*epoch*/) override { Of(id).finished = true; }
  void Abort(const TransferId& id, uint64_t /*epoch*/) override { Of(id).aborted = true; }
  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    return std::vector<uint64_t>(blocks.size());
  }
  std::map<std::string, KvLink> Links() const override {
    return {{"p0", {.bytes_per_second = 5e8}}};
  }

  std::vector<Transfer> transfers;

 private:
  Transfer& Of(const TransferId& id) {
    return *std::find_if(transfers.begin(), transfers.end(),
                         [&](const Transfer& transfer) { return transfer.target.id == id; });
  }
};

// One Prefill call and the transfer that belongs to it, as the far side sees them.
struct FakeCall {
  PrefillCall call;
  bool call_cancelled = false;
  bool replied = false;
  bool written = false;  // the true KV lies in the target blocks
  bool sealed = false;
  bool failed = false;
  bool quiet = false;
};

class FakeCaller : public PrefillCaller {
 public:
  void Call(PrefillCall call) override {
    calls.push_back(std::make_unique<FakeCall>());
    calls.back()->call = std::move(call);
    if (on_call) on_call(*calls.back());
  }
  void Cancel(uint64_t call_id) override {
    for (auto& c : calls) {
      if (c->call.call_id == call_id) c->call_cancelled = true;
    }
  }

  std::vector<std::unique_ptr<FakeCall>> calls;
  // A sender that is faster than the loop's turn.
  std::function<void(FakeCall&)> on_call;
};

// One client of the loop.
struct Client {
  uint64_t id = 0;
  std::vector<int32_t> prompt;
  engine::SamplingParams sampling;
  std::shared_ptr<TokenStream> stream;
  bool reading = true;
  std::vector<TokenEvent> events;
  std::optional<absl::Status> end;

  std::vector<int32_t> Tokens() const {
    std::vector<int32_t> out;
    for (const TokenEvent& event : events) {
      out.insert(out.end(), event.token_ids.begin(), event.token_ids.end());
    }
    return out;
  }
  // Of the events before the first token.
  std::vector<int> Progress() const {
    std::vector<int> out;
    for (const TokenEvent& event : events) {
      if (!event.computed_tokens.has_value()) continue;
      EXPECT_TRUE(event.token_ids.empty() && std::ssize(out) == &event - events.data());
      out.push_back(*event.computed_tokens);
    }
    return out;
  }
  FinishReason Finish() const {
    return events.empty() ? FinishReason::kNone : events.back().finish_reason;
  }
  void Read() {
    while (reading && !end.has_value()) {
      TokenStream::Item item = stream->Take();
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        events.push_back(std::move(*event));
      } else if (auto* status = std::get_if<absl::Status>(&item)) {
        end = *status;
      } else {
        return;
      }
    }
  }
};

struct HarnessOptions {
  int num_blocks = 64;
  int block_size = 4;
  bool caching = true;
  int max_in_flight = 1;
  std::function<absl::Duration()> step_delay;  // see FakeEngineOptions
  LoopOptions loop;
  std::function<absl::Status(const engine::BatchItem&)> item_status;
};

class LoopHarness {
 public:
  explicit LoopHarness(HarnessOptions options)
      : options_(Resolve(std::move(options))),
        far_memory_(BlocksFor(options_.loop.admission.max_model_len, options_.block_size),
                    options_.block_size, kLayers),
        engine({.num_blocks = options_.num_blocks,
                .block_size = options_.block_size,
                .caching = options_.caching,
                .model = {kVocab, options_.loop.admission.limits.max_num_batched_tokens,
                          [this](const engine::Batch& batch) {
                            return before_run ? before_run(batch) : absl::OkStatus();
                          },
                          options_.item_status, options_.max_in_flight},
                .step_delay = options_.step_delay}),
        decode_metrics(&engine.metrics),
        inbox(1024) {
    LoopParts parts;
    parts.runner = &engine.runner();
    parts.pool = &pool;
    parts.cache = &cache;
    parts.receiver = &receiver;
    parts.sender = &giver;
    parts.caller = &caller;
    parts.clock = &clock;
    parts.metrics = &decode_metrics;
    parts.inbox = &inbox;
    parts.spans = &spans;
    worker::Reports hooks;
    hooks.load = [this](const LoadReport& load) { last_load = load; };
    hooks.blocks = [this](const engine::BlockEvents& events, bool cleared) {
      if (cleared) stored.clear();
      for (const Hash128& hash : events.stored) stored.insert(hash.ToHex());
      for (const Hash128& hash : events.removed) stored.erase(hash.ToHex());
    };
    loop = std::make_unique<Loop>(options_.loop, parts, std::move(hooks));
  }

  // `peers`: how many prefill candidates the route names.
  Client& Submit(std::vector<int32_t> prompt, engine::SamplingParams sampling, int peers = 0,
                 int priority = 0, absl::Duration timeout = absl::InfiniteDuration(),
                 bool progress = false) {
    clients.push_back(std::make_unique<Client>());
    Client& client = *clients.back();
    client.id = clients.size();
    client.prompt = prompt;
    client.sampling = sampling;
    client.stream = std::make_shared<TokenStream>(nullptr, [this] { inbox.Wake(); });
    WorkArrived event;
    event.work.id = client.id;
    event.work.request_id = "r" + std::to_string(client.id);
    event.work.tokens = std::move(prompt);
    event.work.sampling = sampling;
    event.work.priority = priority;
    event.work.progress = progress;
    event.work.trace = trace;
    event.work.arrived = clock.Now();
    event.work.deadline = clock.Now() + timeout;
    for (int i = 0; i < peers; ++i) {
      event.work.prefill.push_back(
          {"p" + std::to_string(i), "host:" + std::to_string(i), "", return_address});
    }
    event.stream = client.stream;
    inbox.Push(std::move(event));
    return client;
  }
  void Cancel(const Client& client) { inbox.Push(WorkCancelled{client.id}); }

  bool Step() {
    const bool busy = loop->Step(absl::ZeroDuration());
    for (auto& client : clients) client->Read();
    return busy;
  }
  // Until nothing moves any more.
  void StepAll(int limit = 100000) {
    int idle = 0;
    while (idle < 2 && --limit > 0) idle = Step() ? 0 : idle + 1;
    ASSERT_GT(limit, 0) << "the loop never came to rest";
  }

  // ---- the far side ----
  std::vector<int32_t> Reference(const Client& client) const {
    return engine::FakeReferenceTokens(client.prompt, client.sampling,
                                       options_.loop.admission.max_model_len, kVocab, kLayers);
  }
  // Writes the true KV into the target blocks, once.
  void Write(FakeCall& c) {
    if (std::exchange(c.written, true)) return;
    engine::FakeModelRunner far(far_memory_.region(), engine::FakeModelOptions{kVocab});
    const PrefillCall& call = c.call;
    std::vector<int32_t> table;
    const int blocks = BlocksFor(static_cast<int>(call.tokens.size()), options_.block_size);
    for (int i = 0; i < blocks; ++i) table.push_back(i);
    engine::Batch batch;
    engine::BatchItem& item = batch.items.emplace_back();
    item.tokens = call.tokens;
    item.num_tokens = static_cast<int>(call.tokens.size());
    item.prompt_length = item.num_tokens;
    item.block_table = table;
    ASSERT_TRUE(far.Run(batch).ok());
    ASSERT_EQ(call.first_block + static_cast<int>(call.block_ids.size()), blocks);
    for (size_t i = 0; i < call.block_ids.size(); ++i) {
      for (int layer = 0; layer < kLayers; ++layer) {
        std::memcpy(engine.memory.region().Block(layer, call.block_ids[i]),
                    far_memory_.region().Block(layer, call.first_block + static_cast<int>(i)),
                    engine.memory.region().layout.BlockLayerBytes());
      }
    }
  }
  // A sender that has not been told, or does not care: garbage into the target blocks.
  void Scribble(FakeCall& c) {
    ASSERT_FALSE(c.quiet);
    c.written = false;
    for (int32_t block : c.call.block_ids) {
      for (int layer = 0; layer < kLayers; ++layer) {
        std::memset(engine.memory.region().Block(layer, block), 0xee,
                    engine.memory.region().layout.BlockLayerBytes());
      }
    }
  }
  void Reply(FakeCall& c) {
    c.replied = true;
    inbox.Push(PrefillReply{c.call.call_id, Outcome(c)});
  }
  // As the thread that brings the reply does; the loop hears of it in its next turn.
  void ReplyBesideTheStep(FakeCall& c) {
    c.replied = true;
    PrefillReply reply{.call_id = c.call.call_id, .outcome = Outcome(c), .at = clock.Now()};
    reply.sent = c.call.first_token->Send(*reply.outcome, reply.at);
    inbox.Push(std::move(reply));
  }
  static PrefillOutcome Outcome(const FakeCall& c) {
    PrefillOutcome result;
    engine::SamplingParams one = c.call.sampling;
    one.max_tokens = 1;
    result.first_token.token =
        engine::FakeReferenceTokens(c.call.tokens, one, 1 << 20, kVocab, kLayers)[0];
    result.cached_tokens = 3;
    result.queue = absl::Milliseconds(1);
    result.prefill = absl::Milliseconds(2);
    result.worker_id = "far";
    return result;
  }
  void ReplyError(FakeCall& c, absl::Status status, bool reached = true) {
    c.replied = true;
    inbox.Push(
        PrefillReply{.call_id = c.call.call_id, .outcome = std::move(status), .reached = reached});
  }
  void Seal(FakeCall& c) {
    c.sealed = true;
    kvtransfer::TransferStats stats;
    stats.bytes = c.call.block_ids.size() * engine.memory.region().layout.BlockBytes();
    stats.transport = "tcp";
    stats.first_byte = clock.Now();
    stats.last_byte = clock.Now();
    inbox.Push(KvSealed{c.call.transfer, c.call.epoch, stats});
  }
  void FailKv(FakeCall& c) {
    c.failed = true;
    inbox.Push(KvFailed{c.call.transfer, c.call.epoch, absl::DataLossError("digest differs")});
  }
  void Quiet(FakeCall& c) {
    c.quiet = true;
    inbox.Push(KvQuiet{c.call.transfer, c.call.epoch});
  }
  void Serve(FakeCall& c) {
    Write(c);
    Reply(c);
    Seal(c);
    Quiet(c);
  }

  // Nothing is held, quarantined or expected any more.
  void ExpectNoLeak() {
    EXPECT_EQ(loop->num_sequences(), 0u);
    EXPECT_EQ(loop->num_transfers(), 0u);
    cache.Clear();
    EXPECT_EQ(pool.counts().free, pool.counts().total);
    EXPECT_EQ(pool.counts().quarantined, 0);
  }
  void ExpectFinished(const Client& client) {
    ASSERT_TRUE(client.end.has_value()) << "request " << client.id << " never ended";
    EXPECT_TRUE(client.end->ok()) << client.end->ToString();
    EXPECT_EQ(client.Tokens(), Reference(client)) << "request " << client.id;
  }

 private:
  static HarnessOptions Resolve(HarnessOptions options) {
    options.loop.admission.limits.block_size = options.block_size;
    if (options.loop.admission.max_model_len == 0) {
      options.loop.admission.max_model_len = options.num_blocks * options.block_size;
    }
    options.loop.prefill.block_size = options.block_size;
    options.loop.prefill.num_layers = kLayers;
    options.loop.admission.worker_id = options.loop.prefill.worker_id = "d0";
    options.loop.report.min_interval = absl::ZeroDuration();  // the clock stands still
    return options;
  }

  const HarnessOptions options_;
  engine::FakeKvMemory far_memory_;

 public:
  std::function<absl::Status(const engine::Batch&)> before_run;  // as FakeModelOptions::before_run
  FakeClock clock;
  RecordedSpans spans;
  engine::FakeEngine engine;
  engine::BlockPool& pool = engine.pool;
  engine::PrefixCache& cache = engine.cache;
  engine::FakeModelRunner& runner = engine.fake;
  DecodeMetrics decode_metrics;
  EventInbox inbox;
  FakeReceiver receiver;
  FakeGiver giver;
  FakeCaller caller;
  std::string return_address;  // of the candidates in a route
  TraceContext trace;          // of the requests that come
  LoadReport last_load;
  std::set<std::string> stored;  // what the router would know
  std::vector<std::unique_ptr<Client>> clients;
  std::unique_ptr<Loop> loop;
};

// `length` tokens in a fixed pattern that depends on `seed`.
inline std::vector<int32_t> MakePrompt(int length, int seed = 1) {
  std::vector<int32_t> out;
  for (int i = 0; i < length; ++i) out.push_back((seed * 131 + i * 7) % kVocab);
  return out;
}

inline engine::SamplingParams Greedy(int max_tokens) {
  engine::SamplingParams out;
  out.temperature = 0;
  out.max_tokens = max_tokens;
  return out;
}

}  // namespace tandem::decode
