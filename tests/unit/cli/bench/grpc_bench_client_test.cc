// The client against a server made here, which knows when it wrote each token.
#include "cli/bench/grpc_bench_client.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <fstream>
#include <thread>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/bench/metrics.h"
#include "common/base/clock.h"
#include "common/rpc/server.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem::cli {
namespace {

constexpr int kStreams = 400;
constexpr int kTokens = 25;
constexpr absl::Duration kEvery = absl::Milliseconds(40);

// Writes to every stream one token each kEvery, or when gRPC has taken the last one of every stream
// where that is later, from one thread; a token's id is its place in written(). Streams begin
// together, once there are as many as the test wants.
class Ticker : public v1::Inference::CallbackService {
 public:
  explicit Ticker(int streams)
      : streams_(streams), written_(static_cast<size_t>(streams * kTokens)) {}

  class Stream : public grpc::ServerWriteReactor<v1::GenerateResponse> {
   public:
    explicit Stream(Ticker* ticker) : ticker_(ticker) {}
    void Write(uint32_t id) {
      message_.Clear();
      message_.add_token_ids(id);
      StartWrite(&message_);
    }
    void End(const grpc::Status& status) {
      if (!ended_.exchange(true)) Finish(status);
    }
    void OnWriteDone(bool /*ok*/) override { ticker_->OnWritten(); }
    // A server waits for its calls when it ends.
    void OnCancel() override { End(grpc::Status::CANCELLED); }
    void OnDone() override { delete this; }

   private:
    Ticker* const ticker_;
    std::atomic<bool> ended_ = false;
    v1::GenerateResponse message_;
  };

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* /*context*/, const v1::GenerateRequest* request) override {
    auto* stream = new Stream(this);
    if (request->model() == "refuse") {
      stream->End({grpc::StatusCode::RESOURCE_EXHAUSTED, "full"});
      return stream;
    }
    absl::MutexLock lock(&mutex_);
    last_ = *request;
    running_.push_back(stream);
    return stream;
  }
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* /*request*/,
                                       v1::ListModelsResponse* response) override {
    v1::Model* model = response->add_models();
    model->set_id("fake");
    model->set_vocab_size(1000);
    model->set_max_model_len(2048);
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  // Serves all streams to their end.
  void Run() {
    std::vector<Stream*> streams;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(
          +[](Ticker* t) { return std::ssize(t->running_) == t->streams_; }, this));
      streams = running_;
    }
    uint32_t id = 0;
    for (int token = 0; token < kTokens; ++token) {
      const absl::Time next = absl::Now() + kEvery;
      {
        absl::MutexLock lock(&mutex_);
        unwritten_ = std::ssize(streams);
      }
      for (Stream* stream : streams) {
        written_[id] = Clock::Real()->Now();
        stream->Write(id++);
      }
      absl::SleepFor(next - absl::Now());
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(
          +[](Ticker* t) { return t->unwritten_ == 0; }, this));
    }
    absl::SleepFor(kEvery);
    for (Stream* stream : streams) stream->End(grpc::Status::OK);
  }

  absl::Time written(uint32_t id) const { return written_[id]; }
  v1::GenerateRequest last() {
    absl::MutexLock lock(&mutex_);
    return last_;
  }

 private:
  void OnWritten() {
    absl::MutexLock lock(&mutex_);
    --unwritten_;
  }

  const int streams_;
  absl::Mutex mutex_;
  std::vector<Stream*> running_;
  std::ptrdiff_t unwritten_ = 0;  // of the current round
  v1::GenerateRequest last_;
  std::vector<absl::Time> written_;
};

class Watcher : public AnswerSink {
 public:
  Watcher(const Ticker* ticker, absl::BlockingCounter* ended) : ticker_(ticker), ended_(ended) {}
  void OnTokens(std::span<const uint32_t> ids) override {
    const absl::Time now = Clock::Real()->Now();
    for (const uint32_t id : ids) {
      added_ms.push_back(absl::ToDoubleMilliseconds(now - ticker_->written(id)));
    }
  }
  void OnEnd(const absl::Status& end, const AnswerUsage& /*usage*/) override {
    status = end;
    ended_->DecrementCount();
  }

  std::vector<double> added_ms;
  absl::Status status;

