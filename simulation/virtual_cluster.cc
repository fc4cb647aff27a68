#include "simulation/virtual_cluster.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <variant>

#include "absl/strings/str_cat.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/token_wire.h"
#include "router/api/response_wire.h"

namespace tandem {
namespace {

constexpr std::string_view kRouter = "router";

router::ServedModel ModelOf(const VirtualClusterOptions& options) {
  TANDEM_CHECK(!options.workers.empty(), "a cluster without workers");
  const InProcessWorkerOptions& worker = options.workers.front().options;
  router::ServedModel model;
  model.name = "fake";
  model.config.vocab_size = worker.engine.model.vocab_size;
  model.config.max_position_embeddings = worker.max_model_len;
  return model;
}

}  // namespace

// ---- processes ----

struct VirtualCluster::Process {
  explicit Process(Clock* shared) : clock(shared) {}

  std::string id;
  std::string address;
  WorkerClock clock;
  std::unique_ptr<InProcessPrefillWorker> prefill;  // one of the two
  std::unique_ptr<InProcessDecodeWorker> decode;
  bool dead = false;
  bool hangs = false;
  absl::Time stopped_until = absl::InfinitePast();

  // Turns of the loop.
  absl::Time free_at = absl::InfinitePast();
  absl::Time next_turn = absl::InfiniteFuture();
  bool woken_in_turn = false;

  // The stay in the cluster.
  std::unique_ptr<router::Membership> stay;
  int stays = 0;
  absl::Time last_report = absl::InfinitePast();

  // What ends with the process: the other ends of its calls hear of it.
  std::map<uint64_t, std::function<void()>> on_death;
  uint64_t last_death_note = 0;

