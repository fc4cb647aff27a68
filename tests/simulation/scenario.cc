#include "tests/simulation/scenario.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "fmt/format.h"

#include "common/base/status.h"
#include "router/api/request_wire.h"
#include "simulation/fake_model_runner.h"
#include "simulation/virtual_cluster.h"

namespace tandem {
namespace {

constexpr int32_t kEos = 3;
constexpr int kVocab = 200;
constexpr absl::Duration kPastDeadline = absl::Milliseconds(200);
// Until quarantines that wait for a sender's word, and senders that wait for a receiver's, are
// over.
constexpr absl::Duration kToRest = absl::Seconds(45);
// Until every stay that broke has begun again and has been told of.
constexpr absl::Duration kQuiet = absl::Seconds(1);
constexpr uint64_t kMaxEvents = 5'000'000;
// How long a stop that is due waits for its worker to be in the middle of a write.
constexpr absl::Duration kStopWaits = absl::Seconds(1);

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int Uniform(int low, int high) { return low + static_cast<int>(engine_() % Span(low, high)); }
  bool OneIn(int n) { return Uniform(1, n) == 1; }
  bool Chance(double p) { return Fraction() < p; }
  double Fraction() { return static_cast<double>(engine_() >> 11) * 0x1.0p-53; }
  absl::Duration Between(absl::Duration low, absl::Duration high) {
    return low + (high - low) * Fraction();
  }
  template <typename T>
  T Pick(std::initializer_list<T> values) {
    return *(values.begin() + Uniform(0, static_cast<int>(values.size()) - 1));
  }

 private:
  static uint64_t Span(int low, int high) { return static_cast<uint64_t>(high - low) + 1; }
  std::mt19937_64 engine_;
};

struct Planned {
  std::string name;
  v1::GenerateRequest message;
  engine::SamplingParams sampling;
  std::vector<int32_t> prompt;
  absl::Duration at, deadline, cancel_after = absl::InfiniteDuration(), read_time;
  VirtualClient* client = nullptr;
  std::string refused;  // at the door
};

// How many requests are made again of a cluster that has come to rest.
constexpr size_t kProbes = 5;

// Which messages meet what, and how often.
struct MessageFaults {
  double lost = 0, twice = 0, overtaken = 0, flipped = 0, misplaced = 0, cut = 0, delayed = 0;
  absl::Duration longest_delay;
};

class Scenario {
 public:
  explicit Scenario(uint64_t seed)
      : seed_(seed), random_(seed), chance_(seed ^ 0x5bd1e995), turns_(~seed), stops_(seed << 20) {}

  SeedResult Run() {
    PlanShape();
    PlanWork();
    PlanFaults();
    cluster_ = std::make_unique<VirtualCluster>(options_);
    start_ = Now();
    for (Planned& planned : work_) {
      At(planned.at, [this, &planned] { Submit(&planned); });
    }
    for (auto& [at, act] : happenings_) At(at, act);
    At(quiet_from_, [this] { EndFaults(); });
    // Whatever happens, every request ends by its deadline.
    absl::Duration last = quiet_from_;
    for (const Planned& planned : work_) {
      last = std::max(last, planned.at + planned.deadline);
    }
    RunUntil(last + absl::Seconds(5), [this] { return past_faults_ && AllEnded(); });
    for (const Planned& planned : work_) CheckClient(planned);
    if (faults_.empty()) CheckSequences();
    RunFor(std::max(last_late_ - Now(), absl::ZeroDuration()) + options_.half_open + kQuiet);
    CheckIndex();
    RunFor(kToRest);
    CheckRest();
    result_.requests = static_cast<int>(work_.size());
    if (result_.errors.empty()) Probe();
    result_.events = cluster_->events().num_events();
    result_.requests += static_cast<int>(work_.size());
    result_.returned_tokens = cluster_->returned_tokens();
    result_.migrations = static_cast<int>(cluster_->core().metrics().migrations.Value());
    if (result_.errors.empty()) cluster_.reset();  // whose own checks find what still leaks
    return std::move(result_);
  }

