// A whole router in one thread: workers are messages and a fake DecodeClient, clients are sinks,
// and the clock stands still until the test moves it.
#include "router/core/router_core.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "common/rpc/cluster_client.h"
#include "simulation/fake_clock.h"
#include "tests/fakes/fake_decode_client.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint32_t kVocab = 512;

// Takes every message at once; the stream hears of it from Client::Pump, not from within Write.
class Client : public StreamSink {
 public:
  Client(RouterCore* core, Request request) {
    auto stream = core->NewStream(std::move(request), this);
    EXPECT_OK(stream);
    stream_ = *std::move(stream);
    stream_->Begin();
  }
  void Write(const GenerateResponse& response) override {
    tokens.insert(tokens.end(), response.token_ids.begin(), response.token_ids.end());
    if (response.timing.has_value()) timing = *response.timing;
    writing_ = true;
  }
  void Finish(const absl::Status& status) override {
    outcome = status;
    finished = true;
  }
  void Abort() override {}
  void Pump() {
    if (std::exchange(writing_, false)) stream_->OnWritten(true);
  }
  void Cancel() { stream_->OnClientGone(); }

  std::vector<int32_t> tokens;
  Timing timing;
  absl::Status outcome;
  bool finished = false;

 private:
  std::shared_ptr<RequestStream> stream_;
  bool writing_ = false;
};

class RouterCoreTest : public ::testing::Test {
 protected:
  RouterCoreTest() {
    ServedModel model;
    model.name = "m";
    model.config.vocab_size = static_cast<int>(kVocab);
    auto client = std::make_unique<FakeDecodeClient>();
    decode_ = client.get();
    RouterCoreOptions options;
    options.dispatcher.queue_timeout = absl::Seconds(60);
    options.dispatcher.no_worker_timeout = absl::Seconds(5);
    core_ = std::make_unique<RouterCore>(options, std::move(model), std::move(client), &metrics_,
                                         &clock_);
  }

  std::unique_ptr<Membership> Join(const std::string& id, const std::string& role,
                                   int max_num_seqs = 8) {
    auto membership = core_->Join([](internal::v1::RouterMessage) {});
    internal::v1::WorkerMessage message;
    internal::v1::Hello& hello = *message.mutable_hello();
    hello.set_worker_id(id);
    hello.set_incarnation(1);
    hello.set_role(role);
    hello.set_address(id + ":1");
    hello.set_max_model_len(2048);
    hello.set_max_num_seqs(static_cast<uint32_t>(max_num_seqs));
    hello.set_num_blocks(1000);
    hello.set_local_prefill_max_tokens(role == "unified" ? 0xffffffffu : 0);
    hello.mutable_capability()->set_model("m");
    hello.mutable_capability()->set_vocab_size(kVocab);
    hello.mutable_capability()->set_block_size(16);
    hello.mutable_capability()->set_protocol_version(kProtocolVersion);
    EXPECT_OK(membership->Handle(message));
    return membership;
  }
  void Report(Membership* worker, uint32_t running) {
    internal::v1::WorkerMessage message;
    message.mutable_load()->set_running(running);
    message.mutable_load()->set_blocks_free(1000);
    message.mutable_load()->set_admits_blocks(1000);
    EXPECT_OK(worker->Handle(message));
  }
  Client& Submit(const std::string& id) {
    Request request;
    request.id = id;
    request.tokens = std::vector<int32_t>(40, 7);
    request.max_tokens = 100;
    request.received = clock_.Now();
    request.deadline = clock_.Now() + absl::Seconds(600);
    clients_.push_back(std::make_unique<Client>(core_.get(), std::move(request)));
    return *clients_.back();
  }
  // Until nothing moves any more.
  void Settle() {
    do {
      core_->Step(absl::ZeroDuration());
      for (const auto& client : clients_) client->Pump();
    } while (decode_->Deliver());
  }
  void Advance(absl::Duration by) {
    clock_.Advance(by);
    Settle();
  }

  FakeClock clock_;
  Metrics metrics_;
  FakeDecodeClient* decode_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::unique_ptr<RouterCore> core_;
};

