// A pool that a process of the same host writes itself: what the transports shm and cuda_ipc have
// in common. The receiver passes descriptors of its pool and of a control page over a Unix socket;
// the sender maps both. A DATA frame's header goes over the connection after its bytes are in the
// pool.
//
// What makes that safe: the writer looks at its grant in the control page before every piece, which
// bounds what it writes after it was revoked; and the receiver takes a lost connection for the
// writer's end only when the writer has set `detached`, or its process is gone, which a pidfd tells
// once no thread of it runs any more, and so is what it gave to a card.
#pragma once

#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/posix_fd.h"
#include "kvtransfer/transport/shm_control.h"

namespace tandem::kvtransfer {

// The receiver's end. FAILED_PRECONDITION where the store's pool cannot be shared.
absl::StatusOr<std::unique_ptr<KvOffer>> OfferSharedPool(const KvStore& store);

// The sender's: what an offer's advert says.
struct SharedPoolAdvert {
  std::string socket;  // name of the Unix socket
  std::string card;    // where the pool lies (ExportedPool::card)
};
// UNAVAILABLE where the peer is on another host.
absl::StatusOr<SharedPoolAdvert> ReadSharedPoolAdvert(const std::string& advert);

struct JoinedPool {
  Fd pool;
  SharedMapping control;
  ShmControlPage* page() const { return reinterpret_cast<ShmControlPage*>(control.data()); }
};
// What a PROBE brings, in the scratch memory behind the peer's control page. `bytes`: at most
// kShmProbeBytes.
void WriteProbe(const SharedMapping& control, const FrameHeader& header, ConstBytes bytes);

// Reaches the peer, which runs as the same user, and is passed its pool, of shape `peer`.
absl::StatusOr<JoinedPool> JoinSharedPool(const SharedPoolAdvert& advert, const KvPoolShape& peer,
                                          SelectPeer select);

}  // namespace tandem::kvtransfer
