#include "router/core/router_core.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/log.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/cluster_client.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

constexpr absl::Duration kLookForStuck = absl::Milliseconds(100);

RegistryOptions MakeRegistryOptions(const RouterCoreOptions& core, const ServedModel& model) {
  RegistryOptions options;
  options.model_digest = core.model_digest;
  options.dtype = core.dtype;
  options.kv_dtype = core.kv_dtype;
  options.quantization = core.quantization;
  options.block_size = static_cast<uint32_t>(core.block_size);
  options.protocol_version = kProtocolVersion;
  options.model = model.name;
  options.tokenizer_digest = model.tokenizer_digest;
  options.vocab_size = static_cast<uint32_t>(model.config.vocab_size);
  options.num_layers = static_cast<uint32_t>(model.config.num_layers);
  options.num_kv_heads = static_cast<uint32_t>(model.config.num_kv_heads);
  options.head_dim = static_cast<uint32_t>(model.config.head_dim);
  options.max_model_len = core.max_model_len > 0 ? core.max_model_len : model.config.MaxModelLen();
  return options;
}

}  // namespace

RouterCore::RouterCore(const RouterCoreOptions& options, ServedModel model,
                       std::unique_ptr<DecodeClient> decode_client, Metrics* metrics, Clock* clock)
    : model_(std::move(model)),
      migrate_(options.migrate),
      stalled_after_(options.dispatcher.stalled_after),
      lost_after_(options.lost_after),
      spans_(options.spans),
      trace_sample_ratio_(options.trace_sample_ratio),
      id_(fmt::format("router-{:016x}", RandomUint64())),
      clock_(clock),
      metrics_(metrics),
      max_model_len_(options.max_model_len > 0 ? options.max_model_len
                                               : model_.config.MaxModelLen()),
      registry_(MakeRegistryOptions(options, model_), &index_, clock),
      policy_(options.policy),
      decode_client_(std::move(decode_client)),
      suspects_(clock),
      // A timer that comes before all others must end a sleep that was to last until those.
      timers_(clock, [this] { dispatcher_.Wake(); }),
      dispatcher_(options.dispatcher, &registry_, &index_, &policy_, &metrics_, clock) {
  registry_.SetListener([this] { OnClusterChanged(); });
}

RouterCore::~RouterCore() {
  stopping_ = true;
  dispatcher_.Wake();
  if (thread_.joinable()) thread_.join();
}

void RouterCore::Start() {
  thread_ = std::thread([this] {
    while (!stopping_) Step(absl::InfiniteDuration());
  });
}

void RouterCore::Step(absl::Duration wait) {
  timers_.FireDue();
  LookForStuck();
  SummariseLoad();
  dispatcher_.Step(std::min(wait, std::min(timers_.Next(), next_look_) - clock_->Now()));
}

absl::Time RouterCore::NextDue() const {
  return std::min({timers_.Next(), next_look_, dispatcher_.NextTimeLimit(clock_->Now())});
}

void RouterCore::LookForStuck() {
  const absl::Time now = clock_->Now();
  if (now < next_look_) return;
  next_look_ = now + kLookForStuck;
  std::set<PrefixIndex::Slot> stuck;
  const std::shared_ptr<const ClusterView> view = registry_.view();  // others replace it meanwhile
  RouterMetrics::WorkerCounts counts;
  for (const WorkerView& worker : view->workers) {
    ++counts[{WorkerRoleName(worker.identity->role), worker.State(now, stalled_after_)}];
    const absl::Duration stalled = worker.Stalled(now);
    if (stalled < std::min(stalled_after_, lost_after_)) continue;
    const bool lost = stalled >= lost_after_;
    const WorkerIdentity& identity = *worker.identity;
    const auto streams = running_.At(identity.id);
    if (lost && stuck.insert(identity.slot).second && !stuck_.contains(identity.slot)) {
      spdlog::warn("worker {} makes no progress since {}: its {} streams go on elsewhere",
                   identity.id, absl::FormatDuration(stalled), streams.size());
    }
    for (const std::shared_ptr<RequestStream>& stream : streams) {
      stream->OnWorkerStuck(identity.id, lost);
    }
  }
  stuck_ = std::move(stuck);
  metrics_.SetWorkers(counts);
}

// Looks no more often than LookForStuck makes the driver turn.
void RouterCore::SummariseLoad() {
  const absl::Time now = clock_->Now();
  if (!load_summary_.Due(now)) return;
  LoadSample sample;
  sample.requests = metrics_.AllRequests();
  sample.prompt_tokens = metrics_.prompt_tokens.Value();
  sample.cached_tokens = metrics_.actual_hit_tokens.Value();
  sample.generated_tokens = metrics_.generation_tokens.Value();
  sample.running = metrics_.running.Value();
  sample.waiting = metrics_.waiting.Value();
  double blocks = 0;
  const std::shared_ptr<const ClusterView> view = registry_.view();
  for (const WorkerView& worker : view->workers) {
    if (worker.prefills()) continue;
    blocks += worker.identity->num_blocks;
    sample.kv_usage += worker.load->blocks_used;
  }
  if (blocks > 0) sample.kv_usage /= blocks;
  const std::optional<LogFields> line = load_summary_.Take(now, sample);
  if (line.has_value()) LogEvent(spdlog::level::info, "load", *line);
}

absl::StatusOr<std::shared_ptr<RequestStream>> RouterCore::NewStream(Request request,
                                                                     StreamSink* sink) {
  absl::StatusOr<TextEmitter> text =
      TextEmitter::Create(model_.tokenizer, request.stop, request.min_tokens);
  if (!text.ok()) return WithField(text.status(), "sampling.stop");
  if (spans_ != nullptr && !request.trace.valid()) {
    request.trace = SampleTrace(trace_sample_ratio_);
  }
  return std::make_shared<RequestStream>(
      std::move(request), *std::move(text), sink,
      StreamContext{&dispatcher_, decode_client_.get(), &metrics_, &timers_, clock_, &registry_,
                    &suspects_, &running_, &access_log_, migrate_, spans_});
}

void RouterCore::NoteRefused(const AccessRecord& record) {
  metrics_.requests(record.status.code()).Increment();
  metrics_.rejected(record.status.code()).Increment();
  access_log_.Write(record);
}

std::unique_ptr<Membership> RouterCore::Join(Membership::Send send) {
  return std::make_unique<Membership>(id_, &registry_, &index_, std::move(send));
}

int RouterCore::max_model_len() const {
  const int held = registry_.view()->max_model_len;
  return held > 0 ? std::min(held, max_model_len_) : max_model_len_;
}

void RouterCore::OnClusterChanged() {
  dispatcher_.Wake();
  const uint64_t roster = registry_.roster();
  if (roster_.exchange(roster) == roster) return;
  decode_client_->Keep(*registry_.view());
  if (listener_) listener_();
}

}  // namespace tandem::router
