// The tcp transport: a DATA frame's payload follows its header over the connection itself, and the
// receiver chooses where each byte goes. Nothing a sender says becomes an address.
#include <algorithm>
#include <array>

#include "common/base/status.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/probe_pattern.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kMaxSpans = 64;             // of one ReceiveSome
constexpr size_t kMaxReadBytes = 512 << 10;  // written under a transfer's guard at a time
constexpr size_t kScratchBytes = 256 << 10;

class TcpWriter : public KvWriter {
 public:
  TcpWriter(KvConnection* connection, const KvStore* store, const KvPoolShape& peer,
            absl::Duration io_timeout)
      : connection_(connection), store_(store), peer_(peer), io_timeout_(io_timeout) {}

  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& /*grant*/) override {
    TANDEM_ASSIGN_OR_RETURN(const std::vector<CopyPiece> plan,
                            BuildCopyPlan(store_->shape(), peer_, run));
    std::vector<uint64_t> digests;
    std::vector<ConstBytes> parts;
    if (store_->HostAddress(0) != nullptr) {
      // Before the bytes leave, while that brings them into the cache from which they leave.
      digests = store_->DigestRun(run);
      parts.reserve(plan.size());
      for (const CopyPiece& piece : plan) {
        parts.push_back({store_->HostAddress(piece.source_offset), piece.bytes});
      }
    } else {
      digests.assign(run.source_blocks.size(), 0);
      parts.push_back(Stage(run, digests));
    }
    absl::Status sent = connection_->Send(header, parts, io_timeout_);
    if (!sent.ok() && !absl::IsCancelled(sent)) return sent;
    return CompletedPost(std::move(sent), std::move(digests));
  }

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    const ConstBytes part = pattern.empty() ? ProbePattern().first(header.payload_bytes) : pattern;
    return connection_->Send(header, {&part, 1}, io_timeout_);
  }
  // As many as a long way holds.
  ProbeRoom probe_room() const override { return {kMaxProbePattern, 64}; }

 private:
  // The run's bytes as a frame has them, from a pool that only its store can read.
  ConstBytes Stage(const BlockRun& run, std::span<uint64_t> digests) {
    const size_t bytes = run.Bytes(store_->shape().layout);
    if (bytes > staging_bytes_) {
      staging_bytes_ = std::max(bytes, store_->BatchBytes());
      staging_ = store_->AllocateStaging(staging_bytes_);
    }
    store_->GatherRun(run, staging_.get(), digests);
    return {staging_.get(), bytes};
  }

  KvConnection* const connection_;
  const KvStore* const store_;
  const KvPoolShape peer_;
  const absl::Duration io_timeout_;
  std::shared_ptr<std::byte[]> staging_;
  size_t staging_bytes_ = 0;
};

class TcpReader : public KvReader {
 public:
  TcpReader(KvConnection* connection, const KvStore* store, absl::Duration io_timeout)
      : connection_(connection),
        store_(store),
        io_timeout_(io_timeout),
        direct_(store->HostAddress(0) != nullptr),
        scratch_bytes_(direct_ ? kScratchBytes : store_->BatchBytes()),
        scratch_(store->AllocateStaging(scratch_bytes_)) {}

