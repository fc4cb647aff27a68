// The shm_ring transport: between processes of one host and one user whose pools cannot write each
// other, cards without peer access above all. The receiver makes a ring in memory of the host
// (shm_ring.h) and passes it over a Unix socket; both ends have it pinned for their cards
// (KvStore::OpenWindow). The sender gathers a frame's pages into a slot, then sends the header; the
// receiver brings them to its card and scatters them into its own pool, which nobody else can
// reach. So a late sender writes a ring that nobody reads: there is no grant, and a lost connection
// is the end of its writer.
#include <algorithm>
#include <optional>

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/transport/incoming_frames.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/outgoing_frames.h"
#include "kvtransfer/transport/shared_pool.h"
#include "kvtransfer/transport/shm_ring.h"
#include "kvtransfer/transport/unix_rendezvous.h"

namespace tandem::kvtransfer {
namespace {

// Of a frame, unless a block of one layer is larger. What a frame costs by itself, launches and
// waits for them at both ends, is then about half of the time that the link takes for its bytes.
constexpr size_t kSlotBytes = size_t{8} << 20;
constexpr size_t kPageBytes = 4096;
constexpr size_t kLanders = 2;  // three wait for each other's transfer more than they gain
// How long a writer that finds no slot waits before it looks whether anybody still wants it.
constexpr absl::Duration kSlotPatience = absl::Milliseconds(5);

size_t SlotBytes(const KvPoolShape& receiver) {
  const size_t most = std::max(kSlotBytes, receiver.layout.BlockLayerBytes());
  return (most + kPageBytes - 1) / kPageBytes * kPageBytes;
}

class ShmRingWriter : public KvWriter {
 public:
  ShmRingWriter(KvConnection* connection, const KvStore* store, const KvPoolShape& peer,
                absl::Duration io_timeout, RingMemory ring, std::unique_ptr<HostWindow> window)
      : connection_(connection),
        store_(store),
        peer_(peer),
        io_timeout_(io_timeout),
        ring_(std::move(ring)),
        window_(std::move(window)),
        slots_(ring_),
        frames_(connection, io_timeout,
                {.take_room = [this] { return TakeRoom(); },
                 .start = [this](FrameHeader* header,
                                 const BlockRun& run) { return Start(header, run); },
                 .await_room = [this] { AwaitRoom(); }}) {}
  ~ShmRingWriter() override { Detach(); }

  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& /*grant*/) override {
    TANDEM_RETURN_IF_ERROR(CheckRun(store_->shape(), peer_, run));
    const uint64_t bytes = run.Bytes(store_->shape().layout);
    if (bytes > ring_.slot_bytes()) {
      return InvalidArgument("a frame of {} bytes, slots of {}", bytes, ring_.slot_bytes());
    }
    return frames_.Post(header, run, bytes);
  }

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    const absl::Time give_up = Clock::Real()->Now() + io_timeout_;
    while (!TakeRoom()) {
      if (Clock::Real()->Now() >= give_up) return Unavailable("the ring takes no probe");
      AwaitRoom();
    }
    window_->ProbeOut(ring_.OffsetOf(place_->slot), header.payload_bytes, pattern);
    header.payload_digest = place_->Encode();
    return connection_->Send(header, {}, io_timeout_);
  }
  ProbeRoom probe_room() const override {
    return {std::min(ring_.slot_bytes(), kMaxProbePayload), ring_.num_slots()};
  }

  void Detach() override {
    frames_.Stop();
    window_ = nullptr;
  }

 private:
  bool TakeRoom() {
    place_ = slots_.TryTake();
    return place_.has_value();
  }
  void AwaitRoom() { slots_.AwaitRelease(std::min(kSlotPatience, io_timeout_)); }
  std::unique_ptr<Gathering> Start(FrameHeader* header, const BlockRun& run) {
    header->payload_digest = place_->Encode();
    return window_->Gather(run, ring_.OffsetOf(place_->slot));
  }

  KvConnection* const connection_;
  const KvStore* const store_;
  const KvPoolShape peer_;
  const absl::Duration io_timeout_;
  const RingMemory ring_;
  std::unique_ptr<HostWindow> window_;
  // What the way of a frame uses, and before the first one Probe().
  RingWriterSlots slots_;
  std::optional<RingPlace> place_;  // that was taken last
  OutgoingFrames frames_;           // last: starts when everything else is there
};

class ShmRingReader : public KvReader {
 public:
  ShmRingReader(KvConnection* connection, RingMemory ring, std::unique_ptr<HostWindow> window)
      : ring_(std::move(ring)),
        window_(std::move(window)),
        slots_(ring_),
        frames_(connection, kLanders, /*waits_for_writer=*/false) {}
  ~ShmRingReader() override { Stop(); }

  absl::Status Receive(const FrameHeader& header, std::shared_ptr<Reception> reception) override {
    const RingPlace place = RingPlace::Decode(header.payload_digest);
    const uint64_t bytes = header.payload_bytes;
    TANDEM_ASSIGN_OR_RETURN(const RingReaderSlots::Use use, slots_.Take(place, bytes));
    // Its bytes may be another's by now, and those of the first are perhaps still on their way: it
    // is that one's end that counts.
    if (use == RingReaderSlots::Use::kRepeated) return absl::OkStatus();
    IncomingFrames::Frame frame;
    if (AnyWanted(reception.get())) {
      frame.fetch = [this, place, bytes] {
        return window_->Fetch(ring_.OffsetOf(place.slot), bytes);
      };
      frame.release = [this, place] { slots_.Release(place); };
    } else {
      slots_.Release(place);  // it need not wait for those before it
    }
    frame.reception = std::move(reception);
    frames_.Take(std::move(frame), bytes);
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Probe(const FrameHeader& header) override {
    const RingPlace place = RingPlace::Decode(header.payload_digest);
    TANDEM_ASSIGN_OR_RETURN(const RingReaderSlots::Use use,
                            slots_.Take(place, header.payload_bytes));
    if (use == RingReaderSlots::Use::kRepeated) return 0;
    const std::vector<std::byte> came =
        window_->ProbeIn(ring_.OffsetOf(place.slot), header.payload_bytes, header.code != 0);
    slots_.Release(place);
    return header.code != 0 ? PayloadDigest(came) : 0;
  }

  void Stop() override { frames_.Stop(); }

 private:
  const RingMemory ring_;
  const std::unique_ptr<HostWindow> window_;
  RingReaderSlots slots_;
  IncomingFrames frames_;  // last: starts when everything else is there
};

class ShmRingOffer : public KvOffer {
 public:
  ShmRingOffer(const KvStore* store, size_t ring_bytes, RendezvousListener listener)
      : store_(store),
        ring_bytes_(ring_bytes),
        listener_(std::move(listener)),
        advert_(BootId() + " " + listener_.name) {}

  const std::string& advert() const override { return advert_; }

  absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* connection,
                                                   const std::string& /*note*/) override {
    TANDEM_ASSIGN_OR_RETURN(const RendezvousPeer peer, AcceptPeer(listener_));
    const size_t slot_bytes = SlotBytes(store_->shape());
    TANDEM_ASSIGN_OR_RETURN(RingMemory ring,
                            RingMemory::Create(ring_bytes_, slot_bytes, store_->HostNode()));
    // Pinned before the sender touches it, so that it lies where it was asked for.
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<HostWindow> window,
                            store_->OpenWindow(ring.slots(), slot_bytes));
    TANDEM_RETURN_IF_ERROR(
        SendPool(peer.fd.get(), {RingPage::kVersion, ring.bytes(), {ring.fd(), ring.fd()}}));
    return std::make_shared<ShmRingReader>(connection, std::move(ring), std::move(window));
  }

 private:
  const KvStore* const store_;
  const size_t ring_bytes_;
  const RendezvousListener listener_;
  const std::string advert_;
};

class ShmRingRegistration : public KvRegistration {
 public:
  ShmRingRegistration(const KvStore* store, const LinkTimeouts& timeouts)
      : store_(store), timeouts_(timeouts) {}

  absl::StatusOr<std::unique_ptr<KvOffer>> Offer() override {
    TANDEM_ASSIGN_OR_RETURN(RendezvousListener listener, ListenForPeer());
    return std::make_unique<ShmRingOffer>(store_, timeouts_.ring_bytes, std::move(listener));
  }

  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                    const std::string& advert,
                                                    const KvPoolShape& peer,
                                                    SelectPeer select) override {
    TANDEM_ASSIGN_OR_RETURN(const SharedPoolAdvert offered, ReadSharedPoolAdvert(advert));
    TANDEM_ASSIGN_OR_RETURN(const Fd socket, ConnectToPeer(offered.socket));
    TANDEM_RETURN_IF_ERROR(select(""));
    TANDEM_ASSIGN_OR_RETURN(const SharedPool shared, ReceivePool(socket.get(), kPassTimeout));
    Fd memory(shared.fds[0]);
    const Fd again(shared.fds[1]);
    TANDEM_ASSIGN_OR_RETURN(RingMemory ring,
                            RingMemory::Join(std::move(memory), shared.pool_bytes));
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<HostWindow> window,
                            store_->OpenWindow(ring.slots(), ring.slot_bytes()));
    return std::make_unique<ShmRingWriter>(connection, store_, peer, timeouts_.io, std::move(ring),
                                           std::move(window));
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
};

class ShmRingKvTransport : public KvTransport {
 public:
  const std::string& name() const override { return name_; }
  const KvCapabilities& capabilities() const override { return capabilities_; }
  absl::StatusOr<std::unique_ptr<KvRegistration>> Register(const KvStore* store,
                                                           const LinkTimeouts& timeouts) override {
    if (BootId().empty()) return FailedPrecondition("the host's boot id cannot be read");
    TANDEM_RETURN_IF_ERROR(CheckRingBytes(timeouts.ring_bytes, SlotBytes(store->shape())));
    return std::make_unique<ShmRingRegistration>(store, timeouts);
  }

 private:
  const std::string name_ = "shm_ring";
  const KvCapabilities capabilities_ = {.cancellable = true,
                                        .same_host = true,
                                        .host_memory = true,
                                        .device_memory = true,
                                        .frame_bytes = kSlotBytes,
                                        .expected_bytes_per_second = 1.0e9};
};

}  // namespace

KvTransport* ShmRingTransport() {
  static ShmRingKvTransport* transport = new ShmRingKvTransport;
  return transport;
}

}  // namespace tandem::kvtransfer
