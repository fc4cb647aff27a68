// KvStore: a KV pool as the rest of kvtransfer may use it. It alone knows where the pool lies, and
// nothing else in kvtransfer touches the pool's memory: everything is offsets, blocks and pages.
//
// Offsets are bytes from the pool's base, as in KvPoolShape and CopyPiece; callers keep them within
// shape().TotalBytes(). Who may touch which blocks when is the channel's affair.
//
// Thread-safe. What a function copies is where it belongs when it returns, for every thread of the
// host and all work that is given to a device afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/kv_layout.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/store/host_window.h"
#include "kvtransfer/store/page_digest.h"
#include "kvtransfer/store/peer_fifo.h"
#include "kvtransfer/store/peer_pool.h"

namespace tandem::kvtransfer {

// A pool that another process of this host can map: `bytes` of the shared memory behind `fd`, which
// stays the pool's.
struct ExportedPool {
  int fd = -1;
  uint64_t bytes = 0;
  std::string card;  // whose memory it is, by a name that all processes know; empty: the host's
};

class KvStore {
 public:
  virtual ~KvStore() = default;

  virtual const KvPoolShape& shape() const = 0;
  virtual KvMemoryKind kind() const = 0;
  // FAILED_PRECONDITION where the pool is not shared memory.
  virtual absl::StatusOr<ExportedPool> Export() const = 0;
  // Whether this pool's card can write memory of `card` (ExportedPool::card); FAILED_PRECONDITION
  // says why not.
  virtual absl::Status CanWrite(const std::string& card) const;
  // Maps the pool that another process has exported as `fd`, for this pool's card. `control` holds
  // the grants that its copies will look at; whole pages, which outlive what is returned.
  virtual absl::StatusOr<std::unique_ptr<PeerPool>> MapPeer(int fd, const KvPoolShape& peer,
                                                            std::span<std::byte> control) const;

  // The host's memory `window`, which is mapped whole pages and outlives what is returned, as
  // copies of at most `max_copy_bytes` each reach it fastest. Slow: pins it for a card.
  // RESOURCE_EXHAUSTED names the figure and the fix.
  virtual absl::StatusOr<std::unique_ptr<HostWindow>> OpenWindow(std::span<std::byte> window,
                                                                 size_t max_copy_bytes) const;
  // The NUMA node of the host that is nearest to the pool's memory; -1: not known.
  virtual int HostNode() const { return -1; }

  // Names the place of this pool's end of a FIFO: the two ends of one must lie in different places.
  // At most 100 characters without spaces. FAILED_PRECONDITION says why this pool has no FIFOs.
  virtual absl::StatusOr<std::string> FifoPlace() const;
  // What two ends need in order to meet; at most 128 bytes, unguessable, for one FIFO. The end that
  // makes it must be reachable from the other over the network, and join within its patience.
  virtual absl::StatusOr<std::string> NewFifoId() const;
  // This end of the FIFO `id`, for copies of at most `max_copy_bytes` each. Does not wait for the
  // other. RESOURCE_EXHAUSTED names what is lacking.
  virtual absl::StatusOr<std::unique_ptr<PeerFifo>> JoinFifo(const std::string& id, FifoEnd end,
                                                             size_t max_copy_bytes,
                                                             absl::Duration patience) const;

  // Where the CPU (or a system call) can reach the byte at `offset`; nullptr where only the
  // functions below can, so that a transport of host memory has to stage.
  virtual std::byte* HostAddress(uint64_t offset) const = 0;
  // About so many bytes should be handed over at a time: enough that what a call costs by itself is
  // small beside moving them, little enough that nobody waits long.
  virtual size_t BatchBytes() const = 0;
  // `bytes` of the host's memory that Gather(), GatherRun() and Scatter() reach fastest. Not
  // zeroed. May be slow: for buffers that live as long as a connection.
  virtual std::shared_ptr<std::byte[]> AllocateStaging(size_t bytes) const = 0;
  // Copies out of the pool: source_offset -> to + target_offset, for each piece.
  virtual void Gather(std::span<const CopyPiece> pieces, std::byte* to) const = 0;
  // Copies into the pool: from + source_offset -> target_offset, for each piece.
  virtual void Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const = 0;
  // Copies the pages of `run` to `to`, one behind the other in the order of BuildCopyPlan(), and
  // digests them on the way: digests[i] ^= that of block i.
  virtual void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const = 0;
  // Copies `run` of the pool into one of shape `target` that is mapped at `to`, and digests it on
  // the way: digests[i] ^= that of block i. Asks `go_on` before every piece of at most
  // kMaxPieceBytes (or one page), and writes nothing more once it says no: then returns false. The
  // bytes can be seen by others when it returns.
  virtual bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
                       std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const = 0;
  static constexpr size_t kMaxPieceBytes = 64 << 10;
  // The digests of K and V page of every head of every source block of `run`, in the order
  // [layer][block][head].
  virtual void Digest(const BlockRun& run, std::span<uint64_t> digests) const = 0;
  // About so many bytes should be digested at a time.
  virtual size_t DigestBatchBytes() const { return BatchBytes(); }
  // One digest per source block of `run`, over its layers and heads.
  virtual std::vector<uint64_t> DigestRun(const BlockRun& run) const;
};

// The store over `region`, whose memory outlives it. INVALID_ARGUMENT names what is wrong with the
// region; UNIMPLEMENTED for memory of a kind that this build cannot reach.
absl::StatusOr<std::unique_ptr<KvStore>> MakeKvStore(const KvRegion& region);
// The same over `shards`, the pieces of a pool in the order of their heads (sharded_store.h), where
// there are any.
absl::StatusOr<std::unique_ptr<KvStore>> MakeKvStore(const KvRegion& region,
                                                     std::span<const KvRegion> shards);

}  // namespace tandem::kvtransfer
