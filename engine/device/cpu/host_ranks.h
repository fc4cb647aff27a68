// Ranks on devices that share the host's memory and whose streams work at once.
#pragma once

#include <barrier>
#include <cstddef>
#include <memory>
#include <vector>

#include "engine/device/collective.h"

namespace tandem::engine {

// Outlives the use of its ends.
class HostRanks final : public Ranks {
 public:
  explicit HostRanks(int size);
  ~HostRanks() override;

  Collective* at(int rank) const override;

 private:
  class End;

  std::barrier<> all_;
  std::vector<float*> values_;  // [size], of the sum under way
  std::vector<std::unique_ptr<End>> ends_;
};

}  // namespace tandem::engine
