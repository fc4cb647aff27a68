// A worker dies while blocks come back from a decode worker to a prefill worker: either of the two,
// and after every single event from the moment that the blocks are asked for until they are there.
#include <algorithm>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "spdlog/spdlog.h"

#include "router/api/request_wire.h"
#include "simulation/fake_model_runner.h"
#include "simulation/virtual_cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

constexpr int kVocab = 200;
constexpr int kMaxLen = 200;
constexpr size_t kPrefills = 2, kDecodes = 2;

struct Case {
  bool one_sided;
  router::WorkerRole dies;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << (c.dies == router::WorkerRole::kDecode ? "the giver dies, " : "the taker dies, ")
       << (c.one_sided ? "one-sided" : "two-sided");
}

VirtualClusterOptions Options(bool one_sided) {
  VirtualClusterOptions options;
  for (size_t i = 0; i < kPrefills + kDecodes; ++i) {
    const bool prefill = i < kPrefills;
    VirtualWorker worker;
    worker.role = prefill ? router::WorkerRole::kPrefill : router::WorkerRole::kDecode;
    worker.options.worker_id =
        prefill ? absl::StrCat("prefill-", i) : absl::StrCat("decode-", i - kPrefills);
    worker.options.engine.block_size = 4;
    worker.options.engine.num_blocks = 120;
    worker.options.engine.model.vocab_size = kVocab;
    worker.options.max_model_len = kMaxLen;
    worker.options.local_prefill_max_tokens = 0;
    // Computing is dear.
    worker.step_time = [](const engine::Batch& batch) {
      return absl::Milliseconds(5) + absl::Milliseconds(1) * batch.NumTokens();
    };
    options.workers.push_back(worker);
  }
  options.kv.one_sided = one_sided;
  options.kv.max_blocks_of_a_frame = 2;
  options.kv.ship_time = [](double blocks) { return absl::Microseconds(100) * blocks; };
  return options;
}

// One conversation of two turns.
class Conversation {
 public:
  explicit Conversation(const Case& c) : dies_(c.dies), cluster_(Options(c.one_sided)) {}

  // Up to where the second turn's blocks have been asked for.
  void BeginReturn() {
    std::vector<int32_t> prompt;
    for (int i = 0; i < 30; ++i) prompt.push_back(4 + i * 7 % 190);
    const VirtualClient* first = Submit(prompt, 60);
    RunUntil([&] { return first->finished(); });
    ASSERT_OK(first->outcome());
    giver_ = IndexOf(first->last().timing->decode_worker);
    RunFor(absl::Seconds(1));  // the router hears of it
    prompt.insert(prompt.end(), first->tokens().begin(), first->tokens().end());
    for (int i = 0; i < 10; ++i) prompt.push_back(4 + i * 11 % 190);
    second_ = Submit(prompt, 20);
    RunUntil([&] { return Taker().has_value() || second_->finished(); });
    ASSERT_TRUE(Taker().has_value()) << "nothing was asked back";
    taker_ = *Taker();
  }
  // False: the blocks are all there already.
  bool Go(int events) {
    for (int i = 0; i < events; ++i) cluster_.events().RunNext(absl::InfiniteFuture());
    return cluster_.returned_tokens() == 0;
  }
  void Kill() {
    const size_t victim = dies_ == router::WorkerRole::kDecode ? giver_ : taker_;
    cluster_.Kill(victim);
    cluster_.events().After(absl::Seconds(5), [this, victim] { cluster_.Restart(victim); });
  }
  void ExpectServedAndNothingHeld() {
    RunUntil([&] { return second_->finished(); });
    EXPECT_OK(second_->outcome());
    EXPECT_EQ(second_->num_finishes(), 1);
    EXPECT_EQ(second_->tokens(), expected_);
    RunFor(absl::Minutes(1));
    EXPECT_EQ(cluster_.Held(), "");
    EXPECT_EQ(cluster_.IndexErrors(), "");
  }
  int returned_tokens() const { return cluster_.returned_tokens(); }

 private:
  const VirtualClient* Submit(const std::vector<int32_t>& prompt, int answer) {
    engine::SamplingParams sampling;
    sampling.temperature = 0;
    sampling.max_tokens = answer;
    sampling.ignore_eos = true;
    expected_ = engine::FakeReferenceTokens(prompt, sampling, kMaxLen, kVocab);
    v1::GenerateRequest message;
    for (const int32_t id : prompt) {
      message.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
    }
    message.mutable_sampling()->set_temperature(sampling.temperature);
    message.mutable_sampling()->set_seed(sampling.seed);
    message.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(answer));
    message.mutable_sampling()->set_ignore_eos(true);
    router::RequestLimits limits;
    limits.max_model_len = kMaxLen;
    const absl::Time now = cluster_.events().Now();
    auto request = router::GenerateRequestFromProto(
        cluster_.model(), limits, message, now, now + absl::Minutes(5), &cluster_.events().clock());
    EXPECT_OK(request);
    auto client = cluster_.Submit(*std::move(request), {});
    EXPECT_OK(client);
    return *client;
  }
  template <typename Condition>
  void RunUntil(Condition condition) {
    const absl::Time end = cluster_.events().Now() + absl::Minutes(5);
    while (!condition() && cluster_.events().RunNext(end)) {
    }
  }
  void RunFor(absl::Duration time) { cluster_.events().RunUntil(cluster_.events().Now() + time); }
  static size_t IndexOf(const std::string& worker_id) {
    return kPrefills + static_cast<size_t>(worker_id.back() - '0');
  }
  std::optional<size_t> Taker() const {
    for (size_t i = 0; i < kPrefills; ++i) {
      if (cluster_.num_returns(i) > 0) return i;
    }
    return std::nullopt;
  }

  const router::WorkerRole dies_;
  VirtualCluster cluster_;
  const VirtualClient* second_ = nullptr;
  std::vector<int32_t> expected_;  // of the last request
  size_t giver_ = 0, taker_ = 0;
};

class ReturnLoss : public testing::TestWithParam<Case> {
 protected:
  ReturnLoss() { spdlog::set_level(spdlog::level::off); }
};

TEST_P(ReturnLoss, AtAnyMomentTheRequestIsServedAndNobodyKeepsABlock) {
  // All of them, or under a sanitizer some, from the first to the last.
  constexpr int kStrides = 8;
  const int stride = kStrides / std::max(1, SanitizerShare(kStrides));
  int moments = 0;
  for (bool in_return = true; in_return && !HasFailure(); moments += stride) {
    SCOPED_TRACE(testing::Message() << moments << " events after the blocks were asked for");
    Conversation conversation(GetParam());
    ASSERT_NO_FATAL_FAILURE(conversation.BeginReturn());
    in_return = conversation.Go(moments);
    if (in_return) conversation.Kill();
    conversation.ExpectServedAndNothingHeld();
    EXPECT_TRUE(in_return || conversation.returned_tokens() > 0);
  }
  EXPECT_GT(moments, 20);
}

INSTANTIATE_TEST_SUITE_P(Cases, ReturnLoss,
                         testing::Values(Case{false, router::WorkerRole::kDecode},
                                         Case{false, router::WorkerRole::kPrefill},
                                         Case{true, router::WorkerRole::kDecode},
                                         Case{true, router::WorkerRole::kPrefill}));

}  // namespace
}  // namespace tandem