  uint64_t NoteForDeath(std::function<void()> act) {
    on_death.emplace(++last_death_note, std::move(act));
    return last_death_note;
  }
};

// ---- calls to decode workers ----

// Both ends of one Generate call.
class VirtualCluster::DecodeCall final : public router::DecodeCall,
                                         public std::enable_shared_from_this<DecodeCall> {
 public:
  DecodeCall(VirtualCluster* cluster, std::shared_ptr<router::DecodeHandler> handler)
      : cluster_(cluster), handler_(std::move(handler)) {}

  void Launch(const router::Route& route, const router::Request& request,
              std::span<const int32_t> generated) {
    router::DecodeRequestToProto(route, request, generated, &message_);
    deadline_ = request.deadline;
    const Fate fate = cluster_->FateOf(Message::Kind::kCall, kRouter, route.decode.id);
    const absl::Duration takes = cluster_->options_.latency + fate.delay;
    if (fate.lost) return EndAfter(takes, Unavailable("the connection was lost"));
    cluster_->events_.After(takes, [self = shared_from_this(), address = route.decode.address] {
      self->Arrive(address);
    });
    cluster_->events_.At(deadline_, [self = shared_from_this()] {
      self->CancelAtServer();
      self->EndAtClient(DeadlineExceeded("the call's deadline has passed"));
    });
  }

  // ---- the router's end ----
  void ReadNext() override {
    reading_ = true;
    Soon([this] { Deliver(); });
  }
  void ReadToEnd() override {
    unwanted_ = true;
    Soon([this] { Deliver(); });
  }
  void Cancel() override {
    unwanted_ = true;
    CancelAtServer();
    Soon([this] { EndAtClient(Cancelled("cancelled by the router")); });
  }

 private:
  void Soon(std::function<void()> act) {
    cluster_->events_.After(absl::ZeroDuration(),
                            [self = shared_from_this(), act = std::move(act)] { act(); });
  }
  void EndAfter(absl::Duration delay, absl::Status status) {
    cluster_->events_.After(delay, [self = shared_from_this(), status = std::move(status)] {
      self->EndAtClient(status);
    });
  }
  // What came before is dropped with it.
  void EndAtClient(const absl::Status& status) {
    if (ended_) return;
    events_.clear();
    end_ = status;
    Deliver();
  }
  void Deliver() {
    while (!ended_) {
      if (unwanted_) events_.clear();
      if (!events_.empty()) {
        if (!reading_) return;
        reading_ = false;
        TokenEvent event = std::move(events_.front());
        events_.pop_front();
        cluster_->events_.After(cluster_->options_.latency,
                                [self = shared_from_this()] { self->Credit(); });
        handler_->OnEvent(std::move(event));
        cluster_->WakeRouter();
      } else if (end_.has_value()) {
        ended_ = true;
        const std::shared_ptr<router::DecodeHandler> handler = std::move(handler_);
        handler->OnEnd(*end_);
        cluster_->WakeRouter();
      } else {
        return;
      }
    }
  }

  // ---- the worker's end ----
  void Arrive(const std::string& address) {
    if (ended_ || cancelled_) return;
    server_ = cluster_->FindByAddress(address);
    if (server_ == nullptr) {
      return EndAfter(cluster_->options_.latency, Unavailable("failed to connect to {}", address));
    }
    death_note_ = server_->NoteForDeath([self = shared_from_this()] {
      const std::shared_ptr<DecodeCall> call = self;  // the note, which holds it, is forgotten
      // What has left already arrives.
      call->SendEnd(Unavailable("Socket closed"));
      call->alive_ = nullptr;
    });
    decode::Intake& intake = server_->decode->intake();
    absl::StatusOr<decode::Work> work = intake.Read(message_, deadline_ - cluster_->events_.Now());
    if (!work.ok()) return SendEnd(work.status());
    id_ = work->id;
    stream_ = intake.MakeStream([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->Pump();
    });
    const absl::Status status = intake.Push(*std::move(work), stream_);
    if (!status.ok()) return SendEnd(status);
    alive_ = shared_from_this();
    cluster_->Wake(server_);
  }
  // Takes what the stream has, as far as the window lets it.
  void Pump() {
    while (stream_ != nullptr && !server_->dead) {
      full_ = on_the_way_ >= cluster_->options_.window;
      if (full_) return;
      decode::TokenStream::Item item = stream_->Take();
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        if (!cancelled_ && !broken_) Send(*event);
        continue;
      }
      if (auto* status = std::get_if<absl::Status>(&item)) {
        stream_ = nullptr;
        SendEnd(*status);
        alive_ = nullptr;
      }
      return;
    }
  }
  void Credit() {
    if (on_the_way_ > 0) --on_the_way_;
    if (full_) Pump();
    if (server_ != nullptr) cluster_->Wake(server_);
  }
  void Send(const TokenEvent& event) {
    const Fate fate = cluster_->FateOf(Message::Kind::kTokens, server_->id, kRouter);
    if (fate.lost) {
      broken_ = true;
      CancelAtServer();
      return SendEnd(Unavailable("the connection was lost"));
    }
    ++on_the_way_;
    internal::v1::TokenEvent message;
    TokenEventToProto(event, &message);
    cluster_->events_.At(ArrivesAt(fate), [self = shared_from_this(), message] {
      self->events_.push_back(TokenEventFromProto(message));
      self->Deliver();
    });
  }
  void SendEnd(const absl::Status& status) {
    if (end_sent_) return;
    end_sent_ = true;
    if (server_ != nullptr) server_->on_death.erase(death_note_);
    cluster_->events_.At(ArrivesAt({}), [self = shared_from_this(), status] {
      if (!self->end_.has_value()) self->end_ = status;
      self->Deliver();
    });
  }
  absl::Time ArrivesAt(const Fate& fate) {
    last_ = std::max(last_, server_->clock.Now() + cluster_->options_.latency + fate.delay);
    return last_;
  }
  void CancelAtServer() {
    if (cancelled_) return;
    cancelled_ = true;
    cluster_->events_.After(cluster_->options_.latency, [self = shared_from_this()] {
      if (self->id_ == 0 || self->server_->dead) return;
      self->server_->decode->intake().Cancel(self->id_);
      self->full_ = false;
      self->on_the_way_ = 0;
      self->Pump();  // what waits for the window goes nowhere
      self->cluster_->Wake(self->server_);
    });
  }

