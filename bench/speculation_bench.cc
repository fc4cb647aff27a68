// What speculation (--speculative ngram) gains where an answer repeats its prompt, and what it
// costs where it does not.
//
//   speculation_bench [TEXT] [MODEL] [TOKENS] [DEVICE]
//     default: docs/life_of_a_request.md models/demo 300 cpu
//
// A decode loop with one request, on dummy weights of MODEL.s shape: every step is computed, but
// the tokens are those of a written answer. Words of TEXT are the tokens. *edit*: the prompt is a
// piece of the text, the answer the same with every 20th word another; *prose*: the answer is how
// the text goes on. Each runs with and without drafts in turns; the ratio is of the medians.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"

#include "bench/usage.h"
#include "common/base/check.h"
#include "common/base/locks.h"
#include "decode_worker/loop.h"
#include "decode_worker/ngram_drafter.h"
#include "engine/runtime/engine.h"

namespace tandem::decode {
namespace {

constexpr int kTurns = 5;
constexpr int kPromptTokens = 400;

// Computes as `inner` does and draws the tokens of `script`, which holds prompt and answer.
class ScriptedRunner final : public engine::ModelRunner {
 public:
  ScriptedRunner(engine::ModelRunner* inner, std::vector<int32_t> script)
      : inner_(inner), script_(std::move(script)) {}

  int max_in_flight() const override { return inner_->max_in_flight(); }

  absl::StatusOr<engine::LaunchedStep> Launch(const engine::Batch& batch) override {
    const engine::BatchItem& item = batch.items.front();
    steps_.push_back({item.sampling != nullptr,
                      static_cast<size_t>(item.length()),
                      {item.draft.begin(), item.draft.end()}});
    return inner_->Launch(batch);
  }
  absl::StatusOr<engine::StepOutput> Collect(engine::StepId id) override {
    absl::StatusOr<engine::StepOutput> output = inner_->Collect(id);
    const Step step = std::move(steps_.front());
    steps_.pop_front();
    if (!output.ok() || !step.draws) return output;
    const size_t first = step.length - step.draft.size();  // the place of what is drawn first
    engine::ItemOutput& item = output->items.front();
    item.token.token = script_[first];
    item.further.clear();
    for (size_t i = 0; i < step.draft.size() && step.draft[i] == script_[first + i]; ++i) {
      item.further.push_back({.token = script_[first + i + 1]});
    }
    return output;
  }

 private:
  struct Step {
    bool draws = false;
    size_t length = 0;  // of the sequence, its draft included
    std::vector<int32_t> draft;
  };

