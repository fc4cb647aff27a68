#include "kvtransfer/transport/shared_pool.h"

#include <algorithm>
#include <cstring>
#include <poll.h>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/transport/unix_rendezvous.h"

namespace tandem::kvtransfer {
namespace {

// From a writer's death until what it had given to a card counts as over, if it died with some
// under way. A driver takes a process's work off the card before the process is gone; but where
// another process gives work to the card on its behalf (MPS), that ends by itself, and soon, for
// the grant is revoked.
constexpr absl::Duration kCardSettles = absl::Seconds(2);

size_t ProbePlace(const FrameHeader& header) {
  return header.ordinal_begin % kShmProbeFrames * kShmProbeBytes;
}

class SharedPoolReader : public KvReader {
 public:
  SharedPoolReader(RendezvousPeer peer, std::unique_ptr<ShmControl> control)
      : peer_(std::move(peer)), control_(std::move(control)) {}

  absl::Status Receive(const FrameHeader& /*header*/,
                       std::shared_ptr<Reception> reception) override {
    reception->Done();  // its bytes were in the pool before the header was sent
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Probe(const FrameHeader& header) override {
    if (header.code == 0) return 0;  // they lie where the sender has put them
    if (header.payload_bytes > kShmProbeBytes) {
      return InvalidArgument("a PROBE of {} bytes, more than {}", header.payload_bytes,
                             kShmProbeBytes);
    }
    return PayloadDigest({control_->scratch() + ProbePlace(header), header.payload_bytes});
  }

  absl::StatusOr<std::string> Grant() override {
    TANDEM_ASSIGN_OR_RETURN(const ShmGrant grant, control_->Grant());
    return grant.Encode();
  }
  void Revoke(const std::string& grant) override {
    if (ShmGrant decoded; ShmGrant::Decode(grant, &decoded)) control_->Revoke(decoded);
  }
  void Release(const std::string& grant) override {
    if (ShmGrant decoded; ShmGrant::Decode(grant, &decoded)) control_->Release(decoded);
  }

  bool WriterGone() override {
    if (control_->detached()) return true;
    pollfd entry = {peer_.process.get(), POLLIN, 0};
    if (poll(&entry, 1, 0) <= 0) return false;
    if (!control_->copies_under_way()) return true;
    const absl::Time now = Clock::Real()->Now();
    absl::MutexLock lock(&mutex_);
    found_dead_ = std::min(found_dead_, now);
    return now - found_dead_ >= kCardSettles;
  }

 private:
  const RendezvousPeer peer_;
  const std::unique_ptr<ShmControl> control_;
  absl::Mutex mutex_;
  absl::Time found_dead_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
};

class SharedPoolOffer : public KvOffer {
 public:
  SharedPoolOffer(const ExportedPool& pool, RendezvousListener listener)
      : pool_(pool),
        listener_(std::move(listener)),
        advert_(BootId() + " " + listener_.name + (pool.card.empty() ? "" : " " + pool.card)) {}

  const std::string& advert() const override { return advert_; }

  absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* /*connection*/,
                                                   const std::string& /*note*/) override {
    TANDEM_ASSIGN_OR_RETURN(RendezvousPeer peer, AcceptPeer(listener_));
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<ShmControl> control, ShmControl::Create());
    TANDEM_RETURN_IF_ERROR(SendPool(
        peer.fd.get(), {ShmControlPage::kVersion, pool_.bytes, {pool_.fd, control->fd()}}));
    return std::make_shared<SharedPoolReader>(std::move(peer), std::move(control));
  }

 private:
  const ExportedPool pool_;
  const RendezvousListener listener_;
  const std::string advert_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvOffer>> OfferSharedPool(const KvStore& store) {
  if (BootId().empty()) return FailedPrecondition("the host's boot id cannot be read");
  TANDEM_ASSIGN_OR_RETURN(const ExportedPool pool, store.Export());
  TANDEM_ASSIGN_OR_RETURN(RendezvousListener listener, ListenForPeer());
  return std::make_unique<SharedPoolOffer>(pool, std::move(listener));
}

absl::StatusOr<SharedPoolAdvert> ReadSharedPoolAdvert(const std::string& advert) {
  const std::vector<std::string> parts = absl::StrSplit(advert, ' ');
  if (parts.size() != 2 && parts.size() != 3) {
    return InvalidArgument("a malformed advert of a shared pool");
  }
  if (parts[0] != BootId()) return Unavailable("the peer is on another host");
  return SharedPoolAdvert{parts[1], parts.size() == 3 ? parts[2] : ""};
}

void WriteProbe(const SharedMapping& control, const FrameHeader& header, ConstBytes bytes) {
  std::memcpy(control.data() + kShmControlBytes + ProbePlace(header), bytes.data(), bytes.size());
}

absl::StatusOr<JoinedPool> JoinSharedPool(const SharedPoolAdvert& advert, const KvPoolShape& peer,
                                          SelectPeer select) {
  TANDEM_ASSIGN_OR_RETURN(const Fd socket, ConnectToPeer(advert.socket));
  TANDEM_RETURN_IF_ERROR(select(""));
  TANDEM_ASSIGN_OR_RETURN(const SharedPool shared, ReceivePool(socket.get(), kPassTimeout));
  JoinedPool joined;
  joined.pool = Fd(shared.fds[0]);
  const Fd control(shared.fds[1]);
  if (shared.version != ShmControlPage::kVersion || shared.pool_bytes != peer.TotalBytes()) {
    return FailedPrecondition("the peer shares a pool of {} bytes (version {}), expected {} ({})",
                              shared.pool_bytes, shared.version, peer.TotalBytes(),
                              ShmControlPage::kVersion);
  }
  TANDEM_ASSIGN_OR_RETURN(joined.control,
                          SharedMapping::Map(control.get(), kShmControlBytes + kShmScratchBytes));
  return joined;
}

}  // namespace tandem::kvtransfer
