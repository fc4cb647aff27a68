// Whatever happens in whatever order, every token that leaves the loop is the one that the request
// would have got alone, and no block is lost.
#include <algorithm>
#include <map>
#include <random>
#include <span>

#include "spdlog/spdlog.h"

#include "tests/support/sanitizer.h"
#include "tests/unit/decode_worker/loop_harness.h"
#include "tests/unit/decode_worker/oracle_drafter.h"

namespace tandem::decode {
namespace {

constexpr int kMaxModelLen = 80;

class Storm {
 public:
  // `drafts`: sequences have tokens drafted, right ones and wrong ones.
  Storm(uint32_t seed, HarnessOptions options, bool drafts)
      : random_(seed),
        harness_(drafts ? WithDrafts(std::move(options), seed) : std::move(options)),
        faults_(seed % 3 != 0) {
    harness_.caller.on_call = [this](FakeCall& c) {
      if (Chance(50)) harness_.Write(c);
    };
  }

  void Run(int turns) {
    for (int turn = 0; turn < turns; ++turn) {
      if (Chance(40)) Submit();
      if (Chance(5)) CancelOne();
      for (auto& call : harness_.caller.calls) {
        if (Chance(30)) Act(*call);
      }
      if (Chance(10)) ToggleReader();
      if (Chance(20)) harness_.clock.Advance(absl::Milliseconds(Below(3000)));
      harness_.Step();
    }
    Calm();
    Check();
  }

  int finished() const { return finished_; }
  int disturbed() const { return disturbed_; }
  double preemptions() { return harness_.decode_metrics.worker.preemptions.Value(); }
  double accepted() { return harness_.decode_metrics.accepted_tokens.Value(); }
  double rejected() { return harness_.decode_metrics.drafted_tokens.Value() - accepted(); }
  double retries() { return harness_.decode_metrics.prefill_retries.Value(); }
  double recomputes() { return harness_.decode_metrics.kv_recomputes.Value(); }
  double pauses() { return harness_.decode_metrics.slow_readers.Value(); }

 private:
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  bool Chance(int percent) { return Below(100) < percent; }

  HarnessOptions WithDrafts(HarnessOptions options, uint32_t seed) {
    const auto whole = [this](std::span<const int32_t> tokens) { return TextFrom(tokens); };
    options.loop.speculation.longest_draft = 6;
    options.loop.speculation.drafter = [whole, seed]() mutable {
      return std::make_unique<OracleDrafter>(whole, /*wrong_percent=*/40, seed++);
    };
    return options;
  }

  // Prompt and answer of a request that has come as far as `tokens`, maybe of another one.
  std::vector<int32_t> TextFrom(std::span<const int32_t> tokens) {
    for (const auto& client : harness_.clients) {
      std::vector<int32_t>& text = texts_[client->id];
      if (text.empty()) {
        text = client->prompt;
        const std::vector<int32_t> answer = harness_.Reference(*client);
        text.insert(text.end(), answer.begin(), answer.end());
      }
      if (text.size() > tokens.size() && std::equal(tokens.begin(), tokens.end(), text.begin())) {
        return text;
      }
    }
    return {};
  }

  void Submit() {
    // Few beginnings, so that prompts share prefixes.
    std::vector<int32_t> prompt = MakePrompt(1 + Below(40), 1 + Below(3));
    if (Chance(50)) prompt.push_back(Below(kVocab));
    engine::SamplingParams sampling = Greedy(1 + Below(40));
    if (Chance(50)) {
      sampling.temperature = 1;
      sampling.seed = random_();
    }
    for (int i = 0; i < 20; ++i) sampling.eos_token_ids.push_back(Below(kVocab));
    sampling.ignore_eos = Chance(50);
    sampling.min_tokens = Below(4);
    harness_.Submit(std::move(prompt), sampling, Below(4), Below(8) == 0 ? 1 : 0,
                    Chance(5) ? absl::Seconds(5) : absl::InfiniteDuration());
  }

  void CancelOne() {
    if (!harness_.clients.empty()) {
      harness_.Cancel(
          *harness_.clients[static_cast<size_t>(Below(static_cast<int>(harness_.clients.size())))]);
    }
  }

