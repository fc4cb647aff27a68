#include "tests/support/checked_load.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <sstream>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

constexpr int kBeginnings = 8;
constexpr size_t kMaxMessages = 20;
// Longer than any request may take, whatever befalls the cluster.
constexpr double kPatienceSeconds = 120;

using Random = std::mt19937_64;

int Below(Random& random, int bound) {
  return bound <= 0 ? 0 : static_cast<int>(random() % static_cast<uint64_t>(bound));
}

bool OneIn(Random& random, int n) { return Below(random, n) == 0; }

// From 1 ms to about 2 s, each power of two as often as another: before a request is routed, while
// it waits, in its prefill, in its transfer, in its decode.
double DrawMoment(Random& random) {
  return 0.001 * std::exp2(11.0 * static_cast<double>(Below(random, 1000)) / 1000);
}

std::string Name(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::OK:
      return "OK";
    case grpc::StatusCode::CANCELLED:
      return "CANCELLED";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::UNAVAILABLE:
      return "UNAVAILABLE";
    default:
      return "code " + std::to_string(static_cast<int>(code));
  }
}

std::string Describe(const v1::GenerateRequest& request, const Answer& answer) {
  std::ostringstream out;
  out << answer.token_ids.size() << " of " << request.sampling().max_tokens() << " tokens behind "
      << request.token_ids().ids_size() << ", " << answer.timing.prefill_worker() << " -> "
      << answer.timing.decode_worker() << ", " << answer.timing.migrations() << " migrations, "
      << Name(answer.status.error_code()) << " " << answer.status.error_message();
  return std::move(out).str();
}

}  // namespace

struct CheckedLoad::Farewell {
  enum class How { kStays, kCancels, kCancelsBehindTokens, kDeadline, kIsKilled };
  How how = How::kStays;
  double seconds = 0;  // kCancels, kDeadline, kIsKilled
  size_t tokens = 0;   // kCancelsBehindTokens
};

std::string LoadTotals::ToString() const {
  std::ostringstream out;
  out << requests << " requests:";
  for (const auto& [status, count] : by_status) out << " " << count << " " << status << ",";
  out << " left before/after the first token " << left_before_first_token << "/"
      << left_after_first_token << ", " << tokens_checked << " tokens checked, " << migrations
      << " migrations, " << asked_elsewhere << " asked elsewhere, gaps up to "
      << std::lround(longest_gap_ms) << " ms, failed tries up to "
      << std::lround(longest_failed_attempts_ms) << " ms, " << wrong.size() << " wrong";
  return std::move(out).str();
}

CheckedLoad::CheckedLoad(const LoadOptions& options)
    : options_(options), undisturbed_(options.undisturbed) {
  for (const std::string& address : {options.address, options.other_address}) {
    if (address.empty()) continue;
    routers_.push_back(std::make_unique<TestClient>(
        grpc::CreateChannel(address, grpc::InsecureChannelCredentials())));
  }
  Random random(options.seed);
  for (int i = 0; i < kBeginnings; ++i) {
    beginnings_.push_back(RandomTokens(options.longest_prompt, options.vocab, random()));
  }
  for (int i = 0; i < options.clients; ++i) threads_.emplace_back([this, i] { RunClient(i); });
}

void CheckedLoad::Join() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void CheckedLoad::Stop() {
  stop_ = true;
  Join();
}

LoadTotals CheckedLoad::totals() const {
  absl::MutexLock lock(&mutex_);
  return totals_;
}

void CheckedLoad::RunClient(int client) {
  Random random(options_.seed * 1000 + static_cast<uint64_t>(client));
  while (!stop_ && (options_.requests == 0 || asked_++ < options_.requests)) {
    const v1::GenerateRequest request = Draw(random);
    const Farewell farewell = DrawFarewell(random);
    if (farewell.how == Farewell::How::kIsKilled) {
      AskAndBeKilled(request, farewell);
    } else {
      const auto began = std::chrono::steady_clock::now();
      Judge(request, farewell, Ask(client, request, farewell), began);
    }
    SleepMilliseconds(Below(random, options_.pause_ms + 1));
  }
}

