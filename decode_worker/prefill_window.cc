#include "decode_worker/prefill_window.h"

#include "common/base/check.h"

namespace tandem::decode {

bool PrefillWindow::HasRoom(const std::string& worker, int tokens, int blocks) const {
  if (prompts_ == 0) return true;
  if (prompts_ >= options_.prompts || blocks_ + blocks > options_.blocks) return false;
  const auto it = workers_.find(worker);
  if (it == workers_.end()) return true;
  const Lane& lane = IsShort(tokens) ? it->second.short_prompts : it->second.long_prompts;
  return lane.prompts < 2 || lane.tokens + tokens <= options_.tokens;
}

void PrefillWindow::Add(const std::string& name, int tokens, int blocks) {
  Worker& worker = workers_[name];
  Lane& lane = IsShort(tokens) ? worker.short_prompts : worker.long_prompts;
  ++lane.prompts;
  lane.tokens += tokens;
  ++prompts_;
  blocks_ += blocks;
}

void PrefillWindow::Remove(const std::string& name, int tokens, int blocks) {
  const auto it = workers_.find(name);
  TANDEM_CHECK(it != workers_.end(), "nothing was asked of {}", name);
  Worker& worker = it->second;
  Lane& lane = IsShort(tokens) ? worker.short_prompts : worker.long_prompts;
  --lane.prompts;
  lane.tokens -= tokens;
  --prompts_;
  blocks_ -= blocks;
  if (worker.short_prompts.prompts + worker.long_prompts.prompts == 0) workers_.erase(it);
}

}  // namespace tandem::decode