TEST_F(RouterCoreTest, ARequestGoesFromAClientToAPairOfWorkersAndBack) {
  const auto prefill = Join("p", "prefill");
  const auto decode = Join("d", "decode");
  Client& client = Submit("r");
  Settle();
  ASSERT_EQ(decode_->calls().size(), 1u);
  FakeDecodeCall& call = *decode_->calls()[0];
  EXPECT_EQ(call.route().decode.id, "d");
  ASSERT_EQ(call.route().prefill.size(), 1u);
  EXPECT_EQ(call.route().prefill[0].address, "p:1");
  call.Send({1, 2});
  Settle();
  clock_.Advance(absl::Milliseconds(250));
  call.Send({3}, FinishReason::kStop);
  call.End(absl::OkStatus());
  Settle();
  EXPECT_TRUE(client.finished);
  EXPECT_OK(client.outcome);
  EXPECT_THAT(client.tokens, ElementsAre(1, 2, 3));
  EXPECT_EQ(client.timing.decode_worker, "d");
  EXPECT_DOUBLE_EQ(client.timing.stages[Stage::kTotal], 250);
}

TEST_F(RouterCoreTest, MetricsCountWorkersByState) {
  const auto count = [&](const std::string& role, const std::string& state) {
    core_->Step(absl::ZeroDuration());
    const std::string line =
        "tandem_router_workers{state=\"" + state + "\",worker_role=\"" + role + "\"} ";
    const std::string page = metrics_.Render();
    const size_t at = page.find(line);
    EXPECT_NE(at, page.npos) << page;
    return at == page.npos ? -1 : std::stoi(page.substr(at + line.size()));
  };
  EXPECT_EQ(count("decode", "ready"), 0);
  const auto prefill = Join("p", "prefill");
  const auto decode = Join("d", "decode");
  const auto hangs = Join("e", "decode");
  Report(decode.get(), 0);
  Report(hangs.get(), 0);
  clock_.Advance(core_->stalled_after());
  Report(decode.get(), 0);
  internal::v1::WorkerMessage message;
  message.mutable_heartbeat()->set_seconds_without_progress(
      absl::ToDoubleSeconds(core_->stalled_after()));
  EXPECT_OK(hangs->Handle(message));
  EXPECT_EQ(count("decode", "ready"), 1);
  EXPECT_EQ(count("decode", "stalled"), 1);
  EXPECT_EQ(count("prefill", "ready"), 1);
  EXPECT_OK(core_->DrainWorker("d"));
  clock_.Advance(absl::Milliseconds(100));
  EXPECT_EQ(count("decode", "ready"), 0);
  EXPECT_EQ(count("decode", "draining"), 1);
  EXPECT_EQ(count("unified", "ready"), 0);
}

TEST_F(RouterCoreTest, AManualClockDrivesTheWaitForWorkers) {
  Client& client = Submit("r");
  Settle();
  Advance(absl::Milliseconds(4999));
  EXPECT_FALSE(client.finished);
  Advance(absl::Milliseconds(1));
  EXPECT_TRUE(client.finished);
  EXPECT_EQ(client.outcome.code(), absl::StatusCode::kUnavailable);
}

