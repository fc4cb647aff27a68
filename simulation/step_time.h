// What a simulated device needs for a batch.
#pragma once

#include <functional>

#include "absl/time/time.h"

#include "engine/runtime/model_runner.h"

namespace tandem {

// How long a batch takes on the device, alone.
using StepTime = std::function<absl::Duration(const engine::Batch&)>;

}  // namespace tandem