 private:
  const Ticker* const ticker_;
  absl::BlockingCounter* const ended_;
};

int Threads() {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("Threads:")) return std::stoi(line.substr(8));
  }
  return -1;
}

// 10,000 tokens a second. What is measured holds the server's half of the way too, on the same
// cores, and so is more than what the client adds.
TEST(GrpcBenchClient, FourHundredStreamsAddLittle) {
  Ticker ticker(kStreams);
  auto server = RpcServer::Start({}, {&ticker});
  ASSERT_OK(server);
  GrpcBenchClient client({.server = {.address = (*server)->address()}});
  ASSERT_OK(client.Describe());
  std::thread writer([&] { ticker.Run(); });
  absl::BlockingCounter ended(kStreams);
  std::vector<std::shared_ptr<Watcher>> watchers;
  BenchRequest request{{1, 2, 3}, kTokens, "", absl::Seconds(60)};
  for (int i = 0; i < kStreams; ++i) {
    watchers.push_back(std::make_shared<Watcher>(&ticker, &ended));
    client.Start(request, watchers.back());
  }
  const int threads = Threads();
  ended.Wait();
  writer.join();
  std::vector<double> added;
  for (const auto& watcher : watchers) {
    EXPECT_OK(watcher->status);
    EXPECT_EQ(watcher->added_ms.size(), static_cast<size_t>(kTokens));
    added.insert(added.end(), watcher->added_ms.begin(), watcher->added_ms.end());
  }
  std::sort(added.begin(), added.end());
  std::printf("%d streams, %d threads; write to read: p50 %.3f ms, p99 %.3f ms, max %.3f ms\n",
              kStreams, threads, Percentile(added, 50), Percentile(added, 99), added.back());
  EXPECT_LT(threads, 64);  // not one per stream
  // Half of the interval, also on a busy machine.
  EXPECT_LT(Percentile(added, 50), 20.0 * SanitizerSlowsBy());
  EXPECT_EQ(client.Describe()->vocab_size, 1000u);
}

TEST(GrpcBenchClient, SendsWhatWasAskedAndTellsOfRefusals) {
  Ticker ticker(1);
  auto server = RpcServer::Start({}, {&ticker});
  ASSERT_OK(server);
  GrpcBenchClientOptions options{.server = {.address = (*server)->address()}, .connections = 1};
  options.sampling.set_ignore_eos(true);
  {
    GrpcBenchClient client(options);
    absl::BlockingCounter ended(1);
    std::thread writer([&] { ticker.Run(); });
    const auto watcher = std::make_shared<Watcher>(&ticker, &ended);
    client.Start({{4, 5}, kTokens, "salt", absl::Seconds(60)}, watcher);
    ended.Wait();
    writer.join();
    EXPECT_OK(watcher->status);
  }
  const v1::GenerateRequest sent = ticker.last();
  EXPECT_THAT(sent.token_ids().ids(), testing::ElementsAre(4, 5));
  EXPECT_EQ(sent.sampling().max_tokens(), static_cast<uint32_t>(kTokens));
  EXPECT_TRUE(sent.sampling().ignore_eos());
  EXPECT_EQ(sent.options().cache_salt(), "salt");

  options.model = "refuse";
  GrpcBenchClient refused(options);
  EXPECT_EQ(refused.Describe().status().code(), absl::StatusCode::kNotFound);
  absl::BlockingCounter ended(1);
  const auto watcher = std::make_shared<Watcher>(&ticker, &ended);
  refused.Start({{4}, 1, "", absl::Seconds(60)}, watcher);
  ended.Wait();
  EXPECT_EQ(watcher->status.code(), absl::StatusCode::kResourceExhausted);
}

TEST(GrpcBenchClient, ItsEndCancelsWhatRuns) {
  Ticker ticker(2);  // of which one never comes: nothing is written
  auto server = RpcServer::Start({}, {&ticker});
  ASSERT_OK(server);
  absl::BlockingCounter ended(1);
  const auto watcher = std::make_shared<Watcher>(&ticker, &ended);
  {
    GrpcBenchClient client({.server = {.address = (*server)->address()}});
    client.Start({{4}, 1, "", absl::Seconds(1)}, watcher);
  }
  ended.Wait();
  EXPECT_FALSE(watcher->status.ok());
}

}  // namespace
}  // namespace tandem::cli
