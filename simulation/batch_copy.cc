#include "simulation/batch_copy.h"

namespace tandem::engine {

BatchCopy::BatchCopy(const Batch& batch) : batch_(batch), memory_(batch.items.size()) {
  for (size_t i = 0; i < memory_.size(); ++i) {
    BatchItem& item = batch_.items[i];
    Memory& memory = memory_[i];
    memory.tokens.reserve(item.tokens.size() + 1);
    memory.tokens.assign(item.tokens.begin(), item.tokens.end());
    memory.blocks.assign(item.block_table.begin(), item.block_table.end());
    memory.draft.assign(item.draft.begin(), item.draft.end());
    item.tokens = memory.tokens;
    item.draft = memory.draft;
    item.block_table = memory.blocks;
    if (item.sampling == nullptr) continue;
    memory.sampling = *item.sampling;
    item.sampling = &memory.sampling;
  }
}

void BatchCopy::SetPending(size_t item, int32_t token) {
  memory_[item].tokens.push_back(token);
  batch_.items[item].tokens = memory_[item].tokens;
  batch_.items[item].pending = {};
}

}  // namespace tandem::engine
