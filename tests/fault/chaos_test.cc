// A cluster whose clients leave and whose workers die, stop and hang, at moments drawn from a seed:
// every request ends with one status that explains itself, no token is wrong, and afterwards
// nothing is held and nothing has grown.
//
// ctest runs a share that takes seconds. scripts/soak runs all of it:
//   TANDEM_CHAOS_SEED      what is drawn (1)
//   TANDEM_CHAOS_REQUESTS  of clients that leave (100; the whole: 1,000)
//   TANDEM_CHAOS_FAULTS    that strike workers (10; the whole: 200)
//   TANDEM_SOAK_MINUTES    of both together (0: not at all)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <random>
#include <signal.h>
#include <sstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/checked_load.h"
#include "tests/support/cluster.h"
#include "tests/support/frozen_thread.h"
#include "tests/support/paths.h"
#include "tests/support/process_usage.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr int kWorkers = 4;
constexpr double kRestSeconds = 30;
constexpr int kGivenUpMilliseconds = 11'000;  // the router's --worker-lost-after, and some more
// A process may keep some more connections, threads and memory than at its start for reasons of
// its libraries' own (gRPC starts threads by the number of cores); a leak per request or per fault
// is far above.
constexpr int kSlackDescriptors = 12;
constexpr int64_t kSlackMib = 16;

int FromEnvironment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

double SecondsSince(SteadyClock::time_point then) {
  return std::chrono::duration<double>(SteadyClock::now() - then).count();
}

bool AtRest(const v1::GetClusterResponse& state) {
  for (const v1::Worker& worker : state.workers()) {
    if (worker.state() != "ready" || worker.blocks_used() + worker.blocks_quarantined() > 0 ||
        worker.running() + worker.waiting() > 0 ||
        worker.blocks_total() != worker.blocks_free() + worker.blocks_cached()) {
      return false;
    }
  }
  return state.workers_size() == kWorkers && state.running_requests() == 0 &&
         state.queued_requests() == 0;
}

// One worker of the same model, which nobody disturbs.
std::unique_ptr<TestCluster> StartUndisturbed() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 0;
  spec.unified = 1;
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB",
                       "--no-enable-prefix-caching"};
  return TestCluster::Start(spec);
}

// Two prefill and two decode workers. Their pools hold a few requests, so that blocks are reused at
// once and requests wait for room; most prompts are shipped.
std::unique_ptr<TestCluster> StartDisturbed() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 2;
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=48MiB",
                       "--max-num-batched-tokens=128", "--step-timeout=4"};
  spec.decode_flags = {"--local-prefill-max-tokens=16"};
  return TestCluster::Start(spec);
}

std::map<std::string, ProcessUsage> Usages(TestCluster& cluster) {
  std::map<std::string, ProcessUsage> usages;
  const auto add = [&](const Member& member) {
    if (const auto usage = UsageOf(member.process->pid())) usages[member.id] = *usage;
  };
  add(cluster.router());
  for (const auto& [id, member] : cluster.workers()) add(*member);
  return usages;
}

std::string ToString(const std::map<std::string, ProcessUsage>& usages) {
  std::ostringstream out;
  for (const auto& [id, usage] : usages) {
    out << "  " << id << " " << usage.resident_kib / 1024 << " MiB " << usage.descriptors << " fd "
        << usage.threads << " thr";
  }
  return std::move(out).str();
}

// Of all workers together.
std::string BlocksToString(const v1::GetClusterResponse& state) {
  uint64_t free = 0, cached = 0, used = 0, quarantined = 0;
  for (const v1::Worker& worker : state.workers()) {
    free += worker.blocks_free();
    cached += worker.blocks_cached();
    used += worker.blocks_used();
    quarantined += worker.blocks_quarantined();
  }
  std::ostringstream out;
  out << "blocks: " << free << " free, " << cached << " cached, " << used << " used, "
      << quarantined << " quarantined; requests: " << state.running_requests() << " run, "
      << state.queued_requests() << " wait";
  return std::move(out).str();
}

ProcessUsage MostOf(const ProcessUsage& a, const ProcessUsage& b) {
  return {std::max(a.resident_kib, b.resident_kib), std::max(a.descriptors, b.descriptors),
          std::max(a.threads, b.threads)};
}

