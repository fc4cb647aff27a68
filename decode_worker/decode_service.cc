#include "decode_worker/decode_service.h"

#include <atomic>
#include <memory>
#include <utility>
#include <variant>

#include "absl/time/clock.h"

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"
#include "common/rpc/trace_metadata.h"

namespace tandem::decode {
namespace {

// How long a router should wait before it asks a full worker again.
constexpr absl::Duration kRetryWhenFull = absl::Milliseconds(100);
// A message that is read in less than a few tens of microseconds is read where it arrives.
constexpr size_t kShortMessage = 16 << 10;
constexpr size_t kMaxUnread = 1024;

// One call. Lives until gRPC is done with it; the loop reaches it only through its TokenStream,
// which it ends exactly once.
class GenerateReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit GenerateReactor(Intake* intake) : intake_(intake) {}

  void Start(grpc::ByteBuffer bytes, absl::Time deadline, const TraceContext& trace) {
    internal::v1::DecodeRequest request;
    if (!grpc::SerializationTraits<internal::v1::DecodeRequest>::Deserialize(&bytes, &request)
             .ok()) {
      return End(InvalidArgument("the request is not a valid DecodeRequest"));
    }
    absl::StatusOr<Work> work = intake_->Read(request, deadline - absl::Now());
    if (!work.ok()) return End(work.status());
    work->trace = trace;
    const uint64_t id = id_ = work->id;
    stream_ = intake_->MakeStream([this] { Pump(); });
    Intake* const intake = intake_;
    const std::shared_ptr<const std::atomic<bool>> cancelled = cancelled_;
    // Where this succeeds the stream may have ended, and this object with it, when it returns.
    const absl::Status status = intake_->Push(*std::move(work), stream_);
    if (!status.ok()) return End(status);
    // OnCancel may have come before the loop could know the request.
    if (*cancelled) intake->Cancel(id);
  }
  void Refuse(const absl::Status& status) { End(status); }

  // On gRPC's thread after a write, else on the waker's; never on two at once (TokenStream::Wake).
  void Pump() {
    while (true) {
      TokenStream::Item item = stream_->Take();
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        if (broken_) continue;
        internal::v1::TokenEvent message;
        TokenEventToProto(*event, &message);
        bool own_buffer;
        buffer_.Clear();
        // Serialising a valid message does not fail.
        (void)grpc::SerializationTraits<internal::v1::TokenEvent>::Serialize(message, &buffer_,
                                                                             &own_buffer);
        StartWrite(&buffer_);
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
  void OnCancel() override {
    *cancelled_ = true;
    CancelWork();
  }
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
  const std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
  bool broken_ = false;  // the peer is gone: tokens are dropped until the loop ends the stream
  std::shared_ptr<TokenStream> stream_;
  grpc::ByteBuffer buffer_;  // being written
};

}  // namespace

DecodeService::DecodeService(Intake* intake) : intake_(intake), readers_(1, kMaxUnread) {}

grpc::ServerWriteReactor<grpc::ByteBuffer>* DecodeService::Generate(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  auto* reactor = new GenerateReactor(intake_);
  const absl::Time deadline = absl::FromChrono(context->deadline());
  const TraceContext trace = TraceOf(*context);
  if (request->Length() <= kShortMessage) {
    reactor->Start(*request, deadline, trace);
    return reactor;
  }
  // The call lives until the reactor has answered it.
  const bool taken = readers_.TryRun(
      [reactor, bytes = *request, deadline, trace] { reactor->Start(bytes, deadline, trace); });
  if (!taken) {
    reactor->Refuse(WithRefusal(ResourceExhausted("the worker is behind with reading requests"),
                                {.reason = Refusal::Reason::kInbox}));
  }
  return reactor;
}

}  // namespace tandem::decode
