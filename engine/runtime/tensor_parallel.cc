#include "engine/runtime/tensor_parallel.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/ready_event.h"
#include "common/base/status.h"
#include "engine/device/cpu/threads.h"
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
  RankedRunner(std::vector<ModelRunner*> runners, const Ranks* ranks, RankThreads* threads)
      : runners_(std::move(runners)), ranks_(ranks), threads_(threads) {}

  int max_in_flight() const override { return runners_.front()->max_in_flight(); }
  const std::atomic<uint64_t>* progress() const override { return runners_.front()->progress(); }

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
    // Nothing that the ranks compute from here on means anything: a new process does better.
    TANDEM_CHECK(ranks_->status().ok(), "{}", ranks_->status().ToString());
    for (const auto& output : outputs) TANDEM_RETURN_IF_ERROR(output.status());
    for (size_t rank = 1; rank < outputs.size(); ++rank) {
      TANDEM_RETURN_IF_ERROR(CheckAgreement(*outputs.front(), *outputs[rank], rank));
    }
    return std::move(outputs.front());
  }

 private:
  template <typename T>
  std::vector<absl::StatusOr<T>> OnAll(absl::FunctionRef<absl::StatusOr<T>(ModelRunner*)> call) {
    std::vector<absl::StatusOr<T>> results(runners_.size(), absl::StatusOr<T>(T()));
    threads_->Run([&](int rank) {
      const auto i = static_cast<size_t>(rank);
      results[i] = call(runners_[i]);
    });
    return results;
  }

  const std::vector<ModelRunner*> runners_;
  const Ranks* const ranks_;
  RankThreads* const threads_;
};

class RankedEngine final : public Engine {
 public:
  explicit RankedEngine(int size) : threads_(size) {}

  absl::Status Load(EngineOptions options) {
    if (!options.shared_weights.empty()) {
      spdlog::warn(
          "--shared-weights is left aside: ranks keep their parts of the weights for themselves");
      options.shared_weights.clear();
    }
    TANDEM_ASSIGN_OR_RETURN(std::vector<Rank> opened, OpenRanks(options));
    std::vector<Backend*> backends;
    for (const Rank& rank : opened) {
      backends_.push_back(rank.backend);
      backends.push_back(rank.backend.get());
    }
    TANDEM_ASSIGN_OR_RETURN(collectives_, backends.front()->MakeRanks(backends));
    std::vector<absl::StatusOr<std::unique_ptr<Engine>>> loaded(opened.size());
    threads_.Run([&](int rank) {
      const auto i = static_cast<size_t>(rank);
      opened[i].collective = collectives_->at(rank);
      EngineOptions own = options;
      own.report_loading = options.report_loading && rank == 0;
      loaded[i] = LoadRank(own, std::move(opened[i]));
      if (!loaded[i].ok()) collectives_->Abort();
    });
    TANDEM_RETURN_IF_ERROR(CauseOf(loaded));
    TANDEM_RETURN_IF_ERROR(collectives_->status());
    for (auto& rank : loaded) ranks_.push_back(*std::move(rank));
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
  // Why ranks could not be loaded; those that gave up because another one did know nothing of it.
  static absl::Status CauseOf(const std::vector<absl::StatusOr<std::unique_ptr<Engine>>>& loaded) {
    absl::Status cause;
    for (const auto& rank : loaded) {
      if (cause.ok() || absl::IsAborted(cause)) cause = rank.ok() ? cause : rank.status();
    }
    return cause;
  }

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
    region_.memory = ranks_.front()->region().memory;
    region_.layout = ranks_.front()->region().layout;
    region_.layout.num_kv_heads *= size;
    region_.num_blocks = ranks_.front()->region().num_blocks;
    std::vector<ModelRunner*> runners;
    for (const auto& rank : ranks_) {
      options_.max_model_len = std::min(options_.max_model_len, rank->options().max_model_len);
      region_.num_blocks = std::min(region_.num_blocks, rank->region().num_blocks);
      runners.push_back(&rank->runner());
    }
    if (region_.memory == KvMemoryKind::kDevice) {
      options_.kv_cache_memory_bytes = static_cast<int64_t>(region_.TotalBytes());
    }
    pool_ = std::make_unique<BlockPool>(region_.num_blocks);
    cache_ = std::make_unique<PrefixCache>(pool_.get(), options_.block_size,
                                           options_.enable_prefix_caching);
    runner_ = std::make_unique<RankedRunner>(std::move(runners), collectives_.get(), &threads_);
  }

  // Destroyed last to first.
  std::vector<std::shared_ptr<Backend>> backends_;
  std::unique_ptr<Ranks> collectives_;
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

absl::StatusOr<std::vector<int>> DevicesOf(const EngineOptions& options) {
  const auto size = static_cast<size_t>(options.tensor_parallel_size);
  std::vector<int> devices;
  for (const absl::string_view text : absl::StrSplit(options.devices, ',', absl::SkipEmpty())) {
    int device = -1;
    if (!absl::SimpleAtoi(text, &device) || device < 0) {
      return InvalidArgument("--devices must be numbers of GPUs, as 0,1; got \"{}\"",
                             options.devices);
    }
    devices.push_back(device);
  }
  if (!devices.empty() && options.gpu != 0) {
    return InvalidArgument(
        "--gpu={} beside --devices={}, which names the GPU of every rank: leave --gpu out",
        options.gpu, options.devices);
  }
  if (!devices.empty() && devices.size() != size) {
    return InvalidArgument("--devices={} names {} GPUs, and --tensor-parallel-size={} needs {}",
                           options.devices, devices.size(), size, size);
  }
  while (devices.size() < size) devices.push_back(options.gpu + static_cast<int>(devices.size()));
  return devices;
}

absl::StatusOr<std::vector<Rank>> OpenRanks(const EngineOptions& options) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<int> devices, DevicesOf(options));
  const int size = options.tensor_parallel_size;
  const int threads = options.num_threads == 0 ? PhysicalCores() : options.num_threads;
  std::vector<Rank> ranks;
  std::string name = options.device;
  for (const int device : devices) {
    Rank& rank = ranks.emplace_back();
    rank.shard = {static_cast<int>(ranks.size()) - 1, size};
    rank.on_device = static_cast<int>(std::count(devices.begin(), devices.end(), device));
    TANDEM_ASSIGN_OR_RETURN(
        rank.backend,
        OpenBackend(name, {.num_threads = std::max(1, threads / size), .gpu = device}));
    name = rank.backend->name();  // what auto is for one, it is for all
    if (name == "cpu" && !options.devices.empty()) {
      return InvalidArgument(
          "--devices={} names GPUs, and this worker computes on the CPU (--device={}): leave "
          "--devices out",
          options.devices, options.device);
    }
  }
  if (name == "cpu" && threads < size) {
    spdlog::warn(
        "{} compute threads (--num-threads) for {} ranks (--tensor-parallel-size): each gets one "
        "of its own, {} in all",
        threads, size, size);
  }
  for (Rank& rank : ranks) {
    const size_t total = rank.backend->device().TotalMemory();
    rank.used_before = total - std::min(total, rank.backend->device().AvailableMemory());
  }
  return ranks;
}

absl::StatusOr<std::unique_ptr<Engine>> LoadTensorParallel(const EngineOptions& options) {
  auto engine = std::make_unique<RankedEngine>(options.tensor_parallel_size);
  TANDEM_RETURN_IF_ERROR(engine->Load(options));
  return engine;
}

}  // namespace tandem::engine