  VirtualCluster* const cluster_;
  std::shared_ptr<router::DecodeHandler> handler_;
  internal::v1::DecodeRequest message_;
  absl::Time deadline_;
  // The router's end.
  std::deque<TokenEvent> events_;
  std::optional<absl::Status> end_;
  bool reading_ = true;  // the first event is read at once
  bool unwanted_ = false;
  bool ended_ = false;
  // The worker's.
  std::shared_ptr<Process> server_;
  std::shared_ptr<DecodeCall> alive_;  // itself, as a reactor until its end
  uint64_t id_ = 0;
  uint64_t death_note_ = 0;
  std::shared_ptr<decode::TokenStream> stream_;
  size_t on_the_way_ = 0;
  bool full_ = false;
  bool cancelled_ = false;
  bool broken_ = false;
  bool end_sent_ = false;
  absl::Time last_ = absl::InfinitePast();
};

class VirtualCluster::Decoding final : public router::DecodeClient {
 public:
  explicit Decoding(VirtualCluster* cluster) : cluster_(cluster) {}
  std::shared_ptr<router::DecodeCall> Start(
      const router::Route& route, const router::Request& request,
      std::span<const int32_t> generated, const TraceContext& /*trace*/,
      std::shared_ptr<router::DecodeHandler> handler) override {
    auto call = std::make_shared<DecodeCall>(cluster_, std::move(handler));
    call->Launch(route, request, generated);
    return call;
  }
  void Keep(const router::ClusterView& /*view*/) override {}

 private:
  VirtualCluster* const cluster_;
};

// ---- calls to prefill workers ----

class VirtualCluster::PrefillCaller final : public decode::PrefillCaller {
 public:
  PrefillCaller(VirtualCluster* cluster, std::weak_ptr<Process> client,
                decode::CallerIdentity identity, int vocab_size, decode::EventInbox* inbox)
      : cluster_(cluster),
        client_(std::move(client)),
        identity_(std::move(identity)),
        vocab_size_(vocab_size),
        inbox_(inbox) {}

  void Call(decode::PrefillCall call) override {
    const auto active = std::make_shared<Active>();
    active->call = call;
    active_[call.call_id] = active;
    const std::shared_ptr<Process> client = client_.lock();
    active->death_note = client->NoteForDeath([this, active] { CancelAtServer(active); });
    const Fate fate =
        cluster_->FateOf(Message::Kind::kPrefillCall, client->id, call.peer.worker_id);
    const absl::Time arrives = client->clock.Now() + cluster_->options_.latency + fate.delay;
    if (fate.lost) {
      cluster_->events_.At(arrives,
                           [this, active] { End(active, Unavailable("the call was lost")); });
      return;
    }
    cluster_->events_.At(arrives, [this, active, twice = fate.twice, address = call.peer.address,
                                   request = decode::CallToProto(call, identity_)] {
      Arrive(active, address, request, twice);
    });
    cluster_->events_.At(call.deadline, [this, active] {
      if (active->ended) return;
      CancelAtServer(active);
      End(active, DeadlineExceeded("the call's deadline has passed"));
    });
  }
  void Cancel(uint64_t call_id) override {
    const auto it = active_.find(call_id);
    if (it == active_.end()) return;
    const std::shared_ptr<Active> active = it->second;
    CancelAtServer(active);
    cluster_->events_.After(absl::ZeroDuration(), [this, active] {
      End(active, absl::CancelledError("cancelled by its caller"));
    });
  }

 private:
  struct Active {
    decode::PrefillCall call;
    std::shared_ptr<Process> server;
    uint64_t id = 0;  // at the server
    uint64_t death_note = 0, server_death_note = 0;
    bool cancelled = false;
    bool broken = false;  // at the worker's end
    bool ended = false;
    absl::Time last = absl::InfinitePast();
  };

