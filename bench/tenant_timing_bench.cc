// tenant_timing_bench [TRIALS]: whether the time to the first token tells one tenant what another
// has asked. A victim asks a prompt in half of the trials, something else of the same length in the
// others; then a stranger asks that prompt and takes the time. Printed is how well the time tells
// the two halves apart: the area under the ROC curve (Mann-Whitney U over the number of pairs), 0.5
// where it tells nothing. A stranger of the victim's own tenant is the control: the cache serves
// it, so that its times must tell. Exit status 1 if the control does not, or if another tenant's
// times do, by more than 0.05 and two standard errors.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fmt/format.h"

#include "bench/usage.h"
#include "common/base/clock.h"
#include "common/base/locks.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

constexpr int kPromptTokens = 1024;
constexpr int kVocab = 512;  // of the small test model

// What `tandem key new` writes for the file is appended to `file`; returns the key.
std::string NewKey(const std::string& name, const std::string& tenant, std::string* file) {
  const Completed made =
      RunCommand({BinaryPath("tandem"), "key", "new", "--name", name, "--tenant", tenant}, 30);
  if (made.exit_code != 0) {
    fmt::print(stderr, "{}", made.err);
    std::exit(2);
  }
  *file += made.out;
  return made.err.substr(0, made.err.find('\n'));
}

struct Halves {
  std::vector<double> asked_ms, not_asked_ms;
};

// Of a pair of one time from each half: how often that of the asked prompt is the shorter one.
double AreaUnderCurve(const Halves& halves) {
  double below = 0;
  for (const double asked : halves.asked_ms) {
    for (const double other : halves.not_asked_ms) {
      below += asked < other ? 1 : asked == other ? 0.5 : 0;
    }
  }
  return below / static_cast<double>(halves.asked_ms.size() * halves.not_asked_ms.size());
}

// Of the area where the halves do not differ (Hanley and McNeil 1982).
double StandardError(const Halves& halves) {
  const auto n = static_cast<double>(halves.asked_ms.size()),
             m = static_cast<double>(halves.not_asked_ms.size());
  return std::sqrt((n + m + 1) / (12 * n * m));
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

class Trials {
 public:
  Trials(const std::shared_ptr<grpc::Channel>& channel, const std::string& victim)
      : channel_(channel), victim_(channel, victim) {}

  Halves Run(const std::string& stranger_key, int trials) {
    TestClient stranger(channel_, stranger_key);
    Halves halves;
    for (int i = 0; i < trials; ++i) {
      const std::vector<uint32_t> prompt = RandomTokens(kPromptTokens, kVocab, random_());
      const bool asked = random_() % 2 == 0;
      Time(victim_, asked ? prompt : RandomTokens(kPromptTokens, kVocab, random_()));
      (asked ? halves.asked_ms : halves.not_asked_ms).push_back(Time(stranger, prompt));
    }
    return halves;
  }

 private:
  static double Time(TestClient& client, const std::vector<uint32_t>& prompt) {
    const absl::Time begin = Clock::Real()->Now();
    const Answer answer = client.Generate(TokenRequest(prompt, 1));
    if (!answer.status.ok()) {
      fmt::print(stderr, "{}\n", answer.status.error_message());
      std::exit(2);
    }
    return absl::ToDoubleMilliseconds(Clock::Real()->Now() - begin);
  }

  const std::shared_ptr<grpc::Channel> channel_;
  TestClient victim_;
  std::mt19937_64 random_{7};
};

int Main(int trials) {
  TempDir dir;
  std::string file;
  const std::string victim = NewKey("victim", "a", &file),
                    colleague = NewKey("colleague", "a", &file),
                    other = NewKey("other", "b", &file);
  WriteFile(dir.path() + "/keys.yaml", file);
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/small");
  spec.router_flags = {"--api-keys-file=" + dir.path() + "/keys.yaml"};
  spec.worker_flags = {"--load-format=dummy", "--num-threads=1", "--kv-cache-memory-bytes=256MiB"};
  const auto cluster = TestCluster::Start(spec);
  if (cluster == nullptr) return 2;
  Trials attack(cluster->channel(), victim);
  attack.Run(other, 20);  // warm
  int rc = 0;
  for (const auto& [name, key, tells] : {std::tuple{"same tenant (control)", colleague, true},
                                         std::tuple{"other tenant", other, false}}) {
    const Halves halves = attack.Run(key, trials);
    const double area = AreaUnderCurve(halves), error = StandardError(halves);
    fmt::print(
        "{:<22} {} trials: first token {:.2f} ms where the victim asked, {:.2f} ms where not "
        "(medians); AUC {:.3f}, standard error {:.3f}\n",
        name, trials, Median(halves.asked_ms), Median(halves.not_asked_ms), area, error);
    const bool told = std::abs(area - 0.5) > 0.05 + 2 * error;
    if (told != tells) rc = 1;
  }
  return rc;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "tenant_timing_bench [TRIALS]")) return 0;
  return tandem::Main(argc > 1 ? std::max(20, std::atoi(argv[1])) : 400);
}