// What grew by more than the slack, in words; empty if nothing did.
std::string Growth(const std::map<std::string, ProcessUsage>& from,
                   const std::map<std::string, ProcessUsage>& to) {
  const auto slack_threads = std::max(12U, std::thread::hardware_concurrency());
  std::ostringstream out;
  const auto look = [&](const std::string& what, int64_t before, int64_t after, int64_t slack) {
    if (after > before + slack) out << what << " grew from " << before << " to " << after << "; ";
  };
  for (const auto& [id, before] : from) {
    const auto it = to.find(id);
    if (it == to.end()) continue;
    const ProcessUsage& after = it->second;
    look(id + ": descriptors", before.descriptors, after.descriptors, kSlackDescriptors);
    look(id + ": threads", before.threads, after.threads, slack_threads);
    look(id + ": KiB of memory", before.resident_kib, after.resident_kib,
         1024 * (kSlackMib + SanitizerKeepsMib()));
  }
  return std::move(out).str();
}

// Strikes workers, and starts again those that end, as `tandem up` would.
class Faults {
 public:
  Faults(TestCluster* cluster, uint64_t seed) : cluster_(*cluster), random_(seed) {}

  // One fault at one worker, or at one of each role.
  void Strike() {
    Workers victims = {Draw() % 2 == 0 ? AnyOf("prefill") : AnyOf("decode")};
    if (Draw() % 4 == 0) victims = {AnyOf("prefill"), AnyOf("decode")};
    Strike(victims);
  }

  using Workers = std::vector<std::string>;
  // Returns when all workers are ready again.
  void Strike(const Workers& victims) {
    const Hit hit = {SteadyClock::now(), {}, victims};
    switch (NextKind()) {
      case Kind::kKill:
        Kill(victims);
        break;
      case Kind::kStop:
        StopForAWhile(victims);
        break;
      case Kind::kStopForGood:
        StopForGood(victims);
        break;
      case Kind::kHang:
        Hang(victims);
        break;
    }
    ++strikes_;
    Record(hit);
  }

  // A stop that a worker survives, and that is no strike of the deck.
  void Pause(const std::string& worker) {
    const Hit hit = {SteadyClock::now(), {}, {worker}};
    StopForAWhile({worker});
    Record(hit);
  }

  int strikes() const { return strikes_; }
  // Workers that were struck, or not ready again yet, at some time between these two.
  int StruckBetween(SteadyClock::time_point from, SteadyClock::time_point to) const {
    int workers = 0;
    for (const Hit& hit : hits_) {
      if (hit.began <= to && from <= hit.over) workers += static_cast<int>(hit.workers.size());
    }
    return workers;
  }
  // Who was struck when, around a request that began at `from`: in seconds since then.
  std::string Around(SteadyClock::time_point from) const {
    std::ostringstream out;
    const auto seconds = [&](SteadyClock::time_point at) {
      return std::chrono::duration<double>(at - from).count();
    };
    for (const Hit& hit : hits_) {
      if (seconds(hit.over) < -20 || seconds(hit.began) > 20) continue;
      for (const std::string& worker : hit.workers) out << worker << " ";
      out << "from " << seconds(hit.began) << " to " << seconds(hit.over) << " s; ";
    }
    return std::move(out).str();
  }
  std::string ToString() const {
    std::ostringstream out;
    for (const auto& [kind, count] : count_) out << count << " " << kind << ", ";
    return std::move(out).str();
  }

 private:
  enum class Kind { kKill, kStop, kStopForGood, kHang };
  struct Hit {
    SteadyClock::time_point began;
    SteadyClock::time_point over;  // all workers are ready again
    Workers workers;
  };

  // Over once the router has heard of those who were struck: what it still holds against a worker
  // that goes on is the strike's doing too.
  void Record(Hit hit) {
    const SteadyClock::time_point goes_on = SteadyClock::now();
    const auto heard_of = [&](const v1::GetClusterResponse& state) {
      return std::all_of(state.workers().begin(), state.workers().end(), [&](const auto& worker) {
        const bool struck =
            std::count(hit.workers.begin(), hit.workers.end(), worker.worker_id()) > 0;
        return worker.state() == "ready" &&
               (!struck || worker.seconds_since_report() < SecondsSince(goes_on));
      });
    };
    EXPECT_TRUE(cluster_.WaitFor(
        [&](const auto& state) { return state.workers_size() == kWorkers && heard_of(state); },
        kRestSeconds))
        << cluster_.GetCluster().DebugString();
    hit.over = SteadyClock::now();
    hits_.push_back(hit);
  }

