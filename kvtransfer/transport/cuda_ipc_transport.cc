// The cuda_ipc transport: between processes of one host and one user whose pools lie in the memory
// of cards that reach each other, or of one card. The sender maps the receiver's pool
// (shared_pool.h), and its card writes it: one launch per run.
//
// A thread for each connection waits for the card and sends the headers, so that the next run is
// given to the card while it works on this one. A small run with nothing before it is waited for
// where it is posted: to wake a thread takes longer than it does.
#include <atomic>
#include <deque>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/ready_event.h"
#include "common/base/status.h"
#include "kvtransfer/store/peer_pool.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/shared_pool.h"
#include "kvtransfer/transport/shm_control.h"

namespace tandem::kvtransfer {
namespace {

// What a launch and its end cost is small beside moving so many bytes.
constexpr size_t kFrameBytes = size_t{64} << 20;

// A run that was given to the card.
class Flight {
 public:
  Flight(const FrameHeader& header, std::unique_ptr<PeerPool::Copy> copy)
      : header_(header), copy_(std::move(copy)) {}

  // Waits for the card; sends the header if all was written.
  void Land(ShmControlPage* page, KvConnection* connection, absl::Duration io_timeout) {
    const bool whole = copy_->Wait();
    page->copies_under_way.fetch_sub(1);
    status_ =
        whole ? connection->Send(header_, {}, io_timeout) : Cancelled("revoked by the receiver");
    landed_.Set();
  }
  bool landed() const { return landed_.Ready(); }
  void AwaitLanding() const { landed_.WaitFor(absl::InfiniteDuration()); }
  // Once it has landed.
  const absl::Status& status() const { return status_; }
  std::span<const uint64_t> digests() const { return copy_->digests(); }

 private:
  const FrameHeader header_;
  const std::unique_ptr<PeerPool::Copy> copy_;
  absl::Status status_;
  HostEvent landed_;
};

class FlightPost : public KvPost {
 public:
  explicit FlightPost(std::shared_ptr<const Flight> flight) : flight_(std::move(flight)) {}
  ~FlightPost() override { flight_->AwaitLanding(); }
  bool Done() override { return flight_->landed(); }
  const absl::Status& status() const override { return flight_->status(); }
  std::span<const uint64_t> digests() const override { return flight_->digests(); }

 private:
  const std::shared_ptr<const Flight> flight_;
};

class CudaIpcWriter : public KvWriter {
 public:
  CudaIpcWriter(KvConnection* connection, const KvStore* store, const KvPoolShape& peer,
                absl::Duration io_timeout, SharedMapping control, std::unique_ptr<PeerPool> pool)
      : connection_(connection),
        store_(store),
        peer_(peer),
        io_timeout_(io_timeout),
        control_(std::move(control)),
        pool_(std::move(pool)),
        thread_([this] { LandAll(); }) {}
  ~CudaIpcWriter() override { Detach(); }

  absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header, const BlockRun& run,
                                               const std::string& grant_text) override {
    ShmGrant grant;
    if (!ShmGrant::Decode(grant_text, &grant)) return InvalidArgument("a malformed grant");
    TANDEM_RETURN_IF_ERROR(CheckRun(store_->shape(), peer_, run));
    page()->copies_under_way.fetch_add(1);
    const auto flight = std::make_shared<Flight>(
        header, pool_->Start(run, &page()->grants[grant.slot], grant.generation));
    if (run.Bytes(store_->shape().layout) <= kSmallFrameBytes && NothingUnderWay()) {
      flight->Land(page(), connection_, io_timeout_);
    } else {
      absl::MutexLock lock(&mutex_);
      flights_.push_back(flight);
    }
    return std::make_unique<FlightPost>(flight);
  }

  absl::Status Probe(FrameHeader header, ConstBytes pattern) override {
    // The pattern shows that both ends share memory at all; every transfer is digested.
    if (pattern.empty()) {
      TANDEM_RETURN_IF_ERROR(pool_->Probe(header.payload_bytes));
    } else {
      WriteProbe(control_, header, pattern);
    }
    return connection_->Send(header, {}, io_timeout_);
  }
  ProbeRoom probe_room() const override { return {kMaxProbePayload, kShmProbeFrames}; }