TEST_F(RouterCoreTest, AManualClockDrivesTheQueueTimeout) {
  const auto worker = Join("u", "unified", /*max_num_seqs=*/1);
  Submit("first");
  Client& second = Submit("second");
  Settle();
  EXPECT_EQ(core_->queued_requests(), 1);
  Advance(absl::Seconds(60));
  EXPECT_EQ(second.outcome.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(MessageOf(second.outcome), HasSubstr("--queue-timeout"));
}

TEST_F(RouterCoreTest, AManualClockDrivesDeadlines) {
  const auto worker = Join("u", "unified");
  Client& client = Submit("r");
  Settle();
  Advance(absl::Seconds(600));
  EXPECT_EQ(client.outcome.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(decode_->calls()[0]->cancelled());
}

TEST_F(RouterCoreTest, AReportThatShowsRoomLetsTheNextOneIn) {
  const auto worker = Join("u", "unified", /*max_num_seqs=*/1);
  Client& first = Submit("first");
  Submit("second");
  Settle();
  ASSERT_EQ(decode_->calls().size(), 1u);
  decode_->calls()[0]->Send({1}, FinishReason::kStop);
  decode_->calls()[0]->End(absl::OkStatus());
  Settle();
  EXPECT_TRUE(first.finished);
  clock_.Advance(absl::Seconds(1));
  Report(worker.get(), 0);
  Settle();
  EXPECT_EQ(decode_->calls().size(), 2u);
}

TEST_F(RouterCoreTest, ALostWorkerIsReplacedAndTheStreamGoesOn) {
  auto a = Join("a", "unified");
  const auto b = Join("b", "unified");
  Client& client = Submit("r");
  Settle();
  ASSERT_EQ(decode_->calls()[0]->route().decode.id, "a");
  a.reset();
  decode_->calls()[0]->End(Unavailable("gone"));
  Settle();
  ASSERT_EQ(decode_->calls().size(), 2u);
  EXPECT_EQ(decode_->calls()[1]->route().decode.id, "b");
  decode_->calls()[1]->Send({9}, FinishReason::kLength);
  Settle();
  EXPECT_OK(client.outcome);
  EXPECT_THAT(client.tokens, ElementsAre(9));
}

TEST_F(RouterCoreTest, AWorkerWhoseLoopHangsGetsNothingAndLosesWhatItHas) {
  const auto a = Join("a", "unified");
  const auto b = Join("b", "unified");
  Report(a.get(), 0);
  Report(b.get(), 0);
  Client& client = Submit("r");
  Settle();
  ASSERT_EQ(decode_->calls()[0]->route().decode.id, "a");
  decode_->calls()[0]->Send({1, 2});
  Settle();
  const auto pass = [&](int seconds, double a_without_progress) {
    for (int i = 0; i < 2 * seconds; ++i) {
      clock_.Advance(absl::Milliseconds(500));
      Report(b.get(), 4);  // busy, so "a" looks better
      internal::v1::WorkerMessage message;
      message.mutable_heartbeat()->set_seconds_without_progress(a_without_progress + 0.5 * (i + 1));
      EXPECT_OK(a->Handle(message));
      Settle();
    }
  };
  pass(2, 0);
  Submit("while it may be a long step");
  Settle();
  EXPECT_EQ(decode_->calls()[1]->route().decode.id, "a");
  pass(1, 2);
  ASSERT_EQ(decode_->calls().size(), 3u);  // it has no token yet, and loses nothing
  EXPECT_TRUE(decode_->calls()[1]->cancelled());
  EXPECT_EQ(decode_->calls()[2]->route().decode.id, "b");
  Submit("stalled");
  Settle();
  EXPECT_EQ(decode_->calls()[3]->route().decode.id, "b");
  pass(6, 3);
  EXPECT_EQ(decode_->calls().size(), 4u);
  EXPECT_FALSE(decode_->calls()[0]->cancelled());
  pass(1, 9);
  Settle();
  ASSERT_EQ(decode_->calls().size(), 5u);
  EXPECT_EQ(decode_->calls()[4]->route().decode.id, "b");
  EXPECT_TRUE(decode_->calls()[0]->cancelled());
  EXPECT_THAT(decode_->calls()[4]->generated(), ElementsAre(1, 2));
  decode_->calls()[4]->Send({3}, FinishReason::kStop);
  Settle();
  EXPECT_OK(client.outcome);
  EXPECT_THAT(client.tokens, ElementsAre(1, 2, 3));
  Report(a.get(), 0);  // it was a long step after all
  Submit("back");
  Settle();
  EXPECT_EQ(decode_->calls()[5]->route().decode.id, "a");
}

TEST_F(RouterCoreTest, AClientThatLeavesCancelsTheWorkersCall) {
  const auto worker = Join("u", "unified");
  Client& client = Submit("r");
  Settle();
  client.Cancel();
  Settle();
  EXPECT_TRUE(decode_->calls()[0]->cancelled());
  EXPECT_EQ(client.outcome.code(), absl::StatusCode::kCancelled);
}

TEST_F(RouterCoreTest, ItsOwnThreadSleepsUntilItIsWoken) {
  core_->Start();
  absl::Mutex mutex;
  bool fired = false;
  class Sink : public StreamSink {
   public:
    Sink(absl::Mutex* mutex, bool* finished) : mutex_(mutex), finished_(finished) {}
    void Write(const GenerateResponse&) override {}
    void Finish(const absl::Status&) override {
      absl::MutexLock lock(mutex_);
      *finished_ = true;
    }
    void Abort() override {}

   private:
    absl::Mutex* const mutex_;
    bool* const finished_;
  } sink(&mutex, &fired);
  Request request;
  request.id = "r";
  request.tokens = {1};
  request.received = clock_.Now();
  request.deadline = clock_.Now() + absl::Seconds(1);
  auto stream = core_->NewStream(std::move(request), &sink);
  ASSERT_OK(stream);
  (*stream)->Begin();
  clock_.Advance(absl::Seconds(1));
  core_->Wake();
  absl::MutexLock lock(&mutex);
  mutex.Await(absl::Condition(&fired));
}

}  // namespace
}  // namespace tandem::router
