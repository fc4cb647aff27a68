// Seeds of whole clusters under a virtual clock (scenario.h).
//
//   simulation_test                    the regression seeds, then a share of all seeds
//   simulation_test --seeds=10000      so many, with progress
//   simulation_test --seed=N           one, with its story and the logs of the cluster
//   simulation_test --check_replay     runs every seed twice and compares
//   simulation_test --from=N           where to begin; --keep_going does not stop at 10 failures
//
// Every seed runs in a process of its own, made from the same fresh one: what ends the process is
// a failure of that seed alone, and memory looks the same in every run of it.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>
#include <sys/personality.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

#include "tests/simulation/scenario.h"
#include "tests/support/paths.h"

ABSL_FLAG(std::optional<uint64_t>, seed, std::nullopt, "run this seed alone, loudly");
ABSL_FLAG(std::optional<uint64_t>, seeds, std::nullopt, "how many seeds to run");
ABSL_FLAG(uint64_t, from, 1, "the first of them");
ABSL_FLAG(bool, check_replay, false, "run every seed twice and compare");
ABSL_FLAG(bool, keep_going, false, "run all, however many fail");

namespace tandem {
namespace {

constexpr uint64_t kDefaultSeeds = 400;   // TANDEM_SIMULATION_SEEDS says otherwise
constexpr int kEnough = 10;               // failures
constexpr int kEnoughForAllFaults = 100;  // seeds

// What a child says of its seed, and how much of its text follows.
struct Verdict {
  int requests = 0, served = 0, migrations = 0, returned_tokens = 0;
  FaultCounts met = {};
  uint64_t events = 0, fingerprint = 0;
  uint64_t text_bytes = 0;
};
struct Outcome {
  Verdict verdict;
  std::string errors;
};

void WriteAll(int fd, const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = write(fd, bytes, size);
    if (n <= 0) _exit(3);
    bytes += n;
    size -= static_cast<size_t>(n);
  }
}

std::string ReadAll(int fd) {
  std::string out;
  char buffer[4096];
  for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) {
    out.append(buffer, static_cast<size_t>(n));
  }
  return out;
}

Outcome RunInChild(uint64_t seed) {
  int ends[2];
  if (pipe(ends) != 0) return {{}, "no pipe\n"};
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    const SeedResult result = RunSeed(seed);
    const Verdict verdict = {result.requests,        result.served,       result.migrations,
                             result.returned_tokens, result.met,          result.events,
                             result.fingerprint,     result.errors.size()};
    WriteAll(ends[1], &verdict, sizeof(verdict));
    WriteAll(ends[1], result.errors.data(), result.errors.size());
    _exit(0);
  }
  close(ends[1]);
  const std::string said = ReadAll(ends[0]);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  Outcome outcome;
  if (said.size() >= sizeof(Verdict)) std::memcpy(&outcome.verdict, said.data(), sizeof(Verdict));
  if (said.size() == sizeof(Verdict) + outcome.verdict.text_bytes && status == 0) {
    outcome.errors = said.substr(sizeof(Verdict));
  } else {
    outcome.errors = "seed " + std::to_string(seed) + ": the process ended with status " +
                     std::to_string(status) + "\n";
  }
  return outcome;
}