 private:
  absl::Time Now() { return cluster_->events().Now(); }
  void At(absl::Duration when, std::function<void()> act) {
    cluster_->events().At(start_ + when, std::move(act));
  }
  template <typename... Args>
  void Error(fmt::format_string<Args...> text, Args&&... args) {
    absl::StrAppend(&result_.errors, "seed ", seed_, ": ",
                    fmt::format(text, std::forward<Args>(args)...), "\n");
  }
  template <typename... Args>
  void Tell(fmt::format_string<Args...> text, Args&&... args) {
    absl::StrAppend(&result_.story, "  ", fmt::format(text, std::forward<Args>(args)...), "\n");
  }
  void RunUntil(absl::Duration when, const std::function<bool()>& enough) {
    EventQueue& events = cluster_->events();
    while (!enough() && events.RunNext(start_ + when)) {
      if (events.num_events() < kMaxEvents) continue;
      Error("{} events and no end", kMaxEvents);
      return;
    }
  }

  void RunFor(absl::Duration time) {
    RunUntil(Now() - start_ + time, [] { return false; });
  }

  // ---- the cluster ----

  void PlanShape() {
    InProcessWorkerOptions worker;
    worker.engine.block_size = random_.Pick({4, 8, 16});
    worker.max_model_len = random_.Pick({64, 128, 200});
    const int whole = worker.max_model_len / worker.engine.block_size + 1;
    worker.max_num_seqs = random_.Uniform(2, 12);
    worker.max_num_batched_tokens = random_.Uniform(worker.max_num_seqs, 96);
    worker.local_prefill_max_tokens = random_.Pick({0, 8, 24});
    worker.engine.model.vocab_size = kVocab;
    worker.engine.model.max_in_flight = random_.Uniform(1, 2);
    worker.engine.caching = !random_.OneIn(10);
    if (random_.OneIn(6)) {
      // So few hashes that different blocks have the same.
      worker.engine.chain_hash = [](const Hash128& parent, std::span<const int32_t> tokens) {
        Hash128 hash = ChainBlockHash(parent, tokens);
        hash.low %= 64;
        hash.high = 7;
        return hash;
      };
      weak_hash_ = true;
    }
    const bool unified = random_.OneIn(6);
    const int decodes = random_.Uniform(1, 3), prefills = unified ? 0 : random_.Uniform(1, 3);
    const absl::Duration step = random_.Between(absl::Milliseconds(1), absl::Milliseconds(12));
    const absl::Duration token = random_.Between(absl::Microseconds(5), absl::Microseconds(200));
    for (int i = 0; i < prefills + decodes; ++i) {
      VirtualWorker member;
      member.role = i < prefills ? router::WorkerRole::kPrefill
                    : unified    ? router::WorkerRole::kUnified
                                 : router::WorkerRole::kDecode;
      member.options = worker;
      member.options.worker_id =
          i < prefills ? absl::StrCat("prefill-", i) : absl::StrCat("decode-", i - prefills);
      member.options.engine.num_blocks = whole + random_.Uniform(0, 4 * whole);
      member.step_time = [step, token](const engine::Batch& batch) {
        return step + token * batch.NumTokens();
      };
      options_.workers.push_back(member);
    }
    options_.latency = random_.Between(absl::Microseconds(50), absl::Milliseconds(2));
    options_.kv.latency = options_.latency;
    options_.kv.one_sided = random_.OneIn(2);
    options_.kv.max_blocks_of_a_frame = static_cast<size_t>(random_.Uniform(1, 8));
    const absl::Duration block = random_.Between(absl::Microseconds(20), absl::Milliseconds(3));
    options_.kv.ship_time = [block](double blocks) { return block * blocks; };
    options_.window = static_cast<size_t>(random_.Uniform(1, 8));
    options_.router.migrate = !random_.OneIn(8);
    if (chance_.OneIn(3))
      options_.half_open = chance_.Between(absl::ZeroDuration(), absl::Seconds(1));
    Tell("{} prefill and {} {} workers, blocks of {} tokens, {} of {} sequences, depth {}, {}{}{}",
         prefills, decodes, unified ? "unified" : "decode", worker.engine.block_size,
         options_.workers.back().options.engine.num_blocks, worker.max_num_seqs,
         worker.engine.model.max_in_flight, options_.kv.one_sided ? "one-sided" : "two-sided",
         weak_hash_ ? ", weak hashes" : "", options_.router.migrate ? "" : ", no migration");
  }