v1::GenerateRequest CheckedLoad::Draw(Random& random) const {
  // A beginning that others have too, or had, and an end of its own.
  const std::vector<uint32_t>& beginning = beginnings_[random() % kBeginnings];
  const int tail = 1 + Below(random, options_.longest_prompt / 8);
  const int shared = Below(random, options_.longest_prompt - tail);
  std::vector<uint32_t> prompt(beginning.begin(), beginning.begin() + shared);
  for (uint32_t id : RandomTokens(tail, options_.vocab, random())) prompt.push_back(id);
  v1::GenerateRequest request = TokenRequest(prompt, 1 + Below(random, options_.longest_answer));
  v1::SamplingParams& sampling = *request.mutable_sampling();
  sampling.set_ignore_eos(!OneIn(random, 4));
  if (!OneIn(random, 4)) {
    sampling.set_temperature(0.8f);
    sampling.set_top_p(0.95f);
    sampling.set_seed(random());
  }
  if (OneIn(random, 2)) {
    sampling.set_presence_penalty(0.5f);
    sampling.set_frequency_penalty(0.3f);
    sampling.set_repetition_penalty(1.2f);
  }
  if (OneIn(random, 2)) sampling.set_logprobs(2);
  if (OneIn(random, 3)) {
    for (const char* stop : {"and the", "ing to", "\n\n", "42"}) sampling.add_stop(stop);
  }
  return request;
}

CheckedLoad::Farewell CheckedLoad::DrawFarewell(Random& random) const {
  Farewell farewell;
  if (Below(random, 1000) >= static_cast<int>(options_.leaving * 1000)) return farewell;
  using How = Farewell::How;
  constexpr How kHow[] = {How::kCancels,  How::kCancels,  How::kCancelsBehindTokens,
                          How::kDeadline, How::kDeadline, How::kIsKilled};
  farewell.how = kHow[random() % std::size(kHow)];
  farewell.seconds = DrawMoment(random);
  farewell.tokens = 1 + static_cast<size_t>(Below(random, options_.longest_answer / 2));
  return farewell;
}

Answer CheckedLoad::Ask(int client, const v1::GenerateRequest& request, const Farewell& farewell) {
  for (size_t attempt = 0;; ++attempt) {
    Answer answer = AskOnce(*routers_[(static_cast<size_t>(client) + attempt) % routers_.size()],
                            request, farewell);
    if (answer.status.error_code() != grpc::StatusCode::UNAVAILABLE ||
        attempt + 1 == routers_.size()) {
      return answer;
    }
    absl::MutexLock lock(&mutex_);
    ++totals_.asked_elsewhere;
  }
}

Answer CheckedLoad::AskOnce(TestClient& client, const v1::GenerateRequest& request,
                            const Farewell& farewell) {
  grpc::ClientContext context;
  const bool deadline = farewell.how == Farewell::How::kDeadline;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(
                           std::lround(1000 * (deadline ? farewell.seconds : kPatienceSeconds))));
  absl::Notification over;
  std::thread canceller;
  if (farewell.how == Farewell::How::kCancels) {
    canceller = std::thread([&] {
      if (!over.WaitForNotificationWithTimeout(absl::Seconds(farewell.seconds)))
        context.TryCancel();
    });
  }
  const auto on_message = [&](const Answer& so_far) {
    if (farewell.how == Farewell::How::kCancelsBehindTokens &&
        so_far.token_ids.size() >= farewell.tokens) {
      context.TryCancel();
    }
  };
  Answer answer = client.Generate(request, &context, on_message);
  over.Notify();
  if (canceller.joinable()) canceller.join();
  return answer;
}