  uint64_t Draw() { return random_(); }
  // Of ten in a row each kind comes its number of times.
  Kind NextKind() {
    if (deck_.empty()) {
      deck_.assign(5, Kind::kKill);
      deck_.insert(deck_.end(), 3, Kind::kStop);
      deck_.push_back(Kind::kStopForGood);
      deck_.push_back(Kind::kHang);
      std::shuffle(deck_.begin(), deck_.end(), random_);
    }
    const Kind kind = deck_.back();
    deck_.pop_back();
    return kind;
  }
  std::string AnyOf(const std::string& role) { return role + "-" + std::to_string(Draw() % 2); }
  void SignalAll(const Workers& workers, int signal) {
    for (const std::string& id : workers) cluster_.worker(id).process->Signal(signal);
  }
  void Restart(const Workers& workers) {
    for (const std::string& id : workers) cluster_.StartWorker(id);
  }

  // Signals to stop and to go on, from which they come back by themselves.
  void StopForAWhile(const Workers& workers) {
    count_["stops"] += static_cast<int>(workers.size());
    SignalAll(workers, SIGSTOP);
    SleepMilliseconds(50 << (Draw() % 7));  // up to 3.2 s, beyond what a router waits
    SignalAll(workers, SIGCONT);
  }

  void Kill(const Workers& workers) {
    count_["kills"] += static_cast<int>(workers.size());
    SignalAll(workers, SIGKILL);
    SleepMilliseconds(static_cast<int>(Draw() % 400));
    Restart(workers);
  }

  void StopForGood(const Workers& workers) {
    count_["stops until given up"] += static_cast<int>(workers.size());
    SignalAll(workers, SIGSTOP);
    SleepMilliseconds(kGivenUpMilliseconds);
    SignalAll(workers, SIGKILL);
    Restart(workers);
  }

  // The thread that computes stands still, all others go on.
  void Hang(const Workers& workers) {
    count_["hangs"] += static_cast<int>(workers.size());
    std::vector<std::unique_ptr<FrozenThread>> frozen;
    for (const std::string& id : workers) {
      const auto loop = ThreadNamed(cluster_.worker(id).process->pid(), "tandem-loop");
      ASSERT_TRUE(loop.has_value()) << id;
      frozen.push_back(std::make_unique<FrozenThread>(*loop));
      EXPECT_TRUE(frozen.back()->frozen()) << id;
    }
    for (const std::string& id : workers) {
      // Its watchdog ends it.
      EXPECT_EQ(cluster_.worker(id).process->Wait(kRestSeconds), 128 + SIGABRT) << id;
    }
    Restart(workers);
  }

  TestCluster& cluster_;
  std::mt19937_64 random_;
  std::vector<Kind> deck_;
  std::vector<Hit> hits_;
  int strikes_ = 0;
  std::map<std::string, int> count_;
};

class Chaos : public testing::Test {
 protected:
  Chaos() : seed_(static_cast<uint64_t>(FromEnvironment("TANDEM_CHAOS_SEED", 1))) {
    std::printf("TANDEM_CHAOS_SEED=%llu\n", static_cast<unsigned long long>(seed_));
  }

  void SetUp() override {
    undisturbed_ = StartUndisturbed();
    cluster_ = StartDisturbed();
    ASSERT_TRUE(undisturbed_ != nullptr && cluster_ != nullptr);
  }

  LoadOptions Load() const {
    LoadOptions load;
    load.address = cluster_->address();
    load.undisturbed = undisturbed_->channel();
    load.vocab = kDemoVocab;
    load.longest_prompt = 1200;
    load.longest_answer = 120;
    load.clients = 6;
    load.seed = seed_;
    return load;
  }

  void ExpectRest() {
    EXPECT_TRUE(cluster_->WaitFor(AtRest, kRestSeconds))
        << cluster_->GetCluster().DebugString() << cluster_->Logs();
    EXPECT_TRUE(TestClient(cluster_->channel())
                    .Generate(TokenRequest(RandomTokens(100, kDemoVocab, 5), 4))
                    .status.ok());
  }

  static void ExpectRight(const LoadTotals& totals) {
    for (const std::string& wrong : totals.wrong) ADD_FAILURE() << wrong;
  }

  // One lost worker is made good: only who met two may be told so.
  static void ExpectTwoWorkersLost(const LoadTotals& totals, const Faults& faults) {
    for (const UnavailableRequest& request : totals.unavailable) {
      EXPECT_GE(faults.StruckBetween(request.began, request.ended), 2)
          << request.message << "\nit lasted "
          << std::chrono::duration<double>(request.ended - request.began).count()
          << " s; struck were " << faults.Around(request.began);
    }
  }

  const uint64_t seed_;
  std::unique_ptr<TestCluster> undisturbed_;
  std::unique_ptr<TestCluster> cluster_;
};