  // ---- the workload ----

  std::vector<int32_t> Tokens(int count) {
    std::vector<int32_t> out;
    for (int i = 0; i < count; ++i) out.push_back(random_.Uniform(4, kVocab - 1));
    return out;
  }

  void PlanWork() {
    const int max_len = options_.workers.front().options.max_model_len;
    std::vector<std::vector<int32_t>> prefixes;
    for (int i = 0; i < 4; ++i) prefixes.push_back(Tokens(random_.Uniform(1, max_len / 2)));
    const int count = random_.Uniform(4, 36);
    const absl::Duration span = random_.Between(absl::Milliseconds(50), absl::Seconds(4));
    work_.resize(static_cast<size_t>(count));
    for (Planned& planned : work_) {
      planned.name = absl::StrCat("request ", &planned - work_.data());
      PlanRequest(max_len, span, &prefixes, &planned);
    }
    for (Planned& planned : work_) {
      if (turns_.OneIn(3)) PlanTurn(max_len, &planned);
    }
    Tell("{} requests within {}", count, absl::FormatDuration(span));
  }

  // Instead of what was planned: the next turn of another request, with its answer in the prompt.
  void PlanTurn(int max_len, Planned* planned) {
    const Planned& before =
        work_[static_cast<size_t>(turns_.Uniform(0, static_cast<int>(work_.size()) - 1))];
    if (&before == planned) return;
    std::vector<int32_t> prompt = before.prompt;
    const std::vector<int32_t> answer =
        engine::FakeReferenceTokens(before.prompt, before.sampling, max_len, kVocab);
    prompt.insert(prompt.end(), answer.begin(), answer.end());
    for (int i = turns_.Uniform(1, 40); i > 0; --i) prompt.push_back(turns_.Uniform(4, kVocab - 1));
    const int room = max_len - static_cast<int>(prompt.size());
    if (room < 2) return;
    planned->prompt = std::move(prompt);
    planned->sampling.max_tokens = std::min(planned->sampling.max_tokens, room - 1);
    planned->at = before.at + turns_.Between(absl::ZeroDuration(), absl::Seconds(1));
    v1::GenerateRequest& message = planned->message;
    message.mutable_token_ids()->clear_ids();
    for (int32_t id : planned->prompt) {
      message.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
    }
    message.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(planned->sampling.max_tokens));
    message.mutable_options()->set_cache_salt(before.message.options().cache_salt());
  }

  void PlanRequest(int max_len, absl::Duration span, std::vector<std::vector<int32_t>>* prefixes,
                   Planned* planned) {
    std::vector<int32_t>& prefix = (*prefixes)[static_cast<size_t>(random_.Uniform(0, 3))];
    planned->prompt = prefix;
    const std::vector<int32_t> tail = Tokens(random_.Uniform(1, max_len / 3));
    planned->prompt.insert(planned->prompt.end(), tail.begin(), tail.end());
    if (random_.OneIn(3)) {
      prefix = planned->prompt;
      prefix.resize(std::min<size_t>(prefix.size(), static_cast<size_t>(max_len / 2)));
    }
    engine::SamplingParams& sampling = planned->sampling;
    sampling.temperature = random_.OneIn(2) ? 0.0f : 1.0f;
    sampling.seed = static_cast<uint64_t>(random_.Uniform(0, 1 << 20));
    const int room = max_len - static_cast<int>(planned->prompt.size());
    sampling.max_tokens = random_.Uniform(1, std::min(48, room));
    sampling.eos_token_ids = {kEos};
    sampling.ignore_eos = random_.OneIn(3);
    planned->at = random_.Between(absl::ZeroDuration(), span);
    planned->deadline = random_.OneIn(5) ? random_.Between(absl::Milliseconds(20), absl::Seconds(2))
                                         : absl::Seconds(90);
    if (random_.OneIn(6)) {
      planned->cancel_after = random_.Between(absl::ZeroDuration(), absl::Seconds(1));
    }
    if (random_.OneIn(8)) {
      planned->read_time = random_.Between(absl::Milliseconds(20), absl::Milliseconds(800));
    }
    for (int32_t id : planned->prompt) {
      planned->message.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
    }
    v1::SamplingParams& message = *planned->message.mutable_sampling();
    message.set_temperature(sampling.temperature);
    message.set_seed(sampling.seed);
    message.set_max_tokens(static_cast<uint32_t>(sampling.max_tokens));
    message.set_ignore_eos(sampling.ignore_eos);
    planned->message.mutable_options()->set_priority(random_.Uniform(-1, 1));
    if (random_.OneIn(8)) planned->message.mutable_options()->set_cache_salt("salt");
  }