  void ToggleReader() {
    if (harness_.clients.empty()) return;
    Client& client =
        *harness_.clients[static_cast<size_t>(Below(static_cast<int>(harness_.clients.size())))];
    client.reading = !client.reading;
  }

  bool Cancelled(const FakeCall& c) {
    return harness_.receiver.cancelled.count(c.call.transfer.ToHex()) > 0;
  }

  // One thing that a prefill worker, its sender or the network may do.
  void Act(FakeCall& c) {
    switch (Below(faults_ ? 10 : 4)) {
      case 0:
      case 1:
        if (!c.replied) harness_.Reply(c);
        break;
      case 2:
      case 3:
        if (!c.sealed && !c.failed && !c.quiet && !Cancelled(c)) {
          harness_.Write(c);
          harness_.Seal(c);
        }
        break;
      case 4:
        if (!c.replied) {
          harness_.ReplyError(c, Chance(50) ? absl::UnavailableError("gone")
                                            : absl::ResourceExhaustedError("full"));
        }
        break;
      case 5:
        if (!c.sealed && !c.failed) harness_.FailKv(c);
        break;
      case 6:  // before the end, a writer may write anything
        if (!c.sealed && !c.quiet) harness_.Scribble(c);
        break;
      case 7:
        if (!c.quiet && (c.sealed || c.failed || Cancelled(c))) harness_.Quiet(c);
        break;
      case 8:  // duplicates, and what comes too late
        if (c.sealed) harness_.Seal(c);
        if (c.quiet) harness_.Quiet(c);
        if (c.replied) harness_.Reply(c);
        break;
      case 9:  // another epoch
        harness_.inbox.Push(KvSealed{c.call.transfer, c.call.epoch + 1, {}});
        harness_.inbox.Push(KvQuiet{c.call.transfer, c.call.epoch + 1});
        break;
    }
  }

  // Everybody behaves until all is done.
  void Calm() {
    for (int turn = 0; turn < 20000; ++turn) {
      for (auto& client : harness_.clients) client->reading = true;
      // Serving a call may cause others: by index.
      for (size_t i = 0; i < harness_.caller.calls.size(); ++i) {
        FakeCall& c = *harness_.caller.calls[i];
        if (!c.sealed && !c.failed && !c.quiet && !Cancelled(c)) {
          harness_.Write(c);
          harness_.Seal(c);
        }
        if (!c.replied) harness_.Reply(c);
        if (!c.quiet) harness_.Quiet(c);
      }
      harness_.Step();
      if (harness_.loop->num_sequences() == 0 && harness_.loop->num_transfers() == 0) break;
    }
    harness_.Step();
  }

  void Check() {
    for (const auto& client : harness_.clients) {
      ASSERT_TRUE(client->end.has_value()) << "request " << client->id << " never ended";
      const std::vector<int32_t> expected = harness_.Reference(*client);
      const std::vector<int32_t> got = client->Tokens();
      if (client->end->ok()) {
        ASSERT_EQ(got, expected) << "request " << client->id;
        const bool full = static_cast<int>(got.size()) == client->sampling.max_tokens ||
                          client->prompt.size() + got.size() == kMaxModelLen;
        if (!full) {
          ASSERT_EQ(client->Finish(), FinishReason::kStop);
        }
        ++finished_;
      } else {
        ASSERT_LE(got.size(), expected.size());
        ASSERT_TRUE(std::equal(got.begin(), got.end(), expected.begin()))
            << "request " << client->id << " " << client->end->ToString();
        ++disturbed_;
      }
    }
    // What the router was told is what the cache holds.
    std::set<std::string> held;
    for (const Hash128& hash : harness_.cache.Snapshot()) held.insert(hash.ToHex());
    EXPECT_EQ(harness_.stored, held);
    harness_.ExpectNoLeak();
  }

