// What a step of the decode loop costs its thread besides the model: admit, plan, launch, publish,
// with NUM_STREAMS requests that are read over real gRPC on loopback.
//
//   loop_bench [NUM_STREAMS=256] [STEPS=300]
//
// The same loop runs twice, in turns of 50 steps: with readers woken on the loop's thread, and by a
// StreamWaker. Times are of the loop's thread alone (CLOCK_THREAD_CPUTIME_ID), less what the runner
// spends in Launch and Collect, so that other load on the machine disturbs them little; trust the
// ratio.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <time.h>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"

#include "bench/usage.h"
#include "common/base/check.h"
#include "common/base/locks.h"
#include "common/rpc/server.h"
#include "decode_worker/decode_service.h"
#include "decode_worker/intake.h"
#include "decode_worker/loop.h"

namespace tandem::decode {
namespace {

constexpr int kBlockSize = 16;
constexpr int kPromptTokens = 16;
constexpr int kVocab = 1000;
constexpr int kTurn = 50;  // steps in a row

int64_t ThreadNanoseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Draws a token for everybody at once, and counts the time that it takes from the loop.
class InstantRunner final : public engine::ModelRunner {
 public:
  absl::StatusOr<engine::LaunchedStep> Launch(const engine::Batch& batch) override {
    const int64_t start = ThreadNanoseconds();
    output_.items.assign(batch.items.size(), {});
    for (size_t i = 0; i < batch.items.size(); ++i) {
      output_.items[i].has_token = batch.items[i].sampling != nullptr;
      output_.items[i].token.token = static_cast<int32_t>(i % kVocab);
    }
    nanoseconds_ += ThreadNanoseconds() - start;
    return engine::LaunchedStep{.id = ++last_};
  }
  absl::StatusOr<engine::StepOutput> Collect(engine::StepId) override { return std::move(output_); }

  int64_t nanoseconds() const { return nanoseconds_; }

 private:
  engine::StepOutput output_;
  engine::StepId last_ = 0;
  int64_t nanoseconds_ = 0;
};

// One client stream, read as fast as it comes.
class Reader final : public grpc::ClientReadReactor<internal::v1::TokenEvent> {
 public:
  Reader(internal::v1::Decode::Stub* stub, int max_tokens, absl::BlockingCounter* done)
      : done_(done) {
    for (uint32_t i = 0; i < kPromptTokens; ++i) request_.add_token_ids(i);
    request_.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(max_tokens));
    request_.mutable_sampling()->set_ignore_eos(true);
    stub->async()->Generate(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (ok) StartRead(&event_);
  }
  void OnDone(const grpc::Status&) override { done_->DecrementCount(); }
  void Cancel() { context_.TryCancel(); }

 private:
  absl::BlockingCounter* const done_;
  grpc::ClientContext context_;
  internal::v1::DecodeRequest request_;
  internal::v1::TokenEvent event_;
};

// A decode worker's loop with its server and its clients.
class Bench {
 public:
  Bench(int num_streams, int steps, bool with_waker)
      : num_streams_(num_streams),
        max_model_len_(kPromptTokens + 2 * steps + 1000),
        pool_(num_streams * (BlocksFor(max_model_len_, kBlockSize) + 1)),
        cache_(&pool_, kBlockSize, /*enabled=*/false),
        metrics_(&registry_),
        inbox_(4096),
        intake_({kVocab, max_model_len_}, &inbox_, Clock::Real()),
        service_(&intake_),
        done_(num_streams) {
    if (with_waker) waker_ = std::make_unique<StreamWaker>();
    LoopOptions options;
    options.admission.limits = {kBlockSize, num_streams, 2 * num_streams};
    options.admission.max_model_len = max_model_len_;
    options.admission.unified = true;
    options.publish.max_pending_tokens = 1 << 20;  // nobody is paused
    LoopParts parts;
    parts.runner = &runner_;
    parts.pool = &pool_;
    parts.cache = &cache_;
    parts.waker = waker_.get();
    parts.clock = Clock::Real();
    parts.metrics = &metrics_;
    parts.inbox = &inbox_;
    loop_ = std::make_unique<Loop>(std::move(options), parts, worker::Reports{});
    auto server = RpcServer::Start({}, {&service_});
    TANDEM_CHECK(server.ok(), "{}", server.status().ToString());
    server_ = *std::move(server);
    stub_ = internal::v1::Decode::NewStub(MakeChannel(server_->address()));
    for (int i = 0; i < num_streams; ++i) {
      readers_.push_back(std::make_unique<Reader>(stub_.get(), max_model_len_, &done_));
    }
    while (static_cast<int>(loop_->num_sequences()) < num_streams) {
      loop_->Step(absl::Milliseconds(1));
    }
  }
  ~Bench() {
    loop_.reset();
    for (auto& reader : readers_) reader->Cancel();
    done_.Wait();
    server_->Shutdown(absl::Seconds(1));
  }

  void RunTurn() {
    for (int i = 0; i < kTurn; ++i) {
      // As on a device: the readers have the time of a step to take what was published.
      absl::SleepFor(absl::Milliseconds(10));
      const int64_t runner = runner_.nanoseconds();
      const int64_t start = ThreadNanoseconds();
      loop_->Step(absl::ZeroDuration());
      const int64_t took = ThreadNanoseconds() - start - (runner_.nanoseconds() - runner);
      microseconds_.push_back(static_cast<double>(took) / 1e3);
    }
  }

  void Print(const char* name) {
    std::sort(microseconds_.begin(), microseconds_.end());
    const auto at = [this](double part) {
      return microseconds_[static_cast<size_t>(part * static_cast<double>(microseconds_.size()))];
    };
    std::printf("%-28s %4d streams: p50 %7.0f us  p90 %7.0f us  p99 %7.0f us a step\n", name,
                num_streams_, at(0.5), at(0.9), at(0.99));
  }

 private:
  const int num_streams_;
  const int max_model_len_;
  engine::BlockPool pool_;
  engine::PrefixCache cache_;
  InstantRunner runner_;
  Metrics registry_;
  DecodeMetrics metrics_;
  EventInbox inbox_;
  Intake intake_;
  DecodeService service_;
  absl::BlockingCounter done_;
  std::unique_ptr<StreamWaker> waker_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<internal::v1::Decode::Stub> stub_;
  std::vector<std::unique_ptr<Reader>> readers_;
  std::vector<double> microseconds_;
};

int Main(int argc, char** argv) {
  WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "loop_bench [NUM_STREAMS] [STEPS]")) {
    return 0;
  }
  const int num_streams = argc > 1 ? std::atoi(argv[1]) : 256;
  const int steps = argc > 2 ? std::atoi(argv[2]) : 300;
  TANDEM_CHECK(num_streams > 0 && steps > 0, "usage: loop_bench [NUM_STREAMS] [STEPS]");
  Bench inline_wakes(num_streams, steps, /*with_waker=*/false);
  Bench waker(num_streams, steps, /*with_waker=*/true);
  for (int done = 0; done < steps; done += kTurn) {
    inline_wakes.RunTurn();
    waker.RunTurn();
  }
  inline_wakes.Print("woken on the loop's thread");
  waker.Print("woken by StreamWaker");
  return 0;
}

}  // namespace
}  // namespace tandem::decode

int main(int argc, char** argv) { return tandem::decode::Main(argc, argv); }