  engine::ModelRunner* const inner_;
  const std::vector<int32_t> script_;
  std::deque<Step> steps_;  // launched and not collected
};

struct Result {
  double tokens_per_second = 0;  // from the second one on
  double drafted = 0, accepted = 0;
};

Result Serve(engine::Engine* engine, const std::vector<int32_t>& script, bool drafts) {
  ScriptedRunner runner(&engine->runner(), script);
  Metrics registry;
  DecodeMetrics metrics(&registry);
  EventInbox inbox(16);
  LoopOptions options;
  options.admission.limits = {engine->options().block_size, engine->options().max_num_seqs,
                              engine->options().max_num_batched_tokens};
  options.admission.max_model_len = engine->options().max_model_len;
  options.admission.unified = true;
  options.publish.max_pending_tokens = 1 << 20;
  if (drafts) {
    options.speculation.drafter = [] { return std::make_unique<NgramDrafter>(); };
  }
  LoopParts parts;
  parts.runner = &runner;
  parts.pool = &engine->pool();
  parts.cache = &engine->cache();
  parts.clock = Clock::Real();
  parts.metrics = &metrics;
  parts.inbox = &inbox;
  Loop loop(std::move(options), parts, worker::Reports{});
  auto stream = std::make_shared<TokenStream>(nullptr, nullptr);
  WorkArrived request;
  request.work.id = 1;
  request.work.tokens.assign(script.begin(), script.begin() + kPromptTokens);
  request.work.sampling.temperature = 0;
  request.work.sampling.max_tokens = static_cast<int>(script.size()) - kPromptTokens - 1;
  request.work.arrived = Clock::Real()->Now();
  request.stream = stream;
  inbox.Push(std::move(request));
  loop.Step(absl::ZeroDuration());
  while (stream->pending() == 0) loop.Step(absl::ZeroDuration());
  const absl::Time start = absl::Now();
  while (loop.num_sequences() > 0) loop.Step(absl::ZeroDuration());
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  return {static_cast<double>(stream->pending() - 1) / seconds, metrics.drafted_tokens.Value(),
          metrics.accepted_tokens.Value()};
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Compare(const char* name, engine::Engine* engine, const std::vector<int32_t>& script) {
  std::vector<double> off, on;
  Result drafted;
  for (int turn = 0; turn < kTurns; ++turn) {
    off.push_back(Serve(engine, script, false).tokens_per_second);
    drafted = Serve(engine, script, true);
    on.push_back(drafted.tokens_per_second);
  }
  std::printf("%-6s %7.1f tokens/s, with drafts %7.1f: %.3fx; %.0f of %.0f drafted accepted\n",
              name, Median(off), Median(on), Median(on) / Median(off), drafted.accepted,
              drafted.drafted);
  std::fflush(stdout);
}

std::vector<int32_t> WordsOf(const std::string& path) {
  std::ifstream file(path);
  TANDEM_CHECK(file.good(), "cannot read {}", path);
  std::map<std::string, int32_t> ids;
  std::vector<int32_t> words;
  for (std::string word; file >> word;) {
    words.push_back(ids.try_emplace(word, static_cast<int32_t>(ids.size())).first->second);
  }
  return words;
}

int Main(int argc, char** argv) {
  WatchNoLockOrders();  // as the programs do
  if (AnswerHelp(argc, argv, "speculation_bench [TEXT] [MODEL] [TOKENS] [DEVICE]")) return 0;
  const std::string text = argc > 1 ? argv[1] : "docs/life_of_a_request.md";
  engine::EngineOptions options;
  options.model_dir = argc > 2 ? argv[2] : "models/demo";
  const int tokens = argc > 3 ? std::atoi(argv[3]) : 300;
  TANDEM_CHECK(tokens > 0 && tokens <= kPromptTokens, "TOKENS is 1 to {}", kPromptTokens);
  options.load_format = "dummy";
  options.device = argc > 4 ? argv[4] : "cpu";
  options.enable_prefix_caching = false;
  options.max_model_len = 2 * kPromptTokens + 16;
  options.kv_cache_memory_bytes = int64_t{256} << 20;
  auto engine = engine::Engine::Load(options);
  TANDEM_CHECK(engine.ok(), "{}", engine.status().ToString());
  std::printf("%s\n", (*engine)->Banner().c_str());
  const std::vector<int32_t> words = WordsOf(text);
  const size_t length = static_cast<size_t>(kPromptTokens + tokens + 2);
  TANDEM_CHECK(words.size() >= length, "{} has {} words; {} are needed", text, words.size(),
               length);
  const std::vector<int32_t> prose(words.begin(), words.begin() + static_cast<ptrdiff_t>(length));
  std::vector<int32_t> edit(prose.begin(), prose.begin() + kPromptTokens);
  for (int i = 0; edit.size() < length; ++i) {
    edit.push_back(i % 20 == 19 ? 50 + i : prose[static_cast<size_t>(i)]);
  }
  Compare("edit", engine->get(), edit);
  Compare("prose", engine->get(), prose);
  return 0;
}

}  // namespace
}  // namespace tandem::decode

int main(int argc, char** argv) { return tandem::decode::Main(argc, argv); }