  void Submit(Planned* planned) {
    router::ServedModel model = cluster_->model();
    model.eos_token_ids = {kEos};
    router::RequestLimits limits;
    limits.max_model_len = options_.workers.front().options.max_model_len;
    auto request =
        router::GenerateRequestFromProto(model, limits, planned->message, Now(),
                                         Now() + planned->deadline, &cluster_->events().clock());
    if (!request.ok()) {
      Error("a request was refused: {}", request.status().ToString());
      return;
    }
    auto client = cluster_->Submit(*std::move(request), {.read_time = planned->read_time});
    if (!client.ok()) {
      Error("a request was refused: {}", client.status().ToString());
      return;
    }
    planned->client = *client;
    if (planned->cancel_after == absl::InfiniteDuration()) return;
    cluster_->events().After(planned->cancel_after, [this, client = *client] {
      if (client->finished()) return;
      Met(Fault::kClientGone);
      client->Cancel();
    });
  }

  bool AllEnded() const {
    return std::all_of(work_.begin(), work_.end(), [](const Planned& planned) {
      return planned.client != nullptr && planned.client->finished();
    });
  }

  // ---- faults ----

  void PlanFaults() {
    if (random_.OneIn(5)) {
      Tell("no faults");
      quiet_from_ = absl::ZeroDuration();
      return;
    }
    quiet_from_ = random_.Between(absl::Seconds(1), absl::Seconds(12));
    const std::pair<Message::Kind, const char*> kinds[] = {
        {Message::Kind::kReport, "reports"},
        {Message::Kind::kCall, "calls"},
        {Message::Kind::kTokens, "tokens"},
        {Message::Kind::kPrefillCall, "prefill calls"},
        {Message::Kind::kPrefillReply, "prefill replies"},
        {Message::Kind::kKvFrame, "KV frames"},
        {Message::Kind::kKvAnswer, "KV answers"},
    };
    for (const auto& [kind, name] : kinds) {
      if (!random_.OneIn(4)) continue;
      MessageFaults& faults = message_faults_[kind];
      const double often = random_.Pick({0.002, 0.01, 0.05});
      const bool kv = kind == Message::Kind::kKvFrame || kind == Message::Kind::kKvAnswer;
      const bool report = kind == Message::Kind::kReport;
      const auto plan = [&](double* rate, bool may = true) {
        if (random_.OneIn(3) && may) *rate = often;
      };
      plan(&faults.lost);
      plan(&faults.twice, kv || report || kind == Message::Kind::kPrefillCall);
      plan(&faults.overtaken, kv || report);
      plan(&faults.flipped, kv);
      plan(&faults.misplaced, kind == Message::Kind::kKvFrame);
      plan(&faults.cut, kv);
      plan(&faults.delayed);
      faults.longest_delay = random_.Between(absl::Milliseconds(1), absl::Seconds(1));
      Note(fmt::format(
          "{} meet lost {} twice {} overtaken {} flipped {} misplaced {} cut {} "
          "delayed {} up to {}",
          name, faults.lost, faults.twice, faults.overtaken, faults.flipped, faults.misplaced,
          faults.cut, faults.delayed, absl::FormatDuration(faults.longest_delay)));
    }
    options_.faults = [this](const Message& message) { return FateOf(message); };
    const int workers = static_cast<int>(options_.workers.size());
    for (int i = random_.Uniform(0, 4); i > 0; --i) {
      const auto worker = static_cast<size_t>(random_.Uniform(0, workers - 1));
      PlanHappening(worker, random_.Between(absl::ZeroDuration(), quiet_from_));
    }
    if (random_.OneIn(8)) PlanBrokenSteps();
    if (stops_.OneIn(3)) PlanStop();
  }

