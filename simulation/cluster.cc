#include "simulation/cluster.h"

#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

#include "common/base/check.h"
#include "common/rpc/token_wire.h"
#include "router/api/response_wire.h"

namespace tandem {
namespace {

// A call to a decode worker of this process. Events wait here until the driver delivers them, since
// a handler may not be called from within the calls that it makes.
class Call final : public router::DecodeCall {
 public:
  explicit Call(std::shared_ptr<router::DecodeHandler> handler) : handler_(std::move(handler)) {}

  void Bind(InProcessDecodeWorker* worker, uint64_t id) {
    absl::MutexLock lock(&mutex_);
    worker_ = worker;
    id_ = id;
  }
  bool IsAt(const InProcessDecodeWorker* worker) {
    absl::MutexLock lock(&mutex_);
    return worker_ == worker;
  }
  void Push(const internal::v1::TokenEvent& event) {
    absl::MutexLock lock(&mutex_);
    events_.push_back(TokenEventFromProto(event));
  }
  void End(const absl::Status& status) {
    absl::MutexLock lock(&mutex_);
    end_ = status;
  }

  void ReadNext() override {
    absl::MutexLock lock(&mutex_);
    reading_ = true;
  }
  void ReadToEnd() override {
    absl::MutexLock lock(&mutex_);
    unwanted_ = true;
  }
  void Cancel() override {
    absl::MutexLock lock(&mutex_);
    unwanted_ = true;
    if (id_ != 0) worker_->Cancel(id_);
  }

  // Hands out at most one event or the end, and counts it. False once the end was handed out.
  bool Deliver(int* delivered) {
    std::optional<TokenEvent> event;
    std::optional<absl::Status> end;
    {
      absl::MutexLock lock(&mutex_);
      if (unwanted_) events_.clear();
      if (!events_.empty() && reading_) {
        event = std::move(events_.front());
        events_.pop_front();
        reading_ = false;
      } else if (events_.empty() && end_.has_value()) {
        end = *end_;
      }
    }
    *delivered += event.has_value() || end.has_value() ? 1 : 0;
    if (event.has_value()) handler_->OnEvent(*std::move(event));
    if (end.has_value()) handler_->OnEnd(*end);
    return !end.has_value();
  }

 private:
  const std::shared_ptr<router::DecodeHandler> handler_;
  absl::Mutex mutex_;
  InProcessDecodeWorker* worker_ ABSL_GUARDED_BY(mutex_) = nullptr;
  uint64_t id_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: refused, or not sent yet
  std::deque<TokenEvent> events_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  bool reading_ ABSL_GUARDED_BY(mutex_) = true;  // the first event is read at once
  bool unwanted_ ABSL_GUARDED_BY(mutex_) = false;
};

// What comes is served however late it is: how late is what is asked for.
router::RouterCoreOptions PatientRouter() {
  router::RouterCoreOptions options;
  options.dispatcher.max_wait = absl::InfiniteDuration();
  return options;
}

}  // namespace

// All calls to decode workers of the cluster. Thread-safe, but for Deliver, which one thread calls.
class InProcessCluster::Decoding {
 public:
  explicit Decoding(const std::vector<std::unique_ptr<InProcessDecodeWorker>>* workers,
                    FakeClock* clock)
      : workers_(workers), clock_(clock) {}

  std::shared_ptr<router::DecodeCall> Start(const router::Route& route,
                                            const router::Request& request,
                                            std::span<const int32_t> generated,
                                            std::shared_ptr<router::DecodeHandler> handler) {
    auto call = std::make_shared<Call>(std::move(handler));
    internal::v1::DecodeRequest message;
    router::DecodeRequestToProto(route, request, generated, &message);
    for (const auto& worker : *workers_) {
      if (worker->address() != route.decode.address) continue;
      const uint64_t id = worker->Generate(
          message, request.deadline - clock_->Now(),
          [call](internal::v1::TokenEvent event) { call->Push(event); },
          [call](absl::Status status) { call->End(status); });
      call->Bind(worker.get(), id);
    }
    absl::MutexLock lock(&mutex_);
    calls_.push_back(call);
    return call;
  }

  // What has come from the worker so far still arrives.
  void Break(const InProcessDecodeWorker* worker) {
    absl::MutexLock lock(&mutex_);
    for (const auto& call : calls_) {
      if (call->IsAt(worker)) call->End(absl::UnavailableError("Socket closed"));
    }
  }

  // How many events and ends it was.
  int Deliver() {
    std::vector<std::shared_ptr<Call>> calls;
    {
      absl::MutexLock lock(&mutex_);
      calls = calls_;
    }
    int delivered = 0;
    for (const auto& call : calls) {
      if (call->Deliver(&delivered)) continue;
      absl::MutexLock lock(&mutex_);
      std::erase(calls_, call);
    }
    return delivered;
  }