TEST_F(Chaos, ClientsThatLeaveAtAnyStage) {
  LoadOptions options = Load();
  options.requests = FromEnvironment("TANDEM_CHAOS_REQUESTS", 100);
  options.leaving = 0.8;
  std::map<std::string, ProcessUsage> before;
  {
    LoadOptions warm = options;
    warm.requests = 40;
    warm.seed = seed_ + 1;
    CheckedLoad(warm).Join();
    ExpectRest();
    before = Usages(*cluster_);
  }
  CheckedLoad load(options);
  load.Join();
  const LoadTotals totals = load.totals();
  ExpectRest();
  const auto after = Usages(*cluster_);
  std::printf("%s\nbefore%s\nafter %s\n", totals.ToString().c_str(), ToString(before).c_str(),
              ToString(after).c_str());
  ExpectRight(totals);
  EXPECT_EQ(totals.unavailable.size(), 0u);
  EXPECT_GT(totals.left_before_first_token, totals.requests / 10);
  EXPECT_GT(totals.left_after_first_token, totals.requests / 20);
  EXPECT_EQ(Growth(before, after), "");
}

TEST_F(Chaos, WorkersThatDieStopAndHang) {
  const int strikes = FromEnvironment("TANDEM_CHAOS_FAULTS", 10);
  LoadOptions options = Load();
  options.leaving = 0.25;
  options.workers_die = true;
  Faults faults(cluster_.get(), seed_);
  std::map<std::string, ProcessUsage> before;
  CheckedLoad load(options);
  SleepMilliseconds(2000);
  while (faults.strikes() < strikes && !HasFatalFailure()) {
    faults.Strike();
    SleepMilliseconds(300);
    if (before.empty()) before = {{"router", Usages(*cluster_)["router"]}};
  }
  load.Stop();
  const LoadTotals totals = load.totals();
  ExpectRest();
  const auto after = Usages(*cluster_);
  std::printf("%s%s\nbefore%s\nafter %s\n", faults.ToString().c_str(), totals.ToString().c_str(),
              ToString(before).c_str(), ToString(after).c_str());
  ExpectRight(totals);
  ExpectTwoWorkersLost(totals, faults);
  if (HasFailure()) std::printf("%s", cluster_->Logs().c_str());
  EXPECT_EQ(Growth(before, after), "");
}

// Prefill-0 and decode-0 are stopped now and then but never end, so that their figures, and the
// router's, run through all of it.
TEST_F(Chaos, Soak) {
  const int minutes = FromEnvironment("TANDEM_SOAK_MINUTES", 0);
  if (minutes == 0) GTEST_SKIP() << "TANDEM_SOAK_MINUTES says how long; scripts/soak";
  LoadOptions options = Load();
  options.clients = 4;
  options.pause_ms = 1500;
  options.longest_answer = 600;  // so that many streams are hit after their first token
  options.leaving = 0.3;
  options.workers_die = true;
  Faults faults(cluster_.get(), seed_);
  std::map<std::string, ProcessUsage> before;  // the most of the warm-up, of those that never end
  CheckedLoad load(options);
  const auto began = SteadyClock::now();
  for (int minute = 1; minute <= minutes && !HasFatalFailure(); ++minute) {
    for (int i = 0; SecondsSince(began) < 60 * minute; ++i) {
      SleepMilliseconds(10'000);
      if (i % 2 == 0) {
        faults.Pause(i % 4 == 0 ? "prefill-0" : "decode-0");
      } else {
        faults.Strike({i % 4 == 1 ? "prefill-1" : "decode-1"});
      }
    }
    const auto usages = Usages(*cluster_);
    std::printf("minute %d: %s\n %s\n %s\n", minute, ToString(usages).c_str(),
                BlocksToString(cluster_->GetCluster()).c_str(), load.totals().ToString().c_str());
    std::fflush(stdout);
    if (minute > std::max(1, minutes / 10)) continue;
    for (const char* id : {"router", "prefill-0", "decode-0"}) {
      before[id] = MostOf(before[id], usages.at(id));
    }
  }
  load.Stop();
  ExpectRest();
  const LoadTotals totals = load.totals();
  const auto after = Usages(*cluster_);
  const std::string growth = Growth(before, after);
  std::printf("faults: %s\nbefore:%s\nafter: %s\n%s\n", faults.ToString().c_str(),
              ToString(before).c_str(), ToString(after).c_str(),
              growth.empty() ? "flat" : growth.c_str());
  ExpectRight(totals);
  ExpectTwoWorkersLost(totals, faults);
  EXPECT_EQ(growth, "");
}

}  // namespace
}  // namespace tandem