  void Arrive(const std::shared_ptr<Active>& active, const std::string& address,
              const internal::v1::PrefillRequest& request, bool twice) {
    if (active->ended || active->cancelled) return;
    active->server = cluster_->FindByAddress(address);
    if (active->server == nullptr) {
      cluster_->events_.After(cluster_->options_.latency, [this, active, address] {
        End(active, Unavailable("failed to connect to {}", address), /*reached=*/false);
      });
      return;
    }
    active->server_death_note = active->server->NoteForDeath([this, active] {
      cluster_->events_.After(cluster_->options_.latency,
                              [this, active] { End(active, Unavailable("Socket closed")); });
    });
    prefill::Intake& intake = active->server->prefill->intake();
    active->id = intake.NewId();
    intake.Submit(
        active->id, request,
        [this, active, &intake](const prefill::Wanted& wanted) {
          Ask(active, intake.ToProto(wanted));
        },
        nullptr,
        [this, active, &intake](const absl::StatusOr<prefill::Outcome>& outcome) {
          if (!outcome.ok()) return Reply(active, outcome.status());
          Reply(active, intake.ToProto(*outcome));
        });
    if (twice) {
      intake.Submit(
          intake.NewId(), request, [](const prefill::Wanted& /*wanted*/) {}, nullptr,
          [](const absl::StatusOr<prefill::Outcome>& /*outcome*/) {});
    }
    cluster_->Wake(active->server);
  }
  // On the loop of the prefill worker.
  void Ask(const std::shared_ptr<Active>& active, const internal::v1::KvTarget& wanted) {
    if (active->server->dead) return;
    const Fate fate = FateOfAnswer(*active);
    if (fate.lost) {
      active->broken = true;
      CancelAtServer(active);
      cluster_->events_.At(ArrivesAt(active.get(), fate),
                           [this, active] { End(active, Unavailable("the connection was lost")); });
      return;
    }
    cluster_->events_.At(ArrivesAt(active.get(), fate), [this, active, wanted] {
      const std::shared_ptr<Process> client = client_.lock();
      if (active->ended || client->dead) return;
      auto blocks = decode::WantedFromProto(wanted, active->call);
      TANDEM_CHECK(blocks.ok(), "{}", blocks.status().ToString());
      inbox_->Push(*std::move(blocks));
      cluster_->Wake(client);
    });
  }
  Fate FateOfAnswer(const Active& active) const {
    return cluster_->FateOf(Message::Kind::kPrefillReply, active.server->id, client_.lock()->id);
  }
  absl::Time ArrivesAt(Active* active, const Fate& fate) const {
    active->last = std::max(active->last,
                            active->server->clock.Now() + cluster_->options_.latency + fate.delay);
    return active->last;
  }
  // On the loop of the prefill worker, or while the call arrives.
  void Reply(const std::shared_ptr<Active>& active,
             absl::StatusOr<internal::v1::PrefillResponse> response) {
    if (active->server->dead) return;
    active->id = 0;
    if (active->broken) return;
    const Fate fate = FateOfAnswer(*active);
    if (fate.lost) response = Unavailable("the reply was lost");
    cluster_->events_.At(ArrivesAt(active.get(), fate),
                         [this, active, response = std::move(response)] { End(active, response); });
  }
  void End(const std::shared_ptr<Active>& active,
           const absl::StatusOr<internal::v1::PrefillResponse>& response, bool reached = true) {
    const std::shared_ptr<Process> client = client_.lock();
    if (active->ended || client->dead) return;
    active->ended = true;
    active_.erase(active->call.call_id);
    client->on_death.erase(active->death_note);
    if (active->server != nullptr) active->server->on_death.erase(active->server_death_note);
    decode::PrefillReply reply{.call_id = active->call.call_id, .at = client->clock.Now()};
    if (response.ok()) {
      reply.outcome = decode::OutcomeFromProto(*response, vocab_size_);
      reply.sent = reply.outcome.ok() && active->call.first_token->Send(*reply.outcome, reply.at);
    } else {
      reply.outcome = response.status();
      reply.reached = reached;
    }
    inbox_->Push(std::move(reply));
    cluster_->Wake(client);
  }
  void CancelAtServer(const std::shared_ptr<Active>& active) {
    active->cancelled = true;
    cluster_->events_.After(cluster_->options_.latency, [this, active] {
      if (active->server == nullptr || active->server->dead || active->id == 0) return;
      active->server->prefill->intake().Cancel(active->id);
      cluster_->Wake(active->server);
    });
  }

