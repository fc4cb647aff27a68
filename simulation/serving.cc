#include "simulation/serving.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"

#include "common/base/check.h"
#include "router/api/request_wire.h"
#include "router/request/stream_sink.h"
#include "simulation/cluster.h"
#include "simulation/event_queue.h"
#include "simulation/timed_kv_network.h"

namespace tandem::simulation {
namespace {

// What a message takes from one process to the next.
constexpr absl::Duration kHop = absl::Microseconds(100);
// A message goes through so many processes at most until something is computed.
constexpr int kHopsUntilQuiet = 5;
// The router looks at its timers so often.
constexpr absl::Duration kLongestJump = absl::Milliseconds(10);
constexpr absl::Duration kPatience = absl::Hours(24);  // of a client

StepShape ShapeOf(const engine::Batch& batch) {
  StepShape shape;
  for (const engine::BatchItem& item : batch.items) {
    shape.Add(item.start, item.num_tokens, item.sampling != nullptr);
  }
  return shape;
}

// A client that reads at once and notes when each token came.
class Client final : public router::StreamSink {
 public:
  Client(size_t index, Answer answer, absl::Time start, Clock* clock)
      : index(index), answer(std::move(answer)), start_(start), clock_(clock) {}

  void Begin(router::RouterCore* core, router::Request request) {
    auto stream = core->NewStream(std::move(request), this);
    if (!stream.ok()) return Finish(stream.status());
    stream_ = *std::move(stream);
    stream_->Begin();
  }
  // What came since the last call has been read. False where there was nothing.
  bool Read() {
    if (!std::exchange(written_, false)) return false;
    stream_->OnWritten(true);
    return true;
  }
  void Cancel() {
    if (!finished) stream_->OnClientGone();
  }

  // StreamSink.
  void Write(const router::GenerateResponse& response) override {
    const absl::Duration now = clock_->Now() - start_;
    answer.arrivals.insert(answer.arrivals.end(), response.token_ids.size(), now);
    answer.cached_tokens = response.cached_tokens;
    written_ = true;
  }
  void Finish(const absl::Status& status) override {
    answer.status = status;
    answer.ended = clock_->Now() - start_;
    finished = true;
  }
  void Abort() override {}

  const size_t index;
  Answer answer;
  bool finished = false;

 private:
  const absl::Time start_;
  Clock* const clock_;
  std::shared_ptr<router::RequestStream> stream_;
  bool written_ = false;
};

// What comes within a span of time.
class Throughput {
 public:
  Throughput(absl::Duration begin, absl::Duration end) : begin_(begin), end_(end) {}

  void Add(const Answer& answer) {
    const auto within = [this](absl::Duration at) { return at >= begin_ && at < end_; };
    tokens_ += std::count_if(answer.arrivals.begin(), answer.arrivals.end(), within);
    requests_ += answer.status.ok() && within(answer.ended) ? 1 : 0;
  }
  double tokens_per_second() const { return PerSecond(tokens_); }
  double requests_per_second() const { return PerSecond(requests_); }

 private:
  double PerSecond(int64_t amount) const {
    const double seconds = absl::ToDoubleSeconds(end_ - begin_);
    return seconds > 0 ? static_cast<double>(amount) / seconds : 0;
  }
  const absl::Duration begin_, end_;
  int64_t tokens_ = 0;
  int64_t requests_ = 0;
};

class Server {
 public:
  Server(const Split& split, const WorkerPlan& worker, const CostModel& cost,
         const ModelWork& model, const Traffic& traffic)
      : traffic_(traffic),
        host_(worker.host),
        start_(events_.Now()),
        kv_({worker.link_bytes_per_second, model.KvBytesPerToken() * worker.block_size,
             model.num_layers()},
            &events_) {
    InProcessClusterOptions options;
    options.unified = split.unified > 0;
    options.prefill_workers = split.prefill;
    options.decode_workers = options.unified ? split.unified : split.decode;
    options.kv = &kv_;
    options.clock = &events_.clock();
    options.worker.max_model_len = max_model_len_ = worker.max_model_len;
    options.worker.max_num_seqs = worker.max_num_seqs;
    options.worker.max_num_batched_tokens = worker.max_num_batched_tokens;
    options.worker.local_prefill_max_tokens = decode::AdmissionOptions().local_prefill_max_tokens;
    options.worker.target_step = worker.target_step;
    options.worker.row_tile = worker.row_tile;
    options.worker.engine.num_blocks = worker.num_blocks;
    options.worker.engine.block_size = worker.block_size;
    options.worker.engine.model.vocab_size = traffic.vocab_size;
    options.worker.engine.step_time = [this, &cost, &model](const engine::Batch& batch) {
      return TakeCores(cost, model, ShapeOf(batch));
    };
    model_ = InProcessCluster::MakeModel(options.worker);
    cluster_ = std::make_unique<InProcessCluster>(options);
  }
  // No stream may outlive the router, and no prompt its worker's sender.
  ~Server() {
    next_ = traffic_.requests.size();
    for (const auto& client : clients_) client->Cancel();
    while (!clients_.empty() || !cluster_->Held().empty()) Turn();
  }

