#include "engine/runtime/tensor_parallel.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

#include "common/base/ready_event.h"
#include "common/base/status.h"
#include "engine/device/cpu/host_ranks.h"
#include "engine/runtime/rank_threads.h"

namespace tandem::engine {
namespace {

// A layer is ready when it is ready on every rank.
class AllReady final : public ReadyEvent {
 public:
  void Add(std::shared_ptr<const ReadyEvent> event) { events_.push_back(std::move(event)); }
  bool Ready() const override {
    return std::all_of(events_.begin(), events_.end(),
                       [](const auto& event) { return event->Ready(); });
  }
  bool WaitFor(absl::Duration timeout) const override {
    const absl::Time end = absl::Now() + timeout;
    for (const auto& event : events_) {
      if (!event->WaitFor(std::max(absl::ZeroDuration(), end - absl::Now()))) return false;
    }
    return true;
  }

 private:
  std::vector<std::shared_ptr<const ReadyEvent>> events_;
};

// The first error; else that of the first rank.
template <typename T>
absl::StatusOr<T> FirstOf(std::vector<absl::StatusOr<T>>* of_ranks) {
  for (absl::StatusOr<T>& result : *of_ranks) {
    if (!result.ok()) return result.status();
  }
  return std::move(of_ranks->front());
}

bool DrawnAlike(const ItemOutput& a, const ItemOutput& b) {
  const auto same = [](const TokenLogprob& x, const TokenLogprob& y) { return x.token == y.token; };
  return a.status.ok() == b.status.ok() && a.has_token == b.has_token &&
         (!a.has_token || same(a.token, b.token)) &&
         std::equal(a.further.begin(), a.further.end(), b.further.begin(), b.further.end(), same);
}

class RankedRunner final : public ModelRunner {
 public:
  // All outlive it.
  RankedRunner(std::vector<ModelRunner*> ranks, RankThreads* threads)
      : ranks_(std::move(ranks)), threads_(threads) {}

  int max_in_flight() const override { return ranks_.front()->max_in_flight(); }
  const std::atomic<uint64_t>* progress() const override { return ranks_.front()->progress(); }

  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override {
    auto steps = OnAll<LaunchedStep>([&](ModelRunner* rank) { return rank->Launch(batch); });
    TANDEM_ASSIGN_OR_RETURN(LaunchedStep step, FirstOf(&steps));
    for (size_t layer = 0; layer < step.layer_ready.size(); ++layer) {
      auto all = std::make_shared<AllReady>();
      all->Add(std::move(step.layer_ready[layer]));
      for (size_t rank = 1; rank < steps.size(); ++rank) {
        all->Add(std::move(steps[rank]->layer_ready[layer]));
      }
      step.layer_ready[layer] = std::move(all);
    }
    return step;
  }

  absl::StatusOr<StepOutput> Collect(StepId id) override {
    auto outputs = OnAll<StepOutput>([&](ModelRunner* rank) { return rank->Collect(id); });
    for (const auto& output : outputs) TANDEM_RETURN_IF_ERROR(output.status());
    for (size_t rank = 1; rank < outputs.size(); ++rank) {
      TANDEM_RETURN_IF_ERROR(CheckAgreement(*outputs.front(), *outputs[rank], rank));
    }
    return std::move(outputs.front());
  }

 private:
  template <typename T>
  std::vector<absl::StatusOr<T>> OnAll(absl::FunctionRef<absl::StatusOr<T>(ModelRunner*)> call) {
    std::vector<absl::StatusOr<T>> results(ranks_.size(), absl::StatusOr<T>(T()));
    threads_->Run([&](int rank) {
      const auto i = static_cast<size_t>(rank);
      results[i] = call(ranks_[i]);
    });
    return results;
  }

  const std::vector<ModelRunner*> ranks_;
  RankThreads* const threads_;
};

class RankedEngine final : public Engine {
 public:
  explicit RankedEngine(int size) : collective_(size), threads_(size) {}

  absl::Status Load(EngineOptions options) {
    options.shared_weights.clear();  // of whole models
    const int size = options.tensor_parallel_size;
    std::vector<absl::StatusOr<std::unique_ptr<Engine>>> loaded(static_cast<size_t>(size));
    threads_.Run([&](int rank) {
      EngineOptions own = options;
      own.report_loading = options.report_loading && rank == 0;
      loaded[static_cast<size_t>(rank)] = LoadRank(own, {rank, size}, collective_.at(rank));
    });
    for (auto& rank : loaded) {
      TANDEM_RETURN_IF_ERROR(rank.status());
      ranks_.push_back(*std::move(rank));
    }
    Settle();
    return absl::OkStatus();
  }

  const EngineOptions& options() const override { return options_; }
  const ModelConfig& config() const override { return config_; }
  const std::string& model_digest() const override { return ranks_.front()->model_digest(); }
  KvRegion region() const override { return region_; }
  std::vector<KvRegion> regions() const override {
    std::vector<KvRegion> regions;
    for (const auto& rank : ranks_) regions.push_back(rank->region());
    return regions;
  }
  BlockPool& pool() override { return *pool_; }
  PrefixCache& cache() override { return *cache_; }
  ModelRunner& runner() override { return *runner_; }
  std::string Banner() const override {
    return fmt::format("{} ranks, of which each has: {}", ranks_.size(), ranks_.front()->Banner());
  }

 private:
  // What is said of all ranks follows from what each found to fit.
  void Settle() {
    const int size = static_cast<int>(ranks_.size());
    options_ = ranks_.front()->options();
    options_.num_threads *= size;
    config_ = ranks_.front()->config();
    config_.num_heads *= size;
    config_.num_kv_heads *= size;
    config_.intermediate_size *= size;
    region_ = {};
    region_.layout = ranks_.front()->region().layout;
    region_.layout.num_kv_heads *= size;
    region_.num_blocks = ranks_.front()->region().num_blocks;
    std::vector<ModelRunner*> runners;
    for (const auto& rank : ranks_) {
      options_.max_model_len = std::min(options_.max_model_len, rank->options().max_model_len);
      region_.num_blocks = std::min(region_.num_blocks, rank->region().num_blocks);
      runners.push_back(&rank->runner());
    }
    pool_ = std::make_unique<BlockPool>(region_.num_blocks);
    cache_ = std::make_unique<PrefixCache>(pool_.get(), options_.block_size,
                                           options_.enable_prefix_caching);
    runner_ = std::make_unique<RankedRunner>(std::move(runners), &threads_);
  }

  // Destroyed last to first.
  HostRanks collective_;
  RankThreads threads_;
  std::vector<std::unique_ptr<Engine>> ranks_;
  EngineOptions options_;
  ModelConfig config_;
  KvRegion region_;
  std::unique_ptr<BlockPool> pool_;
  std::unique_ptr<PrefixCache> cache_;
  std::unique_ptr<RankedRunner> runner_;
};

}  // namespace

absl::Status CheckAgreement(const StepOutput& first, const StepOutput& other, size_t rank) {
  for (size_t i = 0; i < first.items.size(); ++i) {
    if (!DrawnAlike(first.items[i], other.items[i])) {
      return Internal("rank {} of the model drew other tokens than rank 0 for item {}", rank, i);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Engine>> LoadTensorParallel(const EngineOptions& options) {
  auto engine = std::make_unique<RankedEngine>(options.tensor_parallel_size);
  TANDEM_RETURN_IF_ERROR(engine->Load(options));
  return engine;
}

}  // namespace tandem::engine