  void Note(std::string what) {
    faults_.push_back(what);
    Tell("{}", what);
  }

  void PlanHappening(size_t worker, absl::Duration at) {
    const std::string& name = options_.workers[worker].options.worker_id;
    const absl::Duration lasts = random_.Between(absl::Milliseconds(1), absl::Seconds(8));
    const std::string when = absl::FormatDuration(at);
    const int what = random_.Uniform(0, 6);
    if (what <= 2 || what == 5) ++struck_;
    switch (what) {
      case 0:
        Note(fmt::format("{}: kill -9 of {}, back after {}", when, name,
                         absl::FormatDuration(lasts)));
        Happens(Fault::kKill, worker, at, [this, worker] { cluster_->Kill(worker); });
        happenings_.emplace_back(at + lasts, [this, worker] { cluster_->Restart(worker); });
        return;
      case 1:
        Note(fmt::format("{}: {} hangs for {}", when, name, absl::FormatDuration(2 * lasts)));
        Happens(Fault::kHang, worker, at, [this, worker] { cluster_->Hang(worker, true); });
        happenings_.emplace_back(at + 2 * lasts, [this, worker] { cluster_->Hang(worker, false); });
        return;
      case 2:
        Note(fmt::format("{}: the stay of {} breaks", when, name));
        Happens(Fault::kBrokenStay, worker, at, [this, worker] { cluster_->BreakStay(worker); });
        return;
      case 3:
        Note(fmt::format("{}: the KV links of {} break", when, name));
        Happens(Fault::kBrokenLinks, worker, at, [this, worker] { cluster_->BreakLinks(worker); });
        return;
      case 4:
        Note(fmt::format("{}: the clock jumps by {}", when, absl::FormatDuration(lasts)));
        Happens(Fault::kClockJump, worker, at,
                [this, lasts] { cluster_->events().clock().Advance(lasts); });
        jumped_ += lasts;
        return;
      case 5: {
        const bool loses = random_.OneIn(2);
        Note(fmt::format("{}: {} is cut off for {}, what it says is {}", when, name,
                         absl::FormatDuration(lasts), loses ? "lost" : "late"));
        partitions_.push_back({name, at, at + lasts, loses});
        return;
      }
      default:
        Note(fmt::format("{}: bits flip in idle blocks of {}", when, name));
        happenings_.emplace_back(at, [this, worker] { FlipIdleBits(worker); });
    }
  }
  // What needs a worker that lives counts where there is one.
  void Happens(Fault fault, size_t worker, absl::Duration at, std::function<void()> act) {
    happenings_.emplace_back(at, [this, fault, worker, act = std::move(act)] {
      if (fault == Fault::kClockJump || cluster_->alive(worker)) Met(fault);
      act();
    });
  }

  // Of a worker in the middle of a write where one comes soon: who has gone on without it meanwhile
  // must not find that write in what is its own by then.
  void PlanStop() {
    const auto worker =
        static_cast<size_t>(stops_.Uniform(0, static_cast<int>(options_.workers.size()) - 1));
    const absl::Duration at = stops_.Between(absl::ZeroDuration(), quiet_from_);
    const absl::Duration lasts = stops_.Between(absl::Milliseconds(1), absl::Seconds(20));
    ++struck_;
    Note(fmt::format("{}: {} is stopped for {}, in a write that begins within {}",
                     absl::FormatDuration(at), options_.workers[worker].options.worker_id,
                     absl::FormatDuration(lasts), absl::FormatDuration(kStopWaits)));
    happenings_.emplace_back(at, [this, worker, at, lasts] { Stop(worker, at, lasts); });
    quiet_from_ = std::max(quiet_from_, at + kStopWaits + lasts);
  }
  void Stop(size_t worker, absl::Duration at, absl::Duration lasts) {
    if (!cluster_->alive(worker)) return;
    if (!cluster_->Writing(worker) && Now() - start_ < at + kStopWaits) {
      cluster_->events().After(absl::Microseconds(200),
                               [this, worker, at, lasts] { Stop(worker, at, lasts); });
      return;
    }
    Met(Fault::kStop);
    // A jump of the clock may have brought the quiet time nearer.
    cluster_->Stop(worker, std::min(Now() + lasts, start_ + quiet_from_));
  }