  std::mt19937 random_;
  std::map<uint64_t, std::vector<int32_t>> texts_;  // by client
  LoopHarness harness_;
  const bool faults_;
  int finished_ = 0;
  int disturbed_ = 0;
};

struct StormCase {
  const char* name;
  int num_blocks;
  int max_num_seqs;
  int max_num_batched_tokens;
  bool caching;
  bool unified;
  int max_in_flight = 1;
  bool delays = false;
  bool drafts = false;
};

class LoopStorm : public testing::TestWithParam<StormCase> {};

TEST_P(LoopStorm, EveryTokenIsTheOneOfTheRequestAlone) {
  const StormCase& param = GetParam();
  spdlog::set_level(spdlog::level::off);  // every fault would be a line
  int finished = 0;
  int disturbed = 0;
  double preemptions = 0, retries = 0, recomputes = 0, pauses = 0;
  double accepted = 0, rejected = 0;
  const auto seeds = static_cast<uint32_t>(SanitizerShare(60));
  for (uint32_t seed = 0; seed < seeds; ++seed) {
    SCOPED_TRACE(testing::Message() << param.name << " seed " << seed);
    HarnessOptions options;
    options.num_blocks = param.num_blocks;
    options.caching = param.caching;
    options.loop.admission.limits.max_num_seqs = param.max_num_seqs;
    options.loop.admission.limits.max_num_batched_tokens = param.max_num_batched_tokens;
    options.loop.admission.max_model_len = kMaxModelLen;
    options.loop.admission.unified = param.unified;
    options.loop.admission.local_prefill_max_tokens = 6;
    options.loop.publish.max_pending_tokens = 8;
    options.max_in_flight = param.max_in_flight;
    if (param.delays) {
      options.step_delay = [random = std::mt19937(seed)]() mutable {
        return absl::Microseconds(random() % 100);
      };
    }
    Storm storm(seed, options, param.drafts);
    storm.Run(250);
    if (HasFatalFailure()) return;
    finished += storm.finished();
    disturbed += storm.disturbed();
    preemptions += storm.preemptions();
    retries += storm.retries();
    recomputes += storm.recomputes();
    pauses += storm.pauses();
    accepted += storm.accepted();
    rejected += storm.rejected();
  }
  // The storm was one.
  EXPECT_GT(finished, SanitizerShare(100));
  EXPECT_GT(disturbed, SanitizerShare(20));
  EXPECT_GT(pauses, 0);
  if (param.num_blocks < 40) {
    EXPECT_GT(preemptions, SanitizerShare(20));
  }
  if (param.drafts) {
    EXPECT_GT(accepted, SanitizerShare(500));
    EXPECT_GT(rejected, SanitizerShare(500));
  }
  if (!param.unified) {
    EXPECT_GT(retries, SanitizerShare(20));
    EXPECT_GT(recomputes, SanitizerShare(5));
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, LoopStorm,
    testing::Values(StormCase{"roomy", 400, 16, 64, true, false},
                    StormCase{"tiny_pool", 24, 8, 16, true, false},
                    StormCase{"tiny_pool_no_cache", 24, 8, 16, false, false},
                    StormCase{"tiny_unified", 24, 8, 16, true, true},
                    StormCase{"one_long_at_a_time", 20, 4, 4, true, true},
                    StormCase{"roomy_drafts", 400, 16, 64, true, false, 1, false, true},
                    StormCase{"tiny_drafts", 24, 8, 16, true, false, 1, false, true},
                    StormCase{"tiny_drafts_unified", 24, 8, 16, true, true, 1, false, true},
                    StormCase{"roomy_ahead", 400, 16, 64, true, false, 2},
                    StormCase{"tiny_ahead", 24, 8, 16, true, false, 2},
                    StormCase{"tiny_ahead_no_cache", 24, 8, 16, false, false, 2},
                    StormCase{"tiny_ahead_unified", 24, 8, 16, true, true, 2},
                    StormCase{"tiny_ahead_delays", 24, 8, 16, true, false, 2, true},
                    StormCase{"roomy_ahead_drafts", 400, 16, 64, true, false, 2, false, true},
                    StormCase{"tiny_ahead_drafts", 24, 8, 16, true, false, 2, false, true},
                    StormCase{"tiny_ahead_drafts_unified", 24, 8, 16, true, true, 2, true, true}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace tandem::decode
