// The nccl transport: through a FIFO between the memory of two cards (store/peer_fifo.h), over
// NVLink, PCIe, InfiniBand or sockets, whatever NCCL finds between them, of one host or of two. The
// sender gathers a frame's pages into a buffer of its card and sends that; the receiver takes it
// into a buffer of its own card and scatters it into its pool, which nobody else can reach. So
// there is no grant, and the end of the connection is the end of its writer.
//
// One communicator for each connection, made when both ends have agreed on this transport: the
// sender's note in SELECT carries its id. NCCL matches by order. So the header of a frame, which
// goes over the connection in the same order, says the how-manieth it is: a header that is repeated
// is known, and one that is missing ends the connection. A peer that stops is noticed by the
// connection or after the io timeout; the communicator is then aborted, which takes its kernels off
// the card, and the next transfer makes another.
#include <algorithm>

#include "absl/strings/escaping.h"

#include "common/base/status.h"
#include "kvtransfer/transport/incoming_frames.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/outgoing_frames.h"

namespace tandem::kvtransfer {
namespace {

// Of a frame, unless a block of one layer is larger: what it costs by itself, launches at both ends
// and NCCL's, is small beside its way over NVLink. kStagedDepth of them lie on either card.
constexpr size_t kFifoFrameBytes = size_t{32} << 20;

size_t MaxFrameBytes(const KvPoolShape& receiver) {
  return std::max(kFifoFrameBytes, receiver.layout.BlockLayerBytes());
}

class NcclWriter : public KvWriter {
 public:
  NcclWriter(KvConnection* connection, const KvStore* store, const KvPoolShape& peer,
             absl::Duration io_timeout, std::unique_ptr<PeerFifo> fifo)
      : connection_(connection),
        store_(store),
        peer_(peer),
        io_timeout_(io_timeout),
        fifo_(std::move(fifo)),
        frames_(connection, io_timeout,
                {.take_room = [] { return true; },
                 .start =
                     [this](FrameHeader* header, const BlockRun& run) {
                       header->payload_digest = ++sent_;
                       return fifo_->Gather(run);
                     },
                 .await_room = [] {},
                 .waits_for_reader = true}) {}
  ~NcclWriter() override { Detach(); }

  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& /*grant*/) override {
    TANDEM_RETURN_IF_ERROR(CheckRun(store_->shape(), peer_, run));
    const uint64_t bytes = run.Bytes(store_->shape().layout);
    if (bytes > MaxFrameBytes(peer_)) {
      return InvalidArgument("a frame of {} bytes, more than {}", bytes, MaxFrameBytes(peer_));
    }
    return frames_.Post(header, run, bytes);
  }

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    header.payload_digest = ++sent_;
    // Before the bytes, for the peer must take them.
    TANDEM_RETURN_IF_ERROR(connection_->Send(header, {}, io_timeout_));
    return fifo_->ProbeOut(header.payload_bytes, pattern);
  }
  ProbeRoom probe_room() const override { return {kMaxProbePayload, kStagedDepth}; }

  void Stop() override { fifo_->Abort(); }
  void Detach() override {
    frames_.Stop();
    fifo_->Abort();
  }

 private:
  KvConnection* const connection_;
  const KvStore* const store_;
  const KvPoolShape peer_;
  const absl::Duration io_timeout_;
  const std::unique_ptr<PeerFifo> fifo_;
  uint64_t sent_ = 0;      // frames; the way's, and before the first one Probe()'s
  OutgoingFrames frames_;  // last: starts when everything else is there
};

class NcclReader : public KvReader {
 public:
  NcclReader(KvConnection* connection, size_t max_frame_bytes, std::unique_ptr<PeerFifo> fifo)
      : max_frame_bytes_(max_frame_bytes),
        fifo_(std::move(fifo)),
        // A second would wait for the first one's transfer more than it gains.
        frames_(connection, /*threads=*/1, /*waits_for_writer=*/true) {}
  ~NcclReader() override { Stop(); }