  void PlanBrokenSteps() {
    const bool whole = random_.OneIn(2);
    Note(whole ? "steps fail" : "numbers are broken");
    broken_steps_ = true;
    // Some do not wait for the logits that would show it.
    for (Planned& planned : work_) {
      if (whole || !random_.OneIn(2)) continue;
      planned.cancel_after = random_.Between(absl::ZeroDuration(), absl::Milliseconds(100));
    }
    for (VirtualWorker& worker : options_.workers) {
      engine::FakeModelOptions& model = worker.options.engine.model;
      const auto unlucky = [this](Fault fault, int one_in) {
        if (past_faults_ || !chance_.OneIn(one_in)) return false;
        Met(fault);
        return true;
      };
      if (whole) {
        model.before_run = [unlucky](const engine::Batch&) {
          return unlucky(Fault::kFailedStep, 60) ? absl::InternalError("out of luck")
                                                 : absl::OkStatus();
        };
      } else {
        model.breaks = [unlucky](const engine::BatchItem&) {
          return unlucky(Fault::kBrokenNumbers, 15);
        };
      }
    }
  }

  void Met(Fault fault) { ++result_.met[static_cast<size_t>(fault)]; }

  Fate FateOf(const Message& message) {
    if (past_faults_) return {};
    const Fate fate = DrawFate(message);
    last_late_ = std::max(last_late_, Now() + fate.delay);
    return fate;
  }

  Fate DrawFate(const Message& message) {
    Fate fate;
    const absl::Duration now = Now() - start_;
    for (const Partition& partition : partitions_) {
      if (now < partition.from || now >= partition.until) continue;
      if (message.from != partition.worker && message.to != partition.worker) continue;
      fate.lost = partition.loses;
      fate.delay = partition.until - now;
      Met(Fault::kPartition);
      return fate;
    }
    const auto it = message_faults_.find(message.kind);
    if (it == message_faults_.end()) return fate;
    const MessageFaults& faults = it->second;
    const auto draw = [this](Fault fault, double rate) {
      if (!chance_.Chance(rate)) return false;
      Met(fault);
      return true;
    };
    fate.lost = draw(Fault::kLost, faults.lost);
    fate.twice = draw(Fault::kTwice, faults.twice);
    fate.overtaken = draw(Fault::kOvertaken, faults.overtaken);
    fate.flipped = draw(Fault::kBitFlip, faults.flipped);
    fate.misplaced = draw(Fault::kMisplaced, faults.misplaced);
    fate.cut = draw(Fault::kCut, faults.cut);
    if (draw(Fault::kLate, faults.delayed)) {
      fate.delay = chance_.Between(absl::ZeroDuration(), faults.longest_delay);
    }
    return fate;
  }

  // What a prefill worker has cached is digested; elsewhere nothing promises to find damage.
  void FlipIdleBits(size_t worker) {
    if (!cluster_->alive(worker) || options_.workers[worker].role != router::WorkerRole::kPrefill) {
      return;
    }
    engine::FakeEngine& engine = cluster_->engine(worker);
    if (engine.pool.counts().used > 0) {  // again when nothing is in use
      cluster_->events().After(absl::Milliseconds(1), [this, worker] {
        if (!past_faults_) FlipIdleBits(worker);
      });
      return;
    }
    Met(Fault::kIdleBitFlip);
    const KvRegion& region = engine.memory.region();
    for (int i = 0; i < region.num_blocks; ++i) {
      std::byte* bytes = region.Block(chance_.Uniform(0, region.layout.num_layers - 1), i);
      const int bit = chance_.Uniform(0, static_cast<int>(region.layout.BlockLayerBytes()) * 8 - 1);
      bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    }
  }

