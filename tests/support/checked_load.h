// Clients of a cluster that somebody disturbs meanwhile. They ask for answers of every kind, some
// leave at a moment of their own, and each judges what it was told: the request must end with one
// status that its own story explains, and every token must be the one that an undisturbed cluster
// of one worker gives.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"

#include "tests/support/cluster.h"

namespace tandem {

struct LoadOptions {
  std::string address;                         // of the cluster under test
  std::string other_address;                   // of its other router, if there is one: every second
                                               // client begins there, and who is told UNAVAILABLE
                                               // asks the other one
  std::shared_ptr<grpc::Channel> undisturbed;  // of the same model in float32
  int vocab = 0;             // ids below are drawn; the model's special ones lie above
  int longest_prompt = 0;    // tokens
  int longest_answer = 0;    // tokens
  int clients = 1;           // each has one request at a time
  int requests = 0;          // of all clients together; 0: until Stop
  double leaving = 0;        // share of requests that the client leaves
  int pause_ms = 0;          // longest time between two requests of a client
  bool workers_die = false;  // so UNAVAILABLE is a true answer: the test says to whom
  uint64_t seed = 0;
};

// A request that was told UNAVAILABLE.
struct UnavailableRequest {
  std::chrono::steady_clock::time_point began;
  std::chrono::steady_clock::time_point ended;
  std::string message;
};

struct LoadTotals {
  int requests = 0;
  std::map<std::string, int> by_status;  // also "client killed", which learns of no status
  int asked_elsewhere = 0;               // of the other router, after UNAVAILABLE
  int left_before_first_token = 0;       // of those who left and saw it
  int left_after_first_token = 0;
  int64_t tokens_checked = 0;
  int migrations = 0;
  double longest_gap_ms = 0;
  double longest_failed_attempts_ms = 0;
  std::vector<UnavailableRequest> unavailable;
  std::vector<std::string> wrong;  // what must not be, in words

  std::string ToString() const;
};

// Thread-safe.
class CheckedLoad {
 public:
  explicit CheckedLoad(const LoadOptions& options);
  ~CheckedLoad() { Stop(); }

  // Waits for the requests that were asked for.
  void Join();
  // No further requests; waits for those that run. What came before Stop counts.
  void Stop();
  LoadTotals totals() const;

 private:
  struct Farewell;  // how and when a client leaves, if it does
  void RunClient(int client);
  v1::GenerateRequest Draw(std::mt19937_64& random) const;
  Farewell DrawFarewell(std::mt19937_64& random) const;
  Answer Ask(int client, const v1::GenerateRequest& request, const Farewell& farewell);
  Answer AskOnce(TestClient& client, const v1::GenerateRequest& request, const Farewell& farewell);
  // Asks as a process of its own, which is killed after a while.
  void AskAndBeKilled(const v1::GenerateRequest& request, const Farewell& farewell);
  void Judge(const v1::GenerateRequest& request, const Farewell& farewell, const Answer& answer,
             std::chrono::steady_clock::time_point began);
  // Empty if that status is one that the client had to expect.
  static std::string WrongStatus(const Farewell& farewell, const Answer& answer, bool workers_die);
  // Empty if the answer, or as much as came of it, is what it is without disturbance.
  std::string WrongTokens(v1::GenerateRequest request, const Answer& answer);

  const LoadOptions options_;
  std::vector<std::unique_ptr<TestClient>> routers_;
  TestClient undisturbed_;
  std::vector<std::vector<uint32_t>> beginnings_;  // that prompts share
  std::atomic<int> asked_ = 0;
  std::atomic<bool> stop_ = false;
  mutable absl::Mutex mutex_;
  LoadTotals totals_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace tandem