class Totals {
 public:
  // False: enough has failed.
  bool Add(uint64_t seed) {
    Outcome outcome = RunInChild(seed);
    if (outcome.errors.empty() && absl::GetFlag(FLAGS_check_replay)) {
      const Outcome again = RunInChild(seed);
      if (again.verdict.fingerprint != outcome.verdict.fingerprint ||
          again.verdict.events != outcome.verdict.events) {
        outcome.errors = "seed " + std::to_string(seed) + ": runs differently every time\n";
      }
    }
    ++seeds_;
    requests_ += outcome.verdict.requests;
    served_ += outcome.verdict.served;
    migrations_ += outcome.verdict.migrations;
    returned_tokens_ += outcome.verdict.returned_tokens;
    events_ += outcome.verdict.events;
    for (size_t i = 0; i < kNumFaults; ++i) met_[i] += outcome.verdict.met[i];
    if (outcome.errors.empty()) return true;
    std::printf("%s    replay: simulation_test --seed=%llu\n", outcome.errors.c_str(),
                static_cast<unsigned long long>(seed));
    std::fflush(stdout);
    failed_.push_back(seed);
    return failed_.size() < kEnough || absl::GetFlag(FLAGS_keep_going);
  }
  void Print() const {
    std::printf(
        "%d seeds: %lld requests, %lld served, %lld streams moved, %lld tokens came back, %llu "
        "events, %.1f s\n",
        seeds_, requests_, served_, migrations_, returned_tokens_,
        static_cast<unsigned long long>(events_), absl::ToDoubleSeconds(absl::Now() - begin_));
    if (failed_.empty()) return;
    std::printf("failed:");
    for (const uint64_t seed : failed_) std::printf(" %llu", static_cast<unsigned long long>(seed));
    std::printf("\n");
  }
  // What happened how often. A fault that never does is as good as none.
  bool AllFaultsMet() const {
    std::printf("met:");
    for (size_t i = 0; i < kNumFaults; ++i) {
      std::printf("%s %s %llu", i == 0 ? "" : ",", std::string(FaultName(i)).c_str(),
                  static_cast<unsigned long long>(met_[i]));
    }
    std::printf("\n");
    return returned_tokens_ > 0 && std::find(met_.begin(), met_.end(), 0) == met_.end();
  }
  bool failed() const { return !failed_.empty(); }
  int seeds() const { return seeds_; }

 private:
  const absl::Time begin_ = absl::Now();
  int seeds_ = 0;
  long long requests_ = 0, served_ = 0, migrations_ = 0, returned_tokens_ = 0;
  uint64_t events_ = 0;
  std::array<uint64_t, kNumFaults> met_ = {};
  std::vector<uint64_t> failed_;
};

int RunOne(uint64_t seed) {
  spdlog::set_level(spdlog::level::info);
  const SeedResult result = RunSeed(seed);
  std::printf("seed %llu\n%s%d requests, %d served, %d streams moved, %llu events\n%s",
              static_cast<unsigned long long>(seed), result.story.c_str(), result.requests,
              result.served, result.migrations, static_cast<unsigned long long>(result.events),
              result.errors.empty() ? "all is well\n" : result.errors.c_str());
  std::fflush(nullptr);
  _exit(result.errors.empty() ? 0 : 1);
}

// A seed a line; what follows a # says what it found.
std::vector<uint64_t> RegressionSeeds() {
  std::vector<uint64_t> seeds;
  std::ifstream file(SourcePath("tests/simulation/regression_seeds.txt"));
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') seeds.push_back(std::strtoull(line.c_str(), nullptr, 10));
  }
  return seeds;
}

int Run() {
  spdlog::set_level(spdlog::level::off);
  if (const auto seed = absl::GetFlag(FLAGS_seed); seed.has_value()) return RunOne(*seed);
  Totals totals;
  uint64_t count = kDefaultSeeds;
  if (const char* share = std::getenv("TANDEM_SIMULATION_SEEDS")) {
    count = std::strtoull(share, nullptr, 10);
  }
  const auto asked = absl::GetFlag(FLAGS_seeds);
  if (asked.has_value()) count = *asked;
  bool go_on = true;
  if (!asked.has_value()) {
    for (const uint64_t seed : RegressionSeeds()) go_on = totals.Add(seed) && go_on;
  }
  const uint64_t from = absl::GetFlag(FLAGS_from);
  for (uint64_t seed = from; seed < from + count && go_on; ++seed) {
    go_on = totals.Add(seed);
    if ((seed - from) % 500 == 499) totals.Print();
  }
  totals.Print();
  const bool all_met = totals.AllFaultsMet();
  if (!all_met && totals.seeds() >= kEnoughForAllFaults) {
    std::printf("some fault never happened\n");
    return 1;
  }
  return totals.failed() ? 1 : 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  // Where memory lies decides the order in which hash tables are walked.
  if ((personality(0xffffffff) & ADDR_NO_RANDOMIZE) == 0 && personality(ADDR_NO_RANDOMIZE) != -1 &&
      std::getenv("TANDEM_SIMULATION_AGAIN") == nullptr) {
    setenv("TANDEM_SIMULATION_AGAIN", "1", 1);
    execv("/proc/self/exe", argv);
  }
  absl::ParseCommandLine(argc, argv);
  return tandem::Run();
}
