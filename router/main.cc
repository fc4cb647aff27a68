// tandem_router: the front door of a cluster.

#include <algorithm>
#include <cstdio>
#include <string>

#include "absl/strings/ascii.h"
#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "common/base/build_info.h"
#include "common/base/heap.h"
#include "common/base/locks.h"
#include "common/base/log.h"
#include "common/base/model_digest.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/config/flags.h"
#include "common/metrics/metrics.h"
#include "common/metrics/process_metrics.h"
#include "common/metrics/tls_metrics.h"
#include "common/rpc/cluster_flags.h"
#include "common/rpc/server.h"
#include "common/trace/otlp_client.h"
#include "router/router_flags.h"
#include "router/router_server.h"

namespace tandem::router {
namespace {

constexpr size_t kDigestDigits = 32;

absl::Status CheckFlags(const RouterFlags& flags) {
  if (flags.model.empty()) return InvalidArgument("--model is required: the model's directory");
  if (!flags.model_digest.empty() &&
      (flags.model_digest.size() != kDigestDigits ||
       !std::all_of(flags.model_digest.begin(), flags.model_digest.end(), absl::ascii_isxdigit))) {
    return InvalidArgument("--model-digest must have {} hex digits, got '{}'", kDigestDigits,
                           flags.model_digest);
  }
  if (flags.block_size < 0) {
    return InvalidArgument("--block-size must be at least 0, got {}", flags.block_size);
  }
  if (flags.max_queued_requests < 1 || flags.max_queued_requests > 1'000'000) {
    return InvalidArgument("--max-queued-requests must be 1 to 1000000, got {}",
                           flags.max_queued_requests);
  }
  if (flags.max_queued_tokens < 1 || flags.max_queued_tokens > uint64_t{1} << 40) {
    return InvalidArgument("--max-queued-tokens must be 1 to 2^40, got {}",
                           flags.max_queued_tokens);
  }
  if (flags.max_streams < 1) {
    return InvalidArgument("--max-streams must be at least 1, got {}", flags.max_streams);
  }
  if (flags.max_streams_per_connection < 1) {
    return InvalidArgument("--max-streams-per-connection must be at least 1, got {}",
                           flags.max_streams_per_connection);
  }
  if (flags.rpc_memory_bytes < int64_t{64} << 20) {
    return InvalidArgument("--rpc-memory-bytes must be at least 64MiB, got {}",
                           flags.rpc_memory_bytes);
  }
  if (flags.max_priority < 0 || flags.max_priority > 1'000'000) {
    return InvalidArgument("--max-priority must be 0 to 1000000, got {}", flags.max_priority);
  }
  if (flags.tls_cert.empty() != flags.tls_key.empty()) {
    return InvalidArgument("--tls-cert and --tls-key go together");
  }
  if (!flags.tls_client_ca.empty() && flags.tls_cert.empty()) {
    return InvalidArgument("--tls-client-ca needs --tls-cert and --tls-key");
  }
  TANDEM_RETURN_IF_ERROR(CheckClusterFlags(flags.cluster_tls));
  TANDEM_RETURN_IF_ERROR(CheckMetricsFlags(flags.metrics, !flags.cluster_tls.certificate.empty()));
  const auto seconds = [](const char* name, double value, double low) {
    if (value >= low && value <= 1e6) return absl::OkStatus();
    return InvalidArgument("{} must be {} to 1e6 seconds, got {}", name, low, value);
  };
  TANDEM_RETURN_IF_ERROR(seconds("--queue-timeout", flags.queue_timeout, 0));
  TANDEM_RETURN_IF_ERROR(seconds("--max-wait", flags.max_wait, 0));
  TANDEM_RETURN_IF_ERROR(seconds("--no-worker-timeout", flags.no_worker_timeout, 0));
  TANDEM_RETURN_IF_ERROR(seconds("--request-timeout", flags.request_timeout, 0.001));
  TANDEM_RETURN_IF_ERROR(seconds("--worker-stalled-after", flags.worker_stalled_after, 0.5));
  TANDEM_RETURN_IF_ERROR(
      seconds("--worker-lost-after", flags.worker_lost_after, flags.worker_stalled_after));
  TANDEM_RETURN_IF_ERROR(seconds("--drain-timeout", flags.drain_timeout, 0));
  if (flags.max_prompt_bytes < 1) {
    return InvalidArgument("--max-prompt-bytes must be at least 1, got {}", flags.max_prompt_bytes);
  }
  if (!(flags.trace_sample_ratio >= 0 && flags.trace_sample_ratio <= 1)) {
    return InvalidArgument("--trace-sample-ratio must be 0 to 1, got {}", flags.trace_sample_ratio);
  }
  return CheckTraceFlags(flags.trace);
}

RouterServerOptions MakeOptions(const RouterFlags& flags) {
  RouterServerOptions options;
  options.listen_address = flags.listen;
  options.internal_listen_address = flags.internal_listen;
  options.health_listen_address = flags.health_listen;
  options.api_keys_file = flags.api_keys_file;
  options.insecure = flags.insecure;
  options.tls = {flags.tls_cert, flags.tls_key, flags.tls_client_ca};
  options.core.dispatcher.max_queued_requests = static_cast<int>(flags.max_queued_requests);
  options.core.dispatcher.queue_timeout = absl::Seconds(flags.queue_timeout);
  options.core.dispatcher.max_wait = absl::Seconds(flags.max_wait);
  options.core.dispatcher.no_worker_timeout = absl::Seconds(flags.no_worker_timeout);
  options.core.dispatcher.max_queued_tokens = static_cast<int64_t>(flags.max_queued_tokens);
  options.inference.max_streams = flags.max_streams;
  options.max_streams_per_connection = flags.max_streams_per_connection;
  options.rpc_memory_bytes = flags.rpc_memory_bytes;
  options.inference.max_priority = flags.max_priority;
  if (flags.dtype != "auto") options.core.dtype = flags.dtype;
  options.core.kv_dtype =
      flags.kv_cache_dtype == "auto" ? options.core.dtype : flags.kv_cache_dtype;
  if (flags.quantization != "auto") options.core.quantization = flags.quantization;
  options.core.block_size = flags.block_size;
  options.core.migrate = flags.migrate;
  options.core.dispatcher.stalled_after = absl::Seconds(flags.worker_stalled_after);
  options.core.lost_after = absl::Seconds(flags.worker_lost_after);
  options.core.dispatcher.cluster_secret = flags.cluster_secret;
  options.core.max_model_len = flags.max_model_len;
  options.core.trace_sample_ratio = flags.trace_sample_ratio;
  options.inference.max_prompt_bytes = static_cast<size_t>(flags.max_prompt_bytes);
  options.inference.normalize_prompts = flags.normalize_prompts;
  options.inference.request_timeout = absl::Seconds(flags.request_timeout);
  return options;
}

// What the weights of workers must be; "" where the router cannot tell.
absl::StatusOr<std::string> WantedDigest(const RouterFlags& flags) {
  if (!flags.model_digest.empty()) return absl::AsciiStrToLower(flags.model_digest);
  if (flags.load_format == "dummy") return DummyDigest(flags.model, flags.seed);
  const absl::StatusOr<std::string> digest = CheckpointDigest(flags.model);
  if (digest.ok() || !absl::IsNotFound(digest.status())) return digest;
  spdlog::warn(
      "the weights that workers must hold are not known, so the first worker says them; "
      "--model-digest pins them ({})",
      MessageOf(digest.status()));
  return "";
}

absl::Status Run(const RouterFlags& flags, SignalWaiter* signals) {
  TANDEM_ASSIGN_OR_RETURN(ServedModel model,
                          ServedModel::Load(flags.model, flags.served_model_name));
  if (flags.max_model_len < 0 || flags.max_model_len > model.config.MaxModelLen()) {
    return InvalidArgument("--max-model-len must be 0 to {}, the model's, got {}",
                           model.config.MaxModelLen(), flags.max_model_len);
  }
  Metrics metrics;  // of what `options` hold, too
  RouterServerOptions options = MakeOptions(flags);
  TANDEM_ASSIGN_OR_RETURN(options.core.model_digest, WantedDigest(flags));
  const MetricLabels labels = {{"role", "router"}, {"model_name", model.name}};
  metrics.SetLabels(labels);
  AddProcessMetrics(&metrics, labels);
  AddBuildInfo(&metrics);
  TANDEM_ASSIGN_OR_RETURN(
      options.certificate,
      OpenClusterCertificate(flags.cluster_tls, ShowExpiry(&metrics, TlsCertificate::kCluster)));
  std::function<TlsTexts()> metrics_tls;
  if (flags.metrics.tls) metrics_tls = [files = options.certificate] { return files->texts(); };
  TANDEM_RETURN_IF_ERROR(metrics.Serve(flags.metrics.listen, std::move(metrics_tls)));
  const std::unique_ptr<SpanSink> spans =
      StartTracing(flags.trace, kRouterProgram,
                   fmt::format("router-{:08x}", RandomUint64() & 0xffffffff), &metrics);
  options.core.spans = spans.get();
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<RouterServer> router,
                          RouterServer::Start(options, std::move(model), &metrics, Clock::Real()));
  const ServedModel& served = router->model();
  spdlog::info(
      "tandem_router: model {} ({}), max_model_len {}, vocabulary {}, tokenizer {}, chat "
      "template {}, queue {}",
      served.name, served.config.architecture, served.config.MaxModelLen(),
      served.config.vocab_size, served.tokenizer != nullptr ? "yes" : "none",
      served.chat_template.has_template() ? "yes" : "none", flags.max_queued_requests);
  const std::string health = router->health_address();
  fmt::print("listening {} metrics {} internal {}{}\n", router->address(), metrics.address(),
             router->internal_address(), health.empty() ? "" : " health " + health);
  std::fflush(stdout);
  const int signal = signals->Wait();
  spdlog::info("signal {}: draining, up to {} s", signal, flags.drain_timeout);
  const int cut = router->Drain(absl::Seconds(flags.drain_timeout));
  if (cut > 0) spdlog::warn("{} streams were cut off", cut);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  KeepFewHeaps();
  WatchNoLockOrders();
  SignalWaiter signals;
  RouterFlags flags;
  FlagSet set(kRouterProgram, kRouterSummary);
  AddRouterFlags(&set, &flags);
  set.AnswerVersion(VersionText(set.program()));
  absl::Status status = set.Parse(argc, argv);
  if (status.ok() && set.HelpRequested()) {
    fmt::print("{}", set.Help());
    return 0;
  }
  if (status.ok()) status = CheckFlags(flags);
  if (status.ok()) status = ResolveModelDir("--model", &flags.model);
  if (!status.ok()) {
    fmt::print(stderr, "tandem_router: {}\n", MessageOf(status));
    return 2;
  }
  StartLog("router", flags.log);
  status = Run(flags, &signals);
  if (!status.ok()) {
    ReportFailure("tandem_router", MessageOf(status));
    return 1;
  }
  FlushLog();
  return 0;
}

}  // namespace
}  // namespace tandem::router

int main(int argc, char** argv) { return tandem::router::Main(argc, argv); }
