// `tandem bench`: sends a workload to a running cluster and says what it was given.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>
#include <unistd.h>

#include "fmt/format.h"

#include "cli/bench/bench_flags.h"
#include "cli/bench/grpc_bench_client.h"
#include "cli/bench/html_report.h"
#include "cli/bench/openai_bench_client.h"
#include "cli/bench/progress.h"
#include "cli/command.h"
#include "cli/inference_client.h"
#include "common/base/clock.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/server.h"

namespace tandem::cli {
namespace {

constexpr int kExitInterrupted = 130;

// The first signal ends the run early, with a report of what there is; the second one the program.
class StopOnSignal {
 public:
  StopOnSignal(SignalWaiter* signals, BenchRunner* runner)
      : signals_(signals), thread_([this, runner] {
          if (signals_->Wait() == 0) return;
          runner->Stop();
          if (signals_->Wait() != 0) _exit(kExitInterrupted);
        }) {}
  ~StopOnSignal() {
    signals_->Wake();
    thread_.join();
  }

 private:
  SignalWaiter* const signals_;
  std::thread thread_;
};

class Bench {
 public:
  Bench(const BenchFlags& flags, BenchPlan plan, BenchClient* client, SignalWaiter* signals)
      : flags_(flags), plan_(std::move(plan)), client_(client), signals_(signals) {
    salt_ =
        flags.cache_salt.empty() ? fmt::format("bench-{:016x}", RandomUint64()) : flags.cache_salt;
  }

  absl::Status WarmUp(BenchClient* client) {
    if (plan_.warm_up.empty()) return absl::OkStatus();
    RunnerOptions options = plan_.runner;
    options.open_loop = false;
    options.cache_salt = salt_ + "-warm-up";
    const RunOutcome outcome = Run(client, options, plan_.warm_up, "warm-up");
    if (outcome.stopped) return Cancelled("stopped in the warm-up");
    for (const RequestRecord& record : outcome.records) TANDEM_RETURN_IF_ERROR(record.status);
    return absl::OkStatus();
  }

  // False if it was stopped.
  bool RunStaticBatches() {
    RunnerOptions options = plan_.runner;
    options.open_loop = false;
    options.static_batches = true;
    if (options.max_concurrency == 0) options.max_concurrency = 16;
    options.cache_salt = salt_ + "-static";
    const RunOutcome outcome = Run(client_, options, plan_.workload, "static batches");
    other_ = {"static batches", "static_batches_run", plan_.setup, MeasureRun(outcome)};
    other_->setup.request_rate = 0;
    other_->setup.static_batches = true;
    other_->setup.max_concurrency = options.max_concurrency;
    return !outcome.stopped;
  }

  // On another server, whose model is `model`. False if it was stopped.
  bool RunElsewhere(BenchClient* client, const std::string& url, const std::string& model) {
    RunnerOptions options = plan_.runner;
    options.cache_salt = salt_;
    const RunOutcome outcome = Run(client, options, plan_.workload, url);
    other_ = {url, "compared_run", plan_.setup, MeasureRun(outcome)};
    other_->setup.backend = kOpenAiBackend;
    other_->setup.model = model;
    return !outcome.stopped;
  }

  void RunMain() {
    RunnerOptions options = plan_.runner;
    options.cache_salt = salt_;
    outcome_ = Run(client_, options, plan_.workload, "bench");
    metrics_ = MeasureRun(outcome_);
  }

  nlohmann::ordered_json Json(bool detailed) const {
    nlohmann::ordered_json json = ReportJson(plan_.setup, metrics_);
    if (other_) json[other_->key] = ReportJson(other_->setup, other_->metrics);
    if (detailed) AddDetails(outcome_.records, &json);
    return json;
  }

  std::string Html() const {
    const nlohmann::ordered_json json = Json(/*detailed=*/false);
    if (!other_) return RenderHtml(plan_.setup, metrics_, outcome_.records, json);
    return RenderHtml(plan_.setup, metrics_, outcome_.records, json, other_->name,
                      json[other_->key]);
  }

  void PrintText() const {
    if (other_) fmt::print("{}", RenderReport(other_->setup, other_->metrics));
    fmt::print("{}", RenderReport(plan_.setup, metrics_));
    if (other_) {
      fmt::print("{}", RenderComparison(plan_.setup, metrics_, other_->metrics, other_->name));
    }
  }

  bool stopped() const { return outcome_.stopped; }
  size_t completed() const { return metrics_.completed; }
  const BenchSetup& setup() const { return plan_.setup; }

 private:
  // The same requests in another way, or elsewhere.
  struct OtherRun {
    std::string name;
    std::string key;  // in the JSON object
    BenchSetup setup;
    BenchMetrics metrics;
  };

  RunOutcome Run(BenchClient* client, const RunnerOptions& options,
                 const std::vector<Conversation>& workload, const std::string& label) {
    BenchRunner runner(options, client, Clock::Real());
    StopOnSignal stop(signals_, &runner);
    ProgressPrinter printer(label, workload.size());
    BenchRunner::OnProgress show;
    if (flags_.progress) show = [&](const RunProgress& progress) { printer.Show(progress); };
    RunOutcome outcome = runner.Run(workload, show);
    if (flags_.progress) printer.Clear();
    return outcome;
  }

  BenchMetrics MeasureRun(const RunOutcome& outcome) const {
    return Measure(outcome.records, outcome.duration, plan_.goodput, plan_.setup.percentiles);
  }

