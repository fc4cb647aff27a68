#include "decode_worker/decode_service.h"

#include <atomic>
#include <memory>
#include <utility>
#include <variant>

#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"

namespace tandem::decode {
namespace {

// How long a router should wait before it asks a full worker again.
constexpr absl::Duration kRetryWhenFull = absl::Milliseconds(100);

// One call. Lives until gRPC is done with it; the loop reaches it only through its TokenStream,
// which it ends exactly once.
class GenerateReactor final : public grpc::ServerWriteReactor<internal::v1::TokenEvent> {
 public:
  explicit GenerateReactor(Intake* intake) : intake_(intake) {}

  void Start(const internal::v1::DecodeRequest& request, absl::Duration left) {
    absl::StatusOr<Work> work = intake_->Read(request, left);
    if (!work.ok()) return End(work.status());
    id_ = work->id;
    stream_ = intake_->MakeStream([this] { Pump(); });
    // Where this succeeds the stream may have ended, and this object with it, when it returns.
    const absl::Status status = intake_->Push(*std::move(work), stream_);
    if (!status.ok()) End(status);
  }

  // On gRPC's thread after a write, else on the waker's; never on two at once (TokenStream::Wake).
  void Pump() {
    while (true) {
      TokenStream::Item item = stream_->Take();
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        if (broken_) continue;
        TokenEventToProto(*event, &event_);
        StartWrite(&event_);
        return;
      }
      if (auto* status = std::get_if<absl::Status>(&item)) End(*status);
      return;
    }
  }

  void OnWriteDone(bool ok) override {
    if (!ok && !broken_) {
      broken_ = true;
      CancelWork();
    }
    Pump();
  }
  void OnCancel() override { CancelWork(); }
  void OnDone() override { delete this; }

 private:
  void CancelWork() {
    if (const uint64_t id = id_; id != 0) intake_->Cancel(id);
  }
  void End(const absl::Status& status) {
    id_ = 0;  // refused or over: the loop need not hear of it
    Finish(ToGrpcStatus(absl::IsResourceExhausted(status) ? WithRetryAfter(status, kRetryWhenFull)
                                                          : status));
  }

  Intake* const intake_;
  std::atomic<uint64_t> id_ = 0;  // 0, which the loop does not know: nothing to cancel
  bool broken_ = false;  // the peer is gone: tokens are dropped until the loop ends the stream
  std::shared_ptr<TokenStream> stream_;
  internal::v1::TokenEvent event_;  // being written
};

}  // namespace

grpc::ServerWriteReactor<internal::v1::TokenEvent>* DecodeService::Generate(
    grpc::CallbackServerContext* context, const internal::v1::DecodeRequest* request) {
  auto* reactor = new GenerateReactor(intake_);
  reactor->Start(*request, absl::FromChrono(context->deadline()) - absl::Now());
  return reactor;
}

}  // namespace tandem::decode