  void EndFaults() {
    past_faults_ = true;
    for (size_t i = 0; i < cluster_->num_workers(); ++i) {
      cluster_->Hang(i, false);
      cluster_->Restart(i);
    }
  }

  // ---- what must hold ----

  void CheckClient(const Planned& planned) {
    const VirtualClient* client = planned.client;
    if (client == nullptr) return Error("{} was never submitted", planned.name);
    const absl::Status& outcome = client->outcome();
    if (planned.read_time > absl::ZeroDuration() && !client->tokens().empty()) {
      Met(Fault::kSlowReader);
    }
    Mix(static_cast<uint64_t>(outcome.code()));
    Mix(static_cast<uint64_t>(absl::ToUnixNanos(client->finished_at())));
    for (const int32_t token : client->tokens()) Mix(static_cast<uint64_t>(token));
    if (client->num_finishes() != 1) {
      return Error("{} has {} final statuses", planned.name, client->num_finishes());
    }
    if (!client->counted_right()) Error("{}: tokens are missing or repeated", planned.name);
    const std::vector<int32_t> want = engine::FakeReferenceTokens(
        planned.prompt, planned.sampling, options_.workers.front().options.max_model_len, kVocab);
    const std::vector<int32_t>& got = client->tokens();
    const auto differ = std::mismatch(got.begin(), got.end(), want.begin(), want.end());
    if (differ.first != got.end()) {
      Error("{}: token {} of {} is wrong", planned.name, differ.first - got.begin(), want.size());
    }
    if (outcome.ok()) {
      const router::GenerateResponse& last = client->last();
      ++result_.served;
      if (got.size() != want.size()) {
        Error("{} ended well with {} of {} tokens, from {} and {}", planned.name, got.size(),
              want.size(), last.timing.has_value() ? last.timing->prefill_worker : "?",
              last.timing.has_value() ? last.timing->decode_worker : "?");
      }
    } else if (!MayEndWith(planned, outcome)) {
      Error("{} ended with {} after {} of {} tokens", planned.name, outcome.ToString(), got.size(),
            want.size());
    }
    // The message that a slow client reads, and the last one after it, have some time more.
    absl::Duration grace = kPastDeadline + jumped_;
    if (planned.read_time > absl::ZeroDuration()) {
      grace += std::min(2 * planned.read_time, absl::Seconds(2));
    }
    const absl::Duration late = client->finished_at() - client->submitted_at() - planned.deadline;
    if (late > grace) {
      Error("{} lived {} past its deadline", planned.name, absl::FormatDuration(late));
    }
  }

  bool MayEndWith(const Planned& planned, const absl::Status& outcome) const {
    switch (outcome.code()) {
      case absl::StatusCode::kCancelled:
        return planned.cancel_after < absl::InfiniteDuration();
      case absl::StatusCode::kDeadlineExceeded:
        return planned.client->finished_at() - planned.client->submitted_at() >= planned.deadline;
      case absl::StatusCode::kInternal:
        return broken_steps_;
      case absl::StatusCode::kUnavailable:
      case absl::StatusCode::kFailedPrecondition:  // it looks like poison
        return !faults_.empty() && (!SaysTwoWereLost(outcome) || MayHaveLostTwo());
      case absl::StatusCode::kResourceExhausted:  // or could not be served before its deadline
        return !faults_.empty() || (planned.deadline <= absl::Seconds(2) &&
                                    absl::StartsWith(outcome.message(), "overloaded: "));
      default:
        return false;
    }
  }

  static bool SaysTwoWereLost(const absl::Status& outcome) {
    return absl::StrContains(outcome.message(), "workers were lost with this request") ||
           absl::IsFailedPrecondition(outcome);
  }
  // What happens to a call or to a link is no death of a worker, and one worker is one, however
  // many calls to it break. Where reports get lost the router does not know who lives.
  bool MayHaveLostTwo() const {
    return struck_ >= 2 || broken_steps_ || jumped_ > absl::ZeroDuration() ||
           message_faults_.contains(Message::Kind::kReport);
  }

