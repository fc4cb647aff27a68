#include "prefill_worker/scheduler.h"

namespace tandem::prefill {

std::vector<int> NextAdmissions(std::span<const WaitingView> waiting, int available_blocks) {
  std::vector<int> admitted;
  for (size_t i = 0; i < waiting.size(); ++i) {
    if (waiting[i].new_blocks <= available_blocks) {
      available_blocks -= waiting[i].new_blocks;
      admitted.push_back(static_cast<int>(i));
    } else if (waiting[i].times_passed >= kMaxTimesPassed) {
      break;
    }
  }
  return admitted;
}

}  // namespace tandem::prefill