  // Sends what is due and steps everybody; then time goes on to where something happens next.
  void Turn() {
    bool moved = cluster_->StepAll();
    while (events_.RunNext(events_.Now())) moved = true;
    for (const auto& client : clients_) moved |= client->Read();
    quiet_turns_ = moved ? 0 : quiet_turns_ + 1;
    const absl::Time now = events_.Now();
    absl::Time next = std::min({cluster_->NextStepEnd(), events_.NextAt(), NextDue()});
    next = std::min(next, now + (quiet_turns_ < kHopsUntilQuiet ? kHop : kLongestJump));
    if (next > now) events_.clock().Advance(next - now);
    cluster_->core().Wake();
    TakeFinished();
  }
  void SendDue() {
    while (NextDue() <= events_.Now()) Send(next_++);
  }

  absl::Duration now() { return events_.Now() - start_; }
  double PrefillBusy() {
    const auto& prefills = cluster_->prefills();
    if (prefills.empty()) return 0;
    absl::Duration busy;
    for (const auto& worker : prefills) busy += worker->engine().TimeBusy();
    return std::min(1.0, absl::FDivDuration(busy, now() * static_cast<int>(prefills.size())));
  }
  std::vector<std::pair<size_t, Answer>> TakeAnswers() { return std::exchange(answers_, {}); }

 private:
  // How long a step takes that begins now, beside those that run now.
  absl::Duration TakeCores(const CostModel& cost, const ModelWork& model, const StepShape& step) {
    const absl::Time now = events_.Now();
    std::erase_if(step_ends_, [now](absl::Time end) { return end <= now; });
    const int workers = static_cast<int>(step_ends_.size()) + 1;  // each has one step at a time
    const absl::Duration takes = absl::Seconds(
        cost.Seconds(model, step, SlowdownOf(host_, workers, cost.ReadBytesPerSecond())));
    step_ends_.push_back(now + takes);
    return takes;
  }

  absl::Time NextDue() const {
    return next_ < traffic_.requests.size() ? start_ + traffic_.requests[next_].due
                                            : absl::InfiniteFuture();
  }

  void Send(size_t i) {
    const Traffic::Request& request = traffic_.requests[i];
    v1::GenerateRequest message;
    for (const int32_t token : traffic_.prompt(i)) {
      message.mutable_token_ids()->add_ids(static_cast<uint32_t>(token));
    }
    message.mutable_sampling()->set_temperature(0);
    message.mutable_sampling()->set_ignore_eos(true);
    message.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(request.answer_tokens));
    Answer answer;
    answer.due = request.due;
    answer.prompt_tokens = request.prompt_tokens;
    clients_.push_back(std::make_unique<Client>(i, std::move(answer), start_, &events_.clock()));
    router::RequestLimits limits;
    limits.max_model_len = max_model_len_;
    const absl::Time now = events_.Now();
    auto parsed = router::GenerateRequestFromProto(model_, limits, message, now, now + kPatience,
                                                   &events_.clock());
    if (!parsed.ok()) return clients_.back()->Finish(parsed.status());
    clients_.back()->Begin(&cluster_->core(), *std::move(parsed));
  }

  void TakeFinished() {
    std::erase_if(clients_, [this](const std::unique_ptr<Client>& client) {
      if (!client->finished) return false;
      answers_.emplace_back(client->index, std::move(client->answer));
      return true;
    });
  }

  const Traffic& traffic_;
  const Host host_;
  std::vector<absl::Time> step_ends_;  // of all workers
  EventQueue events_;
  const absl::Time start_;
  TimedKvNetwork kv_;
  int max_model_len_ = 0;
  router::ServedModel model_;
  std::unique_ptr<InProcessCluster> cluster_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<std::pair<size_t, Answer>> answers_;  // with their request's place
  size_t next_ = 0;                                 // request
  int quiet_turns_ = 0;
};

}  // namespace

std::string Split::Name() const {
  return unified > 0 ? absl::StrCat("unified x", unified) : absl::StrCat(prefill, "P", decode, "D");
}

std::vector<Split> SplitsOf(int cards) {
  std::vector<Split> splits;
  for (int prefill = 1; prefill < cards; ++prefill) splits.push_back({prefill, cards - prefill, 0});
  splits.push_back({0, 0, cards});
  return splits;
}

Outcome Serve(const Split& split, const WorkerPlan& worker, const CostModel& cost,
              const ModelWork& model, const Traffic& traffic, const Window& window,
              const std::function<bool(const Answer&)>& on_answer) {
  TANDEM_CHECK(window.first < window.last && window.last <= traffic.requests.size(),
               "a window of requests that there are not");
  Outcome outcome;
  outcome.answers.resize(window.last - window.first);
  for (Answer& answer : outcome.answers) answer.status = absl::CancelledError("not simulated");
  size_t left = outcome.answers.size();
  bool wanted = true;
  Throughput throughput(traffic.requests[window.first].due, traffic.requests[window.last - 1].due);
  Server server(split, worker, cost, model, traffic);
  while (wanted && left > 0) {
    server.SendDue();
    server.Turn();
    for (auto& [i, answer] : server.TakeAnswers()) {
      throughput.Add(answer);
      if (i < window.first || i >= window.last) continue;
      --left;
      if (on_answer && !on_answer(answer)) wanted = false;
      outcome.answers[i - window.first] = std::move(answer);
    }
  }
  outcome.tokens_per_second = throughput.tokens_per_second();
  outcome.requests_per_second = throughput.requests_per_second();
  outcome.simulated = server.now();
  outcome.prefill_busy = server.PrefillBusy();
  return outcome;
}

}  // namespace tandem::simulation