  absl::Status Receive(const FrameHeader& /*header*/,
                       std::shared_ptr<Reception> reception) override {
    TANDEM_RETURN_IF_ERROR(direct_ ? ReceiveDirect(reception.get())
                                   : ReceiveStaged(reception.get()));
    reception->Done();
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Probe(const FrameHeader& header) override {
    if (header.code != 0) {
      if (header.payload_bytes > kMaxProbePattern) {
        return InvalidArgument("a PROBE of {} bytes, more than {}", header.payload_bytes,
                               kMaxProbePattern);
      }
      std::vector<std::byte> came(header.payload_bytes);
      TANDEM_RETURN_IF_ERROR(ReceiveAll(connection_, came, io_timeout_));
      return PayloadDigest(came);
    }
    for (size_t left = header.payload_bytes; left > 0;) {
      const size_t n = std::min(left, scratch_bytes_);
      TANDEM_RETURN_IF_ERROR(ReceiveAll(connection_, {scratch_.get(), n}, io_timeout_));
      left -= n;
    }
    return 0;
  }

 private:
  // System calls write the pool.
  absl::Status ReceiveDirect(Reception* reception) {
    std::vector<TargetPiece>& pieces = reception->pieces();
    for (size_t current = 0; current < pieces.size();) {
      absl::StatusOr<size_t> received = size_t{0};
      if (pieces[current].wanted) {
        const bool written = reception->WriteGuarded([&] { received = ReadSome(pieces, current); });
        if (!written) {
          Forget(&pieces);
          continue;
        }
      } else {
        received = ReadToScratch(pieces[current]);
      }
      TANDEM_RETURN_IF_ERROR(received.status());
      if (*received == 0) {
        TANDEM_RETURN_IF_ERROR(connection_->WaitReadable(io_timeout_));
        continue;
      }
      Advance(&pieces, &current, *received);
    }
    return absl::OkStatus();
  }

  // The store writes the pool, as much at a time as the scratch memory holds: mostly a whole frame.
  absl::Status ReceiveStaged(Reception* reception) {
    std::vector<TargetPiece>& pieces = reception->pieces();
    std::vector<CopyPiece> copies;
    for (size_t current = 0; current < pieces.size();) {
      copies.clear();
      size_t staged = 0;
      while (current < pieces.size() && staged < scratch_bytes_) {
        const TargetPiece piece = pieces[current];
        const size_t n = std::min<size_t>(piece.bytes, scratch_bytes_ - staged);
        if (piece.wanted) copies.push_back({staged, piece.target_offset, n});
        Advance(&pieces, &current, n);
        staged += n;
      }
      TANDEM_RETURN_IF_ERROR(ReceiveAll(connection_, {scratch_.get(), staged}, io_timeout_));
      if (copies.empty()) continue;
      if (!reception->WriteGuarded([&] { store_->Scatter(scratch_.get(), copies); })) {
        Forget(&pieces);
      }
    }
    return absl::OkStatus();
  }

  static void Forget(std::vector<TargetPiece>* pieces) {
    for (TargetPiece& piece : *pieces) piece.wanted = false;
  }

  // Takes `bytes` off the front of the pieces from `current` on.
  static void Advance(std::vector<TargetPiece>* pieces, size_t* current, size_t bytes) {
    while (bytes > 0) {
      TargetPiece& piece = (*pieces)[*current];
      const size_t n = std::min<size_t>(bytes, piece.bytes);
      piece.bytes -= n;
      piece.target_offset += n;
      bytes -= n;
      if (piece.bytes == 0) ++*current;
    }
  }

  // Reads into the pool what has arrived of the wanted pieces that begin at `current`.
  absl::StatusOr<size_t> ReadSome(const std::vector<TargetPiece>& pieces, size_t current) {
    std::array<MutableBytes, kMaxSpans> into;
    size_t count = 0;
    size_t total = 0;
    for (size_t i = current;
         i < pieces.size() && pieces[i].wanted && count < into.size() && total < kMaxReadBytes;
         ++i) {
      const size_t n = std::min<size_t>(pieces[i].bytes, kMaxReadBytes - total);
      into[count++] = {store_->HostAddress(pieces[i].target_offset), n};
      total += n;
      if (n < pieces[i].bytes) break;
    }
    return connection_->ReceiveSome({into.data(), count});
  }

  absl::StatusOr<size_t> ReadToScratch(const TargetPiece& piece) {
    const MutableBytes into = {scratch_.get(), std::min<size_t>(scratch_bytes_, piece.bytes)};
    return connection_->ReceiveSome({&into, 1});
  }

  KvConnection* const connection_;
  const KvStore* const store_;
  const absl::Duration io_timeout_;
  const bool direct_;
  const size_t scratch_bytes_;
  const std::shared_ptr<std::byte[]> scratch_;
};

class TcpOffer : public KvOffer {
 public:
  TcpOffer(const KvStore* store, const LinkTimeouts& timeouts)
      : store_(store), timeouts_(timeouts) {}
  const std::string& advert() const override { return advert_; }
  absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* connection,
                                                   const std::string& /*note*/) override {
    return std::make_shared<TcpReader>(connection, store_, timeouts_.io);
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
  const std::string advert_;
};

class TcpRegistration : public KvRegistration {
 public:
  TcpRegistration(const KvStore* store, const LinkTimeouts& timeouts)
      : store_(store), timeouts_(timeouts) {}

  absl::StatusOr<std::unique_ptr<KvOffer>> Offer() override {
    return std::make_unique<TcpOffer>(store_, timeouts_);
  }
  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                    const std::string& /*advert*/,
                                                    const KvPoolShape& peer,
                                                    SelectPeer select) override {
    TANDEM_RETURN_IF_ERROR(select(""));
    return std::make_unique<TcpWriter>(connection, store_, peer, timeouts_.io);
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
};

class TcpKvTransport : public KvTransport {
 public:
  const std::string& name() const override { return name_; }
  const KvCapabilities& capabilities() const override { return capabilities_; }
  absl::StatusOr<std::unique_ptr<KvRegistration>> Register(const KvStore* store,
                                                           const LinkTimeouts& timeouts) override {
    return std::make_unique<TcpRegistration>(store, timeouts);
  }

 private:
  const std::string name_ = "tcp";
  const KvCapabilities capabilities_ = {.cancellable = true,
                                        .host_memory = true,
                                        .device_memory = true,
                                        .expected_bytes_per_second = 0.5e9};
};

}  // namespace

KvTransport* TcpTransport() {
  static TcpKvTransport* transport = new TcpKvTransport;
  return transport;
}

}  // namespace tandem::kvtransfer