  const BenchFlags& flags_;
  const BenchPlan plan_;
  BenchClient* const client_;
  SignalWaiter* const signals_;
  std::string salt_;
  RunOutcome outcome_;
  BenchMetrics metrics_;
  std::optional<OtherRun> other_;
};

absl::Status SaveTo(const std::string& path, const std::string& text) {
  std::ofstream out(path);
  out << text;
  out.close();
  if (!out) return Unavailable("cannot write {}", path);
  return absl::OkStatus();
}

absl::Status SaveResult(const BenchFlags& flags, const Bench& bench) {
  std::string name = flags.result_filename;
  if (name.empty()) {
    std::string model = bench.setup().model;
    std::replace(model.begin(), model.end(), '/', '_');
    const std::string rate =
        bench.setup().request_rate > 0 ? fmt::format("{}", bench.setup().request_rate) : "inf";
    name = fmt::format("tandem-{}qps-{}-{}.json", rate, model, bench.setup().date);
  }
  const std::string path = (std::filesystem::path(flags.result_dir) / name).string();
  return SaveTo(path, JsonLine(bench.Json(flags.save_detailed)) + "\n");
}

absl::StatusOr<std::unique_ptr<BenchClient>> MakeClient(const BenchFlags& flags,
                                                        const PublicServer& server) {
  if (flags.api == "openai") {
    OpenAiBenchClientOptions options;
    TANDEM_ASSIGN_OR_RETURN(options.url, ParseHttpUrl("--url", flags.url));
    options.model = flags.model;
    options.api_key = server.api_key;
    options.temperature = flags.temperature;
    options.ignore_eos = flags.ignore_eos;
    return std::make_unique<OpenAiBenchClient>(std::move(options));
  }
  GrpcBenchClientOptions options;
  options.server = server;
  options.model = flags.model;
  options.connections = flags.connections;
  options.sampling.set_temperature(static_cast<float>(flags.temperature));
  options.sampling.set_ignore_eos(flags.ignore_eos);
  return std::make_unique<GrpcBenchClient>(options);
}

// As Bench::RunElsewhere. That server is shown no key, which is the other one's.
absl::StatusOr<bool> RunElsewhere(const BenchFlags& flags, Bench* bench) {
  OpenAiBenchClientOptions options;
  TANDEM_ASSIGN_OR_RETURN(options.url, ParseHttpUrl("--compare-url", flags.compare_url));
  options.temperature = flags.temperature;
  options.ignore_eos = flags.ignore_eos;
  OpenAiBenchClient client(std::move(options));
  TANDEM_ASSIGN_OR_RETURN(const BenchModel model, client.Describe());
  TANDEM_RETURN_IF_ERROR(bench->WarmUp(&client));
  return bench->RunElsewhere(&client, flags.compare_url, model.id);
}

int Execute(const BenchFlags& flags, const PublicServer& server) {
  SignalWaiter signals;
  const absl::StatusOr<std::unique_ptr<BenchClient>> made = MakeClient(flags, server);
  if (!made.ok()) return Fail("bench", made.status());
  BenchClient& client = **made;
  // What went wrong with another server than --server says which it is.
  const auto fail = [&](const std::string& what, const absl::Status& status) {
    return flags.url.empty() ? Fail(what, status, server) : Fail(what, status);
  };
  const absl::StatusOr<BenchModel> model = client.Describe();
  if (!model.ok()) return fail("bench", model.status());
  absl::StatusOr<BenchPlan> plan = MakePlan(flags, *model);
  if (!plan.ok()) return Fail("bench", plan.status());
  if (plan->left_out > 0) {
    fmt::print(stderr, "left out: {} of {} requests, longer than max_model_len {}\n",
               plan->left_out, plan->left_out + plan->workload.size(), model->max_model_len);
  }
  Bench bench(flags, *std::move(plan), &client, &signals);
  if (const absl::Status status = bench.WarmUp(&client); !status.ok()) {
    return fail("bench: warm-up", status);
  }
  if (flags.compare_static && !bench.RunStaticBatches()) return kExitInterrupted;
  if (!flags.compare_url.empty()) {
    const absl::StatusOr<bool> ran = RunElsewhere(flags, &bench);
    if (!ran.ok()) return Fail("bench: --compare-url", ran.status());
    if (!*ran) return kExitInterrupted;
  }
  bench.RunMain();
  if (flags.json) {
    fmt::print("{}\n", JsonLine(bench.Json(flags.save_detailed)));
  } else {
    bench.PrintText();
  }
  if (flags.save_result || flags.save_detailed || !flags.result_filename.empty()) {
    if (const absl::Status status = SaveResult(flags, bench); !status.ok()) {
      return Fail("bench", status);
    }
  }
  if (!flags.html.empty()) {
    if (const absl::Status status = SaveTo(flags.html, bench.Html()); !status.ok()) {
      return Fail("bench: --html", status);
    }
  }
  if (bench.stopped()) return kExitInterrupted;
  return bench.completed() > 0 ? kExitOk : kExitFailed;
}

}  // namespace

int RunBench(const Arguments& arguments) {
  FlagSet parser("tandem bench", "Sends requests to a running cluster and measures the answers.");
  BenchFlags flags;
  flags.AddTo(&parser);
  PublicServer server;
  if (const auto exit_code = ParseOrExit(&parser, arguments, flags.server, &server)) {
    return *exit_code;
  }
  if (const absl::Status status = flags.Check(); !status.ok()) {
    fmt::print(stderr, "tandem bench: {}\n", MessageOf(status));
    return kExitUsage;
  }
  return Execute(flags, server);
}

}  // namespace tandem::cli
