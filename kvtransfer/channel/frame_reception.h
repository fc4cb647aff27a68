// Where the payload of one DATA frame goes.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "kvtransfer/channel/incoming_transfer.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

// Into the pool, as far as the transfer wants it.
class TransferReception final : public Reception {
 public:
  // `connection` is compared only: it may end before the reception does.
  TransferReception(std::shared_ptr<IncomingTransfer> transfer, const KvConnection* connection,
                    const FrameHeader& header, std::vector<TargetPiece> pieces)
      : transfer_(std::move(transfer)),
        connection_(connection),
        header_(header),
        pieces_(std::move(pieces)) {}
  std::vector<TargetPiece>& pieces() override { return pieces_; }
  bool WriteGuarded(absl::FunctionRef<void()> write) override {
    return transfer_->WriteIfOpen(connection_, write);
  }
  void Done() override { transfer_->Arrived(connection_, header_); }

 private:
  const std::shared_ptr<IncomingTransfer> transfer_;
  const KvConnection* const connection_;
  const FrameHeader header_;
  std::vector<TargetPiece> pieces_;
};

// Nowhere.
class UnwantedReception final : public Reception {
 public:
  explicit UnwantedReception(const FrameHeader& header) {
    if (header.payload_bytes > 0) pieces_.push_back({0, header.payload_bytes, false});
  }
  std::vector<TargetPiece>& pieces() override { return pieces_; }
  bool WriteGuarded(absl::FunctionRef<void()> /*write*/) override { return false; }
  void Done() override {}

 private:
  std::vector<TargetPiece> pieces_;
};

}  // namespace tandem::kvtransfer