  absl::Status Receive(const FrameHeader& header, std::shared_ptr<Reception> reception) override {
    TANDEM_ASSIGN_OR_RETURN(const bool repeated, Count(header));
    IncomingFrames::Frame frame;
    // Also what nobody wants has to be taken.
    if (!repeated) {
      frame.fetch = [this, bytes = header.payload_bytes] { return fifo_->Fetch(bytes); };
    }
    frame.reception = std::move(reception);
    frames_.Take(std::move(frame), header.payload_bytes);
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Probe(const FrameHeader& header) override {
    TANDEM_ASSIGN_OR_RETURN(const bool repeated, Count(header));
    if (repeated) return 0;
    TANDEM_RETURN_IF_ERROR(fifo_->AwaitPeer());
    TANDEM_ASSIGN_OR_RETURN(const std::vector<std::byte> came,
                            fifo_->ProbeIn(header.payload_bytes, header.code != 0));
    return header.code != 0 ? PayloadDigest(came) : 0;
  }

  void Stop() override {
    fifo_->Abort();
    frames_.Stop();
  }

 private:
  // Whether the frame has come before.
  absl::StatusOr<bool> Count(const FrameHeader& header) {
    if (header.payload_bytes > max_frame_bytes_) {
      return InvalidArgument("a frame of {} bytes, more than {}", header.payload_bytes,
                             max_frame_bytes_);
    }
    if (header.payload_digest <= taken_) return true;
    if (header.payload_digest != taken_ + 1) {
      return InvalidArgument("frame {} of this link came after frame {}", header.payload_digest,
                             taken_);
    }
    ++taken_;
    return false;
  }

  const size_t max_frame_bytes_;
  const std::unique_ptr<PeerFifo> fifo_;
  uint64_t taken_ = 0;     // frames
  IncomingFrames frames_;  // last: starts when everything else is there
};

class NcclOffer : public KvOffer {
 public:
  NcclOffer(const KvStore* store, const LinkTimeouts& timeouts, std::string place)
      : store_(store), timeouts_(timeouts), place_(std::move(place)) {}

  const std::string& advert() const override { return place_; }

  // Starts the communicator; the sender's first PROBE finds it made.
  absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* connection,
                                                   const std::string& note) override {
    const size_t frame_bytes = MaxFrameBytes(store_->shape());
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<PeerFifo> fifo,
                            store_->JoinFifo(absl::HexStringToBytes(note), FifoEnd::kReader,
                                             frame_bytes, timeouts_.io));
    return std::make_shared<NcclReader>(connection, frame_bytes, std::move(fifo));
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
  const std::string place_;
};

class NcclRegistration : public KvRegistration {
 public:
  NcclRegistration(const KvStore* store, const LinkTimeouts& timeouts, std::string place)
      : store_(store), timeouts_(timeouts), place_(std::move(place)) {}

  absl::StatusOr<std::unique_ptr<KvOffer>> Offer() override {
    return std::make_unique<NcclOffer>(store_, timeouts_, place_);
  }

  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                    const std::string& advert,
                                                    const KvPoolShape& peer,
                                                    SelectPeer select) override {
    if (advert == place_) {
      return Unavailable(
          "both KV pools lie on one card, and NCCL joins different ones only (for tests: set "
          "NCCL_HOSTID apart)");
    }
    TANDEM_ASSIGN_OR_RETURN(const std::string id, store_->NewFifoId());
    TANDEM_RETURN_IF_ERROR(select(absl::BytesToHexString(id)));
    TANDEM_ASSIGN_OR_RETURN(
        std::unique_ptr<PeerFifo> fifo,
        store_->JoinFifo(id, FifoEnd::kWriter, MaxFrameBytes(peer), timeouts_.io));
    TANDEM_RETURN_IF_ERROR(fifo->AwaitPeer());
    return std::make_unique<NcclWriter>(connection, store_, peer, timeouts_.io, std::move(fifo));
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
  const std::string place_;
};

class NcclKvTransport : public KvTransport {
 public:
  const std::string& name() const override { return name_; }
  const KvCapabilities& capabilities() const override { return capabilities_; }
  absl::StatusOr<std::unique_ptr<KvRegistration>> Register(const KvStore* store,
                                                           const LinkTimeouts& timeouts) override {
    if (store->kind() != KvMemoryKind::kDevice) {
      return FailedPrecondition("nccl needs a KV pool in a card's memory (--device=cuda)");
    }
    if (timeouts.encrypted) {
      return FailedPrecondition(
          "nccl encrypts nothing, and KV connections here are TLS (--no-kv-tls where the network "
          "is the cluster's own)");
    }
    TANDEM_ASSIGN_OR_RETURN(std::string place, store->FifoPlace());
    return std::make_unique<NcclRegistration>(store, timeouts, std::move(place));
  }

 private:
  const std::string name_ = "nccl";
  const KvCapabilities capabilities_ = {.cancellable = true,
                                        .device_memory = true,
                                        .frame_bytes = kFifoFrameBytes,
                                        // Of its sockets; over NVLink it is far more.
                                        .expected_bytes_per_second = 1.0e9};
};

}  // namespace

KvTransport* NcclTransport() {
  static NcclKvTransport* transport = new NcclKvTransport;
  return transport;
}

}  // namespace tandem::kvtransfer
