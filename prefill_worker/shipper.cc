#include "prefill_worker/shipper.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "common/base/status.h"

namespace tandem::prefill {
namespace {

// Repeated requests are recognised among so many past transfers.
constexpr size_t kPastTransfers = 4096;

}  // namespace

Shipper::Shipper(kvtransfer::KvSender* sender, const KvLayout& layout)
    : sender_(sender), layout_(layout) {}

absl::Status Shipper::Begin(Sequence* s, int cached_blocks) {
  if (const absl::Status status = sender_->Open(s->work.target); !status.ok()) {
    // RESOURCE_EXHAUSTED would say that blocks are short, and that waiting helps.
    const absl::StatusCode code =
        absl::IsResourceExhausted(status) ? absl::StatusCode::kUnavailable : status.code();
    return absl::Status(code, fmt::format("target: {}", MessageOf(status)));
  }
  s->pushed_blocks = 0;
  PushCached(s, cached_blocks);
  return absl::OkStatus();
}

void Shipper::PushCached(Sequence* s, int cached_blocks) {
  const int from = std::max(s->pushed_blocks, s->work.first_block);
  s->pushed_blocks = cached_blocks;
  if (from >= cached_blocks) return;
  std::vector<int32_t> ordinals(static_cast<size_t>(cached_blocks - from));
  std::iota(ordinals.begin(), ordinals.end(), from - s->work.first_block);
  const auto blocks = s->lease.blocks().subspan(static_cast<size_t>(from), ordinals.size());
  for (int layer = 0; layer < layout_.num_layers; ++layer) {
    sender_->Push(s->work.target.id, s->work.target.epoch, layer, blocks, ordinals);
  }
}

void Shipper::NoteForBatch(Sequence* s, int end) {
  const int end_block = end == s->length() ? s->lease.size() : end / layout_.block_size;
  Shipment shipment{.key = s->key()};
  for (int b = std::max(s->pushed_blocks, s->work.first_block); b < end_block; ++b) {
    shipment.blocks.push_back(s->lease.blocks()[static_cast<size_t>(b)]);
    shipment.ordinals.push_back(b - s->work.first_block);
  }
  s->pushed_blocks = std::max(s->pushed_blocks, end_block);
  if (!shipment.blocks.empty()) shipments_.push_back(std::move(shipment));
}

void Shipper::PushWith(const engine::LaunchedStep& step) {
  // Layer by layer, so that the first that is ready is the first in the sender's queue.
  for (size_t layer = 0; layer < step.layer_ready.size(); ++layer) {
    for (const Shipment& shipment : shipments_) {
      sender_->Push(shipment.key.first, shipment.key.second, static_cast<int>(layer),
                    shipment.blocks, shipment.ordinals, step.layer_ready[layer]);
    }
  }
  shipments_.clear();
}

void Shipper::Finish(const Sequence& s) { sender_->Finish(s.work.target.id, s.work.target.epoch); }

void Shipper::Abort(const Sequence& s) { sender_->Abort(s.work.target.id, s.work.target.epoch); }

void Shipper::NotePast(const TransferKey& key) {
  past_.insert(key);
  past_order_.push_back(key);
  if (past_order_.size() <= kPastTransfers) return;
  past_.erase(past_order_.front());
  past_order_.pop_front();
}

}  // namespace tandem::prefill