  VirtualCluster* const cluster_;
  const std::weak_ptr<Process> client_;  // which owns this
  const decode::CallerIdentity identity_;
  const int vocab_size_;
  decode::EventInbox* const inbox_;
  std::map<uint64_t, std::shared_ptr<Active>> active_;  // by call id
};

// ---- clients ----

void VirtualClient::Cancel() {
  stream_->OnClientGone();
  cluster_->WakeRouter();
}

void VirtualClient::Write(const router::GenerateResponse& response) {
  tokens_.insert(tokens_.end(), response.token_ids.begin(), response.token_ids.end());
  counted_right_ = counted_right_ && !writing_ && num_finishes_ == 0 &&
                   response.completion_tokens == static_cast<int>(tokens_.size());
  arrivals_.push_back({cluster_->events_.Now(), static_cast<int>(response.token_ids.size())});
  last_ = response;
  writing_ = true;
  cluster_->events_.After(options_.read_time, [this, message = ++message_] {
    if (message == message_) TakeMessage(true);
  });
}

void VirtualClient::TakeMessage(bool ok) {
  if (!std::exchange(writing_, false)) return;
  stream_->OnWritten(ok);
  cluster_->WakeRouter();
}

void VirtualClient::Finish(const absl::Status& status) {
  ++num_finishes_;
  outcome_ = status;
  finished_at_ = cluster_->events_.Now();
}

void VirtualClient::Abort() {
  cluster_->events_.After(absl::ZeroDuration(), [this] { TakeMessage(false); });
}

// ---- the cluster ----

VirtualCluster::VirtualCluster(VirtualClusterOptions options)
    : options_(std::move(options)),
      kv_(
          [this] {
            VirtualKvOptions kv = options_.kv;
            kv.faults = options_.faults;
            kv.loop_time = [this](const std::string& worker_id) {
              for (const Worker& worker : workers_) {
                if (worker.setup.options.worker_id == worker_id && worker.process != nullptr) {
                  return worker.process->clock.Now();
                }
              }
              return events_.Now();
            };
            kv.on_event = [this](const std::string& worker_id) {
              for (const Worker& worker : workers_) {
                if (worker.setup.options.worker_id == worker_id && worker.process != nullptr) {
                  Wake(worker.process);
                }
              }
            };
            return kv;
          }(),
          &events_) {
  core_ = std::make_unique<router::RouterCore>(options_.router, ModelOf(options_),
                                               std::make_unique<Decoding>(this), &metrics_,
                                               &events_.clock());
  for (const VirtualWorker& setup : options_.workers) workers_.push_back({.setup = setup});
  for (Worker& worker : workers_) StartProcess(&worker);
  TurnRouter();
}

VirtualCluster::~VirtualCluster() {
  for (const auto& process : processes_) {
    process->dead = true;
    process->on_death.clear();
    process->stay.reset();
  }
  events_.Clear();
  // Before the network that they use; who still holds a process finds it dead.
  for (const auto& process : processes_) {
    process->decode.reset();
    process->prefill.reset();
  }
  core_.reset();
}

