#include "kvtransfer/transport/faulty_network.h"

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {
namespace {

constexpr absl::Duration kDelay = absl::Milliseconds(30);

// The script and its frame counter, shared by all connections.
class Director {
 public:
  explicit Director(FaultScript script) : script_(std::move(script)) {}
  Fault Next(const FrameHeader& header) {
    absl::MutexLock lock(&mutex_);
    return script_(header, index_++);
  }

 private:
  absl::Mutex mutex_;
  const FaultScript script_ ABSL_GUARDED_BY(mutex_);
  uint64_t index_ ABSL_GUARDED_BY(mutex_) = 0;
};

// A frame with its payload in memory of its own.
struct HeldFrame {
  FrameHeader header;
  std::vector<std::byte> payload;
};

class FaultyConnection : public KvConnection {
 public:
  FaultyConnection(std::unique_ptr<KvConnection> inner, Director* director)
      : inner_(std::move(inner)), director_(director) {}

  absl::Status Send(const FrameHeader& header, std::span<const ConstBytes> payload,
                    absl::Duration timeout) override {
    absl::MutexLock lock(&mutex_);
    const Fault fault = director_->Next(header);
    if (fault == Fault::kReorder && !held_.has_value()) {
      held_ = Copy(header, payload);
      return absl::OkStatus();
    }
    TANDEM_RETURN_IF_ERROR(SendWith(fault, header, payload, timeout));
    if (!held_.has_value()) return absl::OkStatus();
    const HeldFrame late = *std::exchange(held_, std::nullopt);
    return SendHeld(late, timeout);
  }

  absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration timeout) override {
    return inner_->ReceiveHeader(timeout);
  }
  absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) override {
    return inner_->ReceiveSome(into);
  }
  absl::Status WaitReadable(absl::Duration timeout) override {
    return inner_->WaitReadable(timeout);
  }
  absl::Status WaitReadableOrInterrupt(absl::Duration timeout) override {
    return inner_->WaitReadableOrInterrupt(timeout);
  }
  void Interrupt() override { inner_->Interrupt(); }
  void SetStillWanted(std::function<bool()> still_wanted) override {
    inner_->SetStillWanted(std::move(still_wanted));
  }
  void Shutdown() override { inner_->Shutdown(); }
  const std::string& peer() const override { return inner_->peer(); }

 private:
  static HeldFrame Copy(const FrameHeader& header, std::span<const ConstBytes> payload) {
    HeldFrame out{header, {}};
    for (const ConstBytes part : payload) {
      out.payload.insert(out.payload.end(), part.begin(), part.end());
    }
    return out;
  }

  absl::Status SendHeld(const HeldFrame& frame, absl::Duration timeout) {
    const ConstBytes part = frame.payload;
    return inner_->Send(frame.header, {&part, part.empty() ? 0u : 1u}, timeout);
  }

  absl::Status SendWith(Fault fault, const FrameHeader& header, std::span<const ConstBytes> payload,
                        absl::Duration timeout) {
    switch (fault) {
      case Fault::kDrop:
        return absl::OkStatus();
      case Fault::kDuplicate:
        TANDEM_RETURN_IF_ERROR(inner_->Send(header, payload, timeout));
        return inner_->Send(header, payload, timeout);
      case Fault::kCorruptPayload: {
        HeldFrame frame = Copy(header, payload);
        if (!frame.payload.empty()) frame.payload[frame.payload.size() / 3] ^= std::byte{0x10};
        return SendHeld(frame, timeout);
      }
      case Fault::kCorruptHeader: {
        HeldFrame frame = Copy(header, payload);
        if (frame.header.ordinal_begin > 0) {
          --frame.header.ordinal_begin;
        } else {
          ++frame.header.layer_begin;
        }
        return SendHeld(frame, timeout);
      }
      case Fault::kDelay:
        absl::SleepFor(kDelay);
        return inner_->Send(header, payload, timeout);
      case Fault::kTruncate: {
        HeldFrame frame = Copy(header, payload);
        frame.payload.resize(frame.payload.size() / 2);
        (void)SendHeld(frame, timeout);
        inner_->Shutdown();
        return Unavailable("truncated on purpose");
      }
      case Fault::kKill:
        inner_->Shutdown();
        return Unavailable("killed on purpose");
      case Fault::kNone:
      case Fault::kReorder:  // one is held already
        break;
    }
    return inner_->Send(header, payload, timeout);
  }

  const std::unique_ptr<KvConnection> inner_;
  Director* const director_;
  absl::Mutex mutex_;
  std::optional<HeldFrame> held_ ABSL_GUARDED_BY(mutex_);
};

class FaultyListener : public KvListener {
 public:
  FaultyListener(std::unique_ptr<KvListener> inner, Director* director)
      : inner_(std::move(inner)), director_(director) {}
  const std::string& address() const override { return inner_->address(); }
  absl::StatusOr<std::unique_ptr<KvConnection>> Accept(absl::Duration timeout) override {
    TANDEM_ASSIGN_OR_RETURN(auto connection, inner_->Accept(timeout));
    return std::make_unique<FaultyConnection>(std::move(connection), director_);
  }
  void Shutdown() override { inner_->Shutdown(); }

 private:
  const std::unique_ptr<KvListener> inner_;
  Director* const director_;
};

class FaultyKvNetwork : public KvNetwork {
 public:
  FaultyKvNetwork(KvNetwork* inner, FaultScript script)
      : inner_(inner), director_(std::move(script)) {}
  absl::StatusOr<std::unique_ptr<KvListener>> Listen(const std::string& host, int port) override {
    TANDEM_ASSIGN_OR_RETURN(auto listener, inner_->Listen(host, port));
    return std::make_unique<FaultyListener>(std::move(listener), &director_);
  }
  absl::StatusOr<std::unique_ptr<KvConnection>> Dial(const std::string& address,
                                                     absl::Duration timeout) override {
    TANDEM_ASSIGN_OR_RETURN(auto connection, inner_->Dial(address, timeout));
    return std::make_unique<FaultyConnection>(std::move(connection), &director_);
  }

 private:
  KvNetwork* const inner_;
  Director director_;
};

}  // namespace

std::unique_ptr<KvNetwork> MakeFaultyNetwork(KvNetwork* inner, FaultScript script) {
  return std::make_unique<FaultyKvNetwork>(inner, std::move(script));
}

}  // namespace tandem::kvtransfer
