// Cards and models that need no description: data sheets, and shapes as their config.json has them.
#pragma once

#include <string>
#include <vector>

#include "common/base/model_config.h"
#include "simulation/cost_model.h"

namespace tandem::simulation {

// Rates are of the data sheet, before any derating. The link is what one card sends another through
// pinned memory of the host: PCIe 4.0 or 5.0 less what it takes itself.
const std::vector<Card>& KnownCards();
// Null for an unknown name; case does not matter.
const Card* FindCard(const std::string& name);

struct KnownModel {
  std::string name;  // as its publisher has it
  ModelConfig config;
};
const std::vector<KnownModel>& KnownModels();
const KnownModel* FindModel(const std::string& name);

}  // namespace tandem::simulation