void VirtualCluster::StartProcess(Worker* worker) {
  const VirtualWorker& setup = worker->setup;
  const auto process = std::make_shared<Process>(&events_.clock());
  InProcessWorkerOptions options = setup.options;
  options.incarnation = ++worker->incarnation;
  options.unified = setup.role == router::WorkerRole::kUnified;
  options.engine.wrap_runner = [this, step_time = setup.step_time,
                                clock = &process->clock](engine::ModelRunner* fake) {
    return std::make_unique<VirtualModelRunner>(fake, step_time, clock, &events_.clock());
  };
  JoinMessages messages;
  // The process owns who calls these.
  const std::weak_ptr<Process> weak = process;
  messages.load = [this, weak](internal::v1::LoadReport load) {
    internal::v1::WorkerMessage message;
    *message.mutable_load() = std::move(load);
    Report(weak.lock(), std::move(message));
  };
  messages.blocks = [this, weak](internal::v1::BlockEvents blocks) {
    internal::v1::WorkerMessage message;
    *message.mutable_blocks() = std::move(blocks);
    Report(weak.lock(), std::move(message));
  };
  process->id = options.worker_id;
  if (setup.role == router::WorkerRole::kPrefill) {
    process->prefill = std::make_unique<InProcessPrefillWorker>(options, &kv_, &process->clock,
                                                                std::move(messages));
    process->address = process->prefill->address();
  } else {
    process->decode = std::make_unique<InProcessDecodeWorker>(
        options, &kv_,
        [this, weak, vocab_size = options.engine.model.vocab_size](decode::CallerIdentity identity,
                                                                   decode::EventInbox* inbox) {
          return std::make_unique<PrefillCaller>(this, weak, std::move(identity), vocab_size,
                                                 inbox);
        },
        &process->clock, std::move(messages));
    process->address = process->decode->address();
  }
  worker->process = process;
  worker->hangs = false;
  processes_.push_back(process);
  Join(process);
  Wake(process);
}

void VirtualCluster::Kill(size_t worker) {
  const std::shared_ptr<Process> process = std::move(workers_[worker].process);
  workers_[worker].process = nullptr;
  if (process == nullptr) return;
  process->dead = true;
  kv_.Kill(process->id);
  for (const auto& [id, act] : std::exchange(process->on_death, {})) act();
  events_.After(options_.latency, [this, process] { LeaveCluster(process); });
}

void VirtualCluster::Restart(size_t worker) {
  if (workers_[worker].process == nullptr) StartProcess(&workers_[worker]);
}

void VirtualCluster::Hang(size_t worker, bool hangs) {
  workers_[worker].hangs = hangs;
  if (const auto& process = workers_[worker].process) {
    process->hangs = hangs;
    if (!hangs) Wake(process);
  }
}

void VirtualCluster::Stop(size_t worker, absl::Time until) {
  const auto& process = workers_[worker].process;
  if (process == nullptr) return;
  process->stopped_until = std::max(process->stopped_until, until);
  kv_.Stop(process->id, until);
  events_.At(until, [this, process = process] { Wake(process); });
}

bool VirtualCluster::Writing(size_t worker) const {
  return kv_.Writing(workers_[worker].setup.options.worker_id);
}

void VirtualCluster::BreakStay(size_t worker) {
  if (const auto& process = workers_[worker].process) {
    LeaveCluster(process);
    events_.After(options_.rejoin_after, [this, process = process] { Join(process); });
  }
}

void VirtualCluster::BreakLinks(size_t worker) {
  kv_.BreakLinks(workers_[worker].setup.options.worker_id);
}

// ---- stays ----

void VirtualCluster::Join(const std::shared_ptr<Process>& process) {
  events_.After(options_.latency, [this, process] {
    if (process->dead || process->stay != nullptr) return;
    const int number = ++process->stays;
    process->stay =
        core_->Join([this, process, number](const internal::v1::RouterMessage& message) {
          if (!message.has_welcome()) return;
          events_.After(options_.latency, [this, process, number] {
            if (process->dead || process->stays != number) return;
            if (process->prefill != nullptr) process->prefill->PostSnapshotWanted();
            if (process->decode != nullptr) process->decode->PostSnapshotWanted();
            Wake(process);
          });
        });
    internal::v1::WorkerMessage hello;
    *hello.mutable_hello() =
        process->prefill != nullptr ? process->prefill->hello() : process->decode->hello();
    WakeRouter();
    if (process->stay->Handle(hello).ok()) return;
    process->stay.reset();  // the one before is not known to be gone
    events_.After(options_.rejoin_after, [this, process] { Join(process); });
  });
}