 private:
  const std::vector<std::unique_ptr<InProcessDecodeWorker>>* const workers_;
  FakeClock* const clock_;
  absl::Mutex mutex_;
  std::vector<std::shared_ptr<Call>> calls_ ABSL_GUARDED_BY(mutex_);
};

namespace {

// The router owns its client; what it does is the cluster's.
template <typename Decoding>
class DecodeClient final : public router::DecodeClient {
 public:
  explicit DecodeClient(std::shared_ptr<Decoding> decoding) : decoding_(std::move(decoding)) {}
  std::shared_ptr<router::DecodeCall> Start(
      const router::Route& route, const router::Request& request,
      std::span<const int32_t> generated, const TraceContext& /*trace*/,
      std::shared_ptr<router::DecodeHandler> handler) override {
    return decoding_->Start(route, request, generated, std::move(handler));
  }
  void Keep(const router::ClusterView&) override {}

 private:
  const std::shared_ptr<Decoding> decoding_;
};

}  // namespace

InProcessClient::InProcessClient(router::RouterCore* core, router::Request request,
                                 int turns_per_message)
    : turns_per_message_(turns_per_message) {
  auto stream = core->NewStream(std::move(request), this);
  TANDEM_CHECK(stream.ok(), "{}", stream.status().ToString());
  stream_ = *std::move(stream);
  stream_->Begin();
}

bool InProcessClient::Pump() {
  bool written = false;
  {
    absl::MutexLock lock(&mutex_);
    if (finished_) return false;
    if (writing_ && ++turns_ >= turns_per_message_) {
      turns_ = 0;
      writing_ = false;
      written = true;
    }
  }
  if (written) stream_->OnWritten(true);
  return true;
}

bool InProcessClient::finished() const {
  absl::MutexLock lock(&mutex_);
  return finished_;
}

absl::Status InProcessClient::outcome() const {
  absl::MutexLock lock(&mutex_);
  return outcome_;
}

std::vector<int32_t> InProcessClient::tokens() const {
  absl::MutexLock lock(&mutex_);
  return tokens_;
}

router::GenerateResponse InProcessClient::last() const {
  absl::MutexLock lock(&mutex_);
  return last_;
}

void InProcessClient::Write(const router::GenerateResponse& response) {
  absl::MutexLock lock(&mutex_);
  tokens_.insert(tokens_.end(), response.token_ids.begin(), response.token_ids.end());
  last_ = response;
  writing_ = true;
}

void InProcessClient::Finish(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  outcome_ = status;
  finished_ = true;
}

router::ServedModel InProcessCluster::MakeModel(const InProcessWorkerOptions& worker) {
  router::ServedModel model;
  model.name = "fake";
  model.config.vocab_size = worker.engine.model.vocab_size;
  model.config.max_position_embeddings = worker.max_model_len;
  return model;
}

InProcessCluster::InProcessCluster(const InProcessClusterOptions& options)
    : options_(options),
      clock_(options.clock != nullptr ? options.clock : &own_clock_),
      kv_(options.kv != nullptr ? options.kv : &own_kv_) {
  decoding_ = std::make_shared<Decoding>(&decodes_, clock_);
  core_ = std::make_unique<router::RouterCore>(PatientRouter(), MakeModel(options_.worker),
                                               std::make_unique<DecodeClient<Decoding>>(decoding_),
                                               &metrics_, clock_);
  memberships_.resize(static_cast<size_t>(options_.prefill_workers + options_.decode_workers));
  size_t slot = 0;
  InProcessWorkerOptions worker = options_.worker;
  worker.engine.clock = clock_;
  worker.engine.model.before_run = options_.before_prefill;
  for (int i = 0; i < options_.prefill_workers; ++i) {
    worker.worker_id = absl::StrCat("prefill-", i);
    prefills_.push_back(std::make_unique<InProcessPrefillWorker>(
        worker, kv_, clock_, MessagesTo(&memberships_[slot++])));
    prefill_list_.push_back(prefills_.back().get());
  }
  worker.engine.model.before_run = options_.worker.engine.model.before_run;
  worker.unified = options_.unified;
  for (int i = 0; i < options_.decode_workers; ++i) {
    worker.worker_id = absl::StrCat("decode-", i);
    decodes_.push_back(std::make_unique<InProcessDecodeWorker>(worker, kv_, &prefill_list_, clock_,
                                                               MessagesTo(&memberships_[slot++])));
  }
  slot = 0;
  for (const auto& prefill : prefills_) memberships_[slot++] = Join(prefill.get());
  for (const auto& decode : decodes_) memberships_[slot++] = Join(decode.get());
}

InProcessCluster::~InProcessCluster() {
  Stop();
  for (auto& membership : memberships_) membership.reset();
  core_.reset();
}

// Workers speak through the slot, which is filled when they join, before their first turn, and
// empty when they left: what they still say while they end goes nowhere.
JoinMessages InProcessCluster::MessagesTo(const std::unique_ptr<router::Membership>* slot) {
  JoinMessages messages;
  messages.load = [slot](internal::v1::LoadReport load) {
    if (*slot == nullptr) return;
    internal::v1::WorkerMessage message;
    *message.mutable_load() = std::move(load);
    const absl::Status status = (*slot)->Handle(message);
    TANDEM_CHECK(status.ok(), "{}", status.ToString());
  };
  messages.blocks = [slot](internal::v1::BlockEvents blocks) {
    if (*slot == nullptr) return;
    internal::v1::WorkerMessage message;
    *message.mutable_blocks() = std::move(blocks);
    const absl::Status status = (*slot)->Handle(message);
    TANDEM_CHECK(status.ok(), "{}", status.ToString());
  };
  return messages;
}

template <typename Worker>
std::unique_ptr<router::Membership> InProcessCluster::Join(Worker* worker) {
  auto membership = core_->Join([worker](internal::v1::RouterMessage message) {
    if (message.has_welcome()) worker->PostSnapshotWanted();
  });
  internal::v1::WorkerMessage hello;
  *hello.mutable_hello() = worker->hello();
  const absl::Status status = membership->Handle(hello);
  TANDEM_CHECK(status.ok(), "{}", status.ToString());
  return membership;
}

template <typename Step>
void InProcessCluster::Drive(Step step) {
  threads_.emplace_back([this, step] {
    while (!stopping_) {
      if (!step()) absl::SleepFor(absl::Microseconds(50));
    }
  });
}

void InProcessCluster::Start() {
  core_->Start();
  core_has_thread_ = true;
  for (const auto& prefill : prefills_) Drive([p = prefill.get()] { return p->Step(); });
  for (const auto& decode : decodes_) Drive([d = decode.get()] { return d->Step(); });
}

void InProcessCluster::Stop() {
  stopping_ = true;
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void InProcessCluster::KillDecode(size_t i) {
  const InProcessDecodeWorker* worker = decodes_[i].get();
  dead_.insert(worker);
  decoding_->Break(worker);
  memberships_[prefills_.size() + i].reset();
}

void InProcessCluster::Turn() {
  StepAll();
  if (!threads_.empty()) absl::SleepFor(absl::Microseconds(20));
  clock_->Advance(options_.turn);
  // The router may sleep until a time of this clock.
  core_->Wake();
}

bool InProcessCluster::StepAll() {
  if (!core_has_thread_) core_->Step(absl::ZeroDuration());
  bool busy = false;
  const auto step = [&](auto& worker) {
    if (dead_.contains(worker.get()) || worker->engine().BusyUntil() > clock_->Now()) return;
    busy |= worker->Step();
  };
  if (threads_.empty()) {
    for (const auto& prefill : prefills_) step(prefill);
    for (const auto& decode : decodes_) step(decode);
  }
  return decoding_->Deliver() > 0 || busy;
}

absl::Time InProcessCluster::NextStepEnd() {
  absl::Time next = absl::InfiniteFuture();
  const auto look = [&](auto& worker) {
    const absl::Time end = worker->engine().BusyUntil();
    if (end > absl::InfinitePast()) next = std::min(next, end);
  };
  for (const auto& prefill : prefills_) look(prefill);
  for (const auto& decode : decodes_) look(decode);
  return next;
}

std::string InProcessCluster::Held() {
  std::string held;
  const auto look = [&](const std::string& name, engine::BlockPoolCounts counts) {
    if (counts.used == 0 && counts.quarantined == 0) return;
    absl::StrAppend(&held, name, ": ", counts.used, " blocks used, ", counts.quarantined,
                    " quarantined\n");
  };
  for (const auto& prefill : prefills_) {
    if (!dead_.contains(prefill.get())) {
      look(prefill->address(), prefill->engine().pool.counts());
    }
  }
  for (const auto& decode : decodes_) {
    if (dead_.contains(decode.get())) continue;
    look(decode->address(), decode->engine().pool.counts());
    if (decode->num_sequences() != 0 || decode->num_transfers() != 0) {
      absl::StrAppend(&held, decode->address(), ": ", decode->num_sequences(), " sequences, ",
                      decode->num_transfers(), " transfers\n");
    }
  }
  if (core_->queued_requests() != 0) {
    absl::StrAppend(&held, "router: ", core_->queued_requests(), " queued\n");
  }
  return held;
}

}  // namespace tandem
