// A DecodeClient whose decode workers are the test: no threads, no network. Events and ends are
// handed to the stream when the test says Deliver(), as gRPC hands them out between its reactions.
//
// Used by one thread.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "router/request/decode_client.h"

namespace tandem::router {

class FakeDecodeCall : public DecodeCall {
 public:
  FakeDecodeCall(Route route, Request request, std::vector<int32_t> generated,
                 const TraceContext& trace, std::shared_ptr<DecodeHandler> handler)
      : route_(std::move(route)),
        request_(std::move(request)),
        generated_(std::move(generated)),
        trace_(trace),
        handler_(std::move(handler)) {}

  // ---- the worker's side ----
  const Route& route() const { return route_; }
  const Request& request() const { return request_; }
  // What earlier calls of the request have sent.
  const std::vector<int32_t>& generated() const { return generated_; }
  const TraceContext& trace() const { return trace_; }
  void Send(TokenEvent event) {
    if (!ended()) events_.push_back(std::move(event));
  }
  void Send(std::vector<int32_t> tokens, FinishReason reason = FinishReason::kNone) {
    TokenEvent event;
    event.token_ids = std::move(tokens);
    event.finish_reason = reason;
    Send(std::move(event));
  }
  // After what was sent.
  void End(absl::Status status) { end_ = std::move(status); }
  bool cancelled() const { return cancelled_; }
  // Called once, by Deliver, if the stream cancels a call that has not ended.
  void OnCancel(std::function<void()> hook) { on_cancel_ = std::move(hook); }
  bool ended() const { return handler_ == nullptr; }
  // Sent and not read.
  size_t unread() const { return events_.size(); }

  // The test is over: nothing more is handed out. Stream and call hold each other until then.
  void Drop() { handler_ = nullptr; }
  // Hands out what is due; false: nothing was.
  bool Deliver() {
    if (ended()) return false;
    if (cancelled_) {
      if (on_cancel_) on_cancel_();
      Finish(absl::CancelledError("cancelled"));
    } else if (!events_.empty() && reading_) {
      reading_ = false;
      TokenEvent event = std::move(events_.front());
      events_.pop_front();
      if (to_end_) {
        cancelled_ = true;
      } else {
        handler_->OnEvent(std::move(event));
      }
    } else if (events_.empty() && end_.has_value()) {
      Finish(*end_);
    } else {
      return false;
    }
    return true;
  }

  // ---- the stream's side ----
  void ReadNext() override { reading_ = true; }
  void ReadToEnd() override { reading_ = to_end_ = true; }
  void Cancel() override { cancelled_ = true; }

 private:
  void Finish(const absl::Status& status) {
    events_.clear();
    std::exchange(handler_, nullptr)->OnEnd(status);
  }

  const Route route_;
  const Request request_;
  const std::vector<int32_t> generated_;
  const TraceContext trace_;
  std::shared_ptr<DecodeHandler> handler_;  // null after its OnEnd
  std::function<void()> on_cancel_;
  std::deque<TokenEvent> events_;
  std::optional<absl::Status> end_;
  bool reading_ = true;
  bool to_end_ = false;
  bool cancelled_ = false;
};

class FakeDecodeClient : public DecodeClient {
 public:
  using Handler = std::function<void(FakeDecodeCall*)>;
  // `on_start` may be empty; it is called for each new call and may send at once.
  explicit FakeDecodeClient(Handler on_start = {}) : on_start_(std::move(on_start)) {}
  ~FakeDecodeClient() override {
    for (const auto& call : calls_) call->Drop();
  }

  std::shared_ptr<DecodeCall> Start(const Route& route, const Request& request,
                                    std::span<const int32_t> generated, const TraceContext& trace,
                                    std::shared_ptr<DecodeHandler> handler) override {
    auto call = std::make_shared<FakeDecodeCall>(
        route, request, std::vector<int32_t>(generated.begin(), generated.end()), trace,
        std::move(handler));
    calls_.push_back(call);
    if (on_start_) on_start_(call.get());
    return call;
  }
  void Keep(const ClusterView&) override {}

  // All calls ever started, in order.
  const std::vector<std::shared_ptr<FakeDecodeCall>>& calls() const { return calls_; }
  // Until nothing is due. False: nothing was.
  bool Deliver() {
    bool any = false;
    for (bool again = true; again; any |= again) {
      again = false;
      // By index: a handler may start another call.
      for (size_t i = 0; i < calls_.size(); ++i) again |= calls_[i]->Deliver();
    }
    return any;
  }

 private:
  const Handler on_start_;
  std::vector<std::shared_ptr<FakeDecodeCall>> calls_;
};

}  // namespace tandem::router