void VirtualCluster::LeaveCluster(const std::shared_ptr<Process>& process) {
  // Its end is its destruction.
  std::shared_ptr<router::Membership> ended = std::move(process->stay);
  events_.After(options_.half_open, [this, ended = std::move(ended)]() mutable {
    ended.reset();
    WakeRouter();
  });
}

void VirtualCluster::Report(const std::shared_ptr<Process>& process,
                            internal::v1::WorkerMessage message) {
  if (process == nullptr || process->dead || process->stay == nullptr) return;
  const Fate fate = FateOf(Message::Kind::kReport, process->id, kRouter);
  absl::Time arrives = process->clock.Now() + options_.latency + fate.delay;
  if (message.has_load() && fate.overtaken) {
    arrives += 10 * options_.latency;
  } else {
    arrives = process->last_report = std::max(arrives, process->last_report);
  }
  events_.At(arrives, [this, process, number = process->stays, fate, message = std::move(message)] {
    if (process->stays != number || process->stay == nullptr) return;
    absl::Status status = fate.lost ? Unavailable("the stream broke") : absl::OkStatus();
    for (int i = 0; i < (fate.twice ? 2 : 1) && status.ok(); ++i) {
      status = process->stay->Handle(message);
    }
    WakeRouter();
    if (status.ok()) return;
    LeaveCluster(process);
    events_.After(options_.rejoin_after, [this, process] { Join(process); });
  });
}

// ---- turns ----

void VirtualCluster::Wake(const std::shared_ptr<Process>& process) {
  if (process->clock.in_turn()) {
    process->woken_in_turn = true;
  } else {
    WakeAt(process, events_.Now());
  }
}

void VirtualCluster::WakeAt(const std::shared_ptr<Process>& process, absl::Time when) {
  when = std::max({when, process->free_at, events_.Now()});
  if (process->dead || when >= process->next_turn) return;
  process->next_turn = when;
  events_.At(when, [this, process, when] {
    if (process->next_turn == when) Turn(process);
  });
}

void VirtualCluster::Turn(const std::shared_ptr<Process>& process) {
  process->next_turn = absl::InfiniteFuture();
  if (process->dead || process->hangs || events_.Now() < process->stopped_until) return;
  process->woken_in_turn = false;
  process->clock.BeginTurn();
  process->clock.WaitUntil(events_.Now() + options_.turn_time);
  const bool more =
      process->prefill != nullptr ? process->prefill->Step() : process->decode->Step();
  process->free_at = process->clock.EndTurn();
  const absl::Duration idle =
      process->prefill != nullptr ? process->prefill->IdleWait() : process->decode->IdleWait();
  const bool again = more || process->woken_in_turn;
  WakeAt(process, again ? process->free_at : process->free_at + idle);
}

void VirtualCluster::WakeRouter() {
  if (std::exchange(router_woken_, true)) return;
  events_.After(absl::ZeroDuration(), [this] { TurnRouter(); });
}

void VirtualCluster::TurnRouter() {
  router_woken_ = false;
  core_->Step(absl::ZeroDuration());
  const absl::Time now = events_.Now();
  const absl::Time due = std::max(core_->NextDue(), now + absl::Microseconds(1));
  if (due >= router_due_ && router_due_ > now) return;
  router_due_ = due;
  events_.At(due, [this, due] {
    if (router_due_ != due) return;
    router_due_ = absl::InfiniteFuture();
    TurnRouter();
  });
}

// ---- what is there ----

absl::StatusOr<VirtualClient*> VirtualCluster::Submit(router::Request request,
                                                      VirtualClient::Options options) {
  std::unique_ptr<VirtualClient> client(new VirtualClient(this, options));
  client->submitted_at_ = events_.Now();
  TANDEM_ASSIGN_OR_RETURN(client->stream_, core_->NewStream(std::move(request), client.get()));
  clients_.push_back(std::move(client));
  clients_.back()->stream_->Begin();
  WakeRouter();
  return clients_.back().get();
}

