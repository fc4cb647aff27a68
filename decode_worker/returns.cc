#include "decode_worker/returns.h"

#include <algorithm>
#include <numeric>

#include "spdlog/spdlog.h"

#include "common/base/check.h"

namespace tandem::decode {

Returns::Returns(std::string worker_id, int num_layers, kvtransfer::KvSender* sender,
                 engine::PrefixCache* cache, WorkerMetrics* metrics)
    : worker_id_(std::move(worker_id)),
      num_layers_(num_layers),
      sender_(sender),
      cache_(cache),
      metrics_(metrics) {}

void Returns::Give(const Sequence& s, BlocksWanted wanted) {
  if (sender_ == nullptr || transfers_.contains(wanted.call_id)) return;
  const auto from = static_cast<size_t>(wanted.first_block);
  const size_t count = wanted.target.target_blocks.size();
  const TransferId id = wanted.target.id;
  const uint64_t epoch = wanted.target.epoch;
  // The sequence's own lease ends with it; what it took over from the cache is there as long.
  engine::BlockLease lease = cache_->Match(s.hash_seed, s.tokens, static_cast<int>(from + count));
  const bool held = lease.size() == static_cast<int>(from + count);
  Transfer transfer{id, epoch, wanted.target.peer_worker_id, std::move(lease)};
  if (const absl::Status status = sender_->Open(std::move(wanted.target)); !status.ok()) {
    spdlog::warn("{}: no blocks for {}: {}", s.work.request_id, transfer.peer, status.ToString());
    return;
  }
  const auto [it, inserted] = transfers_.emplace(wanted.call_id, std::move(transfer));
  // Whoever wants them waits for them: it is told at once that they do not come.
  if (!held) return sender_->Abort(id, epoch);
  std::vector<int32_t> ordinals(count);
  std::iota(ordinals.begin(), ordinals.end(), 0);
  const auto blocks = it->second.lease.blocks().subspan(from);
  for (int layer = 0; layer < num_layers_; ++layer) {
    sender_->Push(id, epoch, layer, blocks, ordinals);
  }
  sender_->Finish(id, epoch);
}

void Returns::Abort(uint64_t call_id) {
  const auto it = transfers_.find(call_id);
  if (it != transfers_.end()) sender_->Abort(it->second.id, it->second.epoch);
}

void Returns::OnGiven(const TransferId& id, uint64_t epoch, const absl::Status& status,
                      const kvtransfer::TransferStats& stats) {
  const auto it = std::find_if(transfers_.begin(), transfers_.end(), [&](const auto& entry) {
    return entry.second.id == id && entry.second.epoch == epoch;
  });
  if (it == transfers_.end()) return;
  KvLinkMetrics& link = metrics_->KvLink(worker_id_, it->second.peer, stats.transport);
  link.bytes.Increment(static_cast<double>(stats.bytes));
  if (status.ok()) {
    link.seconds.Observe(absl::ToDoubleSeconds(stats.last_byte - stats.first_byte));
  } else if (!absl::IsCancelled(status) && !absl::IsAborted(status)) {
    link.failures.Increment();
  }
  transfers_.erase(it);
}

std::map<std::string, KvLink> Returns::Links() const {
  if (sender_ == nullptr) return {};
  return sender_->Links();
}

}  // namespace tandem::decode
