#include "kvtransfer/store/staging_plan.h"

#include <algorithm>

namespace tandem::kvtransfer {

const std::vector<StagedPiece>& StagingPlan::Next() {
  batch_.clear();
  uint64_t at = 0;
  while (copy_ < copies_.size() && batch_.size() < limits_.max_pieces) {
    const CopyPiece& copy = copies_[copy_];
    if (done_ == copy.bytes) {
      ++copy_;
      done_ = 0;
      continue;
    }
    const bool from_pool = direction_ == CopyDirection::kFromPool;
    StagedPiece piece;
    piece.pool_offset = (from_pool ? copy.source_offset : copy.target_offset) + done_;
    piece.host_offset = (from_pool ? copy.target_offset : copy.source_offset) + done_;
    piece.bytes = std::min<uint64_t>(copy.bytes - done_, limits_.piece_bytes);
    at = (at + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    piece.buffer_offset = at + piece.pool_offset % kStagingAlignment;
    if (piece.buffer_offset + piece.bytes > limits_.buffer_bytes) break;
    at = piece.buffer_offset + piece.bytes;
    done_ += piece.bytes;
    batch_.push_back(piece);
  }
  return batch_;
}

}  // namespace tandem::kvtransfer