  void Detach() override {
    if (!thread_.joinable()) return;
    {
      absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    thread_.join();
    pool_ = nullptr;
    page()->detached.store(1, std::memory_order_release);
    control_ = SharedMapping();
  }

 private:
  ShmControlPage* page() const { return reinterpret_cast<ShmControlPage*>(control_.data()); }

  bool NothingUnderWay() const {
    absl::MutexLock lock(&mutex_);
    return flights_.empty();
  }

  // The thread.
  void LandAll() {
    const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return closing_ || !flights_.empty();
    };
    while (true) {
      std::shared_ptr<Flight> flight;
      {
        absl::MutexLock lock(&mutex_);
        mutex_.Await(absl::Condition(&due));
        if (flights_.empty()) return;
        flight = flights_.front();
      }
      flight->Land(page(), connection_, io_timeout_);
      {
        absl::MutexLock lock(&mutex_);
        flights_.pop_front();
      }
      connection_->Interrupt();
    }
  }

  KvConnection* const connection_;
  const KvStore* const store_;
  const KvPoolShape peer_;
  const absl::Duration io_timeout_;
  SharedMapping control_;
  std::unique_ptr<PeerPool> pool_;
  mutable absl::Mutex mutex_;
  std::deque<std::shared_ptr<Flight>> flights_ ABSL_GUARDED_BY(mutex_);  // in their order
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: starts when everything else is there
};

class CudaIpcRegistration : public KvRegistration {
 public:
  CudaIpcRegistration(const KvStore* store, const LinkTimeouts& timeouts)
      : store_(store), timeouts_(timeouts) {}

  absl::StatusOr<std::unique_ptr<KvOffer>> Offer() override { return OfferSharedPool(*store_); }

  absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                    const std::string& advert,
                                                    const KvPoolShape& peer,
                                                    SelectPeer select) override {
    TANDEM_ASSIGN_OR_RETURN(const SharedPoolAdvert offered, ReadSharedPoolAdvert(advert));
    TANDEM_RETURN_IF_ERROR(store_->CanWrite(offered.card));
    TANDEM_ASSIGN_OR_RETURN(JoinedPool joined, JoinSharedPool(offered, peer, select));
    TANDEM_ASSIGN_OR_RETURN(
        std::unique_ptr<PeerPool> pool,
        store_->MapPeer(joined.pool.get(), peer, {joined.control.data(), kShmControlBytes}));
    return std::make_unique<CudaIpcWriter>(connection, store_, peer, timeouts_.io,
                                           std::move(joined.control), std::move(pool));
  }

 private:
  const KvStore* const store_;
  const LinkTimeouts timeouts_;
};

class CudaIpcKvTransport : public KvTransport {
 public:
  const std::string& name() const override { return name_; }
  const KvCapabilities& capabilities() const override { return capabilities_; }
  absl::StatusOr<std::unique_ptr<KvRegistration>> Register(const KvStore* store,
                                                           const LinkTimeouts& timeouts) override {
    if (store->kind() != KvMemoryKind::kDevice) {
      return FailedPrecondition("cuda_ipc needs a KV pool in a card's memory (--device=cuda)");
    }
    // A card that cannot share its memory cannot map that of others either.
    TANDEM_RETURN_IF_ERROR(store->Export().status());
    return std::make_unique<CudaIpcRegistration>(store, timeouts);
  }

 private:
  const std::string name_ = "cuda_ipc";
  const KvCapabilities capabilities_ = {.one_sided = true,
                                        .same_host = true,
                                        .device_memory = true,
                                        .frame_bytes = kFrameBytes,
                                        // Of small transfers between processes that take turns on
                                        // one card; between cards it is far more.
                                        .expected_bytes_per_second = 1.0e9};
};

}  // namespace

KvTransport* CudaIpcTransport() {
  static CudaIpcKvTransport* transport = new CudaIpcKvTransport;
  return transport;
}

}  // namespace tandem::kvtransfer