std::shared_ptr<VirtualCluster::Process> VirtualCluster::FindByAddress(
    const std::string& address) const {
  for (const Worker& worker : workers_) {
    if (worker.process != nullptr && worker.process->address == address) return worker.process;
  }
  return nullptr;
}

Fate VirtualCluster::FateOf(Message::Kind kind, std::string_view from, std::string_view to) {
  Fate fate = options_.faults ? options_.faults({kind, from, to}) : Fate();
  // A process that is stopped says nothing and hears nothing.
  for (const Worker& worker : workers_) {
    if (worker.process == nullptr || (worker.process->id != from && worker.process->id != to)) {
      continue;
    }
    fate.delay = std::max(fate.delay, worker.process->stopped_until - events_.Now());
  }
  return fate;
}

engine::FakeEngine& VirtualCluster::engine(size_t worker) {
  const Process& process = *workers_[worker].process;
  return process.prefill != nullptr ? process.prefill->engine() : process.decode->engine();
}

size_t VirtualCluster::num_sequences(size_t worker) const {
  const Process& process = *workers_[worker].process;
  return process.decode != nullptr ? process.decode->num_sequences() : 0;
}

size_t VirtualCluster::num_returns(size_t worker) const {
  const auto& process = workers_[worker].process;
  return process == nullptr || process->prefill == nullptr ? 0 : process->prefill->num_returns();
}

int VirtualCluster::returned_tokens() const {
  double tokens = 0;
  for (const auto& process : processes_) {
    if (process->prefill != nullptr) tokens += process->prefill->metrics().returned_tokens.Value();
  }
  return static_cast<int>(tokens);
}

std::string VirtualCluster::Held() {
  std::string held;
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (!alive(i)) continue;
    const Process& process = *workers_[i].process;
    const engine::BlockPoolCounts counts = engine(i).pool.counts();
    if (counts.free + counts.cached != counts.total) {
      absl::StrAppend(&held, process.id, ": ", counts.used, " blocks used, ", counts.quarantined,
                      " quarantined of ", counts.total, "; ");
    }
    if (process.prefill != nullptr && process.prefill->num_returns() > 0) {
      absl::StrAppend(&held, process.id, ": ", process.prefill->num_returns(), " returns; ");
    }
    // Also those that hold no block.
    if (process.decode != nullptr &&
        (process.decode->num_sequences() > 0 || process.decode->num_transfers() > 0)) {
      absl::StrAppend(&held, process.id, ": ", process.decode->num_sequences(), " sequences, ",
                      process.decode->num_transfers(), " transfers; ");
    }
  }
  if (core_->queued_requests() != 0) {
    absl::StrAppend(&held, "router: ", core_->queued_requests(), " queued");
  }
  return held;
}

std::string VirtualCluster::IndexErrors() {
  std::string errors;
  const std::shared_ptr<const router::ClusterView> view = core_->view();
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (!alive(i)) continue;
    const std::string& id = workers_[i].process->id;
    const router::WorkerView* worker = view->Find(id);
    if (worker == nullptr) {
      absl::StrAppend(&errors, id, " is not in the cluster; ");
      continue;
    }
    const router::PrefixIndex& index = core_->prefix_index();
    const router::PrefixIndex::Slot slot = worker->identity->slot;
    const std::vector<Hash128> cached = engine(i).cache.Snapshot();
    size_t known = 0;
    for (const Hash128& hash : cached) {
      const std::vector<router::PrefixIndex::Match> matches = index.Lookup({&hash, 1});
      known += std::any_of(matches.begin(), matches.end(),
                           [slot](const auto& match) { return match.worker == slot; })
                   ? 1
                   : 0;
    }
    if (known == cached.size() && index.WorkerBlocks(slot) == cached.size()) continue;
    absl::StrAppend(&errors, id, " holds ", cached.size(), " blocks, the index knows ", known,
                    " of them and claims ", index.WorkerBlocks(slot), "; ");
  }
  return errors;
}

}  // namespace tandem