void CheckedLoad::AskAndBeKilled(const v1::GenerateRequest& request, const Farewell& farewell) {
  std::string ids;
  for (uint32_t id : request.token_ids().ids()) {
    ids += (ids.empty() ? "" : ",") + std::to_string(id);
  }
  TempDir dir;
  const auto process =
      Process::Spawn({BinaryPath("tandem"), "generate", "--server", options_.address, "--token-ids",
                      ids, "--max-tokens", std::to_string(options_.longest_answer), "--ignore-eos"},
                     {}, dir.path() + "/stderr");
  // It needs about 20 ms to start.
  process->Wait(0.02 + farewell.seconds);
  process->Signal(SIGKILL);
  process->Wait(10);
  absl::MutexLock lock(&mutex_);
  ++totals_.requests;
  ++totals_.by_status["client killed"];
}

void CheckedLoad::Judge(const v1::GenerateRequest& request, const Farewell& farewell,
                        const Answer& answer, std::chrono::steady_clock::time_point began) {
  const auto ended = std::chrono::steady_clock::now();
  std::string wrong = WrongStatus(farewell, answer, options_.workers_die);
  if (wrong.empty()) wrong = WrongTokens(request, answer);
  absl::MutexLock lock(&mutex_);
  ++totals_.requests;
  ++totals_.by_status[Name(answer.status.error_code())];
  if (farewell.how != Farewell::How::kStays && !answer.status.ok()) {
    ++(answer.token_ids.empty() ? totals_.left_before_first_token : totals_.left_after_first_token);
  }
  totals_.tokens_checked += static_cast<int64_t>(answer.token_ids.size());
  totals_.migrations += static_cast<int>(answer.timing.migrations());
  totals_.longest_gap_ms = std::max(totals_.longest_gap_ms, answer.longest_gap_ms);
  totals_.longest_failed_attempts_ms =
      std::max(totals_.longest_failed_attempts_ms, answer.timing.failed_attempts());
  if (answer.status.error_code() == grpc::StatusCode::UNAVAILABLE) {
    totals_.unavailable.push_back({began, ended, answer.status.error_message()});
  }
  if (!wrong.empty() && totals_.wrong.size() < kMaxMessages) {
    totals_.wrong.push_back(wrong + ": " + Describe(request, answer));
  }
}

std::string CheckedLoad::WrongStatus(const Farewell& farewell, const Answer& answer,
                                     bool workers_die) {
  using How = Farewell::How;
  const bool finished = answer.finish_reason == v1::FINISH_REASON_STOP ||
                        answer.finish_reason == v1::FINISH_REASON_LENGTH;
  switch (answer.status.error_code()) {
    case grpc::StatusCode::OK:
      if (!finished) return "OK without a finish reason";
      return answer.usage.completion_tokens() == answer.token_ids.size() ? "" : "usage is wrong";
    case grpc::StatusCode::CANCELLED:
      return farewell.how == How::kCancels || farewell.how == How::kCancelsBehindTokens
                 ? ""
                 : "nobody cancelled";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return farewell.how == How::kDeadline ? "" : "took longer than any request may";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:  // its turn would come behind its deadline
      return farewell.how == How::kDeadline && answer.token_ids.empty() ? "" : "room was to come";
    case grpc::StatusCode::UNAVAILABLE:
      // One loss is made good, two are said.
      return workers_die && answer.status.error_message().find("were lost") != std::string::npos
                 ? ""
                 : "unavailable without a reason";
    default:
      return "a status that nothing explains";
  }
}

std::string CheckedLoad::WrongTokens(v1::GenerateRequest request, const Answer& answer) {
  if (answer.token_ids.empty()) return answer.status.ok() ? "OK without a token" : "";
  // Of an answer that was left, as much as came.
  if (!answer.status.ok()) {
    request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(answer.token_ids.size()));
  }
  const Answer right = undisturbed_.Generate(request, kPatienceSeconds);
  if (!right.status.ok()) return "no undisturbed answer: " + right.status.error_message();
  if (answer.token_ids != right.token_ids) return "other tokens";
  if (answer.logprobs != right.logprobs) return "other logprobs";
  if (!answer.status.ok()) return "";
  if (answer.text != right.text) return "another text";
  return answer.finish_reason == right.finish_reason ? "" : "another finish reason";
}

}  // namespace tandem
