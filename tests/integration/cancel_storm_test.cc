// Impatient clients: whole workers over the real KV channel, and a thousand requests that are
// cancelled one turn after they came. Their blocks must come back at once, or nobody else finds
// room.
#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

#include "engine/wire/wire.h"
#include "simulation/fake_clock.h"
#include "simulation/workers.h"

namespace tandem {
namespace {

constexpr int kPromptTokens = 1900;
constexpr int kBlocks = 8192;  // of every pool
constexpr int kCancels = 1000;
constexpr int kPerTurn = 2;  // new requests of the storm at each decode worker
constexpr absl::Duration kTurn = absl::Milliseconds(1);
constexpr absl::Duration kSettle = absl::Milliseconds(200);

struct Stream {
  InProcessDecodeWorker* worker = nullptr;
  uint64_t id = 0;
  bool has_token = false;
  bool ended = false;
};

// Steps two prefill and two decode workers by hand, so that a time to first token is a number of
// turns, whatever the machine does besides.
class CancelStorm : public testing::TestWithParam<std::string> {
 protected:
  CancelStorm() : kv_(GetParam()) {
    for (int i = 0; i < 2; ++i) {
      prefills_.push_back(std::make_unique<InProcessPrefillWorker>(Options("p" + std::to_string(i)),
                                                                   &kv_, &clock_, JoinMessages{}));
      prefill_pointers_.push_back(prefills_.back().get());
    }
    for (int i = 0; i < 2; ++i) {
      decodes_.push_back(std::make_unique<InProcessDecodeWorker>(
          Options("d" + std::to_string(i)), &kv_, &prefill_pointers_, &clock_, JoinMessages{}));
    }
  }

  static InProcessWorkerOptions Options(const std::string& worker_id) {
    InProcessWorkerOptions options;
    options.worker_id = worker_id;
    options.engine.num_blocks = kBlocks;
    options.max_model_len = 2048;
    options.max_num_batched_tokens = 256;
    return options;
  }

  std::unique_ptr<Stream> Ask(int worker) {
    internal::v1::DecodeRequest request;
    std::vector<int32_t> prompt;
    for (int i = 0; i < kPromptTokens; ++i) prompt.push_back((next_prompt_ + i * 7) % 1000);
    prompt[0] = next_prompt_++ % 1000;
    prompt[1] = next_prompt_ / 1000;
    engine::TokensToProto(prompt, request.mutable_token_ids());
    request.mutable_sampling()->set_max_tokens(4);
    for (int i = 0; i < 2; ++i) {
      const InProcessPrefillWorker& prefill = *prefills_[static_cast<size_t>((worker + i) % 2)];
      auto* candidate = request.mutable_route()->add_prefill();
      candidate->set_worker_id(prefill.hello().worker_id());
      candidate->set_address(prefill.address());
    }
    auto stream = std::make_unique<Stream>();
    Stream* s = stream.get();
    s->worker = decodes_[static_cast<size_t>(worker)].get();
    s->id = s->worker->Generate(
        request, absl::InfiniteDuration(),
        [s](internal::v1::TokenEvent event) { s->has_token |= !event.token_ids().empty(); },
        [s](const absl::Status&) { s->ended = true; });
    return stream;
  }

  void Turn() {
    clock_.Advance(kTurn);
    absl::SleepFor(kTurn);  // the channel's threads live in real time
    for (auto& worker : decodes_) worker->Step();
    // A chunk takes longer than a decode step: some prompts are cancelled while the prefill worker
    // has not looked at them, and some after it opened their transfer.
    if (++turns_ % 3 == 0) {
      for (auto& worker : prefills_) worker->Step();
    }
    if (!storming_) return;
    for (const auto& stream : storm_) stream->worker->Cancel(stream->id);
    cancelled_ += static_cast<int>(storm_.size());
    std::move(storm_.begin(), storm_.end(), std::back_inserter(over_));
    storm_.clear();
    if (cancelled_ >= kCancels) return;
    for (int i = 0; i < 2 * kPerTurn; ++i) storm_.push_back(Ask(i % 2));
  }

  int TurnsToFirstToken() {
    std::unique_ptr<Stream> stream = Ask(0);
    int turns = 0;
    for (; !stream->has_token && turns < 1000; ++turns) {
      Turn();
      if (stream->ended && !stream->has_token) stream = Ask(0);  // a full worker is asked again
    }
    EXPECT_TRUE(stream->has_token) << "there never was room";
    const bool storming = std::exchange(storming_, false);
    while (!stream->ended) Turn();
    storming_ = storming;
    return turns;
  }

  FakeClock clock_;
  LoopbackKvNetwork kv_;
  std::vector<std::unique_ptr<InProcessPrefillWorker>> prefills_;
  std::vector<InProcessPrefillWorker*> prefill_pointers_;
  std::vector<std::unique_ptr<InProcessDecodeWorker>> decodes_;
  std::vector<std::unique_ptr<Stream>> storm_, over_;
  int next_prompt_ = 1;
  int cancelled_ = 0;
  int turns_ = 0;
  bool storming_ = false;
};

TEST_P(CancelStorm, BlocksComeBackAtOnceAndABystanderHardlyNotices) {
  const int alone = TurnsToFirstToken();
  storming_ = true;
  std::vector<int> among;
  while (cancelled_ < kCancels) {
    Turn();
    if (cancelled_ > kCancels / 4 && among.size() < 3) among.push_back(TurnsToFirstToken());
  }
  storming_ = false;
  const absl::Time end = absl::Now() + kSettle;
  while (absl::Now() < end) Turn();
  for (const auto& worker : decodes_) {
    const engine::BlockPoolCounts counts = worker->engine().pool.counts();
    EXPECT_LT(counts.quarantined, kBlocks / 20) << "of " << kBlocks << ", 200 ms after the storm";
  }
  for (const int turns : among) EXPECT_LE(turns, 2 * alone) << "turns to the first token";
  for (const auto& stream : over_) EXPECT_TRUE(stream->ended);
}

INSTANTIATE_TEST_SUITE_P(Transports, CancelStorm, testing::Values("tcp", "shm"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace tandem
