// The router's side of Cluster/Join, for tests of the worker's.
#pragma once

#include <deque>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"

#include "tandem/internal/v1/cluster.grpc.pb.h"

namespace tandem {

// A router that records what workers say and welcomes or refuses them.
class FakeRouter : public internal::v1::Cluster::CallbackService {
 public:
  class Stream
      : public grpc::ServerBidiReactor<internal::v1::WorkerMessage, internal::v1::RouterMessage> {
   public:
    explicit Stream(FakeRouter* router) : router_(router) { StartRead(&incoming_); }
    void OnReadDone(bool ok) override {
      absl::MutexLock lock(&router_->mutex_);
      if (!ok) return End(grpc::Status::OK);
      router_->received_.push_back(incoming_);
      if (incoming_.has_hello()) {
        if (!router_->refusal_.empty()) {
          return End(grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, router_->refusal_));
        }
        outgoing_.mutable_welcome()->set_router_id("fake");
        outgoing_.mutable_welcome()->set_vouch_key(router_->vouch_key_);
        StartWrite(&outgoing_);
      }
      if (!router_->stalled_) StartRead(&incoming_);
    }
    void OnCancel() override {
      absl::MutexLock lock(&router_->mutex_);
      End(grpc::Status::CANCELLED);
    }
    void OnDone() override {
      {
        absl::MutexLock lock(&router_->mutex_);
        router_->streams_.erase(this);
      }
      delete this;
    }
    void SendDrain() {
      outgoing_.mutable_drain();
      StartWrite(&outgoing_);
    }
    void Resume() { StartRead(&incoming_); }
    void End(const grpc::Status& status) {
      if (!ended_) Finish(status);
      ended_ = true;
    }

   private:
    FakeRouter* const router_;
    internal::v1::WorkerMessage incoming_;
    internal::v1::RouterMessage outgoing_;
    bool ended_ = false;
  };

  grpc::ServerBidiReactor<internal::v1::WorkerMessage, internal::v1::RouterMessage>* Join(
      grpc::CallbackServerContext* /*context*/) override {
    absl::MutexLock lock(&mutex_);
    auto* stream = new Stream(this);
    streams_.insert(stream);
    return stream;
  }

  void SetVouchKey(const std::string& key) {
    absl::MutexLock lock(&mutex_);
    vouch_key_ = key;
  }
  void Refuse(const std::string& why) {
    absl::MutexLock lock(&mutex_);
    refusal_ = why;
  }
  // Reads no more until Resume: the worker's stream gets busy.
  void Stall() {
    absl::MutexLock lock(&mutex_);
    stalled_ = true;
  }
  void Resume() {
    absl::MutexLock lock(&mutex_);
    stalled_ = false;
    for (Stream* stream : streams_) stream->Resume();
  }
  void Drain() {
    absl::MutexLock lock(&mutex_);
    for (Stream* stream : streams_) stream->SendDrain();
  }
  void EndAll() {
    absl::MutexLock lock(&mutex_);
    for (Stream* stream : streams_) stream->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "x"));
  }
  // The next message of the worker, in order.
  internal::v1::WorkerMessage Next() {
    absl::MutexLock lock(&mutex_);
    const auto arrived = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !received_.empty(); };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&arrived), absl::Seconds(30))) {
      ADD_FAILURE() << "the worker says nothing";
      return {};
    }
    internal::v1::WorkerMessage message = std::move(received_.front());
    received_.pop_front();
    return message;
  }

 private:
  absl::Mutex mutex_;
  std::deque<internal::v1::WorkerMessage> received_ ABSL_GUARDED_BY(mutex_);
  std::set<Stream*> streams_ ABSL_GUARDED_BY(mutex_);
  std::string refusal_ ABSL_GUARDED_BY(mutex_);
  std::string vouch_key_ ABSL_GUARDED_BY(mutex_);
  bool stalled_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem
