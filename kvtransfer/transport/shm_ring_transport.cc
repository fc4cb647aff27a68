// The shm_ring transport: between processes of one host and one user whose pools cannot write each
// other, cards without peer access above all. The receiver makes a ring in memory of the host
// (shm_ring.h) and passes it over a Unix socket; both ends have it pinned for their cards
// (KvStore::OpenWindow). The sender gathers a frame's pages into a slot, then sends the header; the
// receiver brings them to its card and scatters them into its own pool, which nobody else can
// reach. So a late sender writes a ring that nobody reads: there is no grant, and a lost connection
// is the end of its writer.
//
// At either end up to HostWindow::kDepth frames of a connection are under way: the sender has a
// thread that starts them and waits for them in order; the receiver has kLanders threads that take
// them in turns, for there a frame is over only when it has been scattered and digested, and while
// one waits for that another keeps the link busy. A small frame with nothing before it is done
// where it comes: to wake a thread takes longer.
#include <algorithm>
#include <array>
#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/ready_event.h"
#include "common/base/status.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/shared_pool.h"
#include "kvtransfer/transport/shm_ring.h"
#include "kvtransfer/transport/unix_rendezvous.h"

namespace tandem::kvtransfer {
namespace {

// Of a frame, unless a block of one layer is larger. What a frame costs by itself, launches and
// waits for them at both ends, is then about half of the time that the link takes for its bytes.
constexpr size_t kSlotBytes = size_t{8} << 20;
constexpr uint64_t kSmallFrameBytes = uint64_t{1} << 20;
constexpr size_t kPageBytes = 4096;
constexpr size_t kLanders = 2;  // three wait for each other's transfer more than they gain
static_assert(kLanders <= HostWindow::kDepth);
// How long a writer that finds no slot waits before it looks whether anybody still wants it.
constexpr absl::Duration kSlotPatience = absl::Milliseconds(5);

size_t SlotBytes(const KvPoolShape& receiver) {
  const size_t most = std::max(kSlotBytes, receiver.layout.BlockLayerBytes());
  return (most + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// A frame on its way into the ring.
class RingFlight {
 public:
  RingFlight(const FrameHeader& header, const BlockRun& run)
      : header_(header), run_(run), blocks_(run.source_blocks.begin(), run.source_blocks.end()) {
    run_.source_blocks = blocks_;
    run_.target_blocks = {};
  }
  RingFlight(const RingFlight&) = delete;

  void Start(HostWindow* window, const RingMemory& ring, RingPlace place) {
    header_.payload_digest = place.Encode();
    gathering_ = window->Gather(run_, ring.OffsetOf(place.slot));
  }
  // Waits for what was started; sends the header.
  void Land(KvConnection* connection, absl::Duration io_timeout) {
    gathering_->Wait();
    digests_.assign(gathering_->digests().begin(), gathering_->digests().end());
    gathering_ = nullptr;
    End(connection->Send(header_, {}, io_timeout));
  }
  void End(absl::Status status) {
    status_ = std::move(status);
    ended_.Set();
  }
  bool ended() const { return ended_.Ready(); }
  void AwaitEnd() const { ended_.WaitFor(absl::InfiniteDuration()); }
  // Once it has ended.
  const absl::Status& status() const { return status_; }
  std::span<const uint64_t> digests() const { return digests_; }

 private:
  FrameHeader header_;
  BlockRun run_;
  const std::vector<int32_t> blocks_;
  std::unique_ptr<HostWindow::Gathering> gathering_;
  std::vector<uint64_t> digests_;
  absl::Status status_;
  HostEvent ended_;
};

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
        thread_([this] { SendAll(); }) {}
  ~ShmRingWriter() override { Detach(); }

  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& /*grant*/) override {
    TANDEM_RETURN_IF_ERROR(CheckRun(store_->shape(), peer_, run));
    const uint64_t bytes = run.Bytes(store_->shape().layout);
    if (bytes > ring_.slot_bytes()) {
      return InvalidArgument("a frame of {} bytes, slots of {}", bytes, ring_.slot_bytes());
    }
    const auto flight = std::make_shared<RingFlight>(header, run);
    if (bytes > kSmallFrameBytes || !SendAtOnce(flight.get())) {
      absl::MutexLock lock(&mutex_);
      waiting_.push_back(flight);
    }
    return std::make_unique<RingPost>(this, flight);
  }

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    const absl::Time give_up = Clock::Real()->Now() + io_timeout_;
    std::optional<RingPlace> place = slots_.TryTake();
    for (; !place.has_value(); place = slots_.TryTake()) {
      if (Clock::Real()->Now() >= give_up) return Unavailable("the ring takes no probe");
      slots_.AwaitRelease(std::min(kSlotPatience, io_timeout_));
    }
    window_->ProbeOut(ring_.OffsetOf(place->slot), header.payload_bytes, pattern);
    header.payload_digest = place->Encode();
    return connection_->Send(header, {}, io_timeout_);
  }
  ProbeRoom probe_room() const override {
    return {std::min(ring_.slot_bytes(), kMaxProbePayload), ring_.num_slots()};
  }

  void Detach() override {
    if (!thread_.joinable()) return;
    {
      absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    thread_.join();
    window_ = nullptr;
  }

 private:
  class RingPost : public KvPost {
   public:
    RingPost(ShmRingWriter* writer, std::shared_ptr<RingFlight> flight)
        : writer_(writer), flight_(std::move(flight)) {}
    ~RingPost() override {
      Abandon();
      flight_->AwaitEnd();
    }
    bool Done() override { return flight_->ended(); }
    const absl::Status& status() const override { return flight_->status(); }
    std::span<const uint64_t> digests() const override { return flight_->digests(); }
    void Abandon() override { writer_->Abandon(flight_.get()); }

   private:
    ShmRingWriter* const writer_;
    const std::shared_ptr<RingFlight> flight_;
  };

  // Unless something is before it, or no slot is free.
  bool SendAtOnce(RingFlight* flight) {
    {
      absl::MutexLock lock(&mutex_);
      if (!waiting_.empty() || under_way_ > 0) return false;
    }
    // The thread has nothing to do until the caller, who alone adds to `waiting_`, gives it some.
    const std::optional<RingPlace> place = slots_.TryTake();
    if (!place.has_value()) return false;
    flight->Start(window_.get(), ring_, *place);
    flight->Land(connection_, io_timeout_);
    return true;
  }

  // If it has not begun.
  void Abandon(RingFlight* flight) {
    {
      absl::MutexLock lock(&mutex_);
      const auto it = std::find_if(waiting_.begin(), waiting_.end(),
                                   [&](const auto& waiting) { return waiting.get() == flight; });
      if (it == waiting_.end()) return;
      flight->End(Cancelled("given up"));
      waiting_.erase(it);
    }
    connection_->Interrupt();
  }

  // The thread.
  void SendAll() {
    std::deque<std::shared_ptr<RingFlight>> started;
    absl::Time stuck_since = absl::InfiniteFuture();
    while (AwaitWork(/*idle=*/started.empty())) {
      while (started.size() < HostWindow::kDepth) {
        const std::shared_ptr<RingFlight> next = StartNext();
        if (next == nullptr) break;
        started.push_back(next);
      }
      if (started.empty()) {  // no slot
        const absl::Time now = Clock::Real()->Now();
        stuck_since = std::min(stuck_since, now);
        if (now - stuck_since >= io_timeout_) FailWaiting();
        slots_.AwaitRelease(std::min(kSlotPatience, io_timeout_));
        continue;
      }
      stuck_since = absl::InfiniteFuture();
      started.front()->Land(connection_, io_timeout_);
      started.pop_front();
      {
        absl::MutexLock lock(&mutex_);
        --under_way_;
      }
      connection_->Interrupt();
    }
  }

  // False: the end, and nothing is under way.
  bool AwaitWork(bool idle) {
    absl::MutexLock lock(&mutex_);
    const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return closing_ || !waiting_.empty();
    };
    if (idle) mutex_.Await(absl::Condition(&due));
    return !idle || !waiting_.empty();
  }

  // Null: nothing waits, or there is no slot.
  std::shared_ptr<RingFlight> StartNext() {
    std::shared_ptr<RingFlight> flight;
    std::optional<RingPlace> place;
    {
      absl::MutexLock lock(&mutex_);
      if (waiting_.empty()) return nullptr;
      place = slots_.TryTake();
      if (!place.has_value()) return nullptr;
      flight = std::move(waiting_.front());
      waiting_.pop_front();
      ++under_way_;
    }
    flight->Start(window_.get(), ring_, *place);
    return flight;
  }

  void FailWaiting() {
    {
      absl::MutexLock lock(&mutex_);
      for (const auto& flight : waiting_) {
        flight->End(Unavailable("{} took nothing out of the ring for {}", connection_->peer(),
                                absl::FormatDuration(io_timeout_)));
      }
      waiting_.clear();
    }
    connection_->Interrupt();
  }

  KvConnection* const connection_;
  const KvStore* const store_;
  const KvPoolShape peer_;
  const absl::Duration io_timeout_;
  const RingMemory ring_;
  std::unique_ptr<HostWindow> window_;
  RingWriterSlots slots_;  // the thread's, while something waits or is under way
  absl::Mutex mutex_;
  std::deque<std::shared_ptr<RingFlight>> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;  // started by the thread
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: starts when everything else is there
};

// A frame on its way out of the ring.
class Landing {
 public:
  Landing(RingPlace place, uint64_t bytes, std::shared_ptr<Reception> reception)
      : place_(place), bytes_(bytes), reception_(std::move(reception)) {
    uint64_t at = 0;
    for (const TargetPiece& piece : reception_->pieces()) {
      if (piece.wanted) pieces_.push_back({at, piece.target_offset, piece.bytes});
      at += piece.bytes;
    }
  }
  // Of a repeated frame, whose bytes may be another's by now: only its end is told.
  explicit Landing(std::shared_ptr<Reception> reception) : reception_(std::move(reception)) {}

  bool wanted() const { return !pieces_.empty(); }
  void Start(HostWindow* window, const RingMemory& ring) {
    if (wanted()) fetched_ = window->Fetch(ring.OffsetOf(place_.slot), bytes_);
  }
  // Into the pool, if the transfer still wants it.
  void Land(RingReaderSlots* slots) {
    if (fetched_ != nullptr) {
      fetched_->Wait();
      (void)reception_->WriteGuarded([this] { fetched_->Scatter(pieces_); });
      fetched_ = nullptr;
      slots->Release(place_);
    }
    reception_->Done();
  }

 private:
  const RingPlace place_;
  const uint64_t bytes_ = 0;
  const std::shared_ptr<Reception> reception_;
  std::vector<CopyPiece> pieces_;
  std::unique_ptr<HostWindow::Fetched> fetched_;
};

class ShmRingReader : public KvReader {
 public:
  ShmRingReader(RingMemory ring, std::unique_ptr<HostWindow> window)
      : ring_(std::move(ring)), window_(std::move(window)), slots_(ring_) {
    for (std::thread& thread : threads_) thread = std::thread([this] { LandAll(); });
  }
  ~ShmRingReader() override { Stop(); }

  absl::Status Receive(const FrameHeader& header, std::shared_ptr<Reception> reception) override {
    const RingPlace place = RingPlace::Decode(header.payload_digest);
    TANDEM_ASSIGN_OR_RETURN(const RingReaderSlots::Use use,
                            slots_.Take(place, header.payload_bytes));
    std::unique_ptr<Landing> landing;
    if (use == RingReaderSlots::Use::kRepeated) {
      landing = std::make_unique<Landing>(std::move(reception));
    } else {
      landing = std::make_unique<Landing>(place, header.payload_bytes, std::move(reception));
      // Its slot need not wait for those before it.
      if (!landing->wanted()) slots_.Release(place);
    }
    absl::ReleasableMutexLock lock(&mutex_);
    if (header.payload_bytes <= kSmallFrameBytes && waiting_.empty() && under_way_ == 0) {
      // The threads have nothing to do until the caller, who alone adds to `waiting_`, gives them
      // some.
      landing->Start(window_.get(), ring_);
      lock.Release();
      landing->Land(&slots_);
      return absl::OkStatus();
    }
    waiting_.push_back(std::move(landing));
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

  void Stop() override {
    {
      absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
    absl::MutexLock lock(&mutex_);
    waiting_.clear();
  }

 private:
  // A thread's work. What comes first is fetched first; it may be over after what came later.
  void LandAll() {
    while (const std::unique_ptr<Landing> landing = StartNext()) {
      landing->Land(&slots_);
      absl::MutexLock lock(&mutex_);
      --under_way_;
    }
  }

  // Null: the end.
  std::unique_ptr<Landing> StartNext() {
    absl::MutexLock lock(&mutex_);
    const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return closing_ || !waiting_.empty();
    };
    mutex_.Await(absl::Condition(&due));
    if (closing_) return nullptr;
    std::unique_ptr<Landing> landing = std::move(waiting_.front());
    waiting_.pop_front();
    ++under_way_;
    landing->Start(window_.get(), ring_);
    return landing;
  }

  const RingMemory ring_;
  const std::unique_ptr<HostWindow> window_;  // Fetch() under the mutex
  RingReaderSlots slots_;
  absl::Mutex mutex_;
  std::deque<std::unique_ptr<Landing>> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;  // a thread's
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::array<std::thread, kLanders> threads_;
};

class ShmRingOffer : public KvOffer {
 public:
  ShmRingOffer(const KvStore* store, size_t ring_bytes, RendezvousListener listener)
      : store_(store),
        ring_bytes_(ring_bytes),
        listener_(std::move(listener)),
        advert_(BootId() + " " + listener_.name) {}

  const std::string& advert() const override { return advert_; }

  absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* /*connection*/) override {
    TANDEM_ASSIGN_OR_RETURN(const RendezvousPeer peer, AcceptPeer(listener_));
    const size_t slot_bytes = SlotBytes(store_->shape());
    TANDEM_ASSIGN_OR_RETURN(RingMemory ring,
                            RingMemory::Create(ring_bytes_, slot_bytes, store_->HostNode()));
    // Pinned before the sender touches it, so that it lies where it was asked for.
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<HostWindow> window,
                            store_->OpenWindow(ring.slots(), slot_bytes));
    TANDEM_RETURN_IF_ERROR(
        SendPool(peer.fd.get(), {RingPage::kVersion, ring.bytes(), {ring.fd(), ring.fd()}}));
    return std::make_shared<ShmRingReader>(std::move(ring), std::move(window));
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

  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(
      KvConnection* connection, const std::string& advert, const KvPoolShape& peer,
      absl::FunctionRef<absl::Status()> select) override {
    TANDEM_ASSIGN_OR_RETURN(const SharedPoolAdvert offered, ReadSharedPoolAdvert(advert));
    TANDEM_ASSIGN_OR_RETURN(const Fd socket, ConnectToPeer(offered.socket));
    TANDEM_RETURN_IF_ERROR(select());
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