  // Every request has ended, so nothing works for one any more.
  void CheckSequences() {
    RunFor(kPastDeadline);
    for (size_t i = 0; i < cluster_->num_workers(); ++i) {
      if (cluster_->num_sequences(i) == 0) continue;
      Error("{} has {} sequences of requests that ended 200 ms ago",
            options_.workers[i].options.worker_id, cluster_->num_sequences(i));
    }
  }

  void CheckRest() {
    if (const std::string held = cluster_->Held(); !held.empty()) Error("at rest {}", held);
    CheckIndex();
  }

  void CheckIndex() {
    if (const std::string index = cluster_->IndexErrors(); !index.empty()) Error("{}", index);
  }

  // Whatever has happened, the cluster serves as on its first day.
  void Probe() {
    // Before all what did not end well: who knows what it has left.
    std::shuffle(work_.begin(), work_.end(), std::mt19937_64(seed_));
    std::stable_partition(work_.begin(), work_.end(),
                          [](const Planned& planned) { return !planned.client->outcome().ok(); });
    work_.resize(std::min(kProbes, work_.size()));
    for (Planned& probe : work_) {
      absl::StrAppend(&probe.name, " again");
      probe.cancel_after = absl::InfiniteDuration();
      probe.read_time = absl::ZeroDuration();
      probe.deadline = absl::Seconds(60);
      probe.client = nullptr;
      Submit(&probe);
    }
    RunUntil(Now() - start_ + absl::Seconds(65), [this] { return AllEnded(); });
    for (const Planned& probe : work_) {
      CheckClient(probe);
      if (probe.client == nullptr) continue;
      const absl::Status& outcome = probe.client->outcome();
      // Of a prompt that looks like poison the cluster is still afraid.
      if (outcome.ok() || (!faults_.empty() && absl::IsFailedPrecondition(outcome))) continue;
      Error("{} ends with {}", probe.name, outcome.ToString());
    }
    RunFor(kQuiet);
    CheckRest();
  }

  void Mix(uint64_t value) {
    result_.fingerprint = (result_.fingerprint ^ value) * 0x9e3779b97f4a7c15;
    result_.fingerprint ^= result_.fingerprint >> 29;
  }

  struct Partition {
    std::string worker;
    absl::Duration from, until;
    bool loses;
  };

  const uint64_t seed_;
  Random random_;  // for the plan
  Random chance_;  // while it runs
  Random turns_;   // for the next turns of conversations
  Random stops_;   // for processes that are stopped
  VirtualClusterOptions options_;
  std::vector<Planned> work_;
  std::vector<std::string> faults_;  // in words
  std::map<Message::Kind, MessageFaults> message_faults_;
  std::vector<Partition> partitions_;
  std::vector<std::pair<absl::Duration, std::function<void()>>> happenings_;
  absl::Duration quiet_from_;
  absl::Duration jumped_;
  absl::Time last_late_ = absl::InfinitePast();  // arrival of what faults have delayed
  bool weak_hash_ = false;
  int struck_ = 0;  // times that a worker dies, hangs, is stopped or cut off
  bool broken_steps_ = false;
  bool past_faults_ = false;
  std::unique_ptr<VirtualCluster> cluster_;
  absl::Time start_;
  SeedResult result_;
};

}  // namespace

std::string_view FaultName(size_t fault) {
  static constexpr std::array<std::string_view, kNumFaults> kNames = {
      "kills",        "hangs",        "stops",          "broken stays", "broken links",
      "clock jumps",  "cut off",      "idle bit flips", "failed steps", "broken numbers",
      "clients gone", "slow readers", "lost",           "twice",        "overtaken",
      "late",         "cut",          "bit flips",      "misplaced"};
  return kNames[fault];
}

SeedResult RunSeed(uint64_t seed) { return Scenario(seed).Run(); }

}  // namespace tandem
